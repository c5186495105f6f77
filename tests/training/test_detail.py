"""Training a detail adapter: it alone changes, what is dropped, and runs that go on where they stopped."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import toy_run
from detail_model import CONFIG, make_model, own_tensors, teach
from golden_file import noise
from PIL import Image

import pbe
from pbe.data.example import make_generator
from pbe.data.recipe import make_example
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import Record, UnusablePicture
from pbe.models.detail import DetailAttention, is_detail, sizes
from pbe.models.lora import LoRAConfig
from pbe.sampling import NoiseSchedule
from pbe.training.config import load_config
from pbe.training.detail import DetailTrainingConfig, drop_detail
from pbe.training.draws import make_noise_draws
from pbe.training.module import PaintByExampleTraining, TrainingConfig
from pbe.training.optimizer import OptimizerConfig

DETAIL = DetailTrainingConfig(**sizes(CONFIG))
SEEDS, SHAPE = [1, 2], (4, 8, 8)


def make_module(**settings):
    return PaintByExampleTraining(make_model(), TrainingConfig(train=[], detail=DETAIL, **settings), OptimizerConfig())


# --- the step ---------------------------------------------------------------------------------------------------------


def losses(model, context):
    z, t = noise("z", 2, 4, 8, 8), torch.tensor([300, 7])
    z_t = NoiseSchedule.scaled_linear().add_noise(z, noise("n", 2, 4, 8, 8), t)
    unet_in = torch.cat([z_t, noise("kept", 2, 5, 8, 8)], dim=1)
    return (model.unet(unet_in, t, context) - noise("n", 2, 4, 8, 8)).square().mean()


def test_the_adapter_alone_learns_and_all_of_it():
    module = make_module()
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert trained == own_tensors(module.model).keys()
    teach(module.model)  # at the start values are zero, and nothing else has a gradient
    context = module.model.encode_exemplar(noise("e", 2, 3, 28, 28))
    context = torch.where(torch.tensor([True, False])[:, None, None], context, module.model.null_context)
    losses(module.model, context).backward()
    for name, parameter in module.model.named_parameters():
        assert (parameter.grad is not None) == is_detail(name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_it_starts_from_the_model_as_it_is():
    module, plain = make_module(), make_model()
    exemplar = noise("e", 2, 3, 28, 28)
    assert torch.equal(
        losses(module.model, module.model.encode_exemplar(exemplar)), losses(plain, plain.encode_exemplar(exemplar))
    )
    assert all(isinstance(b.attn2, DetailAttention) for b in module.modules() if hasattr(b, "attn2"))


def test_frozen_layers_in_half_precision():
    module = make_module(frozen="bfloat16", norms="half", gradient_checkpointing=True)
    assert {p.dtype for p in own_tensors(module.model).values()} == {torch.float32}
    assert module.model.cond_stage_model.vision.pre_layrnorm.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        losses(module.model, module.model.encode_exemplar(noise("e", 2, 3, 28, 28))).backward()
    assert module.model.unet.middle_block[1].transformer_blocks[0].attn2.to_v_detail.weight.grad.abs().max() > 0


WRONG = {
    "parts too": ({"detail": DETAIL, "train": ["unet"]}, r"training\.detail .*train=\[\], got \['unet'\]"),
    "LoRA too": ({"detail": DETAIL, "lora": LoRAConfig(), "train": []}, "choose one"),
    "nothing": ({"train": []}, r"training\.train is empty"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_train_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


# --- what is dropped --------------------------------------------------------------------------------------------------


def test_draws_of_tokens_leave_the_others_as_they_are():
    for count in (1, 3):
        without, given = (make_noise_draws(SEEDS, SHAPE, 1000, count, detail_tokens=tokens) for tokens in (0, 5))
        assert without.detail.shape == (2 * count, 0)
        assert given.detail.shape == (2 * count, 6)
        for a, b in zip(without[:4], given[:4], strict=True):
            assert torch.equal(a, b)
    alone = make_noise_draws(SEEDS[1:], SHAPE, 1000, 3, detail_tokens=5)
    assert torch.equal(given.detail[1::2], alone.detail)


def test_tokens_are_dropped_together_and_one_by_one():
    context, null = noise("c", 3, 1 + 4, 8), noise("null", 1, 1 + 4, 8)
    u = torch.full((3, 1 + 4), 0.5)
    u[0, 0] = 0.05  # all of the first
    u[1, [2, 4]] = 0.15  # the second and fourth of the second
    dropped = drop_detail(context, null, u, drop=0.1, drop_tokens=0.2)
    expected = context.clone()
    expected[0, 1:], expected[1, [2, 4]] = null[0, 1:], null[0, [2, 4]]
    assert torch.equal(dropped, expected)
    assert torch.equal(drop_detail(context, null, u, 0, 0), context)


# --- runs -------------------------------------------------------------------------------------------------------------


def settings_of(start, **training):
    detail = "{tokens: 3, layers: 1, width: 64, drop: 0.3, drop_tokens: 0.3}"
    given = ", ".join(f"{name}: {value}" for name, value in {"ema_decay": 0.9, **training}.items())
    return [
        f"model={{init: {start}, size: null, vae: null}}",
        f"training={{train: [], detail: {detail}, {given}}}",
        "trainer={max_steps: 4, val_check_interval: 2}",
    ]


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_its_file_edits(toy, tmp_path):
    start = toy_run.write_model(toy.parent)
    settings = settings_of(start, noise_draws=2)
    toy_run.run(toy, *settings, f"run={tmp_path / 'whole'}")
    toy_run.run(toy, *settings, f"run={tmp_path / 'parts'}", "trainer.max_steps=2")
    toy_run.run(toy, *settings, f"run={tmp_path / 'parts'}", "--resume")
    toy_run.assert_same_run(tmp_path / "parts", tmp_path / "whole", 4)
    saved = toy_run.checkpoint(tmp_path / "whole", 4)
    assert saved["pbe"]["detail"] == {"tokens": 3, "layers": 1, "width": 64}
    assert all(is_detail(name) or name.startswith("model_ema.") for name in saved["state_dict"])
    assert saved["state_dict"]["detail.null_tokens"].abs().max() > 0

    last = tmp_path / "whole" / "checkpoints" / "step-00000004"
    plain, *adapted = (
        pbe.load_model(start, "cpu", adapters=[f"{last}.{x}"] if x else []) for x in ("", "ckpt", "safetensors")
    )
    for model in adapted:
        state = model.state_dict()
        assert all(torch.equal(x, state[name]) for name, x in plain.state_dict().items())
        averaged = saved["state_dict"]["model_ema.detailqueries"]
        assert torch.equal(state["detail.queries"], averaged)
    photo, exemplar = (np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in (0, 1))
    args, keywords = (photo, (8, 8, 24, 24), exemplar), {"steps": 2, "sampler": "ddim"}
    pictures = [pbe.edit(model, *args, **keywords)[0] for model in adapted]
    np.testing.assert_array_equal(*pictures)
    (without,) = pbe.edit(plain, *args, **keywords)
    np.testing.assert_array_equal(pbe.edit(adapted[0], *args, **keywords, detail=0)[0], without)


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_tensor_is_refused(toy, tmp_path, capsys):
    settings = [*settings_of(toy_run.write_model(toy.parent)), f"run={tmp_path / 'run'}"]
    toy_run.run(toy, *settings, "trainer.max_steps=2")
    path = tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"
    saved = torch.load(path, weights_only=True)
    del saved["state_dict"]["detail.queries"]
    torch.save(saved, path)
    with pytest.raises(AssertionError):
        toy_run.run(toy, *settings, "--resume")
    assert "detail.queries" in capsys.readouterr().err


def test_distilling_one_is_refused(toy):
    with pytest.raises(ValueError, match=r"a student is \[unet\] or, with train=\[\], training\.lora"):
        load_config([str(toy), "task=distill", "training={train: [], detail: {}, loss: noise, drop_exemplar: 0}"])


# --- what surrounds the object ----------------------------------------------------------------------------------------


class Half:
    """A mask of a picture's left half."""

    def draw(self, size):
        mask = np.zeros(size, dtype=bool)
        mask[:, : size[1] // 2] = True
        return mask


class Nothing:
    def draw(self, size):
        return np.zeros(size, dtype=bool)


@pytest.fixture
def record(tmp_path) -> Iterator[Record]:
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    return Record(tmp_path / "photo.png", np.array([[0.25, 0.25, 0.75, 0.75]], np.float32), (Half(),))


RECIPE = {"resolution": 32, "exemplar_size": 28, "augment": False, "exemplar_margin": 0.0, "object_mask": 0.0}


def exemplar_of(record, donors=None, seed=1, **options):
    recipe = RecipeConfig(**{**RECIPE, **options})
    stages = make_example(record, recipe, make_generator(seed), donors=donors)
    mean, std = (torch.tensor(x)[:, None, None] for x in (pbe.models.clip.CLIP_MEAN, pbe.models.clip.CLIP_STD))
    return (stages.example.exemplar * std + mean) * 255


def test_what_surrounds_an_object_is_filled_with_white(record):
    shown, filled = exemplar_of(record), exemplar_of(record, fill_background=1.0)
    torch.testing.assert_close(shown, torch.full((3, 28, 28), 90.0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(filled[..., :13], shown[..., :13], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(filled[..., 15:], torch.full((3, 28, 13), 255.0), rtol=1e-4, atol=1e-3)
    without_mask = record._replace(masks=None)
    kinds = [exemplar_of(record, fill_background=0.5, seed=seed)[0, 0, -1] > 200 for seed in range(20)]
    assert 4 < sum(kinds) < 16
    assert torch.equal(exemplar_of(without_mask, fill_background=1.0), shown)
    with pytest.raises(UnusablePicture, match=r"photo\.png is empty in its box"):
        exemplar_of(record._replace(masks=(Nothing(),)), fill_background=1.0)


def test_so_is_what_surrounds_a_transplanted_one(record):
    donors = type("Donors", (list,), {"name": "donors"})([record])
    options = {"augment": True, "transplant": 1.0, "flip": 0, "rotation": 0, "blur": 0, "warp": 0}
    filled = exemplar_of(record._replace(masks=None), donors, fill_background=1.0, **options)
    assert (filled[..., 15:] > 254.9).all()
    assert (filled[..., :13] < 91).all()
