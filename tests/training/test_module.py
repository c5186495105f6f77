"""The training step, what it trains and where from, and what a run leaves behind."""

import math
import shutil
import subprocess
import sys
from functools import partial, partialmethod
from types import SimpleNamespace

import golden_file
import lightning
import numpy as np
import pytest
import torch
import toy_run
from conftest import TINY
from lightning.pytorch.plugins import MixedPrecision, Precision
from PIL import Image

import pbe
from pbe.batch.provenance import read_provenance
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.loading import open_recognised
from pbe.checkpoints.surgery import expand, extract_ema
from pbe.cli.edit import main as edit
from pbe.cli.train import main
from pbe.data.datamodule import ExampleDataModule
from pbe.data.example import Example
from pbe.editing.settings import EditSettings
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.lora import LoRAConfig, is_adapter
from pbe.models.paint_by_example import Condition, PaintByExample, PaintByExampleConfig
from pbe.models.unet import UNet
from pbe.training.callbacks import checkpoints, samples
from pbe.training.callbacks.checkpoints import (
    AtomicCheckpointIO,
    CheckpointConfig,
    Checkpoints,
    check_room,
    list_checkpoints,
    step_of,
)
from pbe.training.callbacks.metrics import JSONLinesLogger, TrainingMetrics
from pbe.training.callbacks.samples import SamplesConfig, first_examples, sample, sample_grid, to_picture
from pbe.training.callbacks.stopping import StopSignals
from pbe.training.config import load_config
from pbe.training.draws import make_noise_draws
from pbe.training.ema import ParameterAverage
from pbe.training.initialization import PARTS, ModelConfig, initial_weights, read_vae, starting_model
from pbe.training.loss import check_finite, denoising_losses, drop_exemplars, encode, loss_weights, training_losses
from pbe.training.module import PaintByExampleTraining, TrainingConfig, trained_names
from pbe.training.optimizer import OptimizerConfig, build_optimizer, lr_factor, make_optimizer, parameter_groups
from pbe.training.run import check_resume, make_module, open_data
from pbe.training.vae import VAETraining


