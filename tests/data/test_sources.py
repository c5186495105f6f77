"""COCO, manifests, COCOEE: what their records hold, and what is said of files that cannot be right."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.data.coco import Coco, Polygons, decode_counts, decode_rle
from pbe.data.cocoee import CocoEE
from pbe.data.crop import usable
from pbe.data.manifest import Manifest
from pbe.data.open_images import OpenImages
from pbe.data.open_images_index import index_boxes
from pbe.data.records import (
    DataWarning,
    MaskArray,
    MaskFile,
    PackedStrings,
    UnusablePicture,
    box_areas,
    clip_boxes,
    in_area,
    upright_size,
)
from pbe.data.sources import SourceConfig, open_source

SHARED = Path(__file__).parents[2] / "../shared/data"


def picture(path, width=80, height=60, turned=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[274] = 6  # shown a quarter turned: height x width
    Image.new("RGB", (width, height), "teal").save(path, exif=exif)
    return path


def mask_picture(path, box, width=80, height=60):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    mask.save(path)
    return path


def drawn(box, width=80, height=60):
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


# --- boxes, masks, texts ----------------------------------------------------------------------------------


def test_boxes_are_clipped_or_unsound():
    boxes = np.array(
        [
            (0.1, 0.2, 0.3, 0.4),
            (-0.04, 0, 1, 1.03),
            (-0.06, 0, 1, 1),
            (0, 0, np.nan, 1),
            (0.5, 0.1, 0.5, 0.2),
            (0.5, 0.3, 0.6, 0.2),
            (1, 0, 1.02, 1),
        ]
    )
    clipped, sound = clip_boxes(boxes)
    assert clipped.dtype == np.float32
    assert sound.tolist() == [True, True, False, False, False, False, False]
    assert clipped[1].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(box_areas(clipped[:2]), [0.04, 1], rtol=1e-6)  # float32
    assert in_area(clipped[:2], (0.05, 0.8)).tolist() == [False, False]
    assert in_area(clipped[:2], (0.03, 0.05)).tolist() == [True, False]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_upright_size(tmp_path, suffix):
    assert upright_size(picture(tmp_path / f"a.{suffix}")) == (60, 80)
    assert upright_size(picture(tmp_path / f"b.{suffix}", turned=True)) == (80, 60)


def test_mask_array_fits_every_scale():
    mask = MaskArray(drawn((20, 15, 60, 30)))
    assert mask.box().tolist() == [[0.25, 0.25, 0.75, 0.5]]
    np.testing.assert_array_equal(mask.draw((120, 160)), drawn((40, 30, 120, 60), 160, 120))
    np.testing.assert_array_equal(mask.draw((12, 16)), drawn((4, 3, 12, 6), 16, 12))
    np.testing.assert_array_equal(MaskArray(drawn((0, 0, 1, 1), 3, 3)).draw((2, 2)), drawn((0, 0, 1, 1), 2, 2))
    assert mask.draw((8, 10)).shape == (8, 10)  # 7.5 rounded up, as JPEG's decoder does
    with pytest.raises(ValueError, match="mask of 80x60 does not fit a picture of 60x80"):
        mask.draw((80, 60))


def test_mask_file(tmp_path):
    mask = MaskFile(mask_picture(tmp_path / "mask.png", (20, 15, 60, 30)))
    np.testing.assert_array_equal(mask.draw((60, 80)), drawn((20, 15, 60, 30)))
    with pytest.raises(ValueError, match=r"mask\.png: a mask of 80x60 does not fit"):
        mask.draw((60, 60))
    with pytest.raises(ValueError, match=r"empty\.png is empty"):
        MaskFile(mask_picture(tmp_path / "empty.png", (0, 0, 0, 0))).draw((60, 80))


def test_texts():
    texts = ["Hund", "", "größer", "猫.jpg"]
    kept = pickle.loads(pickle.dumps(PackedStrings(texts)))
    assert list(kept) == texts
    assert len(PackedStrings([])) == 0
    with pytest.raises(IndexError):
        kept[4]


# --- COCO -------------------------------------------------------------------------------------------------


def encode_counts(counts):
    """The COCO API's compressed text, written from the format's description a number at a time."""
    text = ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, x = x & 31, x >> 5
            more = x != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def test_known_compressed_counts():
    # An RLE and its text from the documentation of COCO's API users: a 9 x 10 mask.
    assert decode_counts("61X13mN000`0").tolist() == [6, 1, 40, 4, 5, 4, 5, 4, 21]


def test_compressed_counts_round_trip():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 50, 301):
        counts = rng.integers(0, 10 ** rng.integers(1, 8, n)).tolist()
        assert decode_counts(encode_counts(counts)).tolist() == counts


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_is_drawn(compressed):
    mask = np.random.default_rng(1).random((13, 7)) < 0.3
    pixels = [False, *mask.T.ravel().tolist()]  # down the columns, beginning outside
    counts, run = [], -1
    for before, after in itertools.pairwise(pixels):
        run += 1
        if before != after:
            counts.append(run)
            run = 0
    counts.append(run + 1)
    rle = {"size": [13, 7], "counts": encode_counts(counts) if compressed else counts}
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize("counts", ["", "61X", "6 1", "~~", "6" * 3 + "P" * 9 + "0"])
def test_wrong_compressed_counts(counts):
    with pytest.raises(ValueError, match="is not a compressed RLE"):
        decode_counts(counts)


def test_runs_must_fill_the_picture():
    with pytest.raises(ValueError, match="add up to 90, not to the 99 of 11x9"):
        decode_rle({"size": [9, 11], "counts": [6, 1, 40, 4, 5, 4, 5, 4, 21]})


def test_polygons_agree_with_another_rasteriser():
    draw = pytest.importorskip("skimage.draw")
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    rings = tuple(
        np.stack([x + 0.2 * np.cos(angle), y + 0.15 * np.sin(angle)], axis=1) for x, y in ((0.3, 0.4), (0.7, 0.6))
    )
    mask = Polygons(rings).draw((240, 320))
    expected = np.zeros((240, 320), dtype=bool)
    for ring in rings:
        expected |= draw.polygon2mask((240, 320), ring[:, ::-1] * (240, 320) - 0.5)  # its pixel centres are integers
    # They differ in pixels whose centres lie on an edge, if anywhere.
    assert np.count_nonzero(mask != expected) <= 4
    assert mask.mean() == pytest.approx(0.18, rel=0.01)  # two 12-gons of 6 sin(30 degrees) x 0.2 x 0.15 each


def annotation(number, image, category, bbox, segmentation, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "segmentation": segmentation} | more


def coco_json(path, **changes):
    """Two pictures: a dog with one polygon; a cat with an RLE, a dog with two polygons, a crowd and an empty box."""
    # One column of pixels: x = 20, y from 10 to 40.
    rle = {"size": [60, 80], "counts": encode_counts([60 * 20 + 10, 30, 60 * 60 - 40])}
    two = [[0, 0, 40, 0, 40, 30, 0, 30], [1, 40, 2, 40, 2, 50, 1, 50]]
    content = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 80, "height": 60},
            {"id": 9, "file_name": "b.jpg", "width": 160, "height": 120},
            {"id": 11, "file_name": "c.jpg", "width": 80, "height": 60},
        ],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            annotation(1, 9, 18, [40, 30, 80, 60], [[40, 30, 120, 30, 120, 90, 40, 90]], iscrowd=0),
            annotation(2, 7, 17, [20, 10, 1, 30], rle, iscrowd=0),
            annotation(3, 7, 18, [0, 0, 40, 30.5], two),
            annotation(4, 7, 18, [0, 0, 80, 60], rle, iscrowd=1),
            annotation(5, 7, 18, [10, 10, 0, 20], []),
        ],
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


@pytest.fixture
def coco(tmp_path):
    picture(tmp_path / "images/a.jpg")
    picture(tmp_path / "images/b.jpg", 80, 60)  # at half the size that was annotated
    return coco_json(tmp_path / "coco.json"), tmp_path / "images"


def test_coco_records(coco):
    with pytest.warns(DataWarning, match=r"1 boxes have no area .*first is \[10, 10, 0, 20\] of image 7"):
        source = Coco(*coco)
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 2  # c.jpg has no box
    a, b = source
    assert (a.image.name, a.labels, b.image.name, b.labels) == ("a.jpg", ("cat", "dog"), "b.jpg", ("dog",))
    np.testing.assert_allclose(a.boxes, [(0.25, 1 / 6, 0.2625, 2 / 3), (0, 0, 0.5, 30.5 / 60)], rtol=1e-6)  # float32
    assert b.boxes.tolist() == [[0.25, 0.25, 0.75, 0.75]]
    np.testing.assert_array_equal(a.masks[0].draw((60, 80)), drawn((20, 10, 21, 40)))
    np.testing.assert_array_equal(a.masks[1].draw((60, 80)), drawn((0, 0, 40, 30)) | drawn((1, 40, 2, 50)))
    np.testing.assert_array_equal(b.masks[0].draw((60, 80)), drawn((20, 15, 60, 45)))


@pytest.mark.filterwarnings("ignore::pbe.data.records.DataWarning")
def test_coco_area_and_missing_masks(coco):
    source = Coco(*coco, area=(0.02, 0.8))
    assert [record.labels for record in source] == [("dog",), ("dog",)]
    assert len(source[0].masks) == 1
    content = json.loads(coco[0].read_text())
    del content["annotations"][2]["segmentation"]
    coco[0].write_text(json.dumps(content))
    assert Coco(*coco)[0].masks is None  # one of its two has none


@pytest.mark.filterwarnings("ignore::pbe.data.records.DataWarning")
def test_wrong_coco(tmp_path, coco):
    annotations, images = coco
    with pytest.raises(FileNotFoundError, match=r"none of the 2 pictures of .*such as a\.jpg, is in"):
        Coco(annotations, tmp_path)
    with pytest.raises(ValueError, match=r"no picture has a box of 0\.9 to 1"):
        Coco(annotations, images, area=(0.9, 1))
    picture(images / "a.jpg", turned=True)
    source = Coco(annotations, images)
    with pytest.raises(ValueError, match=r"a\.jpg is 60x80 \(upright\), but was annotated as 80x60"):
        source[0]
    assert len(source[1].boxes) == 1
    (images / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg"):
        source[1]
    with pytest.raises(ValueError, match="annotations name image 9, which is not among the images"):
        Coco(coco_json(annotations, images=json.loads(annotations.read_text())["images"][:1]), images)
    annotations.write_text("[]")
    with pytest.raises(ValueError, match=r"coco\.json has no list 'images'"):
        Coco(annotations, images)


def edited(part, k, field, value=None):
    """The content of `coco_json` with a field of an entry set, or left out."""

    def edit(content):
        entry = content[part][k]
        entry.pop(field, None) if value is None else entry.__setitem__(field, value)

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (edited("images", 1, "width"), r"images\[1\]: it has no width"),
        (edited("images", 1, "height", "60"), r"images\[1\]: height is 60, not a number"),
        (edited("images", 2, "height", 0), r"images\[2\]: its size is 80x0 \(width x height\)"),
        (edited("images", 0, "file_name"), r"images\[0\]: it has no file_name"),
        (edited("images", 0, "id", [7]), r"images\[0\]: id is \[7\], not a number or a text"),
        (edited("categories", 1, "name"), r"categories\[1\]: it has no name"),
        (edited("annotations", 2, "bbox"), r"annotations\[2\]: it has no bbox"),
        (edited("annotations", 2, "bbox", [1, 2, 3]), r"annotations\[2\]: bbox is \[1, 2, 3\], not \[x, y, width"),
        (edited("annotations", 2, "bbox", [1, 2, 3, "4"]), r"annotations\[2\]: bbox is .*'4'\], not \[x, y, width"),
        (edited("annotations", 2, "category_id"), r"annotations\[2\]: it has no category_id"),
        (edited("annotations", 2, "category_id", 99), "annotations name category 99, which is not among the categ"),
        (edited("annotations", 2, "image_id"), r"annotations\[2\]: it has no image_id"),
        (edited("annotations", 1, "segmentation", {"counts": [1]}), r"annotations\[1\]: the size of an RLE is None"),
        (edited("annotations", 1, "segmentation", {"size": [4, 5]}), r"annotations\[1\]: the counts of an RLE are No"),
        (edited("annotations", 1, "segmentation", [1, 2, 3, 4]), r"annotations\[1\]: a polygon is 1, not a list"),
        (edited("annotations", 1, "segmentation", [[1, 2, 3]]), r"annotations\[1\]: a polygon is \[1, 2, 3\], not"),
        (edited("annotations", 1, "segmentation", [[1, 2, 3, "4"]]), r"annotations\[1\]: a polygon holds '4', not a n"),
        (edited("annotations", 0, "segmentation", [[1, 2, None, 4]]), r"annotations\[0\]: a polygon holds None, not a"),
        (edited("annotations", 0, "segmentation", [[1, 2, [3], 4]]), r"annotations\[0\]: a polygon holds \[3\], not a"),
        (edited("annotations", 0, "segmentation", [[1, 2, np.nan, 4]]), r"annotations\[0\]: a polygon holds nan, not"),
        (edited("annotations", 1, "segmentation", {"size": [4, 5], "counts": ["a"]}), r".*RLE hold 'a', not a number"),
        (edited("images", 0, "id", 0.5), r"images\[0\]: id is 0\.5, not a number or a text"),
        (edited("images", 1, "width", float("inf")), r"images\[1\]: width is inf, not a number"),
        (edited("annotations", 2, "bbox", [1, 2, 3, 10**400]), r"annotations\[2\]: bbox is \[1, 2, 3, 10+"),
        (
            edited("annotations", 1, "segmentation", {"size": [10**9] * 2, "counts": "1"}),
            r".*size of an RLE is \[1000000",
        ),
        (edited("annotations", 1, "segmentation", "x"), r"annotations\[1\]: segmentation is 'x', not a list of poly"),
        (lambda content: content["annotations"].insert(1, [4]), r"annotations\[1\]: it is \[4\], not an object"),
        (lambda content: content.update(images={}), "has no list 'images'"),
        (lambda content: content.pop("categories"), "has no list 'categories'"),
    ],
)
def test_wrong_coco_entries_are_named(coco, edit, message):
    content = json.loads(coco[0].read_text())
    edit(content)
    coco[0].write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^{coco[0]}:? {message}"):
        Coco(*coco)


def test_whole_numbers_may_have_a_point_and_masks_may_be_empty(coco):
    content = json.loads(coco[0].read_text())
    expected = [(record.image, record.boxes.tolist(), record.labels) for record in Coco(*coco)]
    for part, fields in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        for entry in content[part]:
            entry.update({name: float(entry[name]) for name in fields if isinstance(entry[name], int)})
    for annotation, empty in zip(
        content["annotations"], itertools.cycle([[[]], [[1, 2, 3, 4]], [], None]), strict=False
    ):
        if not annotation.get("iscrowd"):
            annotation["segmentation"] = empty
    coco[0].write_text(json.dumps(content))
    records = list(Coco(*coco))
    assert [(record.image, record.boxes.tolist(), record.labels) for record in records] == expected
    assert all(record.masks is None for record in records)


@pytest.mark.parametrize("content", [b"", b'{"images": [', b'{"images": "caf\xe9"}', b"[" * 100_000])
def test_broken_coco_json_is_named(coco, content):
    coco[0].write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{coco[0]} is not JSON: "):
        Coco(*coco)


# --- manifests --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg", "garment.jpg", "worn.jpg"):
        picture(tmp_path / name)
    return tmp_path


def manifest(folder, *lines, name="list.csv"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_of_a_picture_make_one_record(folder):
    path = manifest(
        folder, "image,x0,y0,x1,y1,label", "b.jpg,0,0,40,30,dog", "a.jpg,8,6,16,60,", "b.jpg,40,30,80,60,cat"
    )
    b, a = Manifest(path)
    assert (b.image, b.labels) == (folder / "b.jpg", ("dog", "cat"))
    assert b.boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]  # pixels of the picture itself
    assert a.labels is None
    np.testing.assert_allclose(a.boxes, [(0.1, 0.1, 0.2, 1)], rtol=1e-6)  # float32
    assert a.masks is a.exemplar is a.target is None


def test_units(folder):
    (fractions,) = Manifest(manifest(folder, "file,x0,y0,x1,y1,width,height", "a.jpg,0,0.25,1.01,0.5,80,60"))
    assert fractions.boxes.tolist() == [[0, 0.25, 1, 0.5]]
    (twice,) = Manifest(manifest(folder, "file,x0,y0,x1,y1,width,height", "a.jpg,0,30,80,60,160,120"))
    assert twice.boxes.tolist() == [[0, 0.25, 0.5, 0.5]]
    (line,) = Manifest(manifest(folder, '{"image": "a.jpg", "box": [0, 15, 40, 30]}', "", name="list.jsonl"))
    assert line.boxes.tolist() == [[0, 0.25, 0.5, 0.5]]


def test_boxes_are_of_the_upright_picture(folder):
    picture(folder / "a.jpg", turned=True)
    (record,) = Manifest(manifest(folder, "image,x0,y0,x1,y1", "a.jpg,0,0,60,40"))
    assert record.boxes.tolist() == [[0, 0, 1, 0.5]]
    source = Manifest(manifest(folder, "image,x0,y0,x1,y1,width,height", "a.jpg,0,0,60,40,80,60"))
    with pytest.raises(ValueError, match=r"a\.jpg is 60x80 \(upright\), but was annotated as 80x60"):
        source[0]


def test_masks_pairs_and_exemplars(folder):
    mask_picture(folder / "masks/a.png", (20, 15, 60, 30))
    path = manifest(
        folder,
        "image,mask,x0,y0,x1,y1,exemplar,target",
        "a.jpg,masks/a.png,,,,,,",
        "a.jpg,masks/a.png,0,0,80,30,,",
        "a.jpg,,0,0,8,30,,",
        "a.jpg,masks/a.png,,,,,garment.jpg,worn.jpg",
        "a.jpg,masks/a.png,,,,,b.jpg,worn.jpg",
    )
    source = pickle.loads(pickle.dumps(Manifest(path)))
    masked, boxed, paired, other = source
    assert masked.boxes.tolist() == [[0.25, 0.25, 0.75, 0.5], [0, 0, 1, 0.5]]
    assert [record.repaint_masks for record in source] == [True, False, True, True]
    for mask in masked.masks:
        np.testing.assert_array_equal(mask.draw((60, 80)), drawn((20, 15, 60, 30)))
    assert boxed.masks is None
    assert (paired.exemplar, paired.target) == (folder / "garment.jpg", folder / "worn.jpg")
    assert other.exemplar == folder / "b.jpg"
    assert source.photos.tolist() == [0, 0, 0, 0]
    mask_picture(folder / "masks/a.png", (0, 0, 10, 10), 60, 60)
    with pytest.raises(ValueError, match=r"a\.png is 60x60 .* annotated as 80x60"):
        source[0]


def test_photos_are_told_apart_by_their_path(folder):
    path = manifest(
        folder, "image,x0,y0,x1,y1,exemplar", "b.jpg,0,0,1,1,a.jpg", "a.jpg,0,0,1,1,", "./b.jpg,0,0,1,1,",
        "images/../b.jpg,0,0,1,1,a.jpg", "worn.jpg,0,0,1,1,a.jpg",
    )  # fmt: skip
    source = pickle.loads(pickle.dumps(Manifest(path)))
    assert source.photos.tolist() == [0, 1, 0, 0, 2]
    assert len(source) == 5


@pytest.mark.filterwarnings("error")
def test_masks_alone(folder):
    mask_picture(folder / "a.png", (20, 15, 60, 30))
    (record,) = Manifest(manifest(folder, "image,mask", "a.jpg,a.png"))
    assert record.boxes.tolist() == [[0.25, 0.25, 0.75, 0.5]]


def test_area_limits(folder):
    mask_picture(folder / "small.png", (0, 0, 5, 5))
    path = manifest(
        folder, "image,x0,y0,x1,y1,mask,width,height", "a.jpg,0,0,8,6,,80,60", "b.jpg,0,0,40,30,,80,60",
        "b.jpg,0,0,4,3,,80,60", "worn.jpg,,,,,small.png,,",
    )  # fmt: skip
    source = Manifest(path, area=(0.02, 0.8))
    assert [source[0].image.name, len(source[0].boxes), len(source)] == ["b.jpg", 1, 2]
    with pytest.raises(ValueError, match=r"worn\.jpg: no box is of 0\.02 to 0\.8 of its area"):
        source[1]  # known only when its mask is read
    with pytest.raises(ValueError, match=r"no picture has a box of 0\.9 to 1"):
        Manifest(manifest(folder, "image,x0,y0,x1,y1", "a.jpg,0,0,.5,.5"), area=(0.9, 1))


def test_where_pictures_are(folder, tmp_path_factory):
    path = manifest(folder, "image,x0,y0,x1,y1", "x.jpg,0,0,.5,.5", "y.jpg,0,0,.5,.5")
    with pytest.raises(FileNotFoundError, match=r"none of the pictures of .*such as x\.jpg, is in .*images"):
        Manifest(path)
    picture(folder / "images/y.jpg")
    assert Manifest(path)[1].image == folder / "images/y.jpg"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "x.jpg")
    assert Manifest(path, images=elsewhere)[0].image == elsewhere / "x.jpg"


@pytest.mark.parametrize(
    "lines, message",
    [
        (("image,x0,y0,x1,y1,exemplr", "a.jpg,0,0,1,1,b.jpg"), r"line 1: .*'exemplr'.*'exemplar'"),
        (("image,x0,y0,x1,y1,reference", "a.jpg,0,0,1,1,b.jpg"), r"line 1: .*'reference'.*'exemplar'"),
        (("image,x0,y0,x1,y1", "a.jpg,0,0,.5,.5", "a.jpg,0,zero,.5,.5"), r"line 3: y0 must be a number, got 'zero'"),
        (("image,x0,y0,x1,y1", "a.jpg,0,0,,.5"), r"line 2: it has no x1; a row needs"),
        (("image,label", "a.jpg,dog"), r"line 2: it has no x0; a row needs .* or a mask"),
        (("picture,x0,y0,x1,y1", "a.jpg,0,0,.5,.5"), r"line 2: it has no image \(or file\)"),
        (("image,x0,y0,x1,y1", "a.jpg,0,0,.5"), r"line 2: fewer cells than the header"),
        (("image,x0,y0,x1,y1", "a.jpg,0,0,.5,.5,.5"), r"line 2: more cells than the header"),
        (("image,x0,y0,x1,y1", "a.jpg,0,0,.5,.5", "a.jpg,.5,0,.4,1"), r"line 3: box \[0\.5, .* is not .*fractions"),
        (("image,x0,y0,x1,y1,width,height", "a.jpg,0,0,90,60,80,60"), r"line 2: box .* is not inside .*pixels"),
        (("image,x0,y0,x1,y1,width", "a.jpg,0,0,80,60,80"), r"line 2: .*both width and height"),
        (("image,x0,y0,x1,y1,width,height", "a.jpg,0,0,80,60,-80,60"), r"line 2: width and height are -80 and 60"),
        (("image x0 y0 x1 y1", "a.jpg 0 0 80 60"), r"line 2: it has no image \(or file\); it has: image x0 y0 x1 y1"),
        (("image,x,y,width,height", "a.jpg,0,0,80,60"), r"line 2: it has no x0; .* it has: image, x, y, width, height"),
        (("image,bbox", "a.jpg,0 0 80 60"), r"line 1: unknown column 'bbox'; did you mean 'box'"),
        (("image,x0,y0,x1,y1", "a.jpg,9,9,40,30", "a.jpg,40,9,9,30"), r"line 3: box \[40\.0, .* x0 < x1 and y0 < y1"),
        (("image,x0,y0,x1,y1", "a.jpg,9,9,9,30"), r"line 2: box \[9\.0, 9\.0, 9\.0, 30\.0\] .* x0 < x1"),
        (("image,x0,y0,x1,y1,width,height", "a.jpg,0,0,90,60,1e30,60"), r"line 2: width and height are 1e\+30 and 60"),
        (("image,x0,y0,x1,y1,x0", "a.jpg,0,0,1,1,0"), "a column twice: image, x0, y0, x1, y1, x0"),
        (("image,x0,y0,x1,y1", 'a.jpg,0,0,1,"1" 1'), "after line 1: ',' expected after"),
        (("image,x0,y0,x1,y1", 'a.jpg,0,0,1,"1'), "after line 1: unexpected end of data"),
        (("image,x0,y0,x1,y1", "a.jpg,0,0,1,1", "a\0.jpg,0,0,1,1"), "line 3 holds a NUL byte; save the file as UTF-8"),
        (("image,x0,y0,x1,y1",), "has no rows"),
    ],
)  # fmt: skip
def test_wrong_rows(folder, lines, message):
    with pytest.raises(ValueError, match=r"list\.csv.*" + message):
        Manifest(manifest(folder, *lines))


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
@pytest.mark.parametrize(
    "encoding, message",
    [("latin-1", r"line 2 is not UTF-8 \(byte 0xf6\)"), ("utf-16", r"line 1 is not UTF-8 \(byte 0xff\)"),
     ("utf-16-le", "line 1 holds a NUL byte")],
)  # fmt: skip
def test_other_encodings_are_named(folder, name, encoding, message):
    lines = {
        "list.csv": "image,x0,y0,x1,y1\nhören.jpg,0,0,.5,.5\n",
        "list.jsonl": '{"image": "a.jpg", "box": [0, 0, 1, 1]}\n{"image": "hören.jpg", "box": [0, 0, 1, 1]}\n',
    }
    (folder / name).write_bytes(lines[name].encode(encoding))
    with pytest.raises(ValueError, match=rf"{name}, {message}; save the file as UTF-8 text"):
        Manifest(folder / name)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks(folder, ends):
    picture(folder / "hören.jpg")
    lines = ["\ufeffimage,x0,y0,x1,y1", "hören.jpg,0,0,40,30", ""]
    (folder / "list.csv").write_bytes(ends.join(lines).encode())
    (record,) = Manifest(folder / "list.csv")
    assert record.image == folder / "hören.jpg"
    assert record.boxes.tolist() == [[0, 0, 0.5, 0.5]]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not a JSON object"),
        ('{"image": 5, "box": [0, 0, 1, 1]}', "line 1: image is 5, not a text"),
        (r'{"image": "a\u0000.jpg", "box": [0, 0, 1, 1]}', "line 1: image is 'a.x00.jpg', not a text"),
        (r'{"image": "a\ud800.jpg", "box": [0, 0, 1, 1]}', "line 1: .*surrogates not allowed"),
        ('{"image": "a.jpg", "box": [0, 0, 1, 1' + "0" * 400 + "]}", "line 1: y1 must be a number, got 10+"),
        ('{"image": "a.jpg", "box": [0, 0, 1]}', r"line 1: box is \[0, 0, 1\], not a list of x0, y0, x1, y1"),
        ('{"image": "a.jpg", "box": [0, 0, 1, true]}', "line 1: y1 must be a number, got True"),
        ('{"image": "a.jpg", "box": [0, 0, 1, 1], "x0": 0}', "line 1: give box or x0, y0, x1, y1, not both"),
        ("[" * 50_000, "line 1: not JSON: it is nested too deeply"),
        ('{"image": "a.jpg", "box": ' + "[" * 900 + "]" * 900 + "}", r"line 1: box is \[\[\[.*, not a list of x0"),
        ('{"image": "a.jpg", "box": [0, 0, 1, ' + "[" * 900 + "]" * 900 + "]}", "line 1: y1 must be a number, got"),
    ],
)
def test_wrong_json_rows(folder, line, message):
    with pytest.raises(ValueError, match=message):
        Manifest(manifest(folder, line, name="list.jsonl"))


def test_box_outside_a_picture_whose_size_only_the_file_tells(folder):
    source = Manifest(manifest(folder, "image,x0,y0,x1,y1", "a.jpg,0,0,100,60"))
    with pytest.raises(ValueError, match=r"a\.jpg is 80x60; its box \[0\.0, 0\.0, 100\.0, 60\.0\] is not inside it"):
        source[0]
    with pytest.raises(ValueError, match=r"a\.jpg: .* \.csv or \.jsonl"):
        Manifest(folder / "a.jpg")


CORNERS_OF = {
    "image,xmin,ymin,xmax,ymax": ",", "filename;XMin;YMin;XMax;YMax": ";", "path\tleft\ttop\tright\tbottom": "\t",
    " Image , x1,y1,x2,y2": ",", "file_name,x_min,y_min,x_max,y_max": ",",
}  # fmt: skip


@pytest.mark.parametrize("header", CORNERS_OF)
def test_names_and_separators_of_other_tools(folder, header):
    (record,) = Manifest(manifest(folder, header, CORNERS_OF[header].join(["a.jpg", "0", "15", "40", "30"])))
    assert record.image == folder / "a.jpg"
    assert record.boxes.tolist() == [[0, 0.25, 0.5, 0.5]]


def test_known_names_win_over_those_of_other_tools(folder):
    path = manifest(folder, "path,image,category,label,x0,y0,x1,y1", "x.jpg,a.jpg,clothes,shoe,0,0,40,30")
    (record,) = Manifest(path)
    assert (record.image.name, record.labels) == ("a.jpg", ("shoe",))


@pytest.mark.parametrize("kind", ["manifest", "coco"])
def test_a_missing_list_is_named(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl?"):
        open_source(SourceConfig(kind, str(tmp_path / "gone.jsonl"), str(tmp_path)))


def test_boxes_of_unfit_size_are_left_out_at_the_opening(folder):
    lines = ["a.jpg,0,0,40,30", "b.jpg,0,0,4,3", "worn.jpg,0,0,79,59", "gone.jpg,0,0,40,30", "garment.jpg,9,9,190,20"]
    (folder / "text.jpg").write_text("no picture")
    with pytest.warns(DataWarning) as caught:
        source = Manifest(manifest(folder, "image,x0,y0,x1,y1", *lines, "text.jpg,0,0,40,30"), area=(0.02, 0.8))
    (message,) = (str(w.message) for w in caught)
    assert "5 of 6 pictures cannot be used: 2 have no box of 2 to 80 % of their area, such as b.jpg; " in message
    assert "1 have a box that is not inside of them, such as garment.jpg; " in message
    assert "1 are missing, such as gone.jpg; 1 cannot be read, such as text.jpg" in message
    assert len(source) == 4
    assert source[0].image == folder / "a.jpg"
    reasons = []
    for i in (1, 2, 3):
        with pytest.raises(UnusablePicture) as error, usable("list"):
            source[i]
        reasons.append(error.value.reason)
    assert reasons == ["missing", "no box", "unreadable"]


@pytest.mark.filterwarnings("error")
def test_few_skipped_pictures_need_no_warning(folder):
    for i in range(9):
        picture(folder / f"{i}.jpg")
    lines = [f"{i}.jpg,0,0,40,30" for i in range(9)]
    path = manifest(folder, "image,x0,y0,x1,y1", *lines, "a.jpg,0,0,2,2")
    assert len(Manifest(path, area=(0.02, 0.8))) == 9


def test_sizes_are_kept_beside_the_manifest(folder, monkeypatch):
    path = manifest(folder, "image,x0,y0,x1,y1", "a.jpg,0,0,60,30", "b.jpg,0,0,40,30")
    first = [record.boxes.tolist() for record in Manifest(path)]
    kept = folder / ".list.csv.sizes.json"
    content = kept.read_bytes()
    read = []
    monkeypatch.setattr(
        "pbe.data.picture_sizes.upright_size", lambda path: read.append(path.name) or upright_size(path)
    )
    assert [record.boxes.tolist() for record in Manifest(path)] == first
    assert read == []
    picture(folder / "b.jpg", 160, 120)
    Manifest(path)
    assert read == ["b.jpg"]
    entry = f'{{"{folder}/a.jpg": [{(folder / "a.jpg").stat().st_size}, '
    for broken in (b"", b"[1]", b"[" * 50_000, b'{"version": 1}', entry.encode() + b'1, 2, "3"]}', b'{"a": [0]}'):
        kept.write_bytes(broken)
        assert len(Manifest(path)) == 2
        assert kept.read_bytes() != broken
    picture(folder / "b.jpg")
    monkeypatch.setattr("pbe.data.picture_sizes.write_text", raise_oserror)
    assert [record.boxes.tolist() for record in Manifest(path)] == first
    assert json.loads(content)[str(folder / "a.jpg")][2:] == [60, 80]


def raise_oserror(*_, **__):
    raise OSError("a folder that may only be read")


@pytest.mark.parametrize("unit, name", [(100, "percent"), (1000, "thousandths")])
@pytest.mark.parametrize("sized", [False, True])
def test_other_units_than_pixels_are_named(folder, unit, name, sized):
    lines = []
    for i in range(6):
        picture(folder / f"{i}.jpg", 2000, 1500)
        lines.append(f"{i}.jpg,{unit // 10},{unit // 5},{unit * (4 + i) // 10},{unit * 9 // 10}" + ",2000,1500" * sized)
    header = "image,x0,y0,x1,y1" + ",width,height" * sized
    with pytest.warns(DataWarning, match=rf"probably not in pixels but in {name}: .* up to 2000x1500"):
        Manifest(manifest(folder, header, *lines))


@pytest.mark.parametrize("name, count", [("clothing", 4643), ("caltech", 1501), ("pets", 599), ("hires", 17)])
def test_shared_photos(name, count):
    path = SHARED / name / "boxes.csv"
    if not path.exists():
        pytest.skip("the shared photos are not here")
    source = open_source(SourceConfig(kind="manifest", path=str(path)))
    assert len(source) == count
    for i in range(0, count, max(1, count // 40)):
        record = source[i]
        assert record.image.parent == path.parent / ("" if name == "hires" else "images")
        assert clip_boxes(record.boxes)[1].all()
    row = path.read_text().splitlines()[1].split(",")
    first, (height, width) = source[0], upright_size(source[0].image)
    corner = 3 if name == "hires" else 4
    corners = np.array(row[corner : corner + 4], dtype=float)
    np.testing.assert_allclose(first.boxes[0] * (width, height, width, height), corners, rtol=1e-5)  # float32


# --- COCOEE -----------------------------------------------------------------------------------------------


def cocoee(folder, ids=(139, 724)):
    folder.mkdir(exist_ok=True)
    np.save(folder / "id_list.npy", np.array(ids, dtype=np.int64))
    for number in ids:
        picture(folder / f"GT_3500/{number:012d}_GT.png", 64, 64)
        picture(folder / f"Ref_3500/{number:012d}_ref.png", 20, 30)
        mask_picture(folder / f"Mask_bbox_3500/{number:012d}_mask.png", (16, 8, 48, 40), 64, 64)
    return folder


def test_cocoee(tmp_path):
    source = CocoEE(cocoee(tmp_path))
    assert len(source) == 2
    record = source[1]
    assert record.image == tmp_path / "GT_3500/000000000724_GT.png"
    assert record.exemplar == tmp_path / "Ref_3500/000000000724_ref.png"
    assert record.boxes.tolist() == [[0.25, 0.125, 0.75, 0.625]]
    np.testing.assert_array_equal(record.masks[0].draw((64, 64)), drawn((16, 8, 48, 40), 64, 64))
    assert record.fixed
    with pytest.raises(IndexError):
        source[2]


def test_incomplete_cocoee(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"id_list\.npy: there is no such file"):
        CocoEE(tmp_path)
    cocoee(tmp_path)
    (tmp_path / "Ref_3500/000000000724_ref.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of .* the first is .*000000000724_ref"):
        CocoEE(tmp_path)
    for content in (b"", b"139"):
        (tmp_path / "id_list.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"id_list\.npy cannot be read"):
            CocoEE(tmp_path)
    with (tmp_path / "id_list.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3, int), b=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"id_list\.npy must hold a list of integers, got several arrays"):
        CocoEE(tmp_path)
    np.save(tmp_path / "id_list.npy", np.zeros(3))
    with pytest.raises(ValueError, match="must hold a list of integers, got float64"):
        CocoEE(tmp_path)


# --- by name ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pbe.data.records.DataWarning")
def test_sources_by_name(tmp_path, coco):
    header = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"
    name = "00000000000000ab"
    index_boxes(manifest(tmp_path, header, f"{name},/m/0,0,0.5,0,0.5,0", f"{name},/m/0,0,1,0,1,0"), tmp_path / "index")
    picture(tmp_path / f"photos/{name}.jpg")
    area = (0.02, 0.8)
    config = SourceConfig("open_images", str(tmp_path / "index"), str(tmp_path / "photos"), ["IsGroupOf"])
    source = open_source(config, area)
    assert isinstance(source, OpenImages)
    assert source[0].boxes.shape == (1, 4)
    source = open_source(SourceConfig("coco", str(coco[0]), str(coco[1])), area)
    assert isinstance(source, Coco)
    assert len(source[0].boxes) == 1
    path = manifest(tmp_path, "image,x0,y0,x1,y1", "images/a.jpg,0,0,.5,.5", "images/b.jpg,0,0,1,1")
    source = open_source(SourceConfig(path=str(path)), area)
    assert isinstance(source, Manifest)
    assert len(source) == 1
    source = open_source(SourceConfig("cocoee", str(cocoee(tmp_path / "benchmark"))), (0.9, 1))
    assert isinstance(source, CocoEE)
    assert len(source) == 2


def test_wrong_source_configs():
    with pytest.raises(ValueError, match=r"'openimages'.*'open_images'"):
        open_source(SourceConfig(kind="openimages"))
    with pytest.raises(ValueError, match="a source of kind manifest needs path"):
        open_source(SourceConfig())
    with pytest.raises(ValueError, match="a source of kind coco needs images"):
        open_source(SourceConfig("coco", "a.json"))
    with pytest.raises(ValueError, match=r"kind coco has no exclude, got \['IsGroupOf'\]"):
        open_source(SourceConfig("coco", "a.json", "images", ["IsGroupOf"]))
    with pytest.raises(ValueError, match="kind cocoee has no images, got 'images'"):
        open_source(SourceConfig("cocoee", "folder", "images"))
