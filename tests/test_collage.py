"""The exemplar in the hole of the masked image: where it lies, and that data, training and editing show the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_run
from conftest import TINY
from PIL import Image

import pbe
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.cli import main as pbe_main
from pbe.cli.train import main
from pbe.data.example import make_generator
from pbe.data.recipe import make_example, shown_at
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import MaskArray, Record
from pbe.editing.regions import Region
from pbe.images.reading import exemplar_tensor
from pbe.models.collage import collage, collages, fitted_box
from pbe.models.paint_by_example import PaintByExample
from pbe.sampling import NoiseSchedule
from pbe.training.config import load_config
from pbe.training.initialization import starting_model

RED, GREEN = (
    torch.tensor(colour)[:, None, None].expand(3, 16, 16) for colour in ([1.0, -1.0, -1.0], [-1.0, 1.0, -1.0])
)


class Donors(list):
    name = "donors"


PHOTO = np.full((64, 64, 3), 255, np.uint8)
BOX = (16, 8, 48, 56)  # 32 wide, 48 high
SETTINGS = {"steps": 2, "sampler": "ddim", "composite": False}


def mask_of(x0, y0, x1, y1, side=64):
    mask = torch.ones(1, side, side)
    mask[:, y0:y1, x0:x1] = 0
    return mask


def laid(exemplar, box, mask, image=None, shown=None):
    image = torch.zeros(3, 64, 64) if image is None else image
    return collage(image, mask, exemplar, box, torch.ones(1, 16, 16) if shown is None else shown)


def fitted(exemplar, aspect, mask, image=None):
    return laid(exemplar, fitted_box(aspect, mask), mask, image)


def picture(colour, width, height):
    return Image.new("RGB", (width, height), colour)


@pytest.fixture(scope="module")
def model():
    config = replace(TINY, collage=True)
    model = PaintByExample(config)
    model.load_state_dict(seeded_state(TINY, 0))
    return model.eval()


@pytest.fixture
def masked_images(model, monkeypatch):
    """What the autoencoder was given to make z_masked of, in order."""
    seen, encode = [], model.vae.encode

    def noted(pixels):
        seen.append(pixels)
        return encode(pixels)

    monkeypatch.setattr(model.vae, "encode", noted)
    monkeypatch.setattr("pbe.editing.edit.make_ready", lambda model, callback, *_: (model, callback))
    return seen


@pytest.fixture(autouse=True)
def no_fade(monkeypatch):
    """So that what is shown where is seen to the pixel."""
    monkeypatch.setattr("pbe.models.collage.FADE", 0.0)


# --- where it lies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aspect", "inside"),
    [
        (1.5, (16, 8, 48, 56)),  # the region's own
        (1.2, (16, 8, 48, 56)),  # stretched to it
        (1.8, (16, 8, 48, 56)),
        (1.0, (16, 10, 48, 53)),  # by a third, no more
        (0.5, (16, 21, 48, 42)),
        (4.0, (24, 8, 40, 56)),
        (1e-3, (16, 31, 48, 32)),  # a pixel at least
    ],
)
def test_an_exemplar_is_in_the_middle_as_large_as_fits(aspect, inside):
    hole = fitted(RED, aspect, mask_of(*BOX))
    expected = torch.where(mask_of(*inside) == 0, RED[:, :1, :1], 0.0)
    assert torch.equal(hole, expected)


def test_outside_of_the_region_nothing_is_shown():
    mask = mask_of(*BOX)
    mask[:, 20:30, 20:30] = 1  # a part that is kept
    hole = laid(RED, BOX, mask)
    assert torch.equal(hole != 0, (mask == 0).expand(3, -1, -1))
    everywhere = torch.zeros(1, 64, 64)
    for box in ((-8, -4, 24, 28), (50, 40, 90, 80), (-9, -9, 80, 80), (-20, 0, -4, 9), (64, 0, 70, 9)):
        clipped = [min(max(side, 0), 64) for side in box]
        assert torch.equal(laid(RED, box, everywhere) != 0, (mask_of(*clipped) == 0).expand(3, -1, -1)), box
    image, nothing = torch.ones(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    assert not collages(image, nothing, RED[None], [1.0]).any()


def test_around_the_exemplar_the_surroundings_go_on():
    ramp = torch.linspace(-0.9, 0.9, 64).expand(3, 64, 64)
    mask = mask_of(*BOX)
    hole = laid(RED, (28, 28, 36, 36), mask, torch.where(mask > 0, ramp, 100.0))  # what is hidden is not seen
    around = ((mask == 0) & (mask_of(28, 28, 36, 36) > 0))[0]
    torch.testing.assert_close(hole[:, around], ramp[:, around], atol=0.03, rtol=0)
    assert torch.equal(hole[:, 28:36, 28:36], RED[:, :8, :8])


def test_of_a_cut_out_the_object_alone_is_laid_in():
    """Without a trace of the white around it, where it is half transparent too."""
    shown = torch.zeros(1, 16, 16)
    shown[:, :, 4:8], shown[:, :, 8:12] = 1.0, 0.5
    image = torch.full((3, 64, 64), -0.2)
    hole = laid(1 + (RED - 1) * shown, (24, 24, 40, 40), mask_of(*BOX), image, shown)[:, 24:40, 24:40]
    expected = torch.lerp(torch.full((3, 16, 16), -0.2), RED, shown)
    torch.testing.assert_close(hole, expected, atol=1e-5, rtol=0)


def test_along_its_edges_it_fades(monkeypatch):
    """Those of its box and of the hole, and not that of the picture."""
    monkeypatch.setattr("pbe.models.collage.FADE", 0.1)
    across = laid(RED, (0, 8, 48, 56), mask_of(0, 8, 32, 56))[0, 32]  # 0.1 of its 32 x 48 are four pixels
    torch.testing.assert_close(across[28:33], torch.tensor([7, 5, 3, 1, 0]) / 9)
    assert (across[:28] == 1).all()
    down = laid(RED, (16, 20, 48, 60), mask_of(*BOX))[0, :, 32]
    assert (down[:20] == 0).all()
    assert (down[20:24].diff() > 0).all()
    assert (down[25:50] == 1).all()
    assert (down[52:57].diff() < 0).all()


def test_a_batch_is_each_of_its_own():
    exemplars = torch.cat([exemplar_tensor(picture(c, 16, 16), 16) for c in ("red", "lime")])
    images = torch.stack([torch.full((3, 64, 64), 0.5), torch.zeros(3, 64, 64)])
    masks = torch.stack([mask_of(*BOX), mask_of(0, 0, 8, 8)])
    holes = collages(images, masks, exemplars, [1.0, 2.0])
    torch.testing.assert_close(holes[0], fitted(RED, 1.0, masks[0], images[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(holes[1], fitted(GREEN, 2.0, masks[1]), atol=1e-5, rtol=0)


# --- the model --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_hole_is_for_a_model_that_was_trained_with_it(model):
    image, mask = torch.randn(1, 3, 64, 64).clamp(-1, 1), mask_of(*BOX)[None]
    exemplar = torch.randn(1, 3, 28, 28)
    hole = collages(image, mask, exemplar, [1.0])
    z_masked, _ = model.encode_masked(image, mask, hole=hole)
    assert torch.equal(z_masked, model.vae.encode(image * mask + hole).mean)
    assert torch.equal(model.condition(image, mask, exemplar).z_masked, z_masked)
    with pytest.raises(ValueError, match=r"needs a hole: pbe\.models\.collage\.collages"):
        model.encode_masked(image, mask)
    ordinary = PaintByExample(TINY)
    with pytest.raises(ValueError, match="was trained with gray holes"):
        ordinary.condition(image, mask, exemplar, hole=hole)


@pytest.mark.parametrize(("collage", "tokens"), [(True, "class"), (False, "all")])
@pytest.mark.parametrize("kind", ["ckpt", "diffusers"])
def test_a_file_says_what_its_model_is_shown(tmp_path, kind, collage, tokens):
    vision = replace(TINY.exemplar.vision, num_layers=4)  # of which diffusers makes one mapper block
    config = replace(TINY, exemplar=replace(TINY.exemplar, vision=vision, tokens=tokens), collage=collage)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": seeded_state(config, 0), "pbe": pbe_entry(config)}, path)
    if kind == "diffusers":
        pytest.importorskip("safetensors")
        assert pbe_main(["checkpoint", "convert", str(path), "--out", str(tmp_path / "folder")]) == 0
        path = tmp_path / "folder"
    assert pbe.load_model(path, "cpu", "float32").config == config
    assert "collage" not in pbe_entry(TINY)


# --- editing ----------------------------------------------------------------------------------------------


def test_an_edit_shows_the_exemplar_in_its_region(model, masked_images):
    pbe.edit(model, PHOTO, BOX, picture("red", 40, 40), window="full", **SETTINGS)
    (seen,) = masked_images
    expected = torch.where(mask_of(*BOX) == 1, 1.0, fitted(RED, 1.0, mask_of(*BOX), torch.ones(3, 64, 64)))
    torch.testing.assert_close(seen[0], expected, atol=0.01, rtol=0)


def test_of_several_exemplars_it_shows_the_mean(model, masked_images):
    exemplars = [picture("red", 40, 40), picture("lime", 40, 60)]
    pbe.edit(model, PHOTO, BOX, exemplars, exemplar_weights=[1, 3], window="full", **SETTINGS)
    white = torch.ones(3, 64, 64)
    red, green = fitted(RED, 1.0, mask_of(*BOX), white), fitted(GREEN, 1.5, mask_of(*BOX), white)
    expected = torch.where(mask_of(*BOX) == 1, 1.0, 0.25 * red + 0.75 * green)
    torch.testing.assert_close(masked_images[0][0], expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("as_mask", [True, False])
def test_of_an_exemplar_with_a_mask_it_shows_the_object(model, masked_images, as_mask):
    """By a mask as by an alpha channel, and where there is none the photo's surroundings."""
    pixels, shown = np.zeros((30, 30, 3), np.uint8), np.ones((30, 30), bool)
    pixels[:, :10], pixels[:, 10:20], pixels[:, 20:] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    shown[:, 10:20] = False
    exemplar = pixels if as_mask else np.dstack([pixels, shown.astype(np.uint8) * 255])
    photo, mask = np.full((64, 64, 3), 90, np.uint8), shown if as_mask else None
    pbe.edit(model, photo, (8, 8, 56, 56), exemplar, exemplar_mask=mask, window="full", **SETTINGS)
    thirds = [masked_images[0][0][:, 12:52, x : x + 8].mean(dim=(1, 2)) for x in (12, 28, 44)]
    expected = torch.stack([RED[:, 0, 0], torch.full((3,), 90 / 127.5 - 1), GREEN[:, 0, 0]])
    torch.testing.assert_close(torch.stack(thirds), expected, atol=0.01, rtol=0)


