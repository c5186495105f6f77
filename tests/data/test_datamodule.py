"""The loaders: one order for any number of processes, carried on where it was left, as Lightning runs them."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from pbe.data.datamodule import DataConfig, ExampleDataModule, ExampleSampler, check_sizes
from pbe.data.dataset import ExampleDataset
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import DataWarning
from pbe.data.sources import SourceConfig
from pbe.training.config import load_config

RECIPE = RecipeConfig(resolution=32, exemplar_size=16, arbitrary_mask=1.0)
N = 22


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(N):
        small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        small.resize((70, 50)).save(folder / f"{i:02}.png")
    rows = "".join(f"{i:02}.png,70,50,14,10,49,40\n" for i in range(N))
    (folder / "boxes.csv").write_text("file,width,height,x0,y0,x1,y1\n" + rows)
    return str(folder / "boxes.csv")


@pytest.fixture
def dataset(manifest):
    data = ExampleDataModule(DataConfig(SourceConfig(path=manifest), recipe=RECIPE))
    data.setup("fit")
    return data.train


def flatten(lists):
    return list(chain.from_iterable(lists))


def global_batches(dataset, batch_size, processes, epoch=0, position=None):
    """The batches of all processes, put together: (batches, global batch)."""
    slices = []
    for rank in range(processes):
        sampler = ExampleSampler(dataset, batch_size, 5, rank, processes)
        if position:
            sampler.set_position(*position)
        sampler.set_epoch(epoch)
        slices.append(torch.tensor(list(sampler)).view(-1, batch_size))
    return torch.cat(slices, dim=1).tolist()


def test_any_number_of_processes_sees_the_same_batches(dataset):
    alone = global_batches(dataset, 8, 1)
    assert len(alone) == 2  # 22 pictures; the last 6 fill no batch
    assert global_batches(dataset, 4, 2) == global_batches(dataset, 2, 4) == alone
    flat = flatten(alone)
    assert len(set(flat)) == 16
    assert flat != sorted(flat)
    # With other batches it is still the same order.
    assert flatten(global_batches(dataset, 1, 3))[:16] == flat


def test_epochs_and_seeds_have_orders_of_their_own(dataset):
    orders = {tuple(flatten(global_batches(dataset, 2, 1, epoch))) for epoch in range(4)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert list(ExampleSampler(dataset, 2, seed=6)) != list(ExampleSampler(dataset, 2, seed=5))


def test_the_sampler_sets_the_datasets_epoch(dataset):
    ExampleSampler(dataset, 2).set_epoch(7)
    assert dataset.epoch == 7


def test_an_epoch_carries_on_where_it_was_left(dataset):
    whole = flatten(global_batches(dataset, 2, 2, epoch=3))
    assert flatten(global_batches(dataset, 2, 2, epoch=3, position=(3, 8))) == whole[8:]
    # Also with another number of processes, and the epochs after it are whole.
    assert flatten(global_batches(dataset, 1, 3, epoch=3, position=(3, 8)))[:12] == whole[8:20]
    assert global_batches(dataset, 2, 2, epoch=4, position=(3, 8)) == global_batches(dataset, 2, 2, epoch=4)
    sampler = ExampleSampler(dataset, 4)
    sampler.set_position(0, 8)
    assert len(sampler) == 20  # of the whole epoch: Lightning counts from where it carries on
    with pytest.raises(ValueError, match="consumed_samples must be 0 to 22, got 23"):
        sampler.set_position(0, 23)


def test_too_few_pictures_for_a_batch(dataset):
    with pytest.raises(ValueError, match=r"has 22 pictures, fewer than one batch of 24 \(8 x 3 processes\)"):
        ExampleSampler(dataset, 8, rank=0, processes=3)


def test_validation_is_dealt_out_in_order(manifest):
    source = SourceConfig(path=manifest)
    data = ExampleDataModule(DataConfig(source, val_source=source, recipe=RECIPE, workers=0))
    data.setup("fit")
    alone = list(data.val_dataloader().sampler)
    ranks = []
    for rank in range(4):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=4)
        ranks.append(list(data.val_dataloader().sampler))
    assert len({len(rank) for rank in ranks}) == 1  # else one would wait for the other
    assert set(flatten(ranks)) == set(range(N))
    assert alone == list(range(N))


def test_loaders(manifest):
    config = DataConfig(SourceConfig(path=manifest), val_size=5, recipe=RECIPE, batch_size=4, workers=0)
    data = ExampleDataModule(config)
    data.setup("fit")
    assert (len(data.train), len(data.val)) == (17, 5)
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert [len(batch.file) for batch in train] == [4] * 4
    assert [len(batch.file) for batch in val] == [4, 1]
    trained, validated = (flatten(batch.file for batch in batches) for batches in (train, val))
    assert not set(trained) & set(validated)
    assert not data.val.recipe.augment
    assert data.train.recipe.augment
    # Box masks: the validation recipe has no Bezier shapes, which are all that training has here.
    assert all((row.any(0).sum() * row.any(1).sum() == row.sum()) for batch in val for row in batch.mask[:, 0] == 0)
    none = {"missing": 0, "unreadable": 0, "no box": 0}
    assert data.skipped == {"train": none, "val": none}


def test_sources_of_their_own(manifest):
    source = SourceConfig(path=manifest)
    # A size for pictures held out, as a YAML may have it, is of no account.
    config = DataConfig(source, val_source=source, test_source=source, val_size=5, recipe=RECIPE, workers=0)
    data = ExampleDataModule(config)
    assert data.skipped == {}
    data.setup("fit")
    data.setup("test")
    assert len(data.train) == len(data.val) == len(data.test) == N
    with pytest.raises(ValueError, match=r"data\.test_source is not set"):
        ExampleDataModule(DataConfig(source)).setup("test")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore::pbe.data.dataset.UnusablePictureWarning")
def test_skipped_pictures_are_counted_by_split(manifest, tmp_path, workers):
    def source(name, *missing):
        rows = [f"{manifest.rpartition('/')[0]}/{i:02}.png" for i in range(4)] + [str(tmp_path / x) for x in missing]
        path = tmp_path / name
        path.write_text("image,x0,y0,x1,y1\n" + "".join(f"{row},14,10,49,40\n" for row in rows))
        return SourceConfig(path=str(path))

    config = DataConfig(
        source("train.csv"), source("val.csv", "a.png"), source("test.csv", "a.png", "b.png"), recipe=RECIPE,
        batch_size=2, workers=workers,
    )  # fmt: skip
    data = ExampleDataModule(config)
    data.setup("fit")
    data.setup("test")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    counts = {split: skipped["missing"] for split, skipped in data.skipped.items()}
    assert (counts["train"], counts["val"]) == (0, 1)
    assert counts["test"] >= 2  # a replacement may be missing too
    assert list(data.skipped) == ["train", "val", "test"]


def cocoee(folder):
    """A benchmark of two edits: half a percent of the picture, and nine tenths of it."""
    np.save(folder / "id_list.npy", np.array([3, 5]))
    rng = np.random.default_rng(1)
    masks = ((10, 20, 17, 28), (2, 2, 98, 96))
    for number, box in zip((3, 5), masks, strict=True):
        mask = Image.new("L", (100, 100))
        mask.paste(255, box)
        pictures = {"GT": rng.integers(0, 256, (100, 100, 3)), "ref": rng.integers(0, 256, (16, 16, 3)), "mask": mask}
        for name, picture in pictures.items():
            path = folder / f"{'Mask_bbox' if name == 'mask' else name.capitalize().replace('Gt', 'GT')}_3500"
            path.mkdir(exist_ok=True)
            Image.fromarray(np.uint8(picture)).save(path / f"{number:012d}_{name}.png")
    return SourceConfig(kind="cocoee", path=str(folder)), masks


@pytest.mark.filterwarnings("error::pbe.data.dataset.UnusablePictureWarning")
def test_the_benchmark_is_taken_as_it_is_whatever_the_recipe(manifest, tmp_path):
    source, masks = cocoee(tmp_path)
    recipe = RecipeConfig(resolution=100, exemplar_size=16, coverage=[0.1, 0.3], grow=1.0, fit="letterbox", flip=1.0)
    data = ExampleDataModule(DataConfig(SourceConfig(path=manifest), source, source, recipe=recipe, workers=0))
    data.setup("fit")
    data.setup("test")
    (val,), (test,) = data.val_dataloader(), data.test_dataloader()
    for batch in (val, test):
        for k, (x0, y0, x1, y1) in enumerate(masks):
            expected = torch.ones(100, 100)
            expected[y0:y1, x0:x1] = 0
            assert torch.equal(batch.mask[k, 0], expected)
            with Image.open(batch.file[k]) as picture:
                pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(batch.image[k], pixels, rtol=0, atol=1e-6)  # float32
    assert torch.equal(val.exemplar, test.exemplar)


def test_val_size_gives_way_to_few_photos(manifest):
    config = DataConfig(SourceConfig(path=manifest), val_size=64, recipe=RECIPE, workers=0)
    data = ExampleDataModule(config)
    with pytest.warns(DataWarning, match=r"has \d+ photos: \d are held out for validation, not data\.val_size=64"):
        data.setup("fit")
    assert len(data.val) == max(1, (len(data.val) + len(data.train)) // 10)
    config.val_size = 2
    data = ExampleDataModule(config)
    data.setup("fit")
    assert len(data.val) == 2


def test_another_resolution_than_the_models_is_announced(manifest):
    config = DataConfig(SourceConfig(path=manifest), recipe=RecipeConfig(resolution=512, exemplar_size=16))
    with pytest.warns(DataWarning, match=r"resolution is 512, but the model's is 64: .* 64 times the pixels"):
        check_sizes(config, 8, 16, 64)


def test_sizes_that_a_model_does_not_take(manifest):
    config = DataConfig(SourceConfig(path=manifest), recipe=RecipeConfig(resolution=36, exemplar_size=16))
    check_sizes(config, 4, 16)
    with pytest.raises(ValueError, match=r"data\.recipe\.resolution must be a multiple of 8 for this model, got 36"):
        check_sizes(config, 8, 16)
    with pytest.raises(ValueError, match=r"data\.recipe\.exemplar_size must be 224 for this model, got 16"):
        check_sizes(config, 4, 224)
    config.val_recipe["resolution"] = 35
    with pytest.raises(ValueError, match=r"data\.val_recipe\.resolution must be a multiple of 4"):
        check_sizes(config, 4, 16)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"workers": -1}, "data.workers must be at least 0, got -1"),
        ({"val_size": -1}, "data.val_size must be at least 0, got -1"),
        ({"val_recipe": {"grwo": 0}}, "data.val_recipe.grwo: a recipe has no 'grwo'; did you mean 'grow'"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        DataConfig(**options)


class Recorder(lightning.LightningModule):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch.file, batch.seed.tolist()))
        return self.weight * batch.image.mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.current_epoch, batch.file, batch.seed.tolist()))

    def test_step(self, batch, batch_idx):
        self.tested += batch.file

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(tmp_path, epochs):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def fit(manifest, tmp_path, workers, epochs=2, position=None):
    config = DataConfig(SourceConfig(path=manifest), val_size=4, recipe=RECIPE, batch_size=4, workers=workers, seed=9)
    data, module = ExampleDataModule(config), Recorder()
    if position:
        data.set_position(*position)
    make_trainer(tmp_path, epochs).fit(module, data)
    return data, module


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_runs_it(manifest, tmp_path):
    data, module = fit(manifest, tmp_path, workers=0)
    assert len(module.trained) == 2 * 4
    first, second = ([step[1] for step in module.trained if step[0] == epoch] for epoch in (0, 1))
    assert first != second
    # Each step's seeds are those of its epoch's examples.
    expected = ExampleDataset(data.train.source, RECIPE, seed=9)
    numbers = {expected[i].file: i for i in range(len(expected))}
    for epoch, files, seeds in module.trained:
        expected.set_epoch(epoch)
        assert seeds == [int(expected[numbers[file]].seed) for file in files]
    # Validation, first as a sanity check, is the same every time.
    assert len({(tuple(files), tuple(seeds)) for _, files, seeds in module.validated}) == 1
    # Workers that live on see the second epoch as well.
    _, with_workers = fit(manifest, tmp_path, workers=2)
    assert with_workers.trained == module.trained


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_carries_on_within_an_epoch(manifest, tmp_path):
    _, whole = fit(manifest, tmp_path, workers=0, epochs=2)
    _, rest = fit(manifest, tmp_path, workers=0, epochs=2, position=(0, 8))
    assert rest.trained == whole.trained[2:]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_tests_on_the_test_source(manifest, tmp_path):
    config = DataConfig(
        SourceConfig(path="none.csv"), test_source=SourceConfig(path=manifest), recipe=RECIPE, workers=0
    )
    module = Recorder()
    make_trainer(tmp_path, 1).test(module, ExampleDataModule(config), verbose=False)
    assert [file.rpartition("/")[2] for file in module.tested] == [f"{i:02}.png" for i in range(N)]
    config = DataConfig(SourceConfig(path=manifest), recipe=RECIPE)
    with pytest.raises(ValueError, match=r"data\.test_source is not set"):
        make_trainer(tmp_path, 1).test(module, ExampleDataModule(config), verbose=False)


def test_settings_reach_the_recipes(manifest):
    data = load_config(
        [
            f"data.source.path={manifest}",
            "data.val_size=4",
            "data.recipe.coverage=[0.1,0.5]",
            "data.recipe.fit=letterbox",
            "data.val_recipe.min_area=0",
            "data.val_recipe.object_mask=1",
            "data.val_recipe.coverage=[0.2,0.3]",
            "samples.every_n_steps=null",
        ]
    ).data
    assert (data.recipe.coverage, data.recipe.fit) == ((0.1, 0.5), "letterbox")
    val = data.recipe_for_validation()
    assert val == replace(data.recipe, augment=False, min_area=0, object_mask=1, coverage=[0.2, 0.3])
    assert replace(data, val_recipe={"augment": True}).recipe_for_validation() == data.recipe
    for wrong in ("data.val_recipe.flipp=1", "data.val_recipe.flip=often", "data.val_recipe={fit: stretch}"):
        with pytest.raises(ValueError, match=r"data\.val_recipe\.(flipp|flip|fit)"):
            load_config([wrong, "data.val_size=4"])
    with pytest.raises(ValueError, match=r"data\.recipe\.fit"):
        load_config(["data.recipe.fit=stretch"])
    with pytest.raises(ValueError, match=r"data\.recipe\.flipp"):
        load_config(["data.recipe.flipp=1"])
