"""OpenImages: the index of its boxes, and the source that reads it."""

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from pbe.cli.index_boxes import main
from pbe.data import open_images, open_images_index
from pbe.data.open_images import OpenImages
from pbe.data.open_images_index import FLAGS, index_boxes, read_facts
from pbe.data.records import DataWarning, box_areas

ANNOTATIONS = Path(__file__).parents[2] / "../shared/data/annotations"
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
CLICKS = ",XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
IDS = ("000002b66c9c498e", "1f00a1b2c3d4e5f6", "1f00a1b2c3d4e5f7", "f0000000000000aa")
HALF_STEP = 0.5 / 65535 + 1e-7  # of the stored coordinates, and float32's rounding


def row(image=IDS[0], label="/m/01g317", box=(0.1, 0.2, 0.5, 0.6), flags=(0, 0, 0, 0, 0)):
    x0, y0, x1, y1 = box
    return f"{image},xclick,{label},1,{x0},{x1},{y0},{y1}," + ",".join(map(str, flags))


ROWS = (
    row(IDS[0], "/m/01g317", (0.0125, 0.148438, 0.195312, 0.5875), (0, 1, 0, 0, 0)),
    row(IDS[0], "/m/03ssj5", (0, 0, 1, 1), (1, 0, 1, 0, -1)),
    row(IDS[1], "/m/01g317", (0.25, 0.25, 0.75, 0.75), (-1, -1, -1, -1, -1)),
    row(IDS[2], "/m/0k4j", (0.4, 0.4, 0.41, 0.41), (0, 0, 0, 1, 1)),
    row(IDS[3], "/m/03ssj5", (0.5, 0, 1, 0.5)),
)


def write(path, rows=ROWS, header=HEADER, end="\n"):
    path.write_bytes(end.join([header, *rows, ""]).encode())
    return path


def pictures(folder, ids=IDS):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ids:
        (folder / f"{name}.jpg").touch()
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


@pytest.fixture
def index(tmp_path):
    index_boxes(write(tmp_path / "boxes.csv"), tmp_path / "index")
    return tmp_path / "index"


def test_each_record_is_a_photo(tmp_path, index):
    source = OpenImages(index, pictures(tmp_path / "images"), area=(0.02, 0.8))
    assert source.photos.tolist() == list(range(len(source)))
    assert all(record.masks is None and not record.repaint_masks for record in source)


@pytest.mark.parametrize("line", [1, 3])
def test_rows_that_are_not_utf8_are_named(tmp_path, line):
    rows = [HEADER, *ROWS]
    rows[line - 1] += "é"
    (tmp_path / "boxes.csv").write_bytes("\n".join(rows).encode("latin-1"))
    with pytest.raises(ValueError, match=rf"boxes\.csv, line {line} is not UTF-8 \(byte 0xe9\)"):
        index_boxes(tmp_path / "boxes.csv", tmp_path / "index")


@pytest.mark.parametrize("content, message", [("{", "is not JSON"), ("[1]", "has version None")])
def test_broken_meta_is_named(index, content, message):
    (index / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=rf"meta\.json {message}.*`pbe index-boxes`"):
        read_facts(index)


def test_records_hold_the_rows(tmp_path, index):
    source = OpenImages(index, pictures(tmp_path / "images"))
    assert len(source) == 4
    record = source[0]
    assert record.image == tmp_path / "images" / f"{IDS[0]}.jpg"
    assert record.labels == ("/m/01g317", "/m/03ssj5")
    assert record.boxes.dtype == np.float32
    np.testing.assert_allclose(
        record.boxes, [(0.0125, 0.148438, 0.195312, 0.5875), (0, 0, 1, 1)], atol=HALF_STEP, rtol=0
    )
    assert record.boxes[1].tolist() == [0, 0, 1, 1]
    assert [source[i].image.stem for i in range(4)] == list(IDS)
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_rows(tmp_path, split):
    csv_file = ANNOTATIONS / f"openimages-{split}-annotations-bbox.csv"
    if not csv_file.exists():
        pytest.skip("the shared rows of OpenImages are not here")
    classes = ANNOTATIONS / "class-descriptions-boxable.csv"
    facts = index_boxes(csv_file, tmp_path / "index", classes=classes)
    with open(csv_file, newline="") as file:
        rows = list(csv.DictReader(file))
    assert facts.rows == facts.boxes == len(rows)
    names = dict(csv.reader(classes.read_text().splitlines()))
    expected = {}
    for r in rows:
        corners = [float(r[name]) for name in ("XMin", "YMin", "XMax", "YMax")]
        expected.setdefault(r["ImageID"], []).append((corners, names[r["LabelName"]]))
    source = OpenImages(tmp_path / "index", pictures(tmp_path / "images", list(expected)[:1]))
    assert len(source) == facts.images == len(expected)
    assert [source[i].image.stem for i in range(len(source))] == sorted(expected)
    for i in range(0, len(source), 7):
        record = source[i]
        boxes, labels = zip(*expected[record.image.stem], strict=True)
        assert record.labels == labels
        np.testing.assert_allclose(record.boxes, boxes, atol=HALF_STEP, rtol=0)


