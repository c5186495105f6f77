"""The released model's sizes, with random weights in the original layout: slow, 6 GB of disk and of memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.cli import checkpoint
from pbe.cli import edit as inference

pytestmark = pytest.mark.slow

SHARED_PHOTO = Path(__file__).parents[2] / "shared" / "data" / "hires" / "backpack_dog_00.jpg"

LOAD = """
import json, sys
from pathlib import Path
import pbe
model = pbe.load_model(sys.argv[1], device="cpu", dtype=sys.argv[2])
parameters = sum(p.numel() for p in model.parameters())
total = sum(float(p.detach().flatten()[::1024].float().sum()) for p in model.parameters())  # reads every page
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(json.dumps({"parameters": parameters, "peak_gib": peak / 2**20}))
"""


@pytest.fixture(scope="module")
def full_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "model.ckpt"
    assert checkpoint.main(["seed", "--size", "full", "--out", str(path)]) == 0
    yield path
    path.unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory from /proc")
@pytest.mark.parametrize(("dtype", "most_gib"), [("float32", 1.15 * 4.88), ("bfloat16", 3.2)])
def test_loading_holds_no_second_copy(full_checkpoint, dtype, most_gib):
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(full_checkpoint), dtype], capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout)
    assert found["parameters"] == pytest.approx(1.310e9, rel=1e-3)
    assert found["peak_gib"] < most_gib


def test_edits_a_large_photo(full_checkpoint, tmp_path):
    """A shared photo of 1440 x 1440 pixels where there is one, else noise of that size."""
    if SHARED_PHOTO.exists():
        values = np.asarray(Image.open(SHARED_PHOTO).convert("RGB"))
    else:
        values = np.random.default_rng(0).integers(0, 256, (1440, 1440, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    Image.fromarray(values[:300, :300]).save(tmp_path / "exemplar.png")
    arguments = {
        "--ckpt": full_checkpoint,
        "--image": tmp_path / "photo.png",
        "--box": "900,600,1200,900",
        "--exemplar": tmp_path / "exemplar.png",
        "--out": tmp_path / "edited.png",
        "--steps": 2,
        "--dtype": "bfloat16",
    }
    assert inference.main([str(x) for pair in arguments.items() for x in pair]) == 0
    edited = np.asarray(Image.open(tmp_path / "edited.png"))
    repaint = np.zeros(values.shape[:2], bool)
    repaint[600:900, 900:1200] = True
    assert np.array_equal(edited[~repaint], values[~repaint])
    assert (edited[repaint] != values[repaint]).any(axis=1).mean() > 0.9
