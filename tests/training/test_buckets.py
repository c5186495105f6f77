"""A run on photos of several shapes: batches of one shape train, validate and draw samples, and resume bit for bit."""

import pytest
import toy_run
from PIL import Image
from toy_run import assert_same_run

SETTINGS = (
    "data.recipe.fit=buckets",
    "trainer.max_steps=7",
    "checkpoint.every_n_steps=3",
    "checkpoint.keep=5",
    "samples={every_n_steps: 4, edit: {steps: 1}}",
)


@pytest.mark.slow
def test_photos_of_several_shapes(tmp_path):
    toy = toy_run.write(tmp_path)
    rows = ["file,x0,y0,x1,y1"]
    for i in range(toy_run.NUM_PICTURES):
        path = tmp_path / "images" / f"{i}.png"
        with Image.open(path) as picture:
            picture.resize([(64, 64), (96, 64), (48, 64)][i % 3]).save(path)
        rows.append(f"{i}.png,0.3,0.25,0.7,0.75")
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    toy_run.run(toy, f"run={whole}", *SETTINGS)
    assert len(toy_run.metrics(whole, "train/loss")) == 7
    assert (whole / "samples" / "step-00000004.png").is_file()

    toy_run.run(toy, f"run={rest}", *SETTINGS, "trainer.max_steps=3")  # within an epoch of 5 steps
    toy_run.run(toy, f"run={rest}", *SETTINGS, "--resume")
    assert_same_run(rest, whole, 7)
    toy_run.run(toy, f"run={tmp_path / 'dry'}", *SETTINGS, "--dry-run")
    assert (tmp_path / "dry" / "first_batch.png").is_file()
