"""Consistency distillation: its loss against a plain one, its frozen teacher, its runs."""

import math
from functools import partialmethod

import pytest
import torch
import toy_run
from PIL import Image

import pbe
from pbe.cli.checkpoint import main as checkpoint_main
from pbe.models.lora import LoRAConfig
from pbe.models.paint_by_example import Condition, Distilled
from pbe.models.unet import UNet
from pbe.sampling import guided_eps
from pbe.sampling.consistency import boundary_scalings
from pbe.sampling.samplers import ddim_step, predict_z_0
from pbe.training.config import DistillationRun, load_config
from pbe.training.distillation import ConsistencyDistillation, DistillationConfig
from pbe.training.loss import encode
from pbe.training.module import TrainingConfig
from pbe.training.optimizer import OptimizerConfig
from tests.training import test_module as test_training

STUDENTS = {"adapters": {"train": [], "lora": LoRAConfig(rank=2)}, "UNet": {"train": ["unet"]}}
TOY = ("task=distill", "training={train: [unet], ema_decay: null}", "distillation.guidance=[1.5, 4.0]")


def distillation(student: str, **settings) -> ConsistencyDistillation:
    config = TrainingConfig(**STUDENTS[student], drop_exemplar=0.0, **settings)
    model = test_training.tiny_model()
    module = ConsistencyDistillation(model, DistillationConfig(guidance=[1.5, 4.0]), config, OptimizerConfig())
    module.log = lambda *args, **kwargs: None  # it has no trainer here
    with torch.no_grad():  # a student that has learned something already
        for name, parameter in model.named_parameters():
            if name.endswith("lora_up") or (student == "UNet" and parameter.requires_grad):
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return module


