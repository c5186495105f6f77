"""Data sets of examples: the same example wherever it is made, pictures that cannot be used, the tool that shows."""

import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pbe.cli import show_data
from pbe.data.dataset import ExampleDataset, UnusablePictureWarning, train_val_split
from pbe.data.example import collate
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import Record, number_photos

SMALL = RecipeConfig(resolution=32, exemplar_size=16)
BOX = np.float32([[0.2, 0.2, 0.7, 0.8]])


class Listed:
    """A source in memory."""

    name = "listed"

    def __init__(self, records):
        self.records = records

    @property
    def photos(self):
        return number_photos([record.image for record in self.records])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        if isinstance(self.records[i], Exception):
            raise self.records[i]
        return self.records[i]


def save_photos(folder: Path, n: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(n)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((80, 60)).save(path)
    return paths


@pytest.fixture
def source(tmp_path):
    return Listed([Record(path, BOX) for path in save_photos(tmp_path, 6)])


def assert_same(a, b):
    for x, y in zip(a[:5], b[:5], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert a.file == b.file


def differ(a, b):
    return not torch.equal(a.exemplar, b.exemplar) or not torch.equal(a.mask, b.mask)


def test_an_example_follows_from_seed_epoch_and_index(source):
    dataset, again = ExampleDataset(source, SMALL, seed=3), ExampleDataset(source, SMALL, seed=3)
    first = [dataset[i] for i in range(6)]
    for i in (4, 0, 5):  # in another order
        assert_same(again[i], first[i])
    again.set_epoch(1)
    other_epoch, other_seed = [again[i] for i in range(6)], [ExampleDataset(source, SMALL, 4)[i] for i in range(6)]
    assert all(differ(a, b) for a, b in zip(first, other_epoch, strict=True))
    assert all(differ(a, b) for a, b in zip(first, other_seed, strict=True))
    seeds = {int(e.seed) for e in (*first, *other_epoch, *other_seed)}
    assert len(seeds) == 18
    assert min(seeds) >= 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing_and_see_the_epoch(source, workers):
    dataset = ExampleDataset(source, SMALL, seed=3)
    loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)
    reference = ExampleDataset(source, SMALL, seed=3)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        reference.set_epoch(epoch)
        batches = list(loader)
        assert [file for batch in batches for file in batch.file] == [str(r.image) for r in source.records]
        for i, batch in enumerate(batches):
            assert_same(batch, collate([reference[2 * i], reference[2 * i + 1]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_photo_travels_once_if_it_is_the_target_too(source, tmp_path, workers):
    Image.new("RGB", (80, 60), "red").save(tmp_path / "target.png")
    records = [*source.records[:2], source.records[2]._replace(target=tmp_path / "target.png"), source.records[3]]
    dataset = ExampleDataset(Listed(records), SMALL)
    unpaired, paired = DataLoader(dataset, 2, num_workers=workers, collate_fn=collate)
    assert unpaired.source is unpaired.image
    red = torch.tensor([1.0, -1, -1])[:, None, None]
    assert (paired.image[0] == red).all()
    assert not (paired.source[0] == red).all()
    assert torch.equal(paired.source[1], paired.image[1])
    for batch in (unpaired, paired):
        assert torch.equal(batch.masked_image, batch.source * batch.mask)


def test_collate(source):
    dataset = ExampleDataset(source, SMALL)
    batch = collate([dataset[0], dataset[1]])
    assert batch.image.shape == batch.masked_image.shape == (2, 3, 32, 32)
    assert batch.mask.shape == (2, 1, 32, 32)
    assert batch.exemplar.shape == (2, 3, 16, 16)
    assert batch.seed.dtype == torch.int64
    assert batch.seed.tolist() == [int(dataset[0].seed), int(dataset[1].seed)]
    assert batch.file == [dataset[0].file, dataset[1].file]


def spoil(source, tmp_path):
    """Makes four of six pictures unusable."""
    good = source.records
    (tmp_path / "broken.jpg").write_bytes(good[0].image.read_bytes()[:300])
    return Listed(
        [
            Record(tmp_path / "gone.jpg", BOX),
            Record(tmp_path / "broken.jpg", BOX),
            Record(good[2].image, np.float32([[0.1, 0.1, 0.15, 0.15]])),
            ValueError("row 4: no box"),
            good[4],
            good[5],
        ]
    )


def test_unusable_pictures_are_replaced_counted_and_warned_of_once(source, tmp_path):
    dataset = ExampleDataset(spoil(source, tmp_path), SMALL)
    assert dataset.skipped == {"missing": 0, "unreadable": 0, "no box": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, again = [dataset[i] for i in range(6)], [dataset[i] for i in range(6)]
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    good = {str(record.image) for record in source.records[4:]}
    assert {example.file for example in first} == good
    assert len({int(example.seed) for example in first}) == 6  # a replacement has draws of its own
    assert all(count >= 2 for count in dataset.skipped.values())  # both times, and more where one led to the next
    messages = [str(w.message) for w in caught]
    assert all(w.category is UnusablePictureWarning for w in caught)
    for name in ("gone.jpg: there is no such file", "broken.jpg cannot be read", "2.jpg has no box", "row 4: no box"):
        assert sum(name in message for message in messages) == 1


@pytest.mark.filterwarnings("ignore::pbe.data.dataset.UnusablePictureWarning")
def test_counts_of_all_workers_come_together(source, tmp_path):
    spoiled = spoil(source, tmp_path)
    here, there = ExampleDataset(spoiled, SMALL), ExampleDataset(spoiled, SMALL)
    expected = [here[i] for i in range(6)]
    got = [e for batch in DataLoader(there, 1, num_workers=2, collate_fn=list) for e in batch]
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)
    assert there.skipped == here.skipped
    assert sum(there.skipped.values()) >= 4


@pytest.mark.filterwarnings("ignore::pbe.data.dataset.UnusablePictureWarning")
def test_a_source_without_any_usable_picture_is_an_error(tmp_path):
    dataset = ExampleDataset(Listed([Record(tmp_path / f"{i}.jpg", BOX) for i in range(3)]), SMALL)
    with pytest.raises(ValueError, match=r"listed: 100 pictures in a row cannot be used; the first: .*1\.jpg"):
        dataset[1]


def test_warnings_end_but_counts_go_on(tmp_path):
    dataset = ExampleDataset(Listed([Record(tmp_path / f"{i}.jpg", BOX) for i in range(60)]), SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="100 pictures"):
            dataset[0]
    assert len(caught) == 20
    assert "further ones are only counted" in str(caught[-1].message)
    assert dataset.skipped["missing"] == 100


def test_errors_of_the_code_are_not_taken_for_bad_pictures(source, monkeypatch):
    def broken(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("pbe.data.recipe.draw_geometry", broken)
    with pytest.raises(ValueError, match=r"^a bug$"):
        ExampleDataset(source, SMALL)[0]


def test_empty_source_and_wrong_index(source):
    with pytest.raises(ValueError, match="listed holds no picture"):
        ExampleDataset(Listed([]), SMALL)
    with pytest.raises(IndexError, match="example 6 of 6"):
        ExampleDataset(source, SMALL)[6]


def test_hold_out_parts_the_source_the_same_way_each_time(source):
    rest, held = train_val_split(source, 2)

    def files(part):
        return [part[i].image for i in range(len(part))]

    assert (len(rest), len(held)) == (4, 2)
    assert sorted(files(rest) + files(held)) == sorted(files(source))
    assert files(train_val_split(source, 2)[1]) == files(held)
    with pytest.raises(ValueError, match=r"6 pictures \(data.val_size\) cannot be held out of the 6 of listed"):
        train_val_split(source, 6)


def test_hold_out_keeps_the_records_of_a_photo_together(source):
    records = [record for record in source.records for _ in range(3)]
    rest, held = train_val_split(Listed(records), 2)
    assert (len(rest), len(held)) == (12, 6)
    photos = [{part[i].image for i in range(len(part))} for part in (rest, held)]
    assert not photos[0] & photos[1]
    assert len(photos[1]) == 2
    assert len(np.unique(rest.photos)) == rest.photos.max() + 1 == 4
    with pytest.raises(ValueError, match=r"6 pictures \(data.val_size\) cannot be held out of the 6 of listed"):
        train_val_split(Listed(records), 6)


def test_hold_out_of_millions_is_cheap():
    class Index:
        name = "index"
        photos = np.arange(1_900_000, dtype=np.uint32)

    start = time.perf_counter()
    rest, held = train_val_split(Index(), 2048)
    assert time.perf_counter() - start < 2  # a tenth of that on an idle machine
    assert (len(rest), len(held)) == (1_900_000 - 2048, 2048)
    # chosen at random: the mean of 2048 uniform numbers is off by 0.006 of their range, as a standard deviation
    assert abs(held._indices.mean() / 1_900_000 - 0.5) < 0.03
    assert rest._indices.nbytes <= 4 * 1_900_000  # what each worker process holds


def test_show_data_writes_every_stage(source, tmp_path):
    dataset = ExampleDataset(source, SMALL)
    show_data.write([dataset.stages(i) for i in range(3)], tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"grid.png"} | {f"{i:02}_{stage}.png" for i in range(3) for stage in show_data.STAGES}
    with Image.open(tmp_path / "out" / "00_masked.png") as masked:
        shown = torch.from_numpy(np.asarray(masked).copy()).permute(2, 0, 1)
    expected = ((dataset[0].masked_image / 2 + 0.5) * 255).to(torch.uint8)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1)
    with Image.open(tmp_path / "out" / "00_photo.png") as photo:
        assert photo.size == (640, 480)
        box = dataset.stages(0).geometry.box
        colours = {photo.getpixel((round(box.x0 * 8) + 1, y)) for y in range(box.y0 * 8, box.y1 * 8)}
    assert colours & set(show_data.COLOURS.values())


def test_show_data_shows_the_photo_and_the_target(source, tmp_path):
    Image.new("RGB", (80, 60), "red").save(tmp_path / "target.png")
    paired = Listed([source.records[0]._replace(target=tmp_path / "target.png")])
    show_data.write([ExampleDataset(paired, SMALL).stages(0)], tmp_path / "out")
    for stage, is_red in (("window", False), ("target", True)):
        with Image.open(tmp_path / "out" / f"00_{stage}.png") as picture:
            assert (picture.getcolors() == [(32 * 32, (255, 0, 0))]) == is_red


@pytest.mark.slow
def test_show_data_command(tmp_path, capsys):
    save_photos(tmp_path, 4)
    rows = "".join(f"{i}.jpg,80,60,16,12,56,48\n" for i in range(4))
    (tmp_path / "boxes.csv").write_text("file,width,height,x0,y0,x1,y1\n" + rows)
    settings = [f"data.source.path={tmp_path / 'boxes.csv'}", "samples.every_n_steps=null", "data.recipe.resolution=32"]
    assert show_data.main([*settings, "--out", str(tmp_path / "out"), "-n", "2"]) == 0
    assert (tmp_path / "out" / "grid.png").is_file()
    assert "grid.png: 2 examples" in capsys.readouterr().out
    assert show_data.main([*settings, "--out", str(tmp_path / "none"), "-n", "0"]) == 2
    assert "-n must be at least 1, got 0" in capsys.readouterr().err
    assert show_data.main([*settings, "--val", "--out", str(tmp_path / "none")]) == 2
    assert "no validation examples" in capsys.readouterr().err
    assert show_data.main([*settings, "--test", "--out", str(tmp_path / "none")]) == 2
    assert "data.test_source is not set" in capsys.readouterr().err
    assert (
        show_data.main([*settings, "data.test_source=${data.source}", "--test", "--out", str(tmp_path / "test")]) == 0
    )