def tiny_model(size: PaintByExampleConfig = TINY) -> PaintByExample:
    """A small model in which no parameter is zero."""
    with torch.device("meta"):
        model = PaintByExample(size)
    state = {name: golden_file.parameter(name, list(x.shape)) for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def training(size: PaintByExampleConfig = TINY, **settings) -> PaintByExampleTraining:
    module = PaintByExampleTraining(tiny_model(size), TrainingConfig(**settings), OptimizerConfig())
    module.log = lambda *args, **kwargs: None  # it has no trainer here
    return module


def example(n: int = 3, side: int = 32) -> Example:
    images = golden_file.noise("images", n, 3, side, side).clamp(-1, 1)
    mask = torch.ones(n, 1, side, side)
    mask[:, :, 8:24, 8:24] = 0
    exemplar = golden_file.noise("exemplar", n, 3, 28, 28)
    files = [f"{i}.png" for i in range(n)]
    seeds, never, gray = torch.arange(n) + 5, torch.zeros(n), torch.zeros(n, 1, 1, 1)
    return Example(images, images, mask, exemplar, seeds, files, never, gray)


def denoise(
    module: PaintByExampleTraining, z_0: torch.Tensor, condition: Condition, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    return denoising_losses(module.model, module.schedule, z_0, condition, t, noise)


@pytest.fixture(scope="module")
def finished(toy):
    """A finished run of 10 steps with averages, and with sample grids."""
    run = toy.parent / "finished"
    toy_run.run(toy, f"run={run}", "samples={every_n_steps: 5, edit: {steps: 2}, count: 3}", "data.batch_size=2")
    return run


# --- the step -------------------------------------------------------------------------------------------------


def test_golden_loss_and_gradients():
    """The module's own loss, on the original code's inputs, gives its loss and gradients to 1e-4."""
    golden, inputs = golden_file.outputs(), golden_file.inputs()
    module = PaintByExampleTraining(golden_file.model(), TrainingConfig(), OptimizerConfig())
    with torch.no_grad():
        z_masked, mask = module.model.encode_masked(inputs["image"], inputs["mask"])
    names = [name.removeprefix("grad_norm:") for name in golden if name.startswith("grad_norm:")]
    null_context, p = module.model.null_context, module.config.drop_exemplar
    contexts = {
        "train_loss": drop_exemplars(module.model.encode_exemplar(inputs["reference"]), null_context, torch.ones(2), p),
        "train_loss_uncond": drop_exemplars(torch.zeros(2, 1, 768), null_context, torch.zeros(2), p),
    }
    losses = {}
    for name, context in contexts.items():
        losses[name] = denoise(
            module, inputs["x0"], Condition(z_masked, mask, context), inputs["t"], inputs["train_noise"]
        ).mean()
        assert losses[name].item() == pytest.approx(golden[name].item(), rel=1e-4)
    gradients = torch.autograd.grad(losses["train_loss"], [module.model.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.norm().item() == pytest.approx(golden[f"grad_norm:{name}"].item(), rel=1e-4), name


def test_draws_follow_from_the_seed_alone():
    together = make_noise_draws([3, 4, 5], (4, 8, 8), 1000, detail_tokens=2)
    alone = make_noise_draws([4], (4, 8, 8), 1000, detail_tokens=2)
    assert all(torch.equal(x[1:2], y) for x, y in zip(together, alone, strict=True))
    assert all(not torch.equal(x[0], x[1]) for x in together)


def test_draws_are_distributed_as_they_should():
    draws = make_noise_draws(range(4000), (4, 2, 2), 1000)
    # of 4000 uniform draws the mean is within 5 standard errors (1000 / sqrt(12 * 4000) = 4.6) of the middle
    assert draws.t.double().mean().item() == pytest.approx(499.5, abs=23)
    assert draws.t.min() < 10
    assert draws.t.max() > 990
    assert (draws.drop < 0.2).double().mean().item() == pytest.approx(0.2, abs=0.032)
    # independent of one another: a correlation of 4000 pairs has the standard error 0.016
    columns = torch.stack([draws.t.double(), draws.drop.double(), draws.noise[:, 0, 0, 0].double()])
    columns = torch.cat([columns, draws.posterior_noise[:, :, 0, 0, 0].double().T])
    assert (torch.corrcoef(columns) - torch.eye(5)).abs().max() < 0.08


def test_several_draws_of_a_sample_cover_the_timesteps_evenly():
    one, four = make_noise_draws(range(50), (4, 8, 8), 1000), make_noise_draws(range(50), (4, 8, 8), 1000, count=4)
    assert torch.equal(four.posterior_noise, one.posterior_noise)
    for name in ("t", "noise", "drop", "detail"):
        assert torch.equal(getattr(four, name)[:50], getattr(one, name)), name
    assert four.t.view(4, 50).sort(dim=0)[0].diff(dim=0).eq(250).all()
    assert len(four.drop.unique()) == 200
    assert len(four.noise[:, 0, 0, 0].unique()) == 200
    three = make_noise_draws(range(4000), (4, 1, 1), 1000, count=3).t.view(3, 4000)
    for t in three:  # each is uniform on its own
        assert t.double().mean().item() == pytest.approx(499.5, abs=23)
        assert (t.min() < 10) & (t.max() > 990)


@pytest.mark.parametrize("by", ["sample", "batch"])
def test_several_draws_are_as_many_batches_of_the_same_samples(by):
    module = training(noise_draws=3, drop_exemplar=0.5, drop_exemplar_by=by)
    batch = module.on_before_batch_transfer(example(), 0)
    losses = module.batch_losses(batch)
    with torch.no_grad():
        z_0, condition = encode(module.model, batch.example, batch.draws.posterior_noise)
        for k in range(3):
            its = slice(3 * k, 3 * k + 3)
            dropped = batch.draws.drop[its] < 0.5 if by == "sample" else batch.draws.drop[:1].expand(3) < 0.5
            null = module.model.null_context.expand_as(condition.context)
            kept = condition._replace(context=torch.where(dropped[:, None, None], null, condition.context))
            alone = denoise(module, z_0, kept, batch.draws.t[its], batch.draws.noise[its])
            torch.testing.assert_close(losses[its], alone, rtol=1e-4, atol=1e-6)
    metrics = module.training_step(batch, 0)["metrics"]
    assert torch.allclose(metrics["loss"], losses.detach().view(3, 3).mean(dim=0))  # a value a picture
    module.eval()  # validation measures one draw, as ever
    assert len(module.on_before_batch_transfer(example(), 0).draws.t) == 3


def test_latents_are_samples_of_both_pictures():
    module, batch = training(), example()
    draws = module.on_before_batch_transfer(batch, 0).draws
    z_0, condition = encode(module.model, batch, draws.posterior_noise)
    for i, (z, image) in enumerate(((z_0, batch.image), (condition.z_masked, batch.masked_image))):
        with torch.no_grad():
            posterior = module.model.vae.encode(image)
        assert torch.allclose(z, posterior.mean + posterior.std * draws.posterior_noise[:, i], atol=1e-5)


def test_exemplars_are_dropped_by_sample_or_by_batch():
    context, u = torch.zeros(4, 1, 64), torch.tensor([0.1, 0.3, 0.19, 0.9])
    null = tiny_model().null_context

    def dropped(*arguments) -> list[bool]:
        return [torch.equal(c, null[0]) for c in drop_exemplars(context, null, *arguments)]

    assert dropped(u, 0.2) == [True, False, True, False]
    assert dropped(u, 0.2, "batch") == [True] * 4
    assert dropped(u.flip(0), 0.2, "batch") == [False] * 4
    assert torch.equal(drop_exemplars(context, null, torch.zeros(4), 0.0), context)


def test_the_loss_is_whole_without_lightning():
    """A plain loop's loss is the module's, and its gradients reach what trains."""
    module = training(drop_exemplar=0.3)
    batch = module.on_before_batch_transfer(example(), 0)
    losses = training_losses(tiny_model(), module.schedule, batch.to("cpu"), drop_exemplar=0.3)
    assert torch.allclose(losses, module.batch_losses(batch), rtol=1e-5)


def test_a_sample_s_loss_does_not_depend_on_its_batch():
    module, batch = training(), example()
    whole = module.training_step(module.on_before_batch_transfer(batch, 0), 0)["metrics"]["loss"]
    one = Example(*(x[1:2] for x in batch))
    alone = module.training_step(module.on_before_batch_transfer(one, 0), 0)["metrics"]["loss"]
    assert alone.item() == pytest.approx(whole[1].item(), rel=1e-5)


def test_losses_by_band():
    losses = torch.arange(5.0)
    bands = training().by_band(losses, torch.tensor([0, 249, 250, 749, 999]))
    assert {name: x[~x.isnan()].tolist() for name, x in bands.items()} == {
        "loss_t000-249": [0, 1],
        "loss_t250-499": [2],
        "loss_t500-749": [3],
        "loss_t750-999": [4],
    }
    assert all(len(x) == 5 for x in bands.values())


def test_the_velocity_s_error_is_the_noise_s_over_alpha_bar():
    module = training(loss="velocity")
    t = torch.tensor([0, 300, 999])
    alpha_bar = module.schedule.alpha_bar[t]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    z_0, eps, eps_hat = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_t = alpha * z_0 + sigma * eps
    v, v_hat = alpha * eps - sigma * z_0, alpha * eps_hat - sigma * (z_t - sigma * eps_hat) / alpha
    expected = (v_hat - v).square() / (eps_hat - eps).square()
    torch.testing.assert_close(loss_weights(module.schedule, t, "velocity"), expected.float())
    assert loss_weights(module.schedule, t, "noise").tolist() == [1, 1, 1]

    step = module.training_step(module.on_before_batch_transfer(example(), 0), 0)
    assert step["loss"] > 1.01 * step["metrics"]["loss"].mean()  # what is logged stays comparable
    with pytest.raises(ValueError, match=r"training\.loss must be 'noise', 'velocity' or 'min_snr', got 'x_0'"):
        TrainingConfig(loss="x_0")


def test_min_snr_weights_are_diffusers():
    training_utils = pytest.importorskip("diffusers.training_utils")
    schedulers = pytest.importorskip("diffusers")
    schedule = training().schedule
    reference = schedulers.DDPMScheduler(1000, 0.00085, 0.0120, beta_schedule="scaled_linear")
    t = torch.arange(0, 1000, 37)
    snr = training_utils.compute_snr(reference, t)
    weights = loss_weights(schedule, t, "min_snr")
    torch.testing.assert_close(weights, snr.clamp(max=5) / snr, rtol=1e-4, atol=0)
    assert weights.min() < 0.01
    assert weights.max() == 1


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_weight_of_the_mask(weight):
    module = training(mask_weight=weight)
    batch = module.on_before_batch_transfer(example(), 0)
    z_0, condition = encode(module.model, batch.example, batch.draws.posterior_noise)
    t, noise = batch.draws.t, batch.draws.noise
    arguments = module.model, module.schedule, z_0, condition, t, noise
    unet_in = torch.cat([module.schedule.add_noise(z_0, noise, t), condition.z_masked, condition.mask], dim=1)
    error = (module.model.unet(unet_in, t, condition.context) - noise).square()
    weights = torch.where(condition.mask.bool(), 1.0, weight).expand_as(error)
    assert 0 < condition.mask.mean() < 1
    for i, loss in enumerate(denoising_losses(*arguments, mask_weight=weight)):
        expected = (error * weights)[i].sum() / weights[i].sum()
        torch.testing.assert_close(loss, expected)
    plain = denoising_losses(*arguments)
    assert not torch.allclose(denoising_losses(*arguments, mask_weight=weight), plain)


def test_timesteps_of_noisy_samples():
    plain = make_noise_draws(range(200), (4, 2, 2), 1000, count=2)
    noisy = make_noise_draws(range(200), (4, 2, 2), 1000, count=2, noisy=[0.0] * 100 + [1.0] * 50 + [0.5] * 50)
    for name in ("noise", "posterior_noise", "drop"):
        assert torch.equal(getattr(plain, name), getattr(noisy, name))
    plain_t, t = plain.t.view(2, 200), noisy.t.view(2, 200)
    assert torch.equal(plain_t[:, :100], t[:, :100])
    assert torch.equal((plain_t[:, 100:150] + 1000) // 2, t[:, 100:150])
    changed = (plain_t[:, 150:] != t[:, 150:]).any(dim=0)
    assert 10 < changed.sum() < 40
    assert t[:, 150:][:, changed].min() >= 500


def test_loss_that_is_not_finite_names_step_and_files():
    check_finite(torch.tensor(1.0), 1, ["a.png"])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in step 12, on a.png, b.png"):
            check_finite(torch.tensor(bad), 12, ["a.png", "b.png"])


# --- what trains ----------------------------------------------------------------------------------------------


def test_every_trained_parameter_has_a_gradient_and_no_other_could():
    module = training(train=list(PARTS), drop_exemplar=0.55)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    module.model.requires_grad_(True)
    batch = module.on_before_batch_transfer(example(), 0)
    assert 0 < (batch.draws.drop < 0.55).sum() < 3  # both contexts are used
    module.training_step(batch, 0)["loss"].backward()
    reached = {name for name, p in module.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
    # GroupNorm with one channel a group takes a constant away: the layer's bias before it, zero but for rounding
    assert reached <= trained
    assert {n for n in trained - reached if not n.endswith(".bias")} == set()
    left_out = {n.split("transformer_blocks.0.")[1] for n in set(names_of(module, "unet")) - trained}
    assert left_out == {"norm2.weight", "norm2.bias", "attn2.to_q.weight", "attn2.to_k.weight"}


def names_of(module: PaintByExampleTraining, part: str) -> list[str]:
    return [name for name, _ in module.model.named_parameters() if name.startswith(PARTS[part])]


def test_parts_are_chosen():
    module = training()
    frozen = {name for name, p in module.model.named_parameters() if not p.requires_grad}
    assert set(names_of(module, "clip")) < frozen
    assert {name for name in frozen if name.startswith("first_stage_model.")}
    assert not frozen & {*names_of(module, "mapper"), *names_of(module, "proj_out"), "learnable_vector"}
    module = training(train=["proj_out"])
    assert {n for n, p in module.model.named_parameters() if p.requires_grad} == {"proj_out.weight", "proj_out.bias"}


def test_gradient_checkpointing_and_memory_format_change_nothing():
    gradients = []
    for settings in ({}, {"gradient_checkpointing": True}, {"channels_last": True}):
        module = training(**settings)
        module.training_step(module.on_before_batch_transfer(example(), 0), 0)["loss"].backward()
        assert module.state_dict().keys() == training().state_dict().keys()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad]))
    plain, checkpointed, channels_last = gradients
    assert torch.equal(plain, checkpointed)
    # other kernels, other orders of sums
    assert (plain - channels_last).norm() < 1e-4 * plain.norm()


@pytest.mark.slow
def test_compiled_network_has_the_same_gradients(monkeypatch):
    # traced as ever, but run by torch's own kernels: generating code takes minutes and needs a compiler
    monkeypatch.setattr(UNet, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    gradients = []
    for module in (training(), training(compile=True)):
        module.training_step(module.on_before_batch_transfer(example(), 0), 0)["loss"].backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    plain, compiled = gradients
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, msg=name)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": math.nan}, {"weight_decay": -1.0}, {"warmup_start": 2.0}])
def test_optimizer_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(settings))} must be"):
        OptimizerConfig(**settings)


def test_fused_optimizer_on_cuda_unless_it_would_clip_scaled_gradients():
    half = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu"))
    bfloat16 = MixedPrecision("bf16-mixed", "cuda")
    cases = ((half, 1.0, False), (half, None, True), (bfloat16, 1.0, True), (Precision(), 1.0, True))
    for precision, clip, fused in cases:
        module = SimpleNamespace(
            trainer=SimpleNamespace(precision_plugin=precision, gradient_clip_val=clip),
            named_parameters=lambda: [("x", torch.nn.Parameter(torch.zeros(2)))],
            device=torch.device("cuda"),
        )
        optimizer = make_optimizer(module, OptimizerConfig())["optimizer"]
        assert optimizer.defaults["fused"] is fused
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full((2,), 3.0)
        precision.clip_gradients(optimizer, clip or 0.0)  # which refuses what it takes for scaled
        norm = optimizer.param_groups[0]["params"][0].grad.norm().item()
        assert norm == pytest.approx(1.0 if clip else 18**0.5, rel=1e-5)  # clipping divides by the norm and 1e-6


def test_what_trains_decays_and_nothing_else():
    trained, frozen = (torch.nn.Parameter(torch.ones(2), requires_grad=train) for train in (True, False))
    config = OptimizerConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups([("trained", trained), ("frozen", frozen)], config), config)
    trained.grad = torch.zeros(2)  # so that only the decay moves it, by lr times weight_decay
    optimizer.step()
    assert trained.tolist() == pytest.approx([0.95, 0.95])
    assert frozen.tolist() == [1, 1]


