"""Masks from boxes, the manifest of what was cut out, and the tool that splits photos."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

cv2 = pytest.importorskip("cv2")

from pbe.cli import cut_out as cli  # noqa: E402
from pbe.data.manifest import Manifest  # noqa: E402
from pbe.images.grabcut import is_whole, segment  # noqa: E402
from pbe.images.windows import Box  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def scene(height=120, width=160, radius=30):
    """A picture of a red ring before green, both uneven, and the mask (H, W) of the ring with its small hole filled."""
    rng = np.random.default_rng(0)
    distance = np.hypot(*(np.indices((height, width)) - np.array([60, 80])[:, None, None]))
    disc = distance <= radius
    picture = np.where((disc & (distance > 3))[..., None], (190, 40, 30), (40, 150, 60))
    return (picture + rng.integers(-25, 26, picture.shape)).astype(np.uint8), disc


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_the_object_is_found_in_its_box_and_its_hole_filled():
    picture, disc = scene()
    assert overlap(segment(picture, Box(45, 25, 115, 95)), disc) > 0.97
    assert segment(picture, Box(45, 25, 115, 95))[60, 80]


def test_a_narrow_strip_outside_of_the_box_is_no_hole():
    noise = np.random.default_rng(0).integers(-25, 26, (61, 60, 3))
    colours = np.where(np.arange(61)[:, None, None] < 60, (190, 40, 30), (40, 150, 60))
    found = segment((colours + noise).astype(np.uint8), Box(0, 0, 60, 60))
    assert found[:60].mean() > 0.98
    assert not found[60].any()


def test_the_largest_piece_is_taken():
    picture, disc = scene()
    picture[30:36, 130:136] = (190, 40, 30)
    assert overlap(segment(picture, Box(45, 20, 140, 95)), disc) > 0.95


def test_what_is_whole():
    box = Box(10, 10, 50, 50)
    masks = {name: np.zeros((60, 60), dtype=bool) for name in ("empty", "disc", "all", "half", "strip")}
    masks["disc"][np.hypot(*(np.indices((60, 60)) - 29.5)) < 20] = True
    masks["all"][box.slices] = True
    masks["half"][10:50, 10:40] = True
    masks["strip"][28:32, 10:50] = True
    assert [name for name, mask in masks.items() if is_whole(mask, box)] == ["disc"]


@pytest.mark.slow
def test_a_manifest_of_what_was_cut_out(tmp_path, capsys):
    picture, disc = scene()
    (tmp_path / "photos").mkdir()
    Image.fromarray(picture).save(tmp_path / "photos" / "a.png")
    Image.fromarray(picture).resize((1600, 1200)).save(tmp_path / "photos" / "large.png")
    given = disc.copy()
    given[60:] = False
    Image.fromarray(given).save(tmp_path / "given.png")
    rows = [
        "photos/a.png,,ring,48,28,113,93",
        "photos/a.png,,grass,2,2,30,20",
        "photos/large.png,,ring,480,280,1130,930",
    ]
    (tmp_path / "boxes.csv").write_text("file,mask,class,x0,y0,x1,y1\n" + "\n".join(rows) + "\n")
    (tmp_path / "masks.csv").write_text("file,mask,class,x0,y0,x1,y1\nphotos/a.png,given.png,top,48,28,113,60\n")
    command = [str(tmp_path / "boxes.csv"), str(tmp_path / "masks.csv"), "--out", str(tmp_path / "out" / "objects")]
    assert cli.main(command) == 0
    assert "3 of 4 objects" in capsys.readouterr().out

    found = Manifest(tmp_path / "out" / "objects" / "objects.csv")
    records = sorted((found[i] for i in range(len(found))), key=lambda record: record.labels[0] + record.image.name)
    assert len(records) == 2  # the rows of one photo are one record
    ring, top = (records[0].masks[k].draw((120, 160)) for k in np.argsort(records[0].labels))
    assert overlap(ring, disc) > 0.97
    assert np.array_equal(top, given)
    assert overlap(records[1].masks[0].draw((1200, 1600))[::10, ::10], disc) > 0.93
    np.testing.assert_allclose(records[1].boxes, [[0.3, 28 / 120, 113 / 160, 93 / 120]], atol=1e-5)
    assert len(list((tmp_path / "out" / "objects" / "masks").iterdir())) == 2

    assert cli.main(command) == 2
    assert "exists; --force" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0


def test_wrong_input_is_named_and_leaves_nothing(tmp_path, capsys):
    Image.new("RGB", (100, 80)).save(tmp_path / "black.png")
    (tmp_path / "black.csv").write_text("image,x0,y0,x1,y1\nblack.png,20,20,60,60\n")
    for argument, message in (("nowhere.csv", "nowhere.csv"), ("black.csv", "none of 1 objects was found whole")):
        assert cli.main([str(tmp_path / argument), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_photo_that_is_gone_keeps_no_other_back(tmp_path, capsys):
    Image.fromarray(scene()[0]).save(tmp_path / "a.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    rows = [f"{name}.png,48,28,113,93\n" for name in ("gone", "damaged", "a")]
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\n" + "".join(rows))
    assert cli.main([str(tmp_path / "boxes.csv"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 objects" in out
    assert "2 photos left out; the first: " in out
    assert f"{tmp_path / 'gone.png'}: there is no such file" in out


def test_without_opencv_the_extra_is_named(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    (tmp_path / "boxes.csv").write_text("image,x0,y0,x1,y1\na.png,20,20,60,60\n")
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.delitem(sys.modules, "pbe.images.grabcut", raising=False)  # which has it already
    assert cli.main([str(tmp_path / "boxes.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "needs OpenCV, the extra masks: pip install -e .[masks]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- examples/demo_model/split_photos.py ----------------------------------------------------------------


def split(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "demo_model" / "split_photos.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_photos_are_split_by_their_names(tmp_path):
    for folder, names in (("a", [f"a{i}" for i in range(30)]), ("b", [f"b{i}" for i in range(30)])):
        (tmp_path / folder / "images").mkdir(parents=True)
        rows = [f"{name}.jpg,kind,50,40,5,5,30,30,{i / 30}" for i, name in enumerate(names)]
        (tmp_path / folder / "boxes.csv").write_text(
            "\n".join(["file,class,width,height,x0,y0,x1,y1,fill", *rows]) + "\n"
        )
    (tmp_path / "b" / "masks").mkdir()
    Image.new("L", (50, 40)).save(tmp_path / "b" / "masks" / "b20.png")

    def files(out):
        return [
            [(out / row["file"]).resolve() for row in csv.DictReader((out / name).open())]
            for name in ("train.csv", "held_out.csv")
        ]

    assert split(tmp_path / "a", "--out", tmp_path / "one", "--every", 3, "--min-fill", 0.5).returncode == 0
    assert split(tmp_path / "b", tmp_path / "a", "--out", tmp_path / "two", "--every", 3).returncode == 0
    (train, held), (both_train, both_held) = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(train) + len(held) == 15
    assert len(both_train) + len(both_held) == 2 * 16  # by default those that are filled to 0.45
    assert set(train) < set(both_train)
    assert set(held) < set(both_held)
    masks = {
        row["file"]: row["mask"]
        for name in ("train.csv", "held_out.csv")
        for row in csv.DictReader((tmp_path / "two" / name).open())
        if row.get("mask")
    }
    assert masks == {"../b/images/b20.jpg": "../b/masks/b20.png"}


def test_splitting_names_what_is_wrong(tmp_path):
    (tmp_path / "boxes.csv").write_text("file,class\na.jpg,x\n")
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere/boxes.csv"),
        ([tmp_path], "has no column 'width'"),
        ([tmp_path, "--every", 1], "--every must be at least 2"),
    ):
        result = split(*arguments, "--out", tmp_path / "out")
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
