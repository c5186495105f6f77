"""What would go wrong on a GPU alone: tensors of two devices met, and waiting for the device where nobody need.

Tensors that only claim to be on one stand for it: they have no values, so to read one, which makes a CPU wait, is an
error, and so is a CPU's tensor among them. The last tests compute on a GPU where there is one.
"""

import pytest
import torch
import toy_run
from conftest import TINY
from golden_file import noise
from marks import rest_slow
from torch.utils._python_dispatch import TorchDispatchMode

import pbe
from pbe.acceleration import prepare_for_inference, strips
from pbe.checkpoints.seeding import seeded_state
from pbe.models.lora import LoRAConfig
from pbe.models.paint_by_example import Condition, PaintByExample
from pbe.sampling import SAMPLERS, NoiseSchedule, guided_eps, leading, make_generators, randn
from pbe.training.loss import loss_weights
from pbe.training.module import PaintByExampleTraining, TrainingConfig
from tests.training import test_module as test_training

fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")

SCHEDULE = NoiseSchedule.scaled_linear()
DEVICE = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def claimed(monkeypatch):
    """New tensors have no values; those made for "cuda" or moved there count as a GPU's."""
    grid = NoiseSchedule.grid

    def read_grid(*args, **kwargs):
        with fake_tensor.unset_fake_temporarily():  # the schedule's own values, on the CPU, are there
            return grid(*args, **kwargs)

    monkeypatch.setattr(NoiseSchedule, "grid", read_grid)
    monkeypatch.setattr(NoiseSchedule, "scaled_linear", lambda: SCHEDULE)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        yield


def model_on_gpu(dtype: torch.dtype) -> PaintByExample:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return PaintByExample(TINY).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def condition_on_gpu(model: PaintByExample, batch: int) -> Condition:
    """Of a window whose sides `downsampling` does not divide."""
    pictures = torch.zeros(batch, 3, 63, 70), torch.zeros(batch, 1, 63, 70), torch.zeros(batch, 3, 28, 28)
    return model.condition(*(x.to(model.device, model.dtype) for x in pictures))


