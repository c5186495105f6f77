"""Aspect buckets: the shapes of examples, batches of one shape, in the same order for any process, carried on."""

import math
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.data.crop import BUCKETS, SQUARE, nearest_bucket
from pbe.data.datamodule import DataConfig, ExampleDataModule, ExampleSampler, check_sizes
from pbe.data.example import make_generator
from pbe.data.recipe import draw_geometry, make_example
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import Record
from pbe.data.sources import MixedSourceConfig, SourceConfig
from pbe.training.config import load_config

RECIPE = RecipeConfig(resolution=32, exemplar_size=16, fit="buckets")
SIZES = [(48, 48)] * 5 + [(40, 60)] * 7 + [(60, 40)] * 6 + [(30, 120)] * 3  # (height, width)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = ["file,x0,y0,x1,y1"]
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
        rows.append(f"{i:02}.png,0.4,0.3,0.7,0.8")
    (folder / "boxes.csv").write_text("\n".join(rows))
    return str(folder / "boxes.csv")


def opened(manifest, batch_size=3, rank=0, processes=1, **options):
    source = SourceConfig(path=manifest)
    config = DataConfig(source, val_source=source, recipe=RECIPE, batch_size=batch_size, workers=0, **options)
    data = ExampleDataModule(config)
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
    return data


def test_the_bucket_nearest_to_a_photo():
    assert nearest_bucket((100, 100)) == nearest_bucket((100, 112)) == SQUARE
    assert nearest_bucket((300, 400)) == (7, 9)
    assert nearest_bucket((400, 300)) == (9, 7)
    assert nearest_bucket((400, 600)) == (6, 10)
    assert nearest_bucket((1080, 1920)) == (6, 11)
    assert nearest_bucket((5000, 100)) == (11, 6)
    assert all(abs(math.log(h * w / 64)) < 0.07 for h, w in BUCKETS)


@pytest.mark.parametrize("coverage", [None, (0.1, 0.5)])
@pytest.mark.parametrize("size", [(600, 800), (800, 600), (500, 900), (640, 640)])
def test_windows_have_the_buckets_aspect_and_hold_the_box(size, coverage):
    record = Record("photo.jpg", np.float32([[0.4, 0.3, 0.6, 0.6]]))
    generator = make_generator(3)
    h, w = nearest_bucket(size)
    config = RecipeConfig(fit="buckets", coverage=coverage)
    seen = set()
    for _ in range(50):
        geometry = draw_geometry(record, size, config, generator)
        window, grown = geometry.window, geometry.grown
        assert geometry.size == (64 * h, 64 * w)
        assert abs(window.width * h - window.height * w) <= 2 * (w + h)  # whole pixels
        edges = zip(window[:2], grown[:2], grown[2:], window[2:], size[::-1], strict=True)
        assert all(0 <= a <= b < c <= d <= side for a, b, c, d, side in edges)
        seen.add(window)
    assert (len(seen) == 1) == (size == (640, 640) and coverage is None)  # the paper takes those whole


def test_a_box_that_no_such_window_holds_takes_the_whole_photo():
    record = Record("photo.jpg", np.float32([[0.0, 0.2, 1.0, 0.8]]))
    geometry = draw_geometry(record, (100, 300), RecipeConfig(fit="buckets"), make_generator(0))
    assert (geometry.window, geometry.content) == ((0, 0, 300, 100), (0, 0, 704, 384))


def test_an_example_has_the_bucket_it_is_given(manifest):
    record = opened(manifest).train.source[7]
    assert make_example(record, RECIPE, make_generator(0)).example.image.shape == (3, 24, 40)
    example = make_example(record._replace(bucket=(9, 7)), RECIPE, make_generator(0)).example
    assert example.image.shape == (3, 36, 28)
    assert example.mask.shape == (1, 36, 28)
    square = make_example(record._replace(bucket=(9, 7)), replace(RECIPE, fit="squash"), make_generator(0)).example
    assert square.image.shape == (3, 32, 32)


