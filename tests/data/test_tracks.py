"""Pairs of frames: which are chosen, what is written of them, and what training makes of that."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.cli.pair_frames import main
from pbe.data.example import make_generator
from pbe.data.manifest import Manifest
from pbe.data.recipe import make_example
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import Record
from pbe.data.tracks import Frame, choose_pairs, read_frames


def gray(frame, track):
    return 10 * frame + 100 * track


@pytest.fixture
def video(tmp_path):
    """8 frames of 80x60 with two objects of 20x20, whose gray says frame and track; a mask for the second."""
    (tmp_path / "clip").mkdir()
    rows = ["image,track,frame,x0,y0,x1,y1,mask,label"]
    for frame in range(8):
        picture, mask = Image.new("RGB", (80, 60), (0, 0, 200)), Image.new("L", (80, 60))
        for track in (0, 1):
            box = (40 * track + frame, 20, 40 * track + frame + 20, 40)
            picture.paste((gray(frame, track),) * 3, box)
            name = ""
            if track:
                name = f"clip/mask{frame}.png"
                mask.paste(255, box)
                mask.save(tmp_path / name)
            rows.append(f"clip/{frame}.png,{track},{frame},{','.join(map(str, box))},{name},square")
        picture.save(tmp_path / "clip" / f"{frame}.png")
    path = tmp_path / "tracks.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def numbers(row):
    """Target frame, exemplar frame and track of a written row, the latter from the exemplar's middle pixel."""
    target = int(row["image"].rpartition("/")[2][0])
    with Image.open(row["folder"] / row["exemplar"]) as picture:
        value = picture.getpixel((picture.width // 2, picture.height // 2))[0]
    track = value // 100
    return target, round((value - 100 * track) / 10), track


def pairs_of(folder):
    with (folder / "pairs.csv").open() as file:
        return [{**row, "folder": folder} for row in csv.DictReader(file)]


def test_exemplars_are_of_other_frames_of_the_track(video, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert main([str(video), "--out", str(out), "--pairs", "2", "--min-gap", "3"]) == 0
    assert "32 pairs of 16 boxes" in capsys.readouterr().out
    rows = pairs_of(out)
    for row in rows:
        target, exemplar, track = numbers(row)
        assert abs(target - exemplar) >= 3
        assert float(row["x0"]) == pytest.approx((40 * track + target) / 80, abs=1e-6)
        assert (row["mask"] != "", row["label"]) == (track == 1, "square")
    assert len({numbers(row) for row in rows}) == 32
    assert main([str(video), "--out", str(out)]) == 2
    assert "exists; --force" in capsys.readouterr().err
    assert main([str(video), "--out", str(out), "--force"]) == 0
    assert len(pairs_of(out)) == 16


def test_exemplars_have_the_usual_margin_or_white_around_their_mask(video, tmp_path):
    out = tmp_path / "out"
    assert main([str(video), "--out", str(out)]) == 0
    boxed, masked = (next(row for row in pairs_of(out) if bool(row["mask"]) is given) for given in (False, True))
    with Image.open(out / boxed["exemplar"]) as picture:
        frame = numbers(boxed)[1]
        assert picture.size == (20 + min(1, frame) + 1, 22)  # 10 pixels of 1024
    with Image.open(out / masked["exemplar"]) as picture:
        assert picture.size == (20, 20)


def test_what_training_makes_of_a_pair(video, tmp_path):
    out = tmp_path / "out"
    assert main([str(video), "--out", str(out)]) == 0
    manifest = Manifest(out / "pairs.csv")
    assert len(manifest) == 16
    record = manifest[0]
    assert record.is_paired
    plain, turned = (
        make_example(record, RecipeConfig(resolution=32, exemplar_size=16, **options), make_generator(0)).example
        for options in ({"augment": False}, {"flip": 0, "blur": 0, "warp": 0, "rotation": 1.0})
    )
    assert torch.equal(plain.image, plain.source)
    assert not torch.equal(plain.exemplar, turned.exemplar)  # augmentation is not for the photo's own object alone


def test_the_choice_follows_from_the_seed(video):
    frames, problems = read_frames(video)
    assert not problems
    first = choose_pairs(frames, None, 1, 0)
    assert first == choose_pairs(frames, None, 1, 0) != choose_pairs(frames, None, 1, 1)
    assert all(frames[a].track == frames[b].track for a, b in first)


def test_a_tenth_of_a_track_lies_between_by_default(tmp_path):
    box = np.float32([[0.1, 0.1, 0.6, 0.6]])
    frames = [Frame(Record(tmp_path / f"{i}.png", box), None, (tmp_path, "a"), 2 * i) for i in range(41)]
    gaps = [abs(a - b) for a, b in choose_pairs(frames, None, 100, 0)]
    assert min(gaps) == 4
    assert max(gaps) == 40
    assert {a for a, _ in choose_pairs(frames, 60, 1, 0)} == {*range(11), *range(30, 41)}


def test_rows_without_frame_numbers_are_in_order_and_tracks_go_by_folder(video, tmp_path):
    rows = video.read_text().splitlines()
    cut = [",".join(cell for k, cell in enumerate(row.split(",")) if k != 2) for row in rows]
    video.write_text("\n".join(cut).replace("track", "track_id"))
    frames, _ = read_frames(video)
    assert [frame.time for frame in frames[::2]] == list(range(8))
    assert frames[0].track == (tmp_path / "clip", "0")


@pytest.mark.filterwarnings("ignore::pbe.data.records.DataWarning")
def test_boxes_and_tracks_without_a_pair_are_counted(video, tmp_path, capsys):
    rows = video.read_text().splitlines()
    lone = ["clip/0.png,9,0,1,1,9,9,,", "clip/1.png,0,9,70,20,99,40,,", "clip/gone.png,0,9,1,1,9,9,,"]
    video.write_text("\n".join([*rows, *lone]))
    assert main([str(video), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "16 pairs of 17 boxes; 1 tracks without a pair" in text
    assert "2 boxes left out; the first: " in text
    assert "its box [70.0, 20.0, 99.0, 40.0] is not inside it" in text


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (lambda text: text.replace("track", "trakc", 1), (), "unknown column 'trakc'; did you mean 'track'?"),
        (lambda text: text.replace("track", "object", 1), (), "line 2: it has no track; it has: "),
        (
            lambda text: text.replace("png,0,5,", "png,0,,"),
            (),
            "line 12: all rows have a frame, or none; it has: ",
        ),
        (lambda text: text.replace("png,0,5,", "png,0,five,"), (), "line 12: frame must be a number, got 'five'"),
        (lambda text: text.replace("x1", "z1", 1), (), "it has no x1"),
        (lambda text: "\n".join(text.splitlines()[:3]), (), "no track has a box in two pictures"),
        (str, ("--min-gap", "8"), "no track has a box in two pictures at least 8 frames apart"),
        (str, ("--pairs", "0"), "--pairs must be at least 1, got 0"),
    ],
)
def test_mistakes(video, tmp_path, capsys, change, flags, message):
    video.write_text(change(video.read_text()))
    assert main([str(video), "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()
