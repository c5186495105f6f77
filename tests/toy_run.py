"""A training run so small that a step takes milliseconds: pictures, an autoencoder, a config and what they make."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import golden_file
import numpy as np
import torch
from PIL import Image

from pbe.checkpoints.infer_config import pbe_entry
from pbe.cli.train import main
from pbe.models.vae import AutoencoderKL, VAEConfig
from pbe.training.callbacks.checkpoints import list_checkpoints, step_of
from pbe.training.config import load_config
from pbe.training.initialization import VAE_PREFIX, seeded, starting_model

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 12
OF_A_LAUNCH = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

CONFIG = {
    "model": {
        "init": "scratch",
        "size": {
            "resolution": 32,
            "unet": {
                "model_channels": 32,
                "channel_mult": [1, 2],
                "num_res_blocks": 1,
                "attention_levels": [0],
                "num_heads": 4,
                "context_dim": 32,
            },
            "exemplar": {
                "mapper_layers": 1,
                "vision": {
                    "width": 32,
                    "num_layers": 1,
                    "num_heads": 2,
                    "patch_size": 8,
                    "image_size": 16,
                    "mlp_width": 64,
                },
            },
        },
    },
    "training": {"train": ["unet", "mapper", "final_ln", "proj_out", "null_context", "clip"], "ema_decay": 0.9},
    "optimizer": {"lr": 1e-3, "warmup_steps": 4},
    "data": {"val_size": 2, "batch_size": 2, "workers": 0, "recipe": {"resolution": 32, "exemplar_size": 16}},
    "checkpoint": {"every_n_steps": 5, "keep": 2},
    "samples": {"every_n_steps": None},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 10,
        "log_every_n_steps": 1,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


def write(folder: Path) -> Path:
    """Pictures with a manifest, `vae.ckpt`, and the config `toy.yaml`, whose path it returns."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with (folder / "boxes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "width", "height", "x0", "y0", "x1", "y1"])
        for i in range(NUM_PICTURES):
            picture = rng.integers(0, 256, (3,)) * np.ones((64, 64, 1)) // 2
            picture[16:48, 20:44] = rng.integers(0, 256, (3,))
            Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / f"{i}.png")
            rows.writerow([f"{i}.png", 64, 64, 20, 16, 44, 48])
    vae = seeded(AutoencoderKL, VAEConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1, latent_scale=1.0), seed=0)
    state = {VAE_PREFIX + name: tensor for name, tensor in vae.state_dict().items()}
    torch.save({"state_dict": state, "pbe": {"latent_scale": 0.5}}, folder / "vae.ckpt")
    config = {
        **CONFIG,
        "run": str(folder / "run"),
        "model": {**CONFIG["model"], "vae": str(folder / "vae.ckpt")},
        "data": {**CONFIG["data"], "source": {"kind": "manifest", "path": str(folder / "boxes.csv")}},
    }
    (folder / "toy.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "toy.yaml"


def write_model(folder: Path) -> Path:
    """A checkpoint of the toy's model in which no weight is zero: at a start from scratch few have a gradient."""
    model = starting_model(load_config([str(folder / "toy.yaml")]).model, seed=0)
    state = {name: golden_file.parameter(name, list(x.shape)) for name, x in model.state_dict().items()}
    torch.save({"state_dict": state, "pbe": pbe_entry(model.config)}, folder / "model.ckpt")
    return folder / "model.ckpt"


def run(*arguments: object) -> None:
    """`tools/train.py` in this process, on one thread, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*map(str, arguments)]) == 0
    finally:
        torch.set_num_threads(threads)


def start(*arguments: object, start_new_session: bool = False) -> subprocess.Popen:
    """`tools/train.py` in a process of its own, on one thread."""
    # without what Lightning left of a launch in this process: another process would be awaited, and not started
    inherited = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCH}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "train.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=start_new_session, **pipes)


def finish(process: subprocess.Popen) -> str:
    """What a process printed, once it has ended well."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def metrics(run: Path, name: str) -> dict[int, float]:
    """A logged value by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def checkpoint(run: Path, step: int) -> dict:
    return torch.load(run / "checkpoints" / f"step-{step:08}.ckpt", weights_only=True)


def checkpoint_steps(run: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


def same(a, b):
    """Whether nested containers hold equal values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(run: Path, whole: Path, end: int) -> None:
    for name in ("train/loss", "train/loss_t500-749", "val/loss", "val/exemplar_gain", "lr"):
        assert metrics(run, name) == metrics(whole, name), name
    last, expected = checkpoint(run, end), checkpoint(whole, end)
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "data_position"):
        assert same(last[name], expected[name]), name