@pytest.mark.parametrize("student", STUDENTS)
def test_loss_is_that_of_single_samples_by_the_samplers_own_steps(student):
    """Guidance, DDIM and the consistency function as sampling has them, on a teacher that was loaded apart."""
    module, teacher, c = distillation(student), test_training.tiny_model(), 0.001
    batch = module.on_before_batch_transfer(test_training.example(4), 0)
    batch = batch._replace(draws=batch.draws._replace(t=torch.tensor([19, 39, 519, 999])))
    losses = module.batch_losses(batch)
    z_0, condition = encode(module.model, *batch[:1], batch.draws.posterior_noise)
    alpha_bar = module.schedule.alpha_bar

    def estimate(z_t, one, t):
        eps = guided_eps(module.model, one, 1.0)(z_t, torch.tensor([t]))
        c_skip, c_out = boundary_scalings(t)
        return c_skip * z_t + c_out * predict_z_0(z_t, eps, alpha_bar[t].item())

    for i, t in enumerate(batch.draws.t.tolist()):
        one, t_prev = Condition(*(x[i : i + 1] for x in condition)), max(t - 20, 0)
        z_t = module.schedule.add_noise(z_0[i : i + 1], batch.draws.noise[i : i + 1], torch.tensor([t]))
        guidance = 1.5 + 2.5 * batch.draws.drop[i].item()
        eps = guided_eps(teacher, one, guidance)(z_t, torch.tensor([t]))
        z_prev, _ = ddim_step(z_t, eps, alpha_bar[t].item(), alpha_bar[t_prev].item())
        difference = estimate(z_t, one, t) - estimate(z_prev, one, t_prev)
        expected = ((difference**2 + c**2).sqrt() - c).mean()
        torch.testing.assert_close(losses[i], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("student", STUDENTS)
def test_teacher_stays_what_it_was(student):
    """The optimiser moves the student alone; the gradient is that of the estimate alone, as the target has none."""
    module, original = distillation(student), test_training.tiny_model()
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    module.training_step(module.on_before_batch_transfer(test_training.example(), 0), 0)["loss"].backward()
    assert all(p.grad is not None for p in trained)
    optimizer.step()
    x, t, context = torch.randn(2, 9, 4, 4), torch.tensor([19, 999]), torch.randn(2, 1, original.null_context.shape[-1])
    with torch.no_grad(), module.teaching():
        taught = module.model.unet(x, t, context)
    torch.testing.assert_close(taught, original.unet(x, t, context))
    assert (module.model.unet(x, t, context) - taught).abs().max() > 1e-3


def test_three_calls_of_the_network(monkeypatch):
    """The student before and after, and both halves of the teacher together."""
    sizes, forward = [], UNet.forward

    def counted(self, unet_in, t, context):
        sizes.append((len(unet_in), torch.is_grad_enabled()))
        return forward(self, unet_in, t, context)

    monkeypatch.setattr(UNet, "forward", counted)
    module = distillation("adapters", noise_draws=2)
    module.batch_losses(module.on_before_batch_transfer(test_training.example(3), 0))
    assert sizes == [(6, True), (12, False), (6, False)]


def test_timesteps_are_those_of_the_sampler():
    module = distillation("adapters", noise_draws=4)
    t = module.on_before_batch_transfer(test_training.example(64), 0).draws.t
    assert set((t % 20).tolist()) == {19}
    assert {*range(19, 1000, 20)} >= {*t.tolist()}
    assert len(t.unique()) > 40


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_compiled_students_have_the_same_gradients(student, monkeypatch):
    monkeypatch.setattr(UNet, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    gradients = []
    for compile in (False, True):
        module = distillation(student, compile=compile)
        module.training_step(module.on_before_batch_transfer(test_training.example(2), 0), 0)["loss"].backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-6)


def test_checkpointed_adapters_are_on_in_the_backward_pass():
    """Blocks run again there, after the teacher had the adapters off."""
    gradients = []
    for checkpointing in (False, True):
        module = distillation("adapters", gradient_checkpointing=checkpointing)
        module.training_step(module.on_before_batch_transfer(test_training.example(2), 0), 0)["loss"].backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(checkpointed, plain)


# --- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(toy):
    return f"model={{init: {toy_run.write_model(toy.parent)}, size: null, vae: null}}"


@pytest.mark.slow
def test_run_logs_shows_and_says_what_it_is_for(toy, start, tmp_path):
    """Its errors at the four timesteps; grids with a column for the teacher; an edit begins as distilled."""
    run = tmp_path / "run"
    settings = ("samples={every_n_steps: 1, count: 2}", "trainer={max_steps: 2, val_check_interval: 2}")
    toy_run.run(toy, f"run={run}", start, *TOY, *settings)
    for name in ("loss", "loss_t259", "loss_t499", "loss_t759", "loss_t999", "teacher_error"):
        (value,) = toy_run.metrics(run, f"val/{name}").values()
        assert 0 < value < math.inf, name
    assert toy_run.metrics(run, "val/exemplar_gain") == {}  # of the noise's error
    first, second = sorted((run / "samples").iterdir())
    assert Image.open(first).width == Image.open(second).width > 6 * 128
    assert toy_run.checkpoint(run, 2)["pbe"]["distilled"] == {"sampler": "lcm", "steps": 4, "guidance": 1.0}
    model = pbe.load_model(run / "checkpoints" / "step-00000002.ckpt", device="cpu")
    assert model.config.distilled == Distilled("lcm", 4, 1.0)


def test_merged_adapters_keep_what_they_were_distilled_for(toy, start, tmp_path):
    run = tmp_path / "run"
    lora = "training={train: [], lora: {rank: 2}, ema_decay: null}"
    toy_run.run(toy, f"run={run}", start, *TOY, lora, "trainer.max_steps=2")
    files = [toy.parent / "model.ckpt", run / "checkpoints" / "step-00000002.ckpt", "--out", tmp_path / "merged.ckpt"]
    assert all("lora_" in name for name in toy_run.checkpoint(run, 2)["state_dict"])
    assert checkpoint_main(["merge-adapter", *map(str, files)]) == 0
    assert pbe.load_model(tmp_path / "merged.ckpt", device="cpu").config.distilled.guidance == 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ("training.train=[unet, mapper]", r"training\.train=\['unet', 'mapper'\].* is \[unet\]"),
        ("training.drop_exemplar=0.2", r"drop_exemplar=0, got noise, 1 and 0\.2"),
        ("training.loss=velocity", r"training\.loss=noise, .* got velocity"),
        ("distillation.guidance=[5, 1]", r"\[lowest, highest\], got \[5\.0, 1\.0\]"),
        ("distillation.guidance=[5]", r"distillation\.guidance must be a list of two numbers.*got \[5\.0\]"),
        ("distillation.huber=0", r"distillation\.huber must be .* above 0, got 0"),
    ],
)
def test_mistakes_name_the_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(["task=distill", "data.val_size=4", settings])


def test_configs_are_distillations():
    for name in ("distill_lora", "demo/distill"):
        config = load_config([str(toy_run.ROOT / "configs" / f"{name}.yaml")])
        assert isinstance(config, DistillationRun)
        assert config.training.val_timesteps == [259, 499, 759, 999]
