"""Several sources as one: shares of an epoch, and what is said about each."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pbe.data.datamodule import DataConfig, ExampleDataModule
from pbe.data.mixture import Mixture
from pbe.data.records import Record
from pbe.data.sources import MixedSourceConfig, SourceConfig


class Numbered:
    """A source in memory whose records are told by their names."""

    def __init__(self, name, count):
        self.name, self.count = name, count
        self.photos = np.arange(count)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        assert 0 <= i < self.count
        return Record(Path(f"{self.name}{i}"), np.float32([[0.2, 0.2, 0.7, 0.8]]))


def names(mixture, epoch):
    return [mixture.of_epoch(i, epoch).image.name for i in range(len(mixture))]


def test_shares_of_an_epoch():
    mixture = Mixture([Numbered("a", 30), Numbered("b", 10)], weights=[1, 3], noisy=[0, 0.5])
    assert len(mixture) == 40
    first = names(mixture, 0)
    assert sum(name.startswith("a") for name in first) == 10
    assert len(set(first)) == 10 + 10  # all of the small source, three times over
    thrice = {name for epoch in range(3) for name in names(mixture, epoch) if name.startswith("a")}
    assert len(thrice) == 30  # three epochs see all of the large one
    assert names(mixture, 3)[:10] == first[:10]
    assert {mixture[i].noisy for i in range(10)} == {0}
    assert {mixture[i].noisy for i in range(10, 40)} == {0.5}


def test_empty_source():
    with pytest.raises(ValueError, match="b holds no picture"):
        Mixture([Numbered("a", 3), Numbered("b", 0)], [1, 1], [0, 0])


@pytest.fixture
def manifests(tmp_path):
    paths = []
    for name, gray in (("dark", 10), ("light", 200)):
        (tmp_path / name).mkdir()
        rows = ["file,x0,y0,x1,y1"]
        for i in range(4):
            Image.new("RGB", (40, 40), (gray,) * 3).save(tmp_path / name / f"{i}.png")
            rows.append(f"{i}.png,10,10,30,30")
        paths.append(tmp_path / name / "boxes.csv")
        paths[-1].write_text("\n".join(rows))
    return paths


def test_in_a_config(manifests):
    sources = [MixedSourceConfig(path=str(manifests[0])), MixedSourceConfig(path=str(manifests[1]), weight=3, noisy=1)]
    config = DataConfig(sources=sources, val_source=SourceConfig(path=str(manifests[0])), workers=0)
    config.recipe.resolution, config.recipe.exemplar_size = 32, 16
    data = ExampleDataModule(config)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    means = [data.train[i].image.mean().item() for i in range(8)]
    assert [mean > 0 for mean in means] == [False] * 2 + [True] * 6
    assert batch.noisy.tolist() == [float(image.mean() > 0) for image in batch.image]
    assert len(data.val) == 4


def test_mistakes(manifests):
    mixed = [MixedSourceConfig(path=str(manifests[0]))]
    for others in ({"val_size": 2}, {"source": SourceConfig(path="x.csv")}):
        with pytest.raises(ValueError, match=r"takes the place of data\.source"):
            DataConfig(sources=mixed, **others)
    with pytest.raises(ValueError, match=r"data\.sources\.weight must be .* above 0, got 0"):
        MixedSourceConfig(weight=0)