def test_further_columns_other_order_and_line_ends_make_the_same_index(tmp_path, index):
    clicks = ",0.148438,0.012500,0.059375,0.195312,0.148438,0.357812,0.587500,0.325000"
    wide = write(tmp_path / "wide.csv", [*(r + clicks for r in ROWS), ""], HEADER + CLICKS, end="\r\n")
    swapped = write(
        tmp_path / "swapped.csv",
        [",".join(r.split(",")[::-1]) for r in ROWS],
        "\ufeff" + ",".join(HEADER.split(",")[::-1]),
    )
    for path in (wide, swapped):
        index_boxes(path, tmp_path / path.stem)
        assert content(tmp_path / path.stem) == content(index)


def test_rows_in_any_order_make_the_same_records(tmp_path, index):
    shuffled = [ROWS[i] for i in (4, 0, 3, 2, 1)]
    index_boxes(write(tmp_path / "shuffled.csv", shuffled), tmp_path / "shuffled")
    images = pictures(tmp_path / "images")
    for a, b in zip(OpenImages(index, images), OpenImages(tmp_path / "shuffled", images), strict=True):
        assert (a.image, a.labels) == (b.image, b.labels)
        np.testing.assert_array_equal(a.boxes, b.boxes)


@pytest.mark.parametrize("ordered", [True, False])
def test_blocks_do_not_show(tmp_path, monkeypatch, ordered):
    rng = np.random.default_rng(0)
    ids = [f"{i:016x}" for i in rng.integers(0, 2**63, 60)] + ["00000000000000ab", "ffffffffffffffff"]
    names = np.array(sorted(ids * 3) if ordered else ids * 3)
    corners = np.sort(rng.random((len(names), 2, 2)), axis=1).reshape(-1, 4).round(6)
    rows = [row(name, f"/m/{k % 5}", box) for k, (name, box) in enumerate(zip(names, corners, strict=True))]
    path = write(tmp_path / "boxes.csv", rows)
    index_boxes(path, tmp_path / "whole")
    monkeypatch.setattr(open_images_index, "BLOCK", 200)
    monkeypatch.setattr(open_images, "ROWS", 5)
    read = []
    index_boxes(path, tmp_path / "pieces", progress=read.append)
    assert len(read) > 10
    assert sum(read) == path.stat().st_size
    assert content(tmp_path / "whole") == content(tmp_path / "pieces")
    images = pictures(tmp_path / "images", ids[:1])
    for record in OpenImages(tmp_path / "pieces", images):  # in the order of the file
        np.testing.assert_allclose(record.boxes, corners[names == record.image.stem], atol=HALF_STEP, rtol=0)
    source = OpenImages(tmp_path / "pieces", images, area=(0.1, 0.4))
    expected = {name for name, box in zip(names, corners, strict=True) if 0.1 <= box_areas(box[None])[0] <= 0.4}
    assert [record.image.stem for record in source] == sorted(expected)


def test_wrong_columns(tmp_path):
    path = write(tmp_path / "boxes.csv", header=HEADER.replace("XMax", "xmax"))
    with pytest.raises(ValueError, match=r"boxes\.csv has no column 'XMax'"):
        index_boxes(path, tmp_path / "index")
    path = write(
        tmp_path / "few.csv", ["000002b66c9c498e,/m/0,0.1,0.2,0.1,0.2"], "ImageID,LabelName,XMin,XMax,YMin,YMax"
    )
    assert index_boxes(path, tmp_path / "index").boxes == 1  # the flags are optional