def test_batches_have_one_shape_and_leave_out_no_more_than_without(manifest):
    data = opened(manifest)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 7
    assert len({file for batch in batches for file in batch.file}) == 21
    shapes = [batch.image.shape[-2:] for batch in batches]
    assert set(shapes) == {(32, 32), (24, 40), (40, 24), (24, 44)}
    assert all(batch.mask.shape[-2:] == shape for batch, shape in zip(batches, shapes, strict=True))
    assert shapes != sorted(shapes, key=lambda shape: shape[1] - shape[0])  # one shape after the other would be a bias
    own = [nearest_bucket(SIZES[int(file[-6:-4])]) for batch in batches for file in batch.file]
    given = [(h // 4, w // 4) for h, w in shapes for _ in range(3)]
    assert sum(a != b for a, b in zip(own, given, strict=True)) <= 3  # at most one in each of the shared batches


def test_all_processes_have_one_shape_at_a_time_and_the_same_batches(manifest):
    dataset = opened(manifest).train
    alone = list(ExampleSampler(dataset, 4, 5))
    ranks = [list(ExampleSampler(dataset, 2, 5, rank, 2)) for rank in range(2)]
    together = [list(chain(*(rank[k : k + 2] for rank in ranks))) for k in range(0, len(ranks[0]), 2)]
    assert list(chain(*together)) == alone
    assert all(len({bucket for _, bucket in batch}) == 1 for batch in together)


def test_an_epoch_carries_on_where_it_was_left(manifest):
    def order(epoch, position=(0, 0)):
        sampler = ExampleSampler(opened(manifest).train, 2, 5, rank=1, processes=2)
        sampler.set_position(*position)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, (1, 8)) == order(1)[4:]
    assert order(2, (1, 8)) == order(2) != order(1)


def test_validation_has_every_photo_in_its_bucket(manifest):
    data = opened(manifest, batch_size=2)
    batches = list(data.val_dataloader())
    assert [len(batch.file) for batch in batches] == [2] * 10 + [1]
    assert {batch.image.shape[-2:] for batch in batches} == {(32, 32), (24, 40), (40, 24), (24, 44)}
    both = [list(opened(manifest, 2, rank, 2).val_dataloader().sampler) for rank in range(2)]
    assert {i for i, _ in chain(*both)} == set(range(21))
    assert len(both[0]) == len(both[1])


def test_several_sources_have_the_buckets_of_each_epochs_photos(manifest, tmp_path):
    Image.new("RGB", (40, 80)).save(tmp_path / "tall.png")
    (tmp_path / "tall.csv").write_text("file,x0,y0,x1,y1\ntall.png,0.3,0.3,0.7,0.7\n")
    sources = [MixedSourceConfig(path=manifest), MixedSourceConfig(path=str(tmp_path / "tall.csv"))]
    data = ExampleDataModule(DataConfig(sources=sources, recipe=RECIPE, batch_size=2, workers=0))
    data.setup("fit")
    for epoch in range(2):
        data.train.set_epoch(epoch)
        shapes = [data.train[i].image.shape[-2:] for i in range(22)]
        assert [(h // 4, w // 4) for h, w in shapes] == data.train.buckets()
    assert {batch.image.shape[-2:] for batch in data.train_dataloader()} >= {(44, 24), (24, 40)}


@pytest.mark.filterwarnings("ignore::pbe.data.dataset.UnusablePictureWarning", "ignore::pbe.data.records.DataWarning")
def test_what_replaces_a_picture_has_its_batchs_shape(tmp_path):
    rows = "".join(f"{name}.png,0.3,0.3,0.7,0.7\n" for name in ("wide", "gone"))
    (tmp_path / "boxes.csv").write_text("file,x0,y0,x1,y1\n" + rows)
    Image.new("RGB", (100, 50)).save(tmp_path / "wide.png")
    dataset = opened(str(tmp_path / "boxes.csv"), 1).train
    assert dataset.buckets() == [(6, 11), SQUARE]
    assert dataset[1, (9, 7)].image.shape == (3, 36, 28)
    assert torch.equal(dataset[0].image, dataset[0, (6, 11)].image)


def test_mistakes(manifest):
    config = DataConfig(SourceConfig(path=manifest), recipe=replace(RECIPE, resolution=40))
    check_sizes(config, 5, 16)
    with pytest.raises(ValueError, match=r"data\.recipe\.resolution must be a multiple of 32 .*, got 40 \(buckets\)"):
        check_sizes(config, 4, 16)
    with pytest.raises(ValueError, match=r"encodings\.folder keeps one shape .*fit=squash or letterbox"):
        load_config(["data.recipe.fit=buckets", "data.val_size=4", "encodings.folder=x"])
