"""What makes a training step faster or smaller changes nothing, or no more than it says."""

import math
from dataclasses import replace
from functools import partial, partialmethod
from types import SimpleNamespace

import pytest
import torch
import toy_run
from conftest import TINY
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch.nn.attention import SDPBackend, sdpa_kernel

from pbe.checkpoints.meta_device import build_on_meta
from pbe.cli.train import main
from pbe.models.lora import LoRAConfig, is_adapter
from pbe.models.unet import ResBlock, SpatialTransformer, UNet, UNetConfig
from pbe.training import loss as training_loss
from pbe.training import module as training_module
from pbe.training.memory import GroupNormAsGiven, LayerNormAsGiven, blocks_by_level
from pbe.training.module import PaintByExampleTraining, TrainingConfig
from tests.training import test_module as test_training

ADAPTERS = {"train": [], "lora": LoRAConfig(rank=2)}


def step(module: PaintByExampleTraining, dtype: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a step, under autocast to `dtype`."""
    batch = module.on_before_batch_transfer(test_training.example(), 0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}


def distance(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, relative to their length."""
    assert gradients.keys() == expected.keys()
    gap = sum((gradients[name] - x).square().sum() for name, x in expected.items())
    return math.sqrt(gap / sum(x.square().sum() for x in expected.values()))


# --- checkpointing --------------------------------------------------------------------------------------------


def test_levels_hold_every_block_once():
    unet = build_on_meta(UNet, UNetConfig())
    levels = blocks_by_level(unet)
    # 2 blocks on the way down and 3 on the way up a level, each with a transformer but on the last; the middle has 3
    assert [len(level) for level in levels] == [10, 10, 10, 5 + 3]
    blocks = [block for block in unet.modules() if isinstance(block, (ResBlock, SpatialTransformer))]
    assert {id(block) for level in levels for block in level} == {id(block) for block in blocks}
    widths = [
        {block.proj_in.in_channels for block in level if isinstance(block, SpatialTransformer)} for level in levels
    ]
    assert widths == [{320}, {640}, {1280}, {1280}]


def kept_bytes(module: PaintByExampleTraining) -> int:
    """The size of the activations that the forward pass keeps for the backward pass."""
    batch = module.on_before_batch_transfer(test_training.example(), 0)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # holds it, so that no other gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = module.batch_losses(batch).mean()
    sizes = sum(storage.nbytes() for storage in kept.values())
    del loss
    return sizes


@pytest.mark.slow
def test_checkpointed_levels_have_the_same_gradients_and_keep_less():
    choices = (False, 1, 2, True)
    loss, expected = step(test_training.training())
    for choice in choices[1:]:
        again, gradients = step(test_training.training(gradient_checkpointing=choice))
        assert again == loss
        assert all(torch.equal(gradients[name], x) for name, x in expected.items())
    none, one, two, everything = (kept_bytes(test_training.training(gradient_checkpointing=g)) for g in choices)
    assert two == everything  # it has no more levels
    assert everything < 0.8 * one
    assert one < 0.8 * none


def test_checkpointing_that_cannot_be():
    with pytest.raises(ValueError, match=r"gradient_checkpointing=3, but the UNet has 2 levels"):
        test_training.training(gradient_checkpointing=3)
    with pytest.raises(ValueError, match=r"true, false or a number of levels, got -1"):
        TrainingConfig(gradient_checkpointing=-1)


# --- attention ------------------------------------------------------------------------------------------------


def test_cross_attention_over_one_token_needs_no_queries(monkeypatch):
    loss, gradients = step(test_training.training())
    monkeypatch.setattr(training_module, "skip_queries", lambda unet: None)
    ordinary_loss, ordinary = step(test_training.training())
    # sums in another order
    assert loss == pytest.approx(ordinary_loss, rel=1e-5)
    assert distance(gradients, ordinary) < 1e-5


@pytest.mark.parametrize("tokens", ["class", "all"])
def test_adapters_of_queries_learn_where_there_are_tokens_to_choose_from(tokens):
    """All that train have a gradient: several processes wait for those of all."""
    config = replace(TINY, exemplar=replace(TINY.exemplar, tokens=tokens))
    module = test_training.training(config, train=[], lora=LoRAConfig(rank=2, targets="all"))
    module.training_step(module.on_before_batch_transfer(test_training.example(), 0), 0)["loss"].backward()
    adapters = {name: p.grad for name, p in module.model.named_parameters() if is_adapter(name)}
    assert any(".attn2.to_q." in name for name in adapters) == (tokens == "all")
    assert all(gradient is not None for gradient in adapters.values())


def test_flash_attention_alone_suffices_in_half_precision():
    """All of the UNet's attention, forwards and backwards: other kernels are forbidden."""
    module = test_training.training()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        x = torch.randn(2, 9, 16, 16, generator=torch.Generator().manual_seed(0))
        context = torch.zeros(2, 1, TINY.unet.context_dim)
        with torch.autocast("cpu", torch.bfloat16):
            eps = module.model.unet(x, torch.tensor([5, 900]), context)
        eps.float().square().mean().backward()
    query = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    assert module.model.get_parameter(query).grad.abs().max() > 0


# --- half precision -------------------------------------------------------------------------------------------


def test_norms_give_what_they_are_given():
    x = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    group, layer = torch.nn.GroupNorm(8, 32, eps=1e-6), torch.nn.LayerNorm(8, eps=1e-3)
    for norm, as_given in ((group, GroupNormAsGiven(group)), (layer, LayerNormAsGiven(layer))):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        expected = norm(x)
        assert torch.equal(as_given(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            half = as_given(x.bfloat16())
        assert half.dtype == torch.bfloat16
        # x, the weight, the bias and the result are rounded to 8 bits, statistics are not
        torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0.02)


def test_half_norms_change_nothing_in_float32():
    (loss, gradients), (ordinary_loss, ordinary) = (
        step(test_training.training(norms="half")),
        step(test_training.training()),
    )
    assert loss == ordinary_loss
    assert all(torch.equal(gradients[name], x) for name, x in ordinary.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("parts", [{}, ADAPTERS], ids=["parts", "adapters"])
def test_frozen_parts_in_half_precision(dtype, parts):
    """What trains keeps float32 and gets nearly the same gradients, whatever autocast computes in."""
    half = getattr(torch, dtype)
    ordinary, module = test_training.training(**parts), test_training.training(**parts, frozen=dtype)
    autocast = half if parts else None  # beneath adapters the two must be alike
    loss, gradients = step(module, autocast)
    expected_loss, expected = step(ordinary, autocast)
    assert {x.dtype for x in gradients.values()} == {torch.float32}
    # of a mean over many values; that of bfloat16 has 8 bits, of float16 11
    assert loss == pytest.approx(expected_loss, rel=0.02 if dtype == "bfloat16" else 0.005)
    assert distance(gradients, expected) < (0.1 if dtype == "bfloat16" else 0.02)
    in_half = {name for name, p in module.model.named_parameters() if p.dtype == half}
    assert not in_half & gradients.keys()
    starts = ("first_stage_model.", "cond_stage_model.transformer.vision_model.e")
    assert {name for name, _ in ordinary.model.named_parameters() if name.startswith(starts)} <= in_half
    assert ("model.diffusion_model.input_blocks.0.0.weight" in in_half) == bool(parts)


def test_clip_that_trains_is_not_frozen():
    module = test_training.training(train=["unet", "clip"], frozen="bfloat16")
    _, gradients = step(module)
    assert {p.dtype for p in module.model.cond_stage_model.parameters()} == {torch.float32}
    assert gradients["cond_stage_model.transformer.vision_model.embeddings.class_embedding"].abs().max() > 0


@pytest.mark.slow
def test_files_hold_frozen_parts_as_they_were(toy):
    """Bit for bit; and a run goes on as it would have."""
    settings = (
        f"model={{init: {toy_run.write_model(toy.parent)}, size: null, vae: null}}",
        "training={train: [unet, proj_out], ema_decay: null, frozen: bfloat16, norms: half, gradient_checkpointing: 1}",
        "trainer.limit_val_batches=0",
    )
    whole, parts = toy.parent / "whole", toy.parent / "parts"
    toy_run.run(toy, *settings, f"run={whole}", "trainer.max_steps=4")
    toy_run.run(toy, *settings, f"run={parts}", "trainer.max_steps=2")
    toy_run.run(toy, *settings, f"run={parts}", "trainer.max_steps=4", "--resume")
    end, resumed = (toy_run.checkpoint(run, 4)["state_dict"] for run in (whole, parts))
    start = torch.load(toy.parent / "model.ckpt", weights_only=True)["state_dict"]
    assert end.keys() == start.keys()
    assert all(torch.equal(resumed[name], x) for name, x in end.items())
    moved = {name for name, x in start.items() if not torch.equal(end[name], x)}
    assert moved
    assert all(name.startswith(("model.diffusion_model.", "proj_out.")) for name in moved)
    assert {x.dtype for x in end.values()} == {torch.float32}


def test_a_run_that_goes_on_keeps_the_frozen_parts_of_its_checkpoint():
    """Not those of the file that it starts from anew, which may be another by then."""
    name = "first_stage_model.quant_conv.bias"
    saved, again = ({"state_dict": test_training.training(frozen="bfloat16").state_dict()} for _ in range(2))
    test_training.training(frozen="bfloat16").on_save_checkpoint(saved)
    saved["state_dict"][name] = expected = saved["state_dict"][name] + 1 / 3
    module = test_training.training(frozen="bfloat16")
    module.on_load_checkpoint(saved)
    module.on_save_checkpoint(again)
    assert torch.equal(again["state_dict"][name], expected)


@pytest.mark.slow
def test_frozen_layers_beneath_adapters_need_the_same_precision(toy, capsys):
    start = toy_run.write_model(toy.parent)
    settings = [
        str(toy),
        f"model={{init: {start}, size: null, vae: null}}",
        "training={train: [], lora: {rank: 2}, ema_decay: null, frozen: bfloat16}",
        f"run={toy.parent / 'adapters'}",
        "trainer.max_steps=1",
    ]
    assert main(settings) == 2
    assert "needs trainer.precision=bf16-mixed, got 32-true" in capsys.readouterr().err
    # validation and samples too run where autocast is
    toy_run.run(
        *settings,
        "trainer.precision=bf16-mixed",
        "trainer.val_check_interval=1",
        "samples={every_n_steps: 1, edit: {steps: 1}}",
    )
    saved = toy_run.checkpoint(toy.parent / "adapters", 1)["state_dict"]
    assert saved
    assert all(is_adapter(name) and x.dtype == torch.float32 for name, x in saved.items())


@pytest.mark.parametrize("settings", [{"frozen": "bfloat16"}, {"ema_decay": 0.9}])
def test_strategies_that_divide_parameters_are_refused(settings):
    module = test_training.training(**settings)
    module._trainer = SimpleNamespace(strategy=SingleDeviceStrategy(), precision="32-true")
    module.setup("fit")
    module._trainer = SimpleNamespace(strategy=FSDPStrategy(), precision="32-true")
    with pytest.raises(ValueError, match=rf"training\.{next(iter(settings))} needs whole parameters"):
        module.setup("fit")


@pytest.mark.parametrize(("name", "value"), [("frozen", "float64"), ("norms", "float32")])
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=rf"training\.{name} must be .*, got '{value}'"):
        TrainingConfig(**{name: value})


# --- memory ---------------------------------------------------------------------------------------------------


def test_pictures_are_encoded_in_slices(monkeypatch):
    module, batch = test_training.training(), test_training.example()
    draws = module.on_before_batch_transfer(batch, 0).draws
    calls = []
    encode = partial(type(module.model.vae).encode, module.model.vae)
    monkeypatch.setattr(module.model.vae, "encode", lambda x: calls.append(len(x)) or encode(x))
    whole = training_loss.encode(module.model, batch, draws.posterior_noise)
    monkeypatch.setattr(training_loss, "ENCODED_PIXELS", 4 * 32 * 32)
    sliced = training_loss.encode(module.model, batch, draws.posterior_noise)
    assert calls == [6, 4, 2]
    for a, b in zip((whole[0], *whole[1]), (sliced[0], *sliced[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_averages_lie_in_memory_as_their_parameters():
    """Or else each update would take them one by one."""
    module = test_training.training(channels_last=True, ema_decay=0.9)
    average = module.model_ema
    strides = [(a.stride(), p.stride()) for a, p in zip(average.parameters(), average._averaged, strict=True)]
    assert all(a == p for a, p in strides)
    weight = module.model.unet.input_blocks[0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


# --- together -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_with_everything(monkeypatch):
    """One graph with checkpointed blocks and norms of its own; torch's own kernels run it, as they need no compiler."""
    compile = partialmethod(torch.nn.Module.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(UNet, "compile", compile)
    settings = {"gradient_checkpointing": 1, "norms": "half", "frozen": "bfloat16"}
    loss, gradients = step(test_training.training(**settings), torch.bfloat16)
    compiled_loss, compiled = step(test_training.training(**settings, compile=True), torch.bfloat16)
    # bfloat16 is rounded in other places
    assert compiled_loss == pytest.approx(loss, rel=0.01)
    assert distance(compiled, gradients) < 0.05
