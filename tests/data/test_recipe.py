"""The recipe as a whole: against a plain version of it, and option by option."""

from pathlib import Path

import numpy as np
import pytest
import torch
from marks import rest_slow
from PIL import Image

from benchmarks.data import measure_recipe, plain_example
from benchmarks.sections import run
from pbe.data.example import draw_integers, hash64, make_generator
from pbe.data.recipe import choose_box, draw_geometry, make_example
from pbe.data.recipe_config import RecipeConfig, override_recipe
from pbe.data.records import MaskArray, MaskFile, Record, UnusablePicture
from pbe.models.clip import CLIP_MEAN, CLIP_STD

BOX = np.float32([[0.3, 0.25, 0.6, 0.7]])


def natural_photo(height, width, seed=0):
    """Noise whose amplitude falls with its frequency, as that of photos does."""
    rng = np.random.default_rng(seed)
    photo = np.zeros((height, width, 3))
    for cell in (256, 128, 64, 32, 16, 8):
        small = Image.fromarray(rng.integers(0, 256, (height // cell + 2, width // cell + 2, 3), dtype=np.uint8))
        photo += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=float) * cell
    photo -= photo.min()
    return (photo / photo.max() * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(natural_photo(1200, 1600)).save(path, quality=95)
    return path


def example(record, seed=0, **options):
    return make_example(record, RecipeConfig(**options), make_generator(seed))


# --- against the plain version ----------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", rest_slow([256, 512]))
@pytest.mark.parametrize("draft", [False, True])
def test_agrees_with_the_plain_recipe(photo, draft, resolution):
    record, config = Record(photo, BOX), RecipeConfig(draft=draft, resolution=resolution)
    for seed in range(6):
        plain = plain_example(record, config, make_generator(seed))
        ours = make_example(record, config, make_generator(seed)).example
        # Pillow's polygon takes in the pixels that its edge touches, and the plain mask is gray along its border.
        assert (ours.mask - plain.mask).abs().mean() < 0.01
        image = (ours.image - plain.image).abs()
        exemplar = (ours.exemplar - plain.exemplar).abs() * torch.tensor(CLIP_STD)[:, None, None] * 2
        if draft:
            # In [-1, 1]. The draft is an average where the plain recipe picks pixels, and the crop's edge is rounded.
            assert image.mean() < 0.01
            assert exemplar.mean() < 0.01
        else:
            # Resampling uint8 rounds to a level of 2 / 255.
            assert image.max() < 1.1 * 2 / 255
            assert exemplar.max() < 1.1 * 2 / 255


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "hires"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared photos are not there")
@pytest.mark.parametrize("draft, antialias, bound", [(False, False, 0.006), (True, False, 0.05), (True, True, 0.012)])
def test_agrees_with_the_plain_recipe_on_photos(draft, antialias, bound):
    # Means in [-1, 1]. Leaves and gravel are as fine as pixels: there the plain recipe without antialiasing picks
    # pixels where the draft has averages. With antialiasing, only the rounded edges and JPEG's own filter differ.
    config = RecipeConfig(draft=draft, antialias=antialias)
    for seed, file in enumerate(sorted(SHARED.glob("*.jpg"))[::4]):
        plain = plain_example(Record(file, BOX), config, make_generator(seed))
        ours = make_example(Record(file, BOX), config, make_generator(seed)).example
        assert (ours.image - plain.image).abs().mean() < bound
        assert (ours.exemplar - plain.exemplar).abs().mean() * max(CLIP_STD) * 2 < bound


def test_example_has_the_networks_ranges(photo):
    stages = example(Record(photo, BOX))
    ours = stages.example
    assert ours.image.shape == ours.masked_image.shape == (3, 512, 512)
    assert ours.source is ours.image  # so that it travels once
    assert ours.mask.shape == (1, 512, 512)
    assert ours.exemplar.shape == (3, 224, 224)
    assert all(x.dtype == torch.float32 for x in ours[:4])
    assert -1 <= ours.image.min() < -0.2
    assert 0.2 < ours.image.max() <= 1
    assert ours.mask.unique().tolist() == [0, 1]
    torch.testing.assert_close(ours.masked_image, ours.source * ours.mask, rtol=0, atol=0)
    low, high = ((np.array([0, 1]) - np.array(CLIP_MEAN)[:, None]) / np.array(CLIP_STD)[:, None]).T
    assert (ours.exemplar.amin((1, 2)).numpy() >= low - 1e-4).all()
    assert (ours.exemplar.amax((1, 2)).numpy() <= high + 1e-4).all()
    assert ours.file == str(photo)


# --- the draws --------------------------------------------------------------------------------------------


def plans(n=1500, size=(768, 1024), boxes=BOX, masks=None, repaint_masks=False, **options):
    record = Record(Path("photo.jpg"), boxes, masks, repaint_masks=repaint_masks)
    g = make_generator(7)
    return [draw_geometry(record, size, RecipeConfig(**options), g) for _ in range(n)]


def share_of(plans, outline_points):
    return np.mean([p.outline is not None and len(p.outline) == outline_points for p in plans])


def test_half_of_the_masks_are_bezier_shapes():
    assert share_of(plans(), 72) == pytest.approx(0.5, abs=0.055)  # 4 standard deviations
    assert share_of(plans(arbitrary_mask=0.2), 72) == pytest.approx(0.2, abs=0.045)
    assert share_of(plans(200, augment=False), 72) == 0
    assert share_of(plans(200, augment=False), 4) == 1


def test_object_masks_take_their_share_where_they_are_known():
    masks = (MaskArray(np.ones((8, 8), dtype=bool)),)
    assert np.mean([p.outline is None for p in plans(masks=masks, object_mask=0.3)]) == pytest.approx(0.3, abs=0.05)
    assert not any(p.outline is None for p in plans(100, masks=masks, object_mask=0.0))
    assert not any(p.outline is None for p in plans(100, object_mask=1.0))


@pytest.mark.slow
def test_masks_are_repainted_where_their_source_says_so():
    masks = (MaskArray(np.ones((8, 8), dtype=bool)),)
    assert all(p.outline is None for p in plans(100, masks=masks, repaint_masks=True))
    assert not any(p.outline is None for p in plans(100, masks=masks))
    # The recipe comes first.
    for share, mask_says in ((0.3, True), (0.3, False), (0.0, True)):
        some = plans(masks=masks, repaint_masks=mask_says, object_mask=share)
        assert np.mean([p.outline is None for p in some]) == pytest.approx(share, abs=0.05)


def test_masks_that_are_annealed():
    config = RecipeConfig(anneal_masks=4, object_mask=0.2)
    assert [config.of_epoch(epoch).object_mask for epoch in (0, 2, 4, 9)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert RecipeConfig(anneal_masks=2).of_epoch(1).object_mask == 0.5
    assert RecipeConfig(anneal_masks=2).of_epoch(2).object_mask is None


def test_records_without_masks_know_nothing_of_object_masks():
    default, off = plans(100), plans(100, object_mask=0.0)  # such as all of OpenImages
    for a, b in zip(default, off, strict=True):
        assert (a.window, a.grown, len(a.outline)) == (b.window, b.grown, len(b.outline))
        np.testing.assert_array_equal(a.outline, b.outline)


def test_boxes_out_of_bounds_are_not_used():
    boxes = np.float32([[0, 0, 0.1, 0.1], [0, 0, 0.5, 0.5], [0, 0, 1, 0.9], [0.5, 0.5, 0.8, 0.8]])  # 1, 25, 90, 9 %
    g, record = make_generator(0), Record(Path("photo.jpg"), boxes)
    chosen = np.array([choose_box(record, RecipeConfig(), g) for _ in range(1000)])
    assert set(chosen) == {1, 3}
    assert (chosen == 1).mean() == pytest.approx(0.5, abs=0.065)
    assert choose_box(record, RecipeConfig(min_area=0, max_area=0.02), g) == 0
    with pytest.raises(UnusablePicture, match="no box of 30% to 80%") as caught:
        choose_box(record, RecipeConfig(min_area=0.3), g)
    assert caught.value.reason == "no box"


@pytest.mark.parametrize("side, margin, jitter", [(1024, 10, 5), (512, 5, 2.5), (2048, 20, 10)])
def test_numbers_in_photo_pixels_follow_the_photos_size(side, margin, jitter):
    some = plans(50, size=(side // 2, side), grow=0, arbitrary_mask=1)
    box, exemplar_box = some[0].box, some[0].exemplar_box
    assert tuple(np.array(exemplar_box) - np.array(box)) == (-margin, -margin, margin, margin)
    beyond = max(max(box.x0 - p.outline[:, 0].min(), p.outline[:, 1].max() - box.y1) for p in some)
    assert beyond == pytest.approx(jitter, rel=0.15)


def test_coverage_and_fit():
    wide = np.float32([[0.05, 0.3, 0.95, 0.6]])
    assert all(p.window == (0, 0, 1024, 512) and p.content == (0, 0, 512, 512) for p in plans(20, (512, 1024), wide))
    boxed = plans(20, (512, 1024), wide, fit="letterbox")
    assert all(p.window == (0, 0, 1024, 512) and p.content == (0, 128, 512, 384) for p in boxed)
    for p in plans(200, coverage=[0.2, 0.4], grow=0.1):
        assert p.window.width == p.window.height
        assert 0.19 < p.grown.area / p.window.area < 0.41


# --- the options, in pixels -------------------------------------------------------------------------------


def test_letterbox_is_gray_and_kept(photo):
    wide = np.float32([[0.02, 0.3, 0.95, 0.6]])
    ours = example(Record(photo, wide), fit="letterbox", resolution=64).example
    bars = torch.ones(64, dtype=torch.bool)
    bars[8:56] = False  # 1600 x 1200 becomes 64 x 48
    assert (ours.image[:, bars] == 0).all()
    assert (ours.mask[:, bars] == 1).all()
    assert ours.image.shape == (3, 64, 64)
    assert (ours.image[:, ~bars].abs() > 0.01).float().mean() > 0.5
    assert (ours.mask[:, ~bars] == 0).any()


def test_object_mask_is_what_is_repainted(photo):
    mask = np.zeros((120, 160), dtype=bool)
    mask[40:70, 60:90] = True
    record = Record(photo, np.float32([[0.3, 0.3, 0.6, 0.65]]), (MaskArray(mask),))
    stages = example(record, object_mask=1.0, resolution=256, grow=0)
    window, scale = stages.geometry.window, 256 / stages.geometry.window.width
    rows, columns = (stages.example.mask[0] == 0).any(1).nonzero(), (stages.example.mask[0] == 0).any(0).nonzero()
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    expected = [
        (600 - window.x0) * scale,
        (400 - window.y0) * scale,
        (900 - window.x0) * scale,
        (700 - window.y0) * scale,
    ]
    np.testing.assert_allclose(edges, expected, atol=1.01)  # all pixels that are touched
    wider = example(record, object_mask=1.0, object_mask_margin=10.0, resolution=256, grow=0).example
    grown = (wider.mask == 0).any(1).sum() - (columns.max() + 1 - columns.min())
    assert grown == pytest.approx(2 * 10 * 1600 / 1024 * scale, abs=1.01)


def test_pairs(photo, tmp_path):
    target, exemplar = tmp_path / "target.png", tmp_path / "exemplar.png"
    Image.new("RGB", (1600, 1200), (255, 0, 0)).save(target)
    Image.new("RGB", (50, 70), (0, 0, 255)).save(exemplar)
    record = Record(photo, BOX, exemplar=exemplar, target=target)
    ours, alone = example(record).example, example(Record(photo, BOX)).example
    assert (ours.image == torch.tensor([1.0, -1, -1])[:, None, None]).all()
    torch.testing.assert_close(ours.source, alone.source, rtol=0, atol=2 / 255)  # a rounded level
    torch.testing.assert_close(ours.masked_image, ours.source * ours.mask, rtol=0, atol=0)
    blue = (torch.tensor([0.0, 0, 1]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(ours.exemplar, blue[:, None, None].expand(3, 224, 224), rtol=0, atol=1e-4)


def test_pairs_have_bars_around_both_pictures(photo, tmp_path):
    Image.new("RGB", (1600, 1200), (255, 0, 0)).save(tmp_path / "target.png")
    wide = np.float32([[0.02, 0.3, 0.95, 0.6]])
    ours = example(Record(photo, wide, target=tmp_path / "target.png"), fit="letterbox", resolution=64).example
    for picture in (ours.image, ours.source, ours.masked_image):
        assert (picture[:, :8] == 0).all()
        assert (picture[:, 56:] == 0).all()
    assert (ours.image[0, 8:56] == 1).all()
    assert ours.source[:, 8:56].std() > 0.1


def test_fixed_edits_are_taken_as_they_are(photo, tmp_path):
    mask = np.zeros((1200, 1600), dtype=bool)
    mask[100:220, 150:310] = True  # 1 % of the photo: less than the recipe's boxes
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(natural_photo(64, 64, seed=5)).save(tmp_path / "exemplar.png")
    masks = (MaskFile(tmp_path / "mask.png"),)
    boxes = masks[0].read().box()
    record = Record(photo, boxes, masks, tmp_path / "exemplar.png", repaint_masks=True, fixed=True)
    # All that would change something is on.
    options = {"coverage": [0.1, 0.2], "object_mask": 0.0, "object_mask_margin": 30.0, "flip": 1.0, "rotation": 1.0}
    stages = [example(record, seed, resolution=160, exemplar_size=64, antialias=True, **options) for seed in range(3)]
    for one in stages:
        assert one.geometry.window == (0, 0, 1600, 1200)
        torch.testing.assert_close(one.example[:4], stages[0].example[:4], rtol=0, atol=0)
    repainted = torch.zeros(160, 160, dtype=torch.bool)
    repainted[13:30, 15:31] = True  # rows 100 to 220 of 1200 and columns 150 to 310 of 1600: all pixels touched
    torch.testing.assert_close(stages[0].example.mask[0] == 0, repainted, rtol=0, atol=0)
    std, mean = (torch.tensor(values)[:, None, None] for values in (CLIP_STD, CLIP_MEAN))
    shown = (stages[0].example.exemplar * std + mean) * 255
    reference = torch.from_numpy(natural_photo(64, 64, seed=5)).permute(2, 0, 1).float()
    torch.testing.assert_close(shown, reference, rtol=0, atol=1e-2)


def test_a_target_of_another_size_is_refused(photo, tmp_path):
    Image.new("RGB", (1200, 1600)).save(tmp_path / "target.png")
    with pytest.raises(UnusablePicture, match="1200x1600, its photo 1600x1200"):
        example(Record(photo, BOX, target=tmp_path / "target.png"))


def test_recoloring_is_of_the_object_in_photo_and_exemplar_alike(photo):
    off = {"flip": 0.0, "rotation": 0.0, "blur": 0.0, "warp": 0.0, "arbitrary_mask": 0.0, "resolution": 128}
    before = example(Record(photo, BOX), **off)
    after = example(Record(photo, BOX), **off, recolor=1.0)
    assert after.geometry.window == before.geometry.window
    kept = before.example.mask.bool().expand(3, -1, -1)
    torch.testing.assert_close(after.example.image[kept], before.example.image[kept], rtol=0, atol=0)
    assert after.example.source is after.example.image
    assert (after.example.image - before.example.image)[~kept].abs().max() > 0.1
    # The middle of the object has the same colours in both.
    std, mean = (torch.tensor(values)[:, None, None] for values in (CLIP_STD, CLIP_MEAN))
    middle = (after.example.exemplar * std + mean)[:, 92:132, 92:132].mean((1, 2))
    box, window = after.geometry.exemplar_box, after.geometry.window
    left, right = (int((box.x0 + box.width * i / 224 - window.x0) * 128 / window.width) for i in (92, 132))
    top, bottom = (int((box.y0 + box.height * i / 224 - window.y0) * 128 / window.height) for i in (92, 132))
    in_photo = (after.example.image[:, top:bottom, left:right].mean((1, 2)) + 1) / 2
    torch.testing.assert_close(in_photo, middle, rtol=0, atol=0.03)


def test_recoloring_leaves_what_is_kept_beside_an_objects_own_mask(photo):
    mask = np.zeros((120, 160), dtype=bool)
    mask[40:70, 60:90] = True
    record = Record(photo, BOX, (MaskArray(mask),))
    before, after = (example(record, object_mask=1.0, recolor=share).example for share in (0.0, 1.0))
    kept = before.mask.bool().expand(3, -1, -1)
    torch.testing.assert_close(after.image[kept], before.image[kept], rtol=0, atol=0)
    assert (after.image - before.image)[~kept].abs().max() > 0.1


def test_recoloring_has_its_probability_and_leaves_others_as_they_were(photo, tmp_path):
    options = {"resolution": 32, "exemplar_size": 32}
    before = [example(Record(photo, BOX), seed, **options).example for seed in range(60)]
    after = [example(Record(photo, BOX), seed, **options, recolor=0.5).example for seed in range(60)]
    changed = sum(not torch.equal(one.image, other.image) for one, other in zip(before, after, strict=True))
    assert abs(changed - 30) < 4 * 15**0.5  # 4 standard deviations
    Image.new("RGB", (50, 70), (0, 0, 255)).save(tmp_path / "exemplar.png")
    pair = Record(photo, BOX, exemplar=tmp_path / "exemplar.png")
    for record, others in ((pair, {}), (Record(photo, BOX), {"augment": False})):
        recolored = example(record, **options, **others, recolor=1.0).example
        torch.testing.assert_close(recolored[:4], example(record, **options, **others).example[:4], rtol=0, atol=0)


def test_antialias_smooths(tmp_path):
    stripes = np.zeros((1024, 1024, 3), dtype=np.uint8)
    stripes[:, ::3] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    record = Record(tmp_path / "stripes.png", BOX)
    assert example(record, resolution=128, antialias=True).example.image.std() < 0.05
    assert example(record, resolution=128).example.image.std() > 0.3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"flip": 1.5}, "recipe.flip must be a number from 0 to 1, got 1.5"),
        ({"grow": -0.1}, "recipe.grow must be a number from 0 to 1, got -0.1"),
        ({"jitter": -1.0}, "recipe.jitter must be a number of at least 0, got -1.0"),
        ({"resolution": 0}, "recipe.resolution must be a whole number of at least 8, got 0"),
        ({"min_area": 0.9}, "recipe.min_area 0.9 must be below max_area 0.8"),
        ({"coverage": [0.5, 0.1]}, "recipe.coverage must be"),
        ({"coverage": [0.5]}, "recipe.coverage must be"),
        ({"fit": "stretch"}, "recipe.fit must be 'squash', 'letterbox' or 'buckets', got 'stretch'"),
        ({"blur_kernels": [2, 7]}, "recipe.blur_kernels must be"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace(".", r"\.")):
        RecipeConfig(**options)


def test_changes_of_a_recipe():
    recipe = RecipeConfig(resolution=64, coverage=[0.1, 0.5], fit="letterbox")
    other = override_recipe(recipe, {"augment": False, "coverage": None, "min_area": 0}, "data.val_recipe")
    assert (other.augment, other.coverage, other.min_area) == (False, None, 0)
    assert (other.resolution, other.fit) == (64, "letterbox")
    other = override_recipe(recipe, {"coverage": [0.2, 0.3], "object_mask": 0.5, "fit": "squash"}, "")
    assert (other.coverage, other.object_mask, other.fit) == ((0.2, 0.3), 0.5, "squash")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"flipp": 0.5}, r"data\.val_recipe\.flipp: a recipe has no 'flipp'; did you mean 'flip'\?"),
        ({"batch": 4}, r"data\.val_recipe\.batch: a recipe has no 'batch'; .*resolution, "),
        ({"reference_margin": 3.0}, r"data\.val_recipe\.reference_margin .*'exemplar_margin'"),
        ({"flip": "often"}, r"data\.val_recipe\.flip must be a number from 0 to 1, got 'often'"),
        ({"flip": True}, r"data\.val_recipe\.flip must be a number from 0 to 1, got True"),
        ({"flip": None}, r"data\.val_recipe\.flip must be a number from 0 to 1, got None"),
        ({"resolution": 64.0}, r"data\.val_recipe\.resolution must be a whole number of at least 8, got 64\.0"),
        ({"coverage": ["a", "b"]}, r"data\.val_recipe\.coverage must be \[least, most\] .*, got \['a', 'b'\]"),
        ({"fit": "stretch"}, r"data\.val_recipe\.fit must be 'squash', 'letterbox' or 'buckets', got 'stretch'"),
        ({"flip": 1.5}, r"data\.val_recipe\.flip must be a number from 0 to 1, got 1\.5"),
        ({"min_area": 0.9}, r"data\.val_recipe\.min_area 0\.9 must be below max_area 0\.8"),
    ],
)
def test_wrong_changes_name_the_key(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        override_recipe(RecipeConfig(), changes, "data.val_recipe")


# --- numbers ----------------------------------------------------------------------------------------------


def test_hash64_is_splitmix64_and_stays_as_it_is():
    assert hash64(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
    assert hash64(1, 2, 3) != hash64(1, 3, 2) != hash64(2, 1, 3)
    values = np.array([hash64(0, e, i) for e in range(20) for i in range(1000)], dtype=np.uint64)
    assert len(set(values & 0xFFFFFFFF)) >= len(values) - 2  # torch's generator takes the lower half
    bits = (values[:, None] >> np.arange(64, dtype=np.uint64)) & 1
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.02  # 5 standard deviations


def test_draw_integers_takes_both_ends():
    g = make_generator(0)
    draws = np.array([draw_integers([3, 0], g) for _ in range(4000)])
    values, counts = np.unique(draws[:, 0], return_counts=True)
    assert values.tolist() == [0, 1, 2, 3]
    assert abs(counts - 1000).max() < 5 * 1000**0.5
    assert (draws[:, 1] == 0).all()


@pytest.mark.slow
def test_benchmark_compares_both_versions(photo, capsys):
    threads = torch.get_num_threads()
    timing = measure_recipe([Record(photo, BOX)], RecipeConfig(resolution=32, exemplar_size=16), pairs=1)
    assert torch.get_num_threads() == threads
    assert timing.photos == 1
    assert timing.speedup == pytest.approx(timing.ours / timing.plain)  # of the one round that counts
    boxes = photo.parent / "boxes.csv"
    boxes.write_text(f"file,width,height,x0,y0,x1,y1\n{photo.name},1600,1200,480,300,960,840\n")
    assert run("data", [str(boxes), "--pairs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "|  | photos | plain | here | ratio |"
    assert lines[2].startswith("| 512 px, the paper's recipe | 1 | ")