# --- editing ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("claimed")
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param("ordinary", torch.float32, marks=pytest.mark.slow),
        pytest.param("shared", torch.float16, marks=pytest.mark.slow),
        ("consumed", torch.float16),
        pytest.param("consumed", torch.float32, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_an_edit_stays_on_its_device_and_its_loop_waits_for_nothing(form, dtype):
    model = model_on_gpu(dtype)
    if form != "ordinary":
        model = prepare_for_inference(model, consume=form == "consumed")
    condition = condition_on_gpu(model, batch=2)
    for sampler in SAMPLERS.values():
        generators = make_generators(0, 2)
        x_T = randn(condition.z_masked.shape[1:], generators, model.device)
        eps = guided_eps(model, condition, 5.0, leading(SCHEDULE, 2))
        z_0 = sampler(eps, x_T, leading(SCHEDULE, 2), generators=generators)
        assert (z_0.device.type, z_0.dtype, z_0.shape) == ("cuda", torch.float32, condition.z_masked.shape)
    picture = model.vae.decode(z_0.to(dtype))
    assert (picture.device.type, picture.dtype, picture.shape) == ("cuda", dtype, (2, 3, 64, 72))


@pytest.mark.usefixtures("claimed")
@torch.no_grad()
def test_what_waits_and_what_lies_on_the_cpu_would_be_found():
    """The test above can fail: the timesteps of an interval are read, and noise that was left behind is met."""
    model = prepare_for_inference(model_on_gpu(torch.float16))
    condition = condition_on_gpu(model, batch=1)
    x_T = randn(condition.z_masked.shape[1:], make_generators(0, 1), model.device)
    eps = guided_eps(model, condition, 5.0, leading(SCHEDULE, 2), interval=(0, 600))
    with pytest.raises(fake_tensor.DataDependentOutputException):
        SAMPLERS["ddim"](eps, x_T, leading(SCHEDULE, 2))
    eps = guided_eps(model, condition, 5.0, leading(SCHEDULE, 2))
    with pytest.raises(RuntimeError, match=r"two (different )?devices"):
        SAMPLERS["ddim"](eps, x_T.cpu(), leading(SCHEDULE, 2))


@pytest.mark.slow
@pytest.mark.usefixtures("claimed")
@torch.no_grad()
def test_large_pictures_in_strips_give_a_gpu_the_layout_that_its_norm_takes(monkeypatch):
    """CUDA's kernel stops at channels-last values: `Expected X.is_contiguous(memory_format) to be true`."""
    monkeypatch.setattr(strips, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(strips, "STRIP_VALUES", 5000)
    native, seen = torch.native_group_norm, []

    def checked(x, *args):
        assert x.is_contiguous()
        seen.append(x.device.type)
        return native(x, *args)

    monkeypatch.setattr(torch, "native_group_norm", checked)
    model = prepare_for_inference(model_on_gpu(torch.float16), consume=True)
    z = torch.zeros(1, 4, 12, 9, dtype=torch.float16, device="cuda")
    picture = model.vae.decode(z)
    assert (picture.device.type, picture.shape) == ("cuda", (1, 3, 48, 36))
    assert model.vae.encode(picture).mean.shape == z.shape
    assert set(seen) == {"cuda"}


@pytest.mark.usefixtures("claimed")
@torch.no_grad()
def test_every_convolution_is_channels_last_on_a_gpu_in_16_bits():
    """A 1x1 kernel too, by its strides: from them CUDA chooses the layout that it computes in."""
    model = prepare_for_inference(model_on_gpu(torch.float16), consume=True)
    weights = [m.weight for part in (model.unet, model.vae) for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
    assert any(weight.shape[2:] == (1, 1) for weight in weights)
    assert all(weight.stride() == strides_of_channels_last(weight.shape) for weight in weights)


def strides_of_channels_last(shape: torch.Size) -> tuple[int, ...]:
    _, C, H, W = shape
    return C * H * W, 1, C * W, C


# --- training ---------------------------------------------------------------------------------------------------------


class CopiesToGPU(TorchDispatchMode):
    """Whether the CPU waits for each copy of its own to a GPU, and so for all that the GPU was given before."""

    def __init__(self):
        super().__init__()
        self.waited_for: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].device.type, result.device.type) == ("cpu", "cuda"):
            self.waited_for.append(not (kwargs or {}).get("non_blocking", False))
        return result


@pytest.mark.usefixtures("claimed")
@pytest.mark.parametrize(
    "settings",
    rest_slow(
        [
            {"loss": "velocity"},
            {"frozen": "bfloat16", "norms": "half", "gradient_checkpointing": 1},
            {"frozen": "bfloat16", "train": [], "lora": LoRAConfig(rank=2)},
            {"frozen": "bfloat16", "train": [], "lora": LoRAConfig(rank=2, targets="all", dora=True)},
        ]
    ),
    ids=["plain", "half", "adapters", "DoRA"],
)
def test_a_training_loss_is_made_on_its_device_and_waits_for_nothing(settings, monkeypatch):
    """Until it is read, whether it is finite."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)  # autocast as on a GPU
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with torch.device("cuda"):
        model = PaintByExample(TINY)
    module = PaintByExampleTraining(model, TrainingConfig(**settings), test_training.OptimizerConfig())
    with fake_tensor.unset_fake_temporarily():
        batch = module.on_before_batch_transfer(test_training.example(), 0)
    batch = module.transfer_batch_to_device(batch, torch.device("cuda"), 0)
    with CopiesToGPU() as copies:
        with torch.autocast("cuda", torch.bfloat16):
            losses = module.batch_losses(batch)
        loss = (losses * loss_weights(module.schedule, batch.draws.t, module.config.loss)).mean()
    assert copies.waited_for == [False] * len(copies.waited_for) != []
    bands = module.by_band(losses.detach(), batch.draws.t)
    assert {(x.device.type, x.dtype) for x in (loss, *bands.values())} == {("cuda", torch.float32)}
    assert loss.requires_grad


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def seeded_model() -> PaintByExample:
    model = PaintByExample(TINY)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.requires_grad_(False)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.cpu().double() - expected.cpu().double()).norm() / expected.double().norm().cpu()).item()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_gpu_computes_what_a_cpu_does(dtype, monkeypatch):
    """To a few times the rounding of 16 bits, or of the TensorFloat-32 of convolutions, through about 60 layers."""
    unet_in, context, z = noise("x", 2, 9, 8, 8), noise("context", 4, 1, 64), noise("z", 1, 4, 12, 9)
    t = torch.tensor([441, 441])
    plain = prepare_for_inference(seeded_model())
    expected, picture = plain.unet(unet_in, t, context), plain.vae.decode(z)
    model = prepare_for_inference(seeded_model().to(DEVICE, dtype), consume=True)
    unet_in, context, z = (x.to(DEVICE, dtype) for x in (unet_in, context, z))
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert relative(model.unet.bind(context, [1, 441])(unet_in, t.to(DEVICE)), expected) < tolerance
    assert relative(model.vae.decode(z), picture) < tolerance
    monkeypatch.setattr(strips, "WHOLE_PIXELS", 0)
    monkeypatch.setattr(strips, "STRIP_VALUES", 5000)
    assert relative(model.vae.decode(z), picture) < tolerance


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("reuse", [1, 2])
@torch.no_grad()
def test_predictions_of_a_cuda_graph_last(reuse):
    """A replay writes over the last one's; multistep samplers keep four, and deep features are used again."""
    plain = prepare_for_inference(seeded_model().to(DEVICE, torch.float16), consume=True)
    model = prepare_for_inference(seeded_model().to(DEVICE, torch.float16), consume=True, compile="whole")
    context, t = noise("context", 2, 1, 64).to(DEVICE, torch.float16), torch.tensor([441], device=DEVICE)
    inputs = [noise(f"x{i}", 1, 9, 8, 8).to(DEVICE, torch.float16) for i in range(5)]
    predict, expected = (one.unet.bind(context, [441], reuse) for one in (model, plain))
    predictions = [predict(x, t) for x in inputs]  # the first ones are computed and recorded, the last are replayed
    assert all(relative(y, expected(x, t)) < 0.02 for x, y in zip(inputs, predictions, strict=True))


@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_a_run_trains_on_a_gpu(precision, tmp_path):
    """With all that a run has: clipping, averages, validation, sample grids, checkpoints, and going on from one."""
    toy, run = toy_run.write(tmp_path), tmp_path / "run"
    settings = ["trainer.accelerator=gpu", "trainer.devices=1", f"trainer.precision={precision}"]
    settings += [
        "trainer.gradient_clip_val=1.0",
        "samples={every_n_steps: 2, edit: {steps: 2}, count: 2}",
        f"run={run}",
    ]
    settings += ["trainer.val_check_interval=2", "training.gradient_checkpointing=1"]
    if precision != "32-true":
        settings += [f"training.frozen={'float16' if precision == '16-mixed' else 'bfloat16'}", "training.norms=half"]
    toy_run.run(toy, *settings, "trainer.max_steps=2")
    toy_run.run(toy, *settings, "trainer.max_steps=4", "--resume")
    losses = toy_run.metrics(run, "train/loss")
    assert sorted(losses) == [1, 2, 3, 4]
    assert all(0 < loss < 10 for loss in losses.values())
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    assert 0 < toy_run.metrics(run, "peak_memory_gib")[4] < 1  # the device's, not the process's
    assert pbe.load_model(run / "checkpoints/step-00000004.ckpt", DEVICE).dtype == torch.float16