def test_each_region_shows_its_own(model, masked_images, monkeypatch):
    monkeypatch.setattr("pbe.editing.regions.make_ready", lambda model, callback, *_: (model, callback))
    left, right = (4, 8, 24, 28), (40, 30, 60, 50)
    regions = [Region(left, picture("red", 20, 20)), Region(right, picture("lime", 20, 20))]
    pbe.edit_regions(model, PHOTO, regions, window="full", **SETTINGS)
    for seen, colour, box in zip(masked_images, (RED, GREEN), (left, right), strict=True):
        shown = seen[0][:, box[1] : box[3], box[0] : box[2]]
        torch.testing.assert_close(shown, colour[:, :1, :1].expand_as(shown), atol=0.01, rtol=0)


def test_each_result_s_own_window_goes_on_around_it(model, masked_images):
    """In the second part of a mask, whose windows show what was painted in the first."""
    mask, photo = np.zeros((64, 64), bool), np.full((64, 64, 3), 90, np.uint8)
    mask[8:28, 4:24] = mask[30:50, 40:60] = True
    exemplars = [picture("red", 20, 20), picture("red", 20, 20)]
    settings = {**SETTINGS, "composite": True, "split_mask": True, "window": "full", "num_images": 3}
    pbe.edit(model, photo, mask, exemplars, **settings)
    first, second = masked_images
    assert len(first) == 1
    assert len(second) == 3
    inside = second[:, :, 32:48, 42:58]
    torch.testing.assert_close(inside, RED[:, :1, :1].expand_as(inside), atol=0.01, rtol=0)
    assert not torch.equal(second[0], second[1])


