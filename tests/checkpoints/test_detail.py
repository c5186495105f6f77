"""Files of detail adapters: what is written is read again, and what does not fit is refused by name."""

import pytest
import torch
from conftest import TINY
from detail_model import CONFIG, make_model, own_tensors, save, with_detail
from golden_file import noise
from safetensors import safe_open

import pbe
from pbe.checkpoints.adapters import read_adapter
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.writing import save_checkpoint
from pbe.cli.checkpoint import main
from pbe.export import export_model
from pbe.models.detail import at_strength, sizes
from pbe.models.paint_by_example import PaintByExample
from tests.models.test_lora import CONFIG as LORA
from tests.models.test_lora import adapted, save_adapters

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def predict(model, strength=1.0):
    context = model.encode_exemplar(noise("e", 1, 3, 28, 28))
    if model.detail is not None:
        context = at_strength(context, CONFIG.tokens, strength)
    return model.unet(noise("x", 1, 9, 8, 8), torch.tensor([300]), context)


@pytest.fixture(scope="module")
def model():
    return with_detail()


@pytest.fixture(scope="module")
def file(tmp_path_factory, model):
    return save(tmp_path_factory.mktemp("detail") / "detail.safetensors", model, base={"checkpoint": "a.ckpt"})


@pytest.mark.slow
def test_what_is_written_is_read_again(tmp_path, tiny_checkpoint, model, file):
    loaded = pbe.load_model(tiny_checkpoint, "cpu", "float32", adapters=[file])
    own = own_tensors(loaded)
    assert all(torch.equal(x, own[name]) for name, x in own_tensors(model).items())
    assert sizes(loaded.detail.config) == sizes(CONFIG)
    added = pbe.add_adapters(make_model(), file)
    assert torch.equal(predict(added), predict(model))
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == own.keys()
    half = pbe.load_model(tiny_checkpoint, "cpu", "bfloat16", adapters=[file])
    assert {x.dtype for x in own_tensors(half).values()} == {torch.bfloat16}


def test_a_file_s_strength_scales_its_values(model, file):
    for strength in (0.5, 0.25, -1.0):
        added = pbe.add_adapters(make_model(), (file, strength))
        torch.testing.assert_close(predict(added), predict(model, strength), rtol=1e-5, atol=1e-5)
    off = pbe.add_adapters(make_model(), (file, 0))
    assert off.detail is None
    assert torch.equal(predict(off), predict(make_model()))


def test_it_goes_beside_other_adapters_and_away_again(tmp_path, model, file):
    save_adapters(adapted().state_dict(), tmp_path / "lora.safetensors", LORA)
    both = pbe.add_adapters(make_model(), file, tmp_path / "lora.safetensors")
    alone = pbe.add_adapters(make_model(), tmp_path / "lora.safetensors")
    assert torch.equal(predict(both, 0), predict(alone))
    assert not torch.allclose(predict(both), predict(model))
    one_by_one = pbe.add_adapters(pbe.add_adapters(make_model(), file), tmp_path / "lora.safetensors")
    assert torch.equal(predict(one_by_one), predict(both))
    pbe.remove_adapters(both)
    assert both.state_dict().keys() == make_model().state_dict().keys()
    assert torch.equal(predict(both), predict(make_model()))
    assert torch.equal(predict(pbe.add_adapters(both, file)), predict(model))


def test_a_model_takes_one(file):
    plain = make_model()
    with pytest.raises(ValueError, match=r"one detail adapter, not .*detail\.safetensors, .*detail\.safetensors"):
        pbe.add_adapters(plain, file, (file, 0.5))
    assert plain.detail is None


def changed(path, model, change):
    tensors = own_tensors(model)
    entry = change(tensors)
    save_checkpoint(tensors, path, {"detail": sizes(CONFIG)} if entry is None else entry)
    return path


def rename(tensors):
    tensors["detail.unknown"] = tensors.pop("detail.queries")


def reshape(tensors):
    tensors["detail.null_tokens"] = torch.zeros(1, 3, 8)


def whole_numbers(tensors):
    tensors["detail.null_tokens"] = torch.zeros(1, 3, 64, dtype=torch.int64)


WRONG = {
    "other names": (rename, "lacks 1: detail.queries; has no place for 1: detail.unknown"),
    "another shape": (reshape, r"wrong shape in 1: detail.null_tokens \(1, 3, 8\) for \(1, 3, 64\)"),
    "whole numbers": (whole_numbers, "other than floats in 1: detail.null_tokens"),
    "no sizes": (lambda tensors: {}, "entry 'detail' is None: expected an adapter's tokens, layers and width"),
    "a wrong size": (lambda tensors: {"detail": {**sizes(CONFIG), "width": 7}}, r"detail\.width must be .*, got 7"),
    "an unknown size": (lambda tensors: {"detail": {"depth": 4}}, "depth"),
    "another size": (lambda tensors: {"detail": {**sizes(CONFIG), "layers": 3}}, r"lacks 12: detail\.layers\.2"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, model, change, message):
    path = changed(tmp_path / "wrong.safetensors", model, change)
    plain = make_model()
    with pytest.raises(CheckpointError, match=f"wrong.safetensors.*{message}"):
        pbe.add_adapters(plain, path)
    assert plain.detail is None
    assert torch.equal(predict(plain), predict(make_model()))


def test_a_value_beyond_float16_is_refused(tmp_path, model):
    def enlarge(tensors):
        tensors["detail.proj_out.bias"] = torch.full((64,), 1e6)

    path = changed(tmp_path / "large.safetensors", model, enlarge)
    with pytest.raises(CheckpointError, match=r"detail\.proj_out\.bias holds 1e\+06"):
        pbe.add_adapters(make_model(), path, dtype=torch.float16)


def test_commands(tmp_path, tiny_checkpoint, file, capsys):
    assert main(["inspect", str(file), "--ckpt", str(tiny_checkpoint)]) == 0
    told = capsys.readouterr().out
    assert "a detail adapter of" in told
    assert "  tokens: 3\n  layers: 2\n  width: 64\n" in told
    assert "a.ckpt" in told
    refused = {
        "merge-adapter": ["merge-adapter", str(tiny_checkpoint), str(file)],
        "convert-adapter": ["convert-adapter", str(file), "--to", "kohya", "--ckpt", str(tiny_checkpoint)],
    }
    for arguments in refused.values():
        assert main([*arguments, "--out", str(tmp_path / "out.safetensors")]) != 0
        assert "detail adapter" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="holds adapters alone"):
        pbe.load_model(file)


def test_exporting_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="detail adapter cannot be exported"):
        export_model(model, tmp_path / "exported")


def test_a_description_needs_no_model_in_memory(tmp_path, file):
    found = read_adapter(file, build_on_meta(PaintByExample, TINY))
    assert (found.format, found.updates, sizes(found.detail[0])) == ("detail", {}, sizes(CONFIG))
