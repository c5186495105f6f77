"""What several test files share."""

import os
import signal
from pathlib import Path

import golden_file
import pytest
import torch

from pbe.checkpoints.infer_config import pbe_entry
from pbe.models.clip import CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig

# The networks here are so small that threads cost more than they save, most of all on a busy machine. Here and in the
# processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background jobs ignore Ctrl+C, what nohup starts SIGHUP, and so would the processes that tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

TINY = PaintByExampleConfig(
    unet=UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0,), context_dim=64),
    vae=VAEConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1),
    exemplar=ExemplarConfig(
        vision=CLIPVisionConfig(width=64, num_layers=2, num_heads=2, patch_size=14, image_size=28, mlp_width=128),
        mapper_layers=1,
    ),
    resolution=64,
)


@pytest.fixture(scope="session", autouse=True)
def _auto_is_float32():
    """What a test computes does not hang on the processor: dtype "auto" is float32 on a CPU, if it does not ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pbe.checkpoints.loading.has_native_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A file of Paint by Example with random weights, small enough to edit in a blink."""
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in PaintByExample(TINY).state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt"
    state = {name: golden_file.parameter(name, shape) for name, shape in shapes.items()}
    torch.save({"state_dict": state, "pbe": pbe_entry(TINY)}, path)
    return path


@pytest.fixture
def one_thread():
    """Small networks gain nothing from threads, which wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