@pytest.mark.parametrize(("strength", "t"), [(1.0, 649), (0.5, 324)])
def test_sampling_starts_from_what_is_shown(model, monkeypatch, strength, t):
    """At two thirds of the noise; with a strength below 1 from the photo, as for other models."""
    monkeypatch.setattr("pbe.editing.edit.make_ready", lambda model, callback, *_: (model, callback))
    noise, starts = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), []

    class First(Exception):
        pass

    def predict(x, *_):
        starts.append(x)
        raise First

    monkeypatch.setattr(model.unet, "forward", predict)
    settings = {**SETTINGS, "spacing": "trailing", "guidance": 1, "strength": strength, "latents": noise}
    with pytest.raises(First):
        pbe.edit(model, PHOTO, BOX, picture("red", 40, 40), window="full", **settings)
    x, start = starts[0][:, :4], starts[0][:, 4:8]
    if strength < 1:
        start = model.vae.encode(torch.ones(1, 3, 64, 64)).mean
    alpha_bar = NoiseSchedule.scaled_linear().alpha_bar[t].item()
    torch.testing.assert_close(x, alpha_bar**0.5 * start + (1 - alpha_bar) ** 0.5 * noise)


# --- training ---------------------------------------------------------------------------------------------


def test_an_example_shows_the_exemplar_where_its_object_is(tmp_path):
    """Unaugmented, what it shows is the photo itself, in a window that is squashed too."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8).repeat(20, axis=0).repeat(20, axis=1)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    record = Record(tmp_path / "photo.png", np.float32([[0.05, 0.25, 0.95, 0.75]]))  # too wide for a square
    recipe = RecipeConfig(resolution=96, exemplar_size=192, augment=False, antialias=True, collage=True)
    stages = make_example(record, recipe, make_generator(3))
    assert stages.geometry.window.width != stages.geometry.window.height
    x0, y0, x1, y1 = shown_at(stages.geometry)
    inside = (slice(None), slice(y0, y1), slice(x0, x1))
    seen, image, repaint = (
        x[inside] for x in (stages.example.masked_image, stages.example.image, stages.pixels.repaint)
    )
    assert ((seen - image).abs() * repaint).mean() < 0.1
    assert ((seen.roll(3, -1) - image).abs() * repaint).mean() > 0.2


def test_a_transplanted_object_is_shown_where_it_was_put(tmp_path):
    """Another scale and place than in its own photo, and the same draws as without the collage."""
    photo = np.full((200, 300, 3), 255, np.uint8)
    photo[40:100, 60:100] = (255, 0, 0)
    Image.fromarray(photo).save(tmp_path / "donor.png")
    Image.fromarray(np.zeros((400, 400, 3), np.uint8)).save(tmp_path / "host.png")
    mask = np.zeros((200, 300), bool)
    mask[40:100, 60:100] = True
    box = np.float32([[60 / 300, 40 / 200, 100 / 300, 100 / 200]])
    donors = Donors([Record(tmp_path / "donor.png", box, masks=[MaskArray(mask)])])
    host = Record(tmp_path / "host.png", np.float32([[0.3, 0.3, 0.8, 0.7]]))
    recipe = RecipeConfig(resolution=64, exemplar_size=64, transplant=1.0, rotation=0, blur=0, warp=0, flip=0)
    plain, shown = (
        make_example(host, replace(recipe, collage=collage), make_generator(5), donors=donors)
        for collage in (False, True)
    )
    for name in ("image", "mask", "exemplar"):
        assert torch.equal(getattr(plain.example, name), getattr(shown.example, name)), name
    red = (shown.example.image[0] > 0) & (shown.example.image[1] < 0)
    hole = shown.example.hole * shown.pixels.repaint
    seen = (hole[0] > 0.5) & (hole[1] < -0.5)
    assert (red & shown.pixels.repaint[0]).sum() > 100
    assert (red & shown.pixels.repaint[0] != seen).float().sum() < 0.15 * seen.sum()


def test_of_a_transplanted_cut_out_the_object_alone_is_shown(tmp_path):
    """Turned where its exemplar is, which is white around it."""
    photo = np.full((200, 200, 3), (0, 0, 255), np.uint8)
    mask = np.zeros((200, 200), bool)
    mask[50:150, 50:100] = mask[100:150, 50:150] = True  # an L
    photo[mask] = (255, 0, 0)
    Image.fromarray(photo).save(tmp_path / "donor.png")
    Image.fromarray(np.full((400, 400, 3), 90, np.uint8)).save(tmp_path / "host.png")
    donors = Donors([Record(tmp_path / "donor.png", np.float32([[0.25, 0.25, 0.75, 0.75]]), masks=[MaskArray(mask)])])
    host = Record(tmp_path / "host.png", np.float32([[0.3, 0.3, 0.8, 0.7]]))
    recipe = RecipeConfig(
        resolution=64, exemplar_size=64, transplant=1.0, fill_background=1.0, flip=0, blur=0, warp=0, collage=True
    )
    for seed in range(4):
        stages = make_example(host, recipe, make_generator(seed), donors=donors)
        hole, repaint = stages.example.hole, stages.pixels.repaint
        blue = (hole[2] > 0.2) & (hole[0] < -0.2)  # of the donor's photo
        red = (hole[0] > 0.5) & (hole[1] < -0.5)
        gray = ((hole - (90 / 127.5 - 1)).abs() < 0.05).all(dim=0)
        assert not blue.any()
        assert min(red.sum(), (gray & repaint[0]).sum()) > 50
        corner = stages.example.exemplar[:, 24:30, 40:46]  # in the L's bay
        torch.testing.assert_close(corner, exemplar_tensor(picture("white", 9, 9), 6)[0], atol=0.05, rtol=0)


def test_a_run_shows_it_and_its_file_says_so(tmp_path, capsys):
    toy = toy_run.write(tmp_path)
    settings = ("trainer.max_steps=2", "checkpoint.every_n_steps=2", "samples={every_n_steps: 2, edit: {steps: 1}}")
    run = (str(toy), *settings, "model.collage=true")
    toy_run.run(*run, f"run={tmp_path / 'plain'}")
    toy_run.run(*run, f"run={tmp_path / 'kept'}", f"encodings.folder={tmp_path / 'encodings'}")
    losses, kept = (toy_run.metrics(tmp_path / name, "train/loss") for name in ("plain", "kept"))
    assert kept == pytest.approx(losses, rel=2e-3)
    assert list((tmp_path / "plain" / "samples").glob("*.png"))
    saved = tmp_path / "plain" / "checkpoints" / "step-00000002.ckpt"
    model = pbe.load_model(saved, "cpu", "float32")
    assert model.config.collage
    # who goes on with it has it too, unless they say otherwise
    going_on = [str(toy), f"model={{init: {saved}, size: null, vae: null}}"]
    assert load_config(going_on).data.recipe.collage
    without = load_config([*going_on, "model.collage=false"])
    assert not without.data.recipe.collage
    assert not starting_model(without.model, 0).config.collage
    assert main([*run, f"run={tmp_path / 'other'}", "data.recipe.collage=false"]) == 2
    assert "data.recipe.collage must be true for this model: leave it out" in capsys.readouterr().err


def test_a_student_is_shown_it_too(tmp_path):
    toy = toy_run.write(tmp_path)
    settings = ("task=distill", "training={train: [unet], ema_decay: null}", "trainer.max_steps=1")
    toy_run.run(toy, *settings, "model.collage=true", "checkpoint.every_n_steps=1", f"run={tmp_path / 'student'}")
    student = pbe.load_model(tmp_path / "student" / "checkpoints" / "step-00000001.ckpt", "cpu", "float32")
    assert student.config.collage
    assert student.config.distilled
