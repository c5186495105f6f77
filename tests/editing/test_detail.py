"""Edits with a detail adapter: its strength, null tokens, negative and mixed exemplars, and edits in one batch."""

import numpy as np
import pytest
import torch
from detail_model import CONFIG, make_model, save, with_detail

import pbe
from pbe.acceleration.offloading import offload
from pbe.batch.provenance import identify
from pbe.editing.condition import read_mixture, read_told
from pbe.editing.edit import edit
from pbe.editing.settings import EditSettings
from pbe.editing.together import run_together
from pbe.images.reading import exemplar_tensor, read_exemplar

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"steps": 3, "sampler": "ddpm", "guidance": 3.0}
D = CONFIG.tokens


def picture(seed, height=30, width=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PHOTO, BOX, EXEMPLAR, OTHER = picture(0, 80, 96), (10, 20, 40, 44), picture(1), picture(2)


@pytest.fixture(scope="module")
def model():
    return with_detail()


def run(model, **settings):
    (result,) = pbe.edit(model, PHOTO, BOX, settings.pop("exemplar", EXEMPLAR), **{**SETTINGS, **settings})
    return result.astype(int)


def test_strength(model):
    plain, full = run(make_model()), run(model)
    np.testing.assert_array_equal(run(model, detail=0), plain)
    np.testing.assert_array_equal(run(model, detail=1), full)
    assert np.abs(full - plain).max() > 4
    assert 0 < np.abs(run(model, detail=0.3) - plain).mean() < np.abs(full - plain).mean()


def test_it_is_refused_where_the_model_has_none():
    with pytest.raises(ValueError, match=r"detail=0\.5 needs a model with a detail adapter: --adapter"):
        run(make_model(), detail=0.5)
    np.testing.assert_array_equal(run(make_model(), detail=0), run(make_model()))
    with pytest.raises(ValueError, match="detail must be a number of at least 0, got -1"):
        EditSettings(detail=-1)


OPTIONS = {
    "guidance 1": {"guidance": 1.0},
    "guidance 0": {"guidance": 0.0},
    "an interval": {"guidance_interval": (200, 700)},
    "reuse": {"reuse": 2, "steps": 4},
    "a negative": {"negative": OTHER},
    "several": {"exemplar": [EXEMPLAR, OTHER], "exemplar_weights": [2, 1]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_the_settings(model, options):
    np.testing.assert_array_equal(run(model, detail=0, **options), run(make_model(), **options))
    half = run(model, detail=0.5, **options)
    assert np.abs(half - run(model, detail=0, **options)).max() > 0
    assert np.abs(run(pbe.prepare_for_inference(with_detail(), consume=True), detail=0.5, **options) - half).max() <= 1


@torch.no_grad()
def test_what_the_tokens_are(model):
    def encoded(one):
        return model.encode_exemplar(exemplar_tensor(read_exemplar(one), 28))

    told = (EXEMPLAR, None, None, None, None, None)
    context, null, _ = read_told(model, EditSettings(), *told)
    assert torch.equal(context, encoded(EXEMPLAR))
    assert null is None  # the model's own
    assert torch.equal(model.null_context[:, :1], model.learnable_vector)
    assert torch.equal(model.null_context[:, 1:], model.detail.null_tokens)

    mixed = read_mixture(model, [EXEMPLAR, OTHER], None, [3, 1]).context(model)
    expected = 0.75 * encoded(EXEMPLAR) + 0.25 * encoded(OTHER)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)

    context, null, _ = read_told(model, EditSettings(detail=0.5), EXEMPLAR, None, None, OTHER, None, None)
    for found, one in ((context, EXEMPLAR), (null, OTHER)):
        assert found.shape[1] == 1 + 2 * D
        assert torch.equal(found[:, : 1 + D], encoded(one))
        assert torch.equal(found[:, 1 + D :], 0.5 * encoded(one)[:, 1:])
    context, null, _ = read_told(model, EditSettings(detail=0.5), *told)
    assert torch.equal(null[:, 1 + D :], 0.5 * model.detail.null_tokens)


@pytest.mark.slow
def test_edits_in_one_batch_are_as_alone():
    prepared = pbe.prepare_for_inference(with_detail())
    own = [{"exemplar": EXEMPLAR, "seed": 5}, {"exemplar": OTHER, "seed": 6}]
    for common in ({}, {"detail": 0.5}, {"negative": picture(9), "detail": 2}):
        edits = [edit.begin(prepared, PHOTO, BOX, **{**SETTINGS, **common, **one}) for one in own]
        for (result,), one in zip(run_together(edits), own, strict=True):
            assert np.abs(result.astype(int) - run(prepared, **common, **one)).max() <= 1


def test_with_little_memory(model):
    prepared = pbe.prepare_for_inference(offload(with_detail(), "cpu"), consume=True)
    assert np.abs(run(prepared, detail=0.5) - run(model, detail=0.5)).max() <= 1


@pytest.mark.slow
def test_a_compiled_model_is_used_as_it_is(model):
    compiled = with_detail()
    compiled.unet.compile(backend="eager")
    assert np.abs(run(compiled, detail=0.5) - run(model, detail=0.5)).max() <= 1


def test_it_is_a_setting_like_others_and_named_in_provenance(tmp_path, tiny_checkpoint):
    assert "detail" not in EditSettings().to_json()
    assert EditSettings.from_texts({"detail": "0.5"}).to_json()["detail"] == 0.5
    file = save(tmp_path / "detail.safetensors")
    weights = identify(tiny_checkpoint, torch.float32, [(file, 0.5)])
    assert weights.adapters[0]["file"] == "detail.safetensors"
    assert weights.adapters[0]["strength"] == 0.5