def test_learning_rate():
    config = OptimizerConfig(warmup_steps=10_000, warmup_start=1e-6)
    # the original's: (1 - start) / warm-up * n + start
    assert [lr_factor(n, config) for n in (0, 5000, 10_000, 10**6)] == pytest.approx([1e-6, 0.5000005, 1, 1], rel=1e-12)
    config = OptimizerConfig(warmup_steps=10, decay_steps=100)
    assert [lr_factor(n, config) for n in (10, 60, 110, 500)] == pytest.approx([1, 0.5, 0, 0], abs=1e-12)


def test_average():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    average = ParameterAverage({"model.diffusion_model.out.2.bias": p}, decay=0.9)
    assert list(average.state_dict()) == ["diffusion_modelout2bias"]
    expected = 1.0
    for n in range(1, 200):
        p.data.fill_(n)
        average.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert average.diffusion_modelout2bias.item() == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert p.item() == pytest.approx(expected, rel=1e-5)
    average.swap()
    assert p.item() == 199
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        ParameterAverage({}, decay=1)


def test_settings_of_training_that_cannot_be():
    """In code too, where no YAML is checked against the types."""
    for settings, message in (
        ({"train": ["unet", "vae"]}, r"training\.train must be .*'unet', 'mapper',.*, got \['unet', 'vae'\]"),
        ({"drop_exemplar_by": "picture"}, r"training\.drop_exemplar_by must be 'sample' or 'batch', got 'picture'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**settings)
    with pytest.raises(ValueError, match=r"model\.reset must be .*'unet'.*, got \['vae'\]"):
        ModelConfig(reset=["vae"])
    with pytest.raises(ValueError, match=r"samples\.edit\.guidance must be .* at least 0, got inf"):
        SamplesConfig(edit={"guidance": math.inf})
    with pytest.raises(ValueError, match=r"samples\.edit\.seam: .* choose one of steps, guidance"):
        SamplesConfig(edit={"seam": "poisson"})


# --- where it starts ------------------------------------------------------------------------------------------


def test_scratch_is_seeded_and_the_unet_starts_at_zero(toy):
    config = load_config([str(toy)]).model
    model, again, other = starting_model(config, 0), starting_model(config, 0), starting_model(config, 1)
    states = [m.state_dict() for m in (model, again, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    for name in states[0]:
        is_drawn = states[0][name].unique().numel() > 1 and not name.startswith("first_stage_model.")
        assert torch.equal(states[0][name], states[2][name]) != is_drawn, name
    assert model.config.vae.latent_scale == 0.5  # of the autoencoder's file
    x, t, context = torch.randn(2, 9, 8, 8), torch.tensor([5, 900]), torch.randn(2, 1, 32)
    assert model.unet(x, t, context).abs().max() == 0
    residual, transformer = model.unet.middle_block[:2]
    assert residual.out_layers[-1].weight.abs().max() == transformer.proj_out.weight.abs().max() == 0
    # unit gain within the exemplar's encoder: neither vanishing nor exploding
    assert 0.1 < model.encode_exemplar(torch.randn(8, 3, 16, 16)).std() < 3


def test_reset_draws_parts_anew(toy):
    path = toy_run.write_model(toy.parent)
    kept = starting_model(ModelConfig(init=str(path)), 0).state_dict()
    reset = starting_model(ModelConfig(init=str(path), reset=["unet", "proj_out"]), 0).state_dict()
    prefixes = (PARTS["unet"], PARTS["proj_out"])
    changed = {name for name in kept if not torch.equal(kept[name], reset[name])}
    assert {name.startswith(prefixes) for name in changed} == {True}
    assert changed == {name for name in kept if name.startswith(prefixes)}


def test_tokens_of_the_exemplar_are_chosen(toy):
    """With all tokens as context, query and key train too."""
    path = toy_run.write_model(toy.parent)
    choices = (None, "class", "all")
    models = {tokens: starting_model(ModelConfig(init=str(path), tokens=tokens), 0) for tokens in choices}
    exemplar = torch.randn(2, 3, 16, 16)
    assert [m.encode_exemplar(exemplar).shape[1] for m in models.values()] == [1, 1, 5]
    trained = {tokens: trained_names(model, ["unet"]) for tokens, model in models.items()}
    assert {name.split(".")[-2] for name in trained["all"] - trained["class"]} == {"norm2", "to_q", "to_k"}
    assert trained["all"] == {name for name, _ in models["all"].named_parameters() if name.startswith(PARTS["unet"])}


def test_starting_from_a_file_leaves_the_file_alone(toy):
    path = toy_run.write_model(toy.parent)
    before = path.read_bytes()
    model = starting_model(ModelConfig(init=str(path)), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before
    assert starting_model(ModelConfig(init=str(path)), 0).learnable_vector.abs().max() > 0


def test_starts_that_cannot_be(toy):
    config = load_config([str(toy)]).model
    path = str(toy_run.write_model(toy.parent))
    for bad, message in (
        (ModelConfig(size=config.size), r"model\.init=scratch needs model\.vae"),
        (ModelConfig(vae=config.vae), r"model\.init=scratch needs model\.size"),
        (ModelConfig(init=path, vae=config.vae), r"model\.vae is for model\.init=scratch"),
        (ModelConfig(init=config.vae), r"holds AutoencoderKL, training needs Paint by Example"),
    ):
        with pytest.raises(ValueError, match=message):
            starting_model(bad, 0)
    (toy.parent / "no_vae.ckpt").unlink(missing_ok=True)
    torch.save({"state_dict": {"proj_out.weight": torch.zeros(2, 2)}}, toy.parent / "no_vae.ckpt")
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        read_vae(toy.parent / "no_vae.ckpt")


def test_every_parameter_has_an_initial_weight():
    with torch.device("meta"):
        model = PaintByExample(TINY)
    weights = dict(initial_weights(model, torch.Generator().manual_seed(0)))
    assert {n: x.shape for n, x in weights.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(x.isfinite().all() for x in weights.values())


# --- what a run leaves ----------------------------------------------------------------------------------------


def test_checkpoints_load_straight(finished, toy):
    path = finished / "checkpoints" / "step-00000010.ckpt"
    model = pbe.load_model(path, "cpu", weights="raw")
    saved = toy_run.checkpoint(finished, 10)
    assert all(torch.equal(x, saved["state_dict"][name]) for name, x in model.state_dict().items())
    assert model.config.vae.latent_scale == 0.5
    assert (model.config.unet.num_heads, model.config.exemplar.vision.num_heads) == (4, 2)
    assert saved["pbe"]["trained_on"] == f"manifest {toy.parent / 'boxes.csv'}"
    assert saved["pbe"]["config"]["optimizer"]["lr"] == 1e-3
    photo = Image.new("RGB", (48, 40), "gray")
    (edited,) = pbe.edit(model, photo, (10, 10, 30, 30), photo, steps=4, sampler="ddim")
    assert edited.size == photo.size


@pytest.mark.slow
def test_an_edit_by_a_fresh_checkpoint_gives_what_its_sample_grid_showed(finished, tmp_path):
    path, config = finished / "checkpoints" / "step-00000010.ckpt", load_config([str(finished / "config.yaml")])
    examples = first_examples(open_data(config).val_dataloader(), config.samples.count)
    with pytest.warns(UserWarning, match=r"step-00000010\.ckpt: its averages are used, as in its sample grids"):
        model = pbe.load_model(path, "cpu", "float32")
    raw = pbe.load_model(path, "cpu", "float32", weights="raw")
    shown = Image.open(finished / "samples" / "step-00000010.png")
    again, other = (sample_grid(one, examples, config.samples.settings()) for one in (model, raw))
    assert again.tobytes() == shown.tobytes() != other.tobytes()

    # the same by the command, from the pictures in 8 bits
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    photo = to_picture(examples.source[0] / 2 + 0.5)
    mask, exemplar = to_picture(1 - examples.mask[0]), to_picture(examples.exemplar[0] * std + mean)
    files = {"image": photo, "mask": mask, "exemplar": exemplar}
    for name, picture in files.items():
        picture.save(tmp_path / f"{name}.png")
    flags = [text for name in files for text in (f"--{name}", str(tmp_path / f"{name}.png"))]
    flags += ["--seed", "0", "--steps", "2", "--sampler", "ddim", "--window", "full", "--no-composite", "--quiet"]
    photo, exemplar = (torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in (photo, exemplar))
    example = Example(*(values[:1] for values in examples))
    example = example._replace(source=photo[None] * 2 - 1, exemplar=((exemplar - mean) / std)[None])
    for weights, network in (("auto", model), ("raw", raw)):
        out = tmp_path / f"{weights}.png"
        assert edit([*flags, "--ckpt", str(path), "--device", "cpu", "--weights", weights, "--out", str(out)]) == 0
        expected = to_picture(sample(network, example, config.samples.settings())[0] / 2 + 0.5)
        difference = np.abs(np.asarray(Image.open(out)).astype(int) - np.asarray(expected))
        assert difference.max() <= 1
    assert read_provenance(tmp_path / "raw.png")["weights"] == "raw"
    assert "weights" not in read_provenance(tmp_path / "auto.png")


@pytest.mark.slow
def test_adapters_alone_are_trained_and_saved(toy, tmp_path):
    """Their run goes on where it stopped, and the last file lies over the checkpoint it started from."""
    start = toy_run.write_model(toy.parent)
    settings = [
        f"model={{init: {start}, size: null, vae: null}}",
        "training={train: [], lora: {rank: 2}, ema_decay: null}",
        "trainer={max_steps: 4, val_check_interval: 2}",
    ]
    toy_run.run(toy, *settings, f"run={tmp_path / 'whole'}")
    toy_run.run(toy, *settings, f"run={tmp_path / 'parts'}", "trainer.max_steps=2")
    toy_run.run(toy, *settings, f"run={tmp_path / 'parts'}", "--resume")
    whole, parts = (toy_run.checkpoint(tmp_path / name, 4)["state_dict"] for name in ("whole", "parts"))
    assert all(map(is_adapter, whole))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())

    path = tmp_path / "whole" / "checkpoints" / "step-00000004.ckpt"
    with pytest.raises(CheckpointError, match="adapters alone"):
        pbe.load_model(path, "cpu")
    model, plain = pbe.load_model(start, "cpu"), pbe.load_model(start, "cpu")
    pbe.add_adapters(model, path)
    adapted = model.state_dict()
    changed = {name for name, x in plain.state_dict().items() if not torch.equal(x, adapted[name])}
    assert changed == {name.rpartition(".")[0] + ".weight" for name in whole}
    ups = [x for name, x in whole.items() if name.endswith("lora_up")]
    assert all(x.abs().max() > 0 for x in ups)


@pytest.mark.slow
def test_adapters_are_drawn_with_the_run_s_seed(toy):
    start = toy_run.write_model(toy.parent)
    settings = [str(toy), f"model={{init: {start}, size: null, vae: null}}"]
    settings.append("training={train: [], lora: {rank: 2}, ema_decay: null}")
    states = [make_module(load_config([*settings, f"seed={seed}"])).model.state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    differ = {name for name, x in states[0].items() if not torch.equal(x, states[2][name])}
    assert differ == {name for name in states[0] if name.endswith("lora_down")}


def test_adapters_train_alone():
    with pytest.raises(ValueError, match=r"training\.lora .*train=\[\], got \['unet'\]"):
        TrainingConfig(lora=LoRAConfig(), train=["unet"])


def test_averages_are_in_the_checkpoint_and_extracted(finished):
    source = open_recognised(finished / "checkpoints" / "step-00000010.ckpt")
    averaged, last = extract_ema(source), source.tensor
    saved = toy_run.checkpoint(finished, 10)["state_dict"]
    for name, x in averaged.items():
        if name.startswith("first_stage_model."):
            assert torch.equal(x, last(name))
    for name in ("model.diffusion_model.out.2.weight", "cond_stage_model.final_ln.weight", "learnable_vector"):
        assert not torch.equal(averaged[name], last(name))
        assert torch.equal(averaged[name], saved["model_ema." + name.removeprefix("model.").replace(".", "")])


def test_averages_begin_with_the_first_step_and_are_what_grids_show(toy, monkeypatch):
    name, shown = "model.diffusion_model.out.2.weight", []

    def sample_grid(model, examples, config, beside):
        shown.append(model.get_parameter(name).detach().clone())
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(samples, "sample_grid", sample_grid)
    run = toy.parent / "one_average"
    settings = ("trainer.max_steps=1", "optimizer.warmup_steps=0", "samples.every_n_steps=1")
    toy_run.run(toy, f"run={run}", *settings, "trainer.limit_val_batches=0")
    start = starting_model(load_config([str(toy)]).model, 0).get_parameter(name)
    saved = toy_run.checkpoint(run, 1)["state_dict"]
    end, average = saved[name], saved["model_ema.diffusion_modelout2weight"]
    # the decay of the first update is (1 + 1) / (10 + 1)
    torch.testing.assert_close(average, (2 / 11) * start + (9 / 11) * end)
    assert not torch.allclose(average, end)
    assert torch.equal(shown[0], average)


def test_validation_measures_the_averages():
    module, examples = training(ema_decay=0.9), example(2)
    expected = validate(module, examples, 2)["val/loss"]  # of averages that are still the parameters
    before = [p.detach().clone() for p in module.model.parameters()]
    with torch.no_grad():
        for parameter in module.model_ema._averaged:
            parameter.mul_(1.1)
    moved = [p.detach().clone() for p in module.model.parameters()]
    assert validate(module, examples, 2)["val/loss"] == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(p, x) for p, x in zip(module.model.parameters(), moved, strict=True))
    module.model_ema.swap()
    assert all(torch.equal(p, x) for p, x in zip(module.model.parameters(), before, strict=True))
    module.model_ema.swap()
    module.model_ema = None
    assert validate(module, examples, 2)["val/loss"] != pytest.approx(expected, rel=1e-3)


def test_checkpoints_are_contiguous_whatever_the_run_s_memory_format():
    module = training(channels_last=True, ema_decay=0.9)
    checkpoint = {"state_dict": module.state_dict()}
    assert not all(x.is_contiguous() for x in checkpoint["state_dict"].values())
    module.on_save_checkpoint(checkpoint)
    assert all(x.is_contiguous() for x in checkpoint["state_dict"].values())


def test_frozen_parts_stay_and_the_others_move(finished, toy):
    start = starting_model(load_config([str(toy)]).model, 0).state_dict()
    end = toy_run.checkpoint(finished, 10)["state_dict"]
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert not {name for name in moved if name.startswith("first_stage_model.")}
    assert {part for part, prefix in PARTS.items() if any(n.startswith(prefix) for n in moved)} == set(PARTS)


@pytest.mark.slow
def test_the_last_checkpoints_are_kept(toy):
    run = toy.parent / "kept"
    toy_run.run(toy, f"run={run}", "checkpoint.every_n_steps=2", "trainer.max_steps=7", "trainer.limit_val_batches=0")
    names = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert names == ["step-00000006.ckpt", "step-00000007.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "last"),
    [("trainer.max_epochs=1", 5), ("trainer.max_time={milliseconds: 1}", 1)],
    ids=["by epochs", "by time"],
)
def test_every_run_ends_with_a_checkpoint(toy, end, last, request):
    run = toy.parent / request.node.callspec.id.replace(" ", "_")
    settings = ("trainer.max_steps=-1", end, "checkpoint.every_n_steps=100", "trainer.limit_val_batches=0")
    toy_run.run(toy, f"run={run}", *settings)
    assert [step_of(path) for path in list_checkpoints(run / "checkpoints")] == [last]


def test_metrics_and_samples(finished):
    assert list(toy_run.metrics(finished, "train/loss")) == list(range(1, 11))
    assert list(toy_run.metrics(finished, "val/loss")) == [4, 8]
    assert toy_run.metrics(finished, "lr")[10] == 1e-3
    assert all(
        x > 0 for name in ("pictures_per_second", "peak_memory_gib") for x in toy_run.metrics(finished, name).values()
    )
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["step-00000005.png", "step-00000010.png"]
    assert load_config([str(finished / "config.yaml")]).data.batch_size == 2


def test_validation_s_time_is_not_training_s(monkeypatch):
    now, metrics, trainer = [100.0], TrainingMetrics(), SimpleNamespace(global_step=0, sanity_checking=False)
    monkeypatch.setattr("pbe.training.callbacks.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics.on_train_start(trainer, None)
    now[0] = 107.0
    metrics.on_validation_start(trainer, None)
    now[0] = 130.0
    metrics.on_validation_end(trainer, None)
    now[0] = 131.0
    checkpoint = {}
    metrics.on_save_checkpoint(trainer, None, checkpoint)
    assert checkpoint["metrics"]["seconds"] == 8.0


@pytest.mark.slow
def test_metrics_are_means_over_samples(toy):
    """Three steps' metrics in one line are the mean of those of the three."""
    every, third = toy.parent / "every", toy.parent / "third"
    settings = ("trainer.max_steps=3", "trainer.limit_val_batches=0")
    toy_run.run(toy, f"run={every}", *settings)
    toy_run.run(toy, f"run={third}", *settings, "trainer.log_every_n_steps=3")
    losses = toy_run.metrics(every, "train/loss")
    assert toy_run.metrics(third, "train/loss") == {3: pytest.approx(sum(losses.values()) / 3, rel=1e-6)}


@pytest.mark.slow
def test_a_run_with_several_draws(toy):
    """It logs the mean over draws and samples, and counts pictures as they are."""
    one, three = toy.parent / "one_draw", toy.parent / "three_draws"
    settings = ("trainer.max_steps=1", "optimizer.warmup_steps=0", "trainer.val_check_interval=1", "data.batch_size=4")
    toy_run.run(toy, f"run={one}", *settings)
    toy_run.run(toy, f"run={three}", *settings, "training.noise_draws=3")
    a, b = (toy_run.metrics(run, "train/loss")[1] for run in (one, three))
    assert math.isfinite(b)
    assert a != b
    assert toy_run.metrics(three, "val/loss").keys() == toy_run.metrics(one, "val/loss").keys()


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(toy):
    """The first loss logged of 2 x 2 samples is that of 4: the same samples in the same order."""
    one, two = toy.parent / "batch4", toy.parent / "batch2x2"
    settings = ("trainer.max_steps=1", "trainer.limit_val_batches=0", "optimizer.warmup_steps=0")
    toy_run.run(toy, f"run={one}", *settings, "data.batch_size=4")
    toy_run.run(toy, f"run={two}", *settings, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    a, b = toy_run.metrics(one, "train/loss"), toy_run.metrics(two, "train/loss")
    assert b == {1: pytest.approx(a[1], rel=1e-5)}


@pytest.mark.slow
def test_precision(toy):
    """Under autocast the loss is float32's to bfloat16's three digits, and the parameters stay float32."""
    run, plain = toy.parent / "bf16", toy.parent / "fp32"
    start = (f"model.init={toy_run.write_model(toy.parent)}", "model.size=null", "model.vae=null")
    settings = (*start, "trainer.max_steps=1", "trainer.limit_val_batches=0")
    toy_run.run(toy, f"run={run}", *settings, "trainer.precision=bf16-mixed")
    toy_run.run(toy, f"run={plain}", *settings)
    losses = [toy_run.metrics(path, "train/loss")[1] for path in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0] != losses[1]
    assert {x.dtype for x in toy_run.checkpoint(run, 1)["state_dict"].values()} == {torch.float32}


# --- validation -----------------------------------------------------------------------------------------------


def validate(module: PaintByExampleTraining, examples: Example, batch_size: int) -> dict[str, float]:
    """The metrics of a validation over `examples`."""
    metrics: dict[str, float] = {}
    module.log_dict = lambda values, sync_dist: metrics.update(values)
    module._trainer = SimpleNamespace(world_size=1, global_step=7)
    module.on_validation_epoch_start()
    for first in range(0, len(examples.file), batch_size):
        batch = Example(*(x[first : first + batch_size] for x in examples))
        with torch.no_grad():
            module.validation_step(module.on_before_batch_transfer(batch, 0), 0)
    module.on_validation_epoch_end()
    return metrics


def test_validation_compares_with_the_exemplar_of_the_sample_before():
    module, examples = training(val_timesteps=[100, 800]), example(4)
    metrics = validate(module, examples, batch_size=4)
    draws = module.on_before_batch_transfer(examples, 0).draws
    with torch.no_grad():
        z_0, right_one = encode(module.model, examples, draws.posterior_noise)
        wrong_one = right_one._replace(context=right_one.context.roll(1, 0))
        right, wrong = (
            torch.stack([denoise(module, z_0, c, torch.full((4,), t), draws.noise) for t in (100, 800)])
            for c in (right_one, wrong_one)
        )
    gain = (wrong - right).mean(dim=0)
    assert metrics["val/loss"] == pytest.approx(right.mean().item(), rel=1e-5)
    assert metrics["val/loss_t800"] == pytest.approx(right[1].mean().item(), rel=1e-5)
    assert metrics["val/loss_wrong_exemplar"] == pytest.approx(wrong.mean().item(), rel=1e-5)
    # differences of losses: rounding is relative to the losses
    tolerance = 1e-5 * right.mean().item()
    assert metrics["val/exemplar_gain"] == pytest.approx(gain.mean().item(), abs=tolerance)
    assert metrics["val/exemplar_gain_se"] == pytest.approx(gain.std().item() / 2, abs=tolerance)
    assert metrics["step"] == 7


def test_validation_does_not_depend_on_the_batch_size():
    module, examples = training(val_timesteps=[500]), example(4)
    whole, halves, singly = (validate(module, examples, n) for n in (4, 2, 1))
    assert halves["val/loss"] == pytest.approx(whole["val/loss"], rel=1e-5)
    assert singly["val/loss"] == pytest.approx(whole["val/loss"], rel=1e-5)
    assert singly["val/exemplar_gain_se"] > 0
    assert "val/exemplar_gain" not in validate(module, example(1), 1)  # nothing to compare with


@pytest.mark.slow
def test_a_test_is_a_validation_of_other_pictures(finished, toy):
    source = f"{{kind: manifest, path: {toy.parent / 'boxes.csv'}}}"
    config = load_config([str(toy), f"data.val_source={source}", f"data.test_source={source}"])
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=TrainingMetrics())
    module, data = make_module(config), ExampleDataModule(config.data)
    (validated,), (tested,) = trainer.validate(module, data), trainer.test(module, data)
    assert {name.replace("test/", "val/"): x for name, x in tested.items()} == validated
    assert tested["test/loss"] > 0


# --- when something is wrong ----------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(finished, toy, capsys):
    assert main([str(toy), f"run={finished}"]) == 2
    assert (
        f"{finished} has a run with the checkpoint step-00000010.ckpt: --resume continues it" in capsys.readouterr().err
    )


def test_a_resumed_run_keeps_its_settings(finished, toy, capsys):
    """Half of them would be applied, and the run's records would tell of the rest."""
    settings = ("optimizer.lr=1e-5", "data.workers=1", "training.compile=true", "trainer.max_steps=11", "--resume")
    assert main([str(toy), f"run={finished}", *settings]) == 2
    assert "changed are optimizer.lr." in capsys.readouterr().err
    assert main([str(toy), f"run={finished}", "data.batch_size=4", "trainer.max_steps=11", "--resume"]) == 2
    assert "had 2 pictures in a batch over all processes and cannot go on with 4" in capsys.readouterr().err


@pytest.mark.slow
def test_what_an_older_run_could_not_say_was_as_it_is_by_default(toy, tmp_path):
    run = tmp_path / "run"
    toy_run.run(toy, f"run={run}", "trainer.max_steps=1", "checkpoint.every_n_steps=1")
    last = run / "checkpoints" / "step-00000001.ckpt"
    state = toy_run.checkpoint(run, 1)
    settings = state["pbe"]["config"]
    del settings["encodings"], settings["optimizer"]["name"], settings["data"]["sources"]
    torch.save(state, last)
    config = partial(load_config, [str(toy), f"run={run}", "trainer.max_steps=1", "checkpoint.every_n_steps=1"])
    check_resume(config(), last, resume=True)
    changed = config()
    changed.encodings.crops = 3
    with pytest.raises(ValueError, match=r"changed are encodings\.crops\."):
        check_resume(changed, last, resume=True)


@pytest.mark.parametrize("setting", ["count=0", "edit.steps=2000", "every_n_steps=-3"])
def test_sample_settings_are_checked_at_the_start(toy, setting, capsys):
    assert main([str(toy), f"samples.{setting}"]) == 2
    assert f"samples.{setting.split('=')[0]}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(toy, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(toy), f"run={tmp_path / 'file' / 'run'}"]) == 2
    assert f"error: the run's folder {tmp_path / 'file' / 'run'} cannot be written" in capsys.readouterr().err


def test_a_disk_too_small_for_the_checkpoints(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    check_room(tmp_path, usage.free // 2)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=3 * 10**9))
    with pytest.raises(OSError, match=r"has 3\.0 GB free, and the checkpoints to keep there need about 50\.0 GB"):
        check_room(tmp_path, 50 * 10**9)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"x": torch.ones(3)}, path)
    monkeypatch.setattr(checkpoints.torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("write failed")))
    with pytest.raises(OSError, match=rf"cannot write {path} \([\d.]+ GB free\): write failed"):
        writer.save_checkpoint({"x": torch.zeros(3)}, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(writer.load_checkpoint(path)["x"], torch.ones(3))


def test_divergence_stops_the_run(toy, capsys):
    """A learning rate of 1e30 makes the second step's loss infinite; nothing of it is saved."""
    run = toy.parent / "diverged"
    settings = (
        "optimizer.lr=1e30",
        "optimizer.warmup_steps=0",
        "checkpoint.every_n_steps=1",
        "samples.every_n_steps=null",
    )
    assert main([str(toy), f"run={run}", *settings]) == 2
    error = capsys.readouterr().err
    assert "error: the loss is" in error or "parameters are not finite" in error
    for path in list_checkpoints(run / "checkpoints"):
        assert all(x.isfinite().all() for x in torch.load(path, weights_only=True)["state_dict"].values())


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    module = training()
    module.model.proj_out.bias.data[3] = float("nan")
    writer = Checkpoints(tmp_path, CheckpointConfig(), StopSignals())
    with pytest.raises(FloatingPointError, match=r"after step 3 1 parameters are not finite, as model\.proj_out\.bias"):
        writer.save(SimpleNamespace(global_step=3), module)


def test_two_processes_cannot_train_in_one_folder(toy, capsys):
    run = toy.parent / "locked"
    run.mkdir()
    held = "import sys; from pbe.io.atomic import locked\nwith locked(__import__('pathlib').Path(sys.argv[1]), ''):"
    command = [sys.executable, "-c", f"{held} print('held', flush=True); sys.stdin.read()", str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert main([str(toy), f"run={run}", "trainer.max_steps=1"]) == 2
        assert f"error: another process is training in {run}" in capsys.readouterr().err
        other.stdin.close()
    toy_run.run(toy, f"run={run}", "trainer.max_steps=1")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_weights_are_trained_in_float32(toy, precision, capsys):
    assert main([str(toy), f"run={toy.parent / precision}", f"trainer.precision={precision}"]) == 2
    error = capsys.readouterr().err
    assert f"error: trainer.precision={precision} is not one of 32-true, 16-mixed, bf16-mixed" in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.max_steps=abc"], "lightning.Trainer does not take trainer="),
        (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches must be an integer of at least 1"),
        (["training.noise_draws=0"], "training.noise_draws must be a whole number of at least 1, got 0"),
        (["data.batch_size=99"], "data.batch_size=99 is more than the 10 records of"),
        (["training={lora: {rank: 0}, train: [], ema_decay: null}"], "lora.rank must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_leave_nothing(toy, settings, message, capsys):
    run = toy.parent / "cannot"
    assert main([str(toy), f"run={run}", *settings]) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert "Traceback" not in error
    assert not (run / "config.yaml").exists()


def test_errors_of_data_workers_are_one_line(toy, tmp_path, capsys):
    for i in range(toy_run.NUM_PICTURES):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    (tmp_path / "boxes.csv").write_bytes((toy.parent / "boxes.csv").read_bytes())
    settings = [f"data.source.path={tmp_path / 'boxes.csv'}", "data.workers=1", f"run={tmp_path / 'run'}"]
    assert main([str(toy), *settings]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "100 pictures in a row cannot be used; the first: " in line


def test_a_trial_run_leaves_no_checkpoint(toy):
    run = toy.parent / "trial"
    toy_run.run(toy, f"run={run}", "trainer.fast_dev_run=true")
    assert list_checkpoints(run / "checkpoints") == []


@pytest.mark.slow
def test_a_run_goes_on_where_its_files_have_moved_but_not_with_others(finished, toy, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(toy.parent / "images", tmp_path / "images")
    shutil.copyfile(toy.parent / "boxes.csv", tmp_path / "boxes.csv")
    shutil.copyfile(toy.parent / "vae.ckpt", tmp_path / "vae.ckpt")
    moved = [f"data.source.path={tmp_path / 'boxes.csv'}", f"model.vae={tmp_path / 'vae.ckpt'}"]
    more = [str(toy), f"run={tmp_path / 'run'}", "samples.every_n_steps=null", *moved, "--resume"]
    toy_run.run(*more, "trainer.max_steps=11")
    assert main([*more, "trainer.max_steps=12", "trainer.accumulate_grad_batches=2"]) == 2
    assert "changed are trainer.accumulate_grad_batches." in capsys.readouterr().err
    lines = (tmp_path / "boxes.csv").read_text().splitlines()
    (tmp_path / "boxes.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert main([*more, "trainer.max_steps=12"]) == 2
    assert "the run's data had 10 records and now has 9" in capsys.readouterr().err


def test_exemplars_must_be_as_large_as_the_encoder_s(toy, capsys):
    assert main([str(toy), f"run={toy.parent / 'exemplars'}", "data.recipe.exemplar_size=24"]) == 2
    assert "exemplar_size" in capsys.readouterr().err


def test_a_grid_that_cannot_be_made_does_not_end_the_run(toy, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(samples, "sample_grid", full)
    run = toy.parent / "no_grid"
    with pytest.warns(UserWarning, match="no sample grid of step 1: No space left"):
        toy_run.run(toy, f"run={run}", "trainer.max_steps=2", "samples={every_n_steps: 1, edit: {steps: 2}}")
    assert (run / "checkpoints" / "step-00000002.ckpt").exists()


def test_averages_cannot_begin_in_the_middle(finished, toy, capsys, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    settings = ("training.ema_decay=null", "trainer.max_steps=12")
    assert main([str(toy), f"run={tmp_path / 'run'}", *settings, "--resume"]) == 2
    assert "changed are training.ema_decay." in capsys.readouterr().err


def test_log_is_cut_where_the_run_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    logger = JSONLinesLogger(path)
    logger.trim(2)
    logger.log_metrics({"a": 9.0}, step=3)
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 9.0}\n'


# --- small parts ----------------------------------------------------------------------------------------------


def test_sample_grid_shows_each_picture_in_its_own_colours(monkeypatch):
    monkeypatch.setattr(samples, "grid", lambda rows, **_: rows)
    shown = example(1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    gray, blue = torch.full((1, 3, 28, 28), 0.6), torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(1, 3, 28, 28)
    for colours, expected in ((gray, (153, 153, 153)), (blue, (0, 0, 255))):
        shown = shown._replace(exemplar=(colours - mean) / std)
        ((source, masked, exemplar, result, target),) = sample_grid(tiny_model(), shown, EditSettings(steps=1))
        assert exemplar.getpixel((14, 14)) == expected
    assert masked.getpixel((16, 16)) == (128, 128, 128)  # the mask's inside is 0 of [-1, 1]
    assert source.tobytes() == target.tobytes() != masked.tobytes()
    assert result.size == source.size


def test_sample_grid_shows_all_columns():
    settings = SamplesConfig(edit={"steps": 2}).settings()
    picture = sample_grid(tiny_model(), example(2), settings)
    again = sample_grid(tiny_model(), example(2), settings)
    assert picture.tobytes() == again.tobytes()
    assert picture.width > 5 * 128
    assert picture.height > 2 * 128


def test_prior_of_four_channels_trains_and_expands(toy):
    """A UNet without the task's inputs, for the ablation's prior: its checkpoint becomes one of nine inputs."""
    run = toy.parent / "prior"
    settings = ("model.size.unet.in_channels=4", "training.drop_exemplar=1", "training.train=[unet,null_context]")
    toy_run.run(toy, f"run={run}", *settings, "trainer.max_steps=2", "trainer.limit_val_batches=0")
    source = open_recognised(run / "checkpoints" / "step-00000002.ckpt")
    weight = expand(source)["model.diffusion_model.input_blocks.0.0.weight"]
    assert weight.shape[1] == 9
    assert weight[:, 4:].abs().max() == 0


def test_autoencoder_s_run(toy):
    """It learns, and its file gives latents of unit variance to the model that starts from it."""
    run = toy.parent / "vae"
    settings = {
        "task": "vae",
        "run": str(run),
        "size": "{channels: 32, channel_mult: [1, 1], num_res_blocks: 1, latent_scale: 1.0}",
        "optimizer": "{lr: 0.003, warmup_steps: 0}",
    }
    data = f"data={{val_size: 4, batch_size: 4, workers: 0, source: {{path: {toy.parent / 'boxes.csv'}}}}}"
    recipe = "data.recipe={resolution: 32, exemplar_size: 16}"
    trainer = "trainer={accelerator: cpu, max_steps: 40, log_every_n_steps: 1, enable_progress_bar: false}"
    toy_run.run(*(f"{k}={v}" for k, v in settings.items()), data, recipe, trainer)
    l1 = toy_run.metrics(run, "train/l1")
    assert l1[40] < 0.6 * l1[1]
    path = run / "checkpoints" / "step-00000040.ckpt"
    config, state = read_vae(path)
    module = make_module(load_config([str(toy), f"model.vae={path}"]))
    assert module.model.config.vae == config
    built = module.model.state_dict()
    assert all(torch.equal(built[name], x) for name, x in state.items())
    data = ExampleDataModule(load_config([str(toy), "data.val_size=4"]).data)
    data.setup("fit")
    examples = next(iter(data.train_dataloader()))
    z_0, _ = encode(module.model, examples, module.on_before_batch_transfer(examples, 0).draws.posterior_noise)
    # two other pictures than the four it was measured on
    assert 0.5 < z_0.std() < 2


@pytest.mark.parametrize("limit, batches", [(2, 2), (9, 7), (0, 7), (0.5, 3), (1.0, 7)])
def test_an_autoencoder_s_scale_is_measured_on_what_validation_sees(limit, batches):
    module = SimpleNamespace(trainer=SimpleNamespace(limit_val_batches=limit))
    assert VAETraining.num_scale_batches(module, 7) == batches


def test_decoder_alone_is_trained(toy, capsys):
    """The latents stay what they were, their scale too."""
    start, run = toy.parent / "vae.ckpt", toy.parent / "decoder"
    settings = [
        "task=vae",
        f"init={start}",
        "training.train=decoder",
        "optimizer={lr: 0.003, warmup_steps: 0}",
        f"data={{val_size: 2, batch_size: 2, workers: 0, source: {{path: {toy.parent / 'boxes.csv'}}}}}",
        "data.recipe={resolution: 32, exemplar_size: 16}",
        "trainer={accelerator: cpu, max_steps: 3, enable_progress_bar: false, enable_model_summary: false}",
    ]
    toy_run.run(*settings, f"run={run}")
    path = run / "checkpoints" / "step-00000003.ckpt"
    (before, old), (after, new) = read_vae(start), read_vae(path)
    assert before == after
    changed = {name for name, x in old.items() if not torch.equal(x, new[name])}
    assert changed
    assert all(name.startswith(("first_stage_model.decoder.", "first_stage_model.post_quant_")) for name in changed)
    assert main([*settings, f"run={run}2", "init=scratch"]) == 2
    assert "training.train=decoder needs init=" in capsys.readouterr().err