@pytest.mark.parametrize(
    "bad, message",
    [
        (row().replace("0.5", "half"), "XMax is 'half', not a number"),
        (row().replace("0.5", ""), "XMax is '', not a number"),
        (row().replace("0.5", "nan"), "XMin 0.1, YMin 0.2, XMax nan, YMax 0.6: not fractions"),
        (row()[:-10], "8 cells where the header has 13"),
        (row(image="1f00a1b2c3d4e5"), "ImageID '1f00a1b2c3d4e5' is not 16 hexadecimal digits"),
        (row(image="1F00A1B2C3D4E5F6"), "ImageID '1F00A1B2C3D4E5F6' is not 16"),
        (row(image=IDS[0] + "0"), "ImageID '000002b66c9c498e0' is not 16"),
        (row(box=(10, 20, 50, 60)), "XMin 10, YMin 20, XMax 50, YMax 60: not fractions"),
        (row(label="/m/" + "0" * 40), "LabelName is longer than 32"),
        (row(flags=(0, 0, "x", 0, 0)), "IsGroupOf is 'x', not a number"),
        (row(flags=(0, 0, 0.5, 0, 0)), "IsGroupOf is 0.5, not a whole number"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr(open_images_index, "BLOCK", 300)
    path = write(tmp_path / "boxes.csv", [*ROWS, *ROWS, bad, *ROWS])
    with pytest.raises(ValueError, match=f"line 12: {message}"):
        index_boxes(path, tmp_path / "index")
    assert [p.name for p in tmp_path.iterdir()] == ["boxes.csv"]


def test_edges_are_clipped_and_empty_boxes_left_out(tmp_path):
    rows = [row(box=(-0.01, 0.5, 0.5, 1.04)), row(box=(0.3, 0.3, 0.3, 0.6)), row(box=(0.6, 0.3, 0.5, 0.6)), row()]
    facts = index_boxes(write(tmp_path / "boxes.csv", rows), tmp_path / "index")
    assert (facts.rows, facts.boxes, facts.clipped, facts.empty) == (4, 2, 1, 2)
    boxes = OpenImages(tmp_path / "index", pictures(tmp_path / "images"))[0].boxes
    np.testing.assert_allclose(boxes[0], (0, 0.5, 0.5, 1), atol=HALF_STEP, rtol=0)
    with pytest.raises(ValueError, match="none of its 1 rows is a box"):
        index_boxes(write(tmp_path / "boxes.csv", rows[1:2]), tmp_path / "none")


def test_pictures_without_a_file_are_left_out(tmp_path):
    images = pictures(tmp_path / "images", IDS[1:2])
    pictures(images / "train_f", [IDS[3], "not-an-id", IDS[0] + "0", "über"])
    path = write(tmp_path / "boxes.csv")
    facts = index_boxes(path, tmp_path / "index", images=images)
    assert (facts.images, facts.boxes, facts.missing) == (2, 2, 2)
    with pytest.raises(ValueError, match="none of its 5 rows is a box of a picture in"):
        index_boxes(path, tmp_path / "none", images=pictures(tmp_path / "empty", []))
    with pytest.raises(FileNotFoundError, match="no such folder of pictures"):
        index_boxes(path, tmp_path / "none", images=tmp_path / "nowhere")


# --- the source -------------------------------------------------------------------------------------------


def test_flags_may_have_a_point(tmp_path):
    path = tmp_path / "boxes.csv"
    rows = [row(flags=("0.0", "-1.0", "1.0", 0, 1)), row(flags=(0, "1.0", 0, 0, "-1"))]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    index_boxes(path, tmp_path / "index")
    assert np.fromfile(tmp_path / "index/flags", np.uint8).tolist() == [0b10100, 0b00010]


def test_boxes_out_of_area_are_left_out(tmp_path, index):
    source = OpenImages(index, pictures(tmp_path / "images"), area=(0.02, 0.8))
    assert [record.image.stem for record in source] == [IDS[0], IDS[1], IDS[3]]
    assert source[0].labels == ("/m/01g317",)
    with pytest.raises(ValueError, match=r"no picture has a box of 0\.3 to 0\.5 of its area"):
        OpenImages(index, tmp_path / "images", area=(0.3, 0.5))


def test_flags_exclude_boxes(tmp_path, index):
    images = pictures(tmp_path / "images")
    for flag, left in (
        ("IsOccluded", [1, 1, 1, 1]),
        ("IsGroupOf", [1, 1, 1, 1]),
        ("IsTruncated", [1, 1, 1, 1]),
        ("IsDepiction", [2, 1, 1]),
        ("IsInside", [2, 1, 1]),
    ):
        assert [len(record.boxes) for record in OpenImages(index, images, exclude=[flag])] == left, flag
    assert [len(record.boxes) for record in OpenImages(index, images, exclude=FLAGS)] == [1, 1]
    with pytest.raises(ValueError, match=r"'IsGroup'.*'IsGroupOf'"):
        OpenImages(index, images, exclude=["IsGroup"])


def test_sub_folders_by_first_digit(tmp_path, index):
    images = tmp_path / "images"
    for name in IDS:
        pictures(images / f"train_{name[0]}", [name])
    pictures(images / "other", ["0123456789abcdef"])
    source = OpenImages(index, images)
    assert len(source) == 4
    assert all(record.image.is_file() for record in source)


def test_some_sub_folders_only(tmp_path, index):
    pictures(tmp_path / "images" / "train_1", IDS[1:3])
    with pytest.warns(DataWarning, match="starting with 1 only: 2 of 4 pictures are left out"):
        source = OpenImages(index, tmp_path / "images")
    assert [record.image.stem for record in source] == list(IDS[1:3])


def test_wrong_folders_of_pictures(tmp_path, index):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        OpenImages(index, tmp_path / "nowhere")
    pictures(tmp_path / "others", ["0123456789abcdef"])
    with pytest.raises(FileNotFoundError, match=f"none of the 4 pictures of .*such as {IDS[0]}.jpg"):
        OpenImages(index, tmp_path / "others")
    pictures(tmp_path / "mixed" / "train_0", IDS)
    with pytest.raises(ValueError, match="train_0 holds pictures whose ids start with 0, 1, f"):
        OpenImages(index, tmp_path / "mixed")
    for name in ("train_1", "validation_1"):
        pictures(tmp_path / "twice" / name, IDS[1:2])
    with pytest.raises(ValueError, match=r"validation_1 holds pictures whose ids start with 1; .* one sub-folder for"):
        OpenImages(index, tmp_path / "twice")


def test_copies_for_workers_are_small_and_equal(tmp_path):
    rows = [row(f"{k // 4:016x}", f"/m/{k % 3}") for k in range(40_000)]
    index_boxes(write(tmp_path / "boxes.csv", rows), tmp_path / "index")
    source = OpenImages(tmp_path / "index", pictures(tmp_path / "images", ["0" * 16]))
    data = pickle.dumps(source)
    assert len(data) < 4 * 10_000 + 4096  # 4 bytes a picture: the boxes stay in the file
    copy = pickle.loads(data)
    assert copy[9_999].image == source[9_999].image
    np.testing.assert_array_equal(copy[9_999].boxes, source[9_999].boxes)


def test_wrong_indexes(tmp_path, index):
    images = pictures(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"images is not an index of boxes.*meta\.json"):
        OpenImages(images, images)
    (index / "boxes").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"boxes must have 40 bytes .*`pbe index-boxes`"):
        OpenImages(index, images)
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    with pytest.raises(ValueError, match="version 0, this library reads 1"):
        OpenImages(index, images)


# --- the command ------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    path = write(tmp_path / "boxes.csv", [*ROWS, row(IDS[3], box=(0.2, 0.2, 0.2, 0.4))])
    classes = tmp_path / "classes.csv"
    classes.write_text("/m/01g317,Person\n/m/03ssj5,Bed\n")
    images = pictures(tmp_path / "images", IDS[:3])
    arguments = [str(path), "--out", str(tmp_path / "index"), "--images", str(images), "--classes", str(classes)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "3 pictures, 4 boxes, 3 classes" in out
    assert "1 boxes without area left out" in out
    assert "1 pictures left out: no file in" in out
    assert OpenImages(tmp_path / "index", images)[0].labels == ("Person", "Bed")
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert main([str(tmp_path / "absent.csv"), "--out", str(tmp_path / "x")]) == 2
    assert "absent.csv" in capsys.readouterr().err
