"""What the larger model in the box is trained with: packed photos, and the weights it starts from."""

import csv
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pbe
from examples.demo_model import pack, warm_start
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.checkpoints.writing import save_checkpoint
from pbe.data.manifest import Manifest
from pbe.models.vae import AutoencoderKL, VAEConfig
from pbe.training.config import load_config
from pbe.training.initialization import seeded, starting_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manifests(tmp_path):
    """A manifest in pixels as split_photos writes it, and one in fractions and with masks as `pbe cut-out` does."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        picture = np.full((150, 300, 3), 40 + 60 * i, dtype=np.uint8)
        picture[30:90, 60:180] = (200, 30, 30)
        Image.fromarray(picture).save(photos / f"{i}.jpg")
    mask = np.zeros((150, 300), dtype=np.uint8)
    mask[30:90, 60:180] = 255
    Image.fromarray(mask).save(photos / "mask.png")
    (tmp_path / "train.csv").write_text(
        "file,class,width,height,x0,y0,x1,y1\nphotos/0.jpg,a,300,150,60,30,180,90\nphotos/1.jpg,b,300,150,60,30,180,90\n"
    )
    (tmp_path / "objects.csv").write_text(
        "image,mask,label,x0,y0,x1,y1\nphotos/0.jpg,photos/mask.png,a,0.2,0.2,0.6,0.6\n"
    )
    return [tmp_path / "train.csv", tmp_path / "objects.csv"]


def test_a_pack_has_the_records_of_its_manifests(manifests, tmp_path, capsys):
    out, there = tmp_path / "pack.zip", tmp_path / "there"
    assert pack.main([*map(str, manifests), "--side", "75", "--out", str(out)]) == 0
    assert "2 photos" in capsys.readouterr().out
    with zipfile.ZipFile(out) as packed:
        packed.extractall(there)
    assert sorted(path.suffix for path in there.iterdir()) == [".csv", ".csv", ".png", ".webp", ".webp"]
    for manifest in manifests:
        before, after = Manifest(manifest), Manifest(there / manifest.name)
        assert len(before) == len(after)
        for i in range(len(before)):
            a, b = before[i], after[i]
            np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-6)
            assert a.labels == b.labels
            with Image.open(a.image) as old, Image.open(b.image) as new:
                assert new.size == (150, 75)
                difference = np.asarray(old.resize((150, 75)), dtype=float) - np.asarray(new.convert("RGB"))
                assert np.abs(difference).mean() < 6
    (mask,) = after[0].masks
    with Image.open(mask.path) as kept:
        assert kept.mode == "1"
    drawn = mask.draw((75, 150))
    assert drawn[15:45, 30:90].mean() > 0.95
    assert drawn.sum() < 1.1 * 30 * 60


def test_boxes_in_pixels_of_an_unknown_size_are_not_packed(manifests, tmp_path, capsys):
    with manifests[1].open() as file:
        rows = [{**row, "x0": "60", "x1": "180"} for row in csv.DictReader(file)]
    with manifests[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert pack.main([str(manifests[1]), "--out", str(tmp_path / "pack.zip")]) == 2
    assert "objects.csv, line 2: a box in pixels needs the photo's width and height" in capsys.readouterr().err
    assert not Path(tmp_path / "pack.zip").exists()


@torch.no_grad()
def test_the_larger_model_starts_with_what_the_smaller_one_learned(tmp_path):
    size = VAEConfig(channels=32, channel_mult=(1, 1, 1), num_res_blocks=1, latent_channels=4, latent_scale=1.0)
    state = {VAE_PREFIX + name: x for name, x in seeded(AutoencoderKL, size, seed=0).state_dict().items()}
    old_file, vae, start = (str(tmp_path / name) for name in ("old.ckpt", "vae.ckpt", "start.ckpt"))
    torch.save({"state_dict": state, "pbe": {"latent_scale": 0.5}}, vae)
    old = starting_model(load_config([str(ROOT / "configs/demo/unet.yaml"), f"model.vae={vae}"]).model, seed=3)
    save_checkpoint(old.state_dict(), Path(old_file), pbe_entry(old.config))
    assert warm_start.main([old_file, vae, "--out", start]) == 0

    new = pbe.load_model(start, "cpu", torch.float32)
    assert new.config.resolution == new.config.exemplar.vision.image_size == 128
    assert new.config.vae.latent_scale == 0.5
    exemplar = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    larger = exemplar.repeat_interleave(2, 2).repeat_interleave(2, 3)
    tokens = [m.cond_stage_model.vision.tokens(x) for m, x in ((new, larger), (old, exemplar))]
    torch.testing.assert_close(*tokens, atol=1e-4, rtol=1e-4)
    assert new.encode_exemplar(larger).shape == (2, 65, 256)
    taken = old.unet.state_dict()
    assert all(torch.equal(x, taken[name]) for name, x in new.unet.state_dict().items())


# --- the script for a GPU ---------------------------------------------------------------------------------

# stands for python3: notes how it is to train, and leaves files where the networks' would be
PYTHON = """#!/usr/bin/env bash
for argument; do
    [[ $argument != run=* ]] || run=${argument#run=}
    [[ ${before:-} != --out ]] || out=$argument
    before=$argument
done
if [[ $1 == tools/train.py ]]; then
    printf '%s\\n' "${@:2}" -- >>"$COMMANDS"
    mkdir -p "$run/checkpoints" "$run/samples"
    touch "$run/checkpoints/step-00000100.ckpt" "$run/metrics.jsonl" "$run/samples/step-00000100.png"
elif [[ -n ${out:-} ]]; then
    head -c 27500000 /dev/zero >"$out"
fi
"""


@pytest.mark.parametrize("steps", ["", "2"])
def test_the_script_for_a_gpu_trains_each_network_twice(steps, tmp_path):
    python, commands, out = tmp_path / "python3", tmp_path / "commands", tmp_path / "out"
    python.write_text(PYTHON)
    python.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMANDS": str(commands), "OUT": str(out), "STEPS": steps}
    script = str(ROOT / "examples/demo_model/gpu.sh")
    subprocess.run(["bash", script], env=os.environ | variables, check=True, timeout=240, cwd=tmp_path)

    trained = [one.strip().splitlines() for one in commands.read_text().split("--\n")[:-1]]
    runs = [load_config([str(ROOT / config), *settings]) for config, *settings in trained]
    assert [(run.task, Path(run.run).name) for run in runs] == [
        ("vae", "vae-1"),
        ("vae", "vae"),
        ("paint_by_example", "unet-1"),
        ("paint_by_example", "unet"),
    ]
    assert [run.optimizer.decay_steps is None for run in runs] == [True, False, True, False]
    assert runs[1].init == f"{runs[0].run}/checkpoints/step-00000100.ckpt"
    assert runs[2].encodings == runs[3].encodings
    for run in runs:
        if steps:
            assert run.trainer["max_steps"] == 2
        else:
            assert 0 < run.trainer["max_time"]["seconds"] < 540
    files = sorted(path.name for path in out.iterdir())
    assert files == [
        "edits.png",
        "log.txt",
        "model.ckpt.00",
        "model.ckpt.01",
        "samples.png",
        "unet.jsonl",
        "vae.ckpt",
        "vae.jsonl",
    ]
    assert all((out / name).stat().st_size <= 16 * 2**20 for name in files if name.startswith("model"))
