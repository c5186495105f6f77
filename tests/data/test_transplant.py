"""Objects of other photos: where they go, what is pasted, and when."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.cli import show_data
from pbe.data.crop import in_window
from pbe.data.dataset import ExampleDataset, UnusablePictureWarning
from pbe.data.example import make_generator
from pbe.data.recipe import draw_geometry, make_example
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import MaskArray, MaskFile, Record, UnusablePicture, number_photos
from pbe.data.transplant import CutOut, Donor, donor_box, draw_donor, paste
from pbe.images.windows import Box
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.training.config import load_config

SMALL = {"resolution": 64, "exemplar_size": 32, "antialias": True}
PLAIN = SMALL | {"flip": 0.0, "rotation": 0.0, "blur": 0.0, "warp": 0.0, "arbitrary_mask": 0.0, "grow": 0.0}
BOX = np.float32([[0.25, 0.25, 0.75, 0.75]])
DISC = np.hypot(*(np.indices((100, 100)) - 49.5)) < 25


class Listed:
    """A source in memory."""

    name = "listed"

    def __init__(self, *records):
        self.records = records
        self.photos = number_photos([record.image for record in records])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.records[i]


@pytest.fixture
def host(tmp_path) -> Record:
    """A blue photo whose object, a box in its middle, is black."""
    photo = Image.new("RGB", (160, 160), (0, 0, 255))
    photo.paste((0, 0, 0), (40, 40, 120, 120))
    photo.save(tmp_path / "host.png")
    return Record(tmp_path / "host.png", BOX)


@pytest.fixture
def donors(tmp_path) -> Listed:
    """A photo of a red disc before green."""
    colours = np.where(DISC[..., None], np.uint8([255, 0, 0]), np.uint8([0, 255, 0]))
    Image.fromarray(colours).save(tmp_path / "donor.png")
    return Listed(Record(tmp_path / "donor.png", BOX, (MaskArray(DISC),)))


def transplanted(record, donors, seed=0, **options):
    config = RecipeConfig(**(PLAIN | {"transplant": 1.0} | options))
    return make_example(record, config, make_generator(seed), donors=donors)


def donor_of(width, height):
    return Donor(Path("photo.jpg"), MaskArray(DISC), (1000, 1000), Box(10, 20, 10 + width, 20 + height))


@pytest.mark.parametrize(("width", "height"), [(200, 200), (90, 300), (300, 90), (3, 7)])
def test_a_donor_goes_where_the_object_was_in_its_own_shape_and_as_large(width, height):
    box = Box(300, 200, 380, 300)
    place = donor_box(donor_of(width, height), box, (700, 900))
    assert place.area == pytest.approx(box.area, rel=0.03)  # whole pixels
    assert place.width / place.height == pytest.approx(width / height, rel=0.03)
    assert abs(place.x0 + place.x1 - 680) <= 1
    assert abs(place.y0 + place.y1 - 500) <= 1


def test_a_donor_stays_inside_the_photo():
    for donor in (donor_of(400, 20), donor_of(20, 400), donor_of(50, 50)):
        for box in (Box(0, 0, 100, 100), Box(0, 60, 40, 100), Box(99, 0, 100, 100)):
            place = donor_box(donor, box, (100, 100))
            assert 0 <= place.x0 < place.x1 <= 100
            assert 0 <= place.y0 < place.y1 <= 100


def test_anywhere_is_all_over_the_photo_and_drawn_only_if_it_may_be(host, donors):
    size, donor = (160, 240), draw_donor(donors, make_generator(0))

    def boxes(**options):
        config = RecipeConfig(**PLAIN, **options)
        return [draw_geometry(host, size, config, make_generator(seed), donor).box for seed in range(200)]

    own, mixed, free = (boxes(transplant_anywhere=share) for share in (0.0, 0.5, 1.0))
    assert own == boxes()
    assert len(set(own)) == 1
    assert 60 < sum(box == own[0] for box in mixed) < 140
    shares = [box.area / (160 * 240) for box in free]
    assert 0.09 < min(shares) < 0.15
    assert 0.35 < max(shares) < 0.41
    assert min(box.x0 for box in free) < 20 < 220 < max(box.x1 for box in free)
    assert all(0 <= box.x0 and 0 <= box.y0 and box.x1 <= 240 and box.y1 <= 160 for box in free)


def test_the_margin_of_an_exemplar_follows_its_own_photo():
    donor = donor_of(200, 100)._replace(size=(2048, 512))
    config = RecipeConfig(exemplar_margin=5)
    geometry = draw_geometry(Record(Path("photo.jpg"), BOX), (256, 256), config, make_generator(0), donor)
    assert geometry.exemplar_box == donor.box.grown(10, donor.size)  # 5 pixels of a photo of 1024


def test_a_box_in_the_pixels_of_a_window():
    assert in_window(Box(30, 20, 60, 50), Box(20, 10, 120, 60), (25, 200)) == (20, 5, 80, 20)
    assert in_window(Box(118, 58, 120, 60), Box(20, 10, 120, 60), (5, 5)) == (4, 4, 5, 5)


def test_pasting_mixes_by_cover_and_leaves_the_rest():
    under = torch.full((3, 4, 5), 100, dtype=torch.uint8)
    cut_out = CutOut(torch.full((3, 2, 3), 200, dtype=torch.uint8), torch.tensor([[[0.0, 0.5, 1.0]] * 2]))
    over = paste(cut_out, under, Box(1, 1, 4, 3))
    assert over[:, 1:3, 1:4].unique(dim=0).tolist() == [[[100, 150, 200]] * 2]
    assert (over != under).sum() == 3 * 2 * 2
    assert (under == 100).all()


def test_the_object_is_in_the_photo_and_the_exemplar(host, donors):
    stages = transplanted(host, donors)
    example, place = stages.example, in_window(stages.geometry.box, stages.geometry.window, (64, 64))
    image = (example.image + 1) / 2
    # A disc fills its box to pi / 4; all that is not the disc is the host's, black and blue, and nothing is green but
    # for pixels on the disc's edge: half of them is covered, by what is half green.
    red = (image[0] > 0.5).sum().item()
    assert red == pytest.approx(np.pi / 4 * place.area, rel=0.05)
    assert image[1].max() < 0.3
    assert (image[1] > 0.02).sum() < np.pi * place.width * 1.5
    assert image[:, place.y0 + place.height // 2, place.x0 + place.width // 2].tolist() == [1, 0, 0]
    # It is all inside of what is repainted, and the exemplar shows it in its own surroundings.
    assert (example.mask[0][image[0] > 0.02] == 0).all()
    std, mean = (torch.tensor(values)[:, None, None] for values in (CLIP_STD, CLIP_MEAN))
    exemplar = example.exemplar * std + mean
    torch.testing.assert_close(exemplar[:, 16, 16], torch.tensor([1.0, 0, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(exemplar[:, 0, 0], torch.tensor([0.0, 1, 0]), rtol=0, atol=1e-5)
    assert example.source is example.image
    assert stages.geometry.donor.image == donors[0].image


def test_the_mask_is_the_recipes_not_that_of_the_photos_own_object(host, donors):
    with_mask = host._replace(masks=(MaskArray(np.ones((160, 160), dtype=bool)),), repaint_masks=True)
    assert transplanted(with_mask, donors).geometry.outline is not None
    assert transplanted(with_mask, donors, transplant=0.0).geometry.outline is None


def test_what_is_transplanted_keeps_its_colours(host, donors):
    before, after = (transplanted(host, donors, recolor=share).example for share in (0.0, 1.0))
    torch.testing.assert_close(after.image, before.image, rtol=0, atol=0)


def test_it_has_its_probability_and_leaves_others_as_they_were(host, donors, tmp_path):
    stages = [transplanted(host, donors, seed, transplant=0.5) for seed in range(60)]
    assert abs(sum(one.geometry.donor is not None for one in stages) - 30) < 4 * 15**0.5  # 4 standard deviations
    Image.new("RGB", (50, 70), (0, 0, 255)).save(tmp_path / "blue.png")
    Image.new("RGB", (160, 160)).save(tmp_path / "target.png")
    for record in (host._replace(exemplar=tmp_path / "blue.png"), host._replace(target=tmp_path / "target.png")):
        assert transplanted(record, donors).geometry.donor is None
    assert transplanted(host, donors, augment=False).geometry.donor is None
    # Where it is off, examples are what they were before there was such a thing.
    off, without = (
        make_example(host, RecipeConfig(**SMALL), make_generator(1), donors=given).example for given in (donors, None)
    )
    for a, b in zip(off[:4], without[:4], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_all_donors_and_all_of_their_objects_are_drawn(donors):
    two = np.float32([[0, 0, 0.5, 0.5], [0.25, 0.25, 1, 1]])
    masks = (MaskArray(DISC), MaskArray(~DISC))
    source = Listed(donors[0], donors[0]._replace(boxes=two, masks=masks))
    drawn = [draw_donor(source, make_generator(seed)) for seed in range(60)]
    assert {donor.box for donor in drawn} == {(25, 25, 75, 75), (0, 0, 50, 50), (25, 25, 100, 100)}
    assert all(np.array_equal(donor.mask.mask, ~DISC) == (donor.box == (25, 25, 100, 100)) for donor in drawn)


def test_donors_need_masks(host, donors):
    with pytest.raises(ValueError, match=r"donor\.png of listed has no mask.*data\.donors"):
        transplanted(host, Listed(donors[0]._replace(masks=None)))


def test_donors_that_cannot_be_used_are_named(host, donors, tmp_path):
    empty = donors[0]._replace(masks=(MaskArray(~DISC & False),))
    with pytest.raises(UnusablePicture, match=r"mask of .*donor\.png is empty"):
        transplanted(host, Listed(empty))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UnusablePicture, match=r"mask of .*donor\.png.*bad\.png"):
        transplanted(host, Listed(donors[0]._replace(masks=(MaskFile(tmp_path / "bad.png"),))))
    with pytest.raises(UnusablePicture, match="there is no such file"):
        transplanted(host, Listed(donors[0]._replace(image=tmp_path / "gone.png")))


def test_a_data_set_of_transplants(host, donors, tmp_path):
    recipe = RecipeConfig(**SMALL, transplant=0.5)
    source = Listed(*[host] * 20)
    dataset, again = (ExampleDataset(source, recipe, 3, donors) for _ in range(2))
    for i in range(20):
        for a, b in zip(dataset[i][:5], again[i][:5], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert {dataset.stages(i).geometry.donor is None for i in range(20)} == {True, False}

    gone = Listed(donors[0], donors[0]._replace(image=tmp_path / "gone.png"))
    dataset = ExampleDataset(source, recipe, 3, gone)
    with pytest.warns(UnusablePictureWarning, match=r"gone\.png"):
        _ = [dataset[i] for i in range(20)]
    assert dataset.skipped["missing"] > 0

    with pytest.raises(ValueError, match=r"needs data\.donors"):
        ExampleDataset(source, recipe)
    with pytest.raises(ValueError, match="holds no picture"):
        ExampleDataset(source, recipe, donors=Listed())


def test_from_a_config(host, donors, tmp_path, capsys):
    Image.fromarray(DISC).save(tmp_path / "disc.png")
    (tmp_path / "hosts.csv").write_text("image,x0,y0,x1,y1\nhost.png,40,40,120,120\n")
    (tmp_path / "donors.csv").write_text("image,mask\ndonor.png,disc.png\n")
    settings = [f"data.source.path={tmp_path / 'hosts.csv'}", "data.recipe.transplant=1", "samples.every_n_steps=null"]
    with pytest.raises(ValueError, match=r"data\.recipe\.transplant needs data\.donors"):
        load_config(settings)
    with pytest.raises(ValueError, match=r"transplant must be a number from 0 to 1, got 2"):
        load_config([*settings, "data.recipe.transplant=2"])
    settings.append(f"data.donors.path={tmp_path / 'donors.csv'}")
    assert show_data.main(["--out", str(tmp_path / "shown"), *settings, "-n", "2", "data.recipe.grow=0"]) == 0
    with Image.open(tmp_path / "shown" / "00_target.png") as target:
        assert target.getpixel((target.width // 2, target.height // 2)) == (255, 0, 0)
    assert show_data.main([*settings, "data.donors.path=nowhere.csv", "--out", str(tmp_path / "shown")]) == 2
    assert "nowhere.csv" in capsys.readouterr().err
