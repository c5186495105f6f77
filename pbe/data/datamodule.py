"""Loaders of examples for Lightning: the same order for any number of processes, resumable within an epoch."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from pbe.data.dataset import ExampleDataset, Index, train_val_split
from pbe.data.example import Example, collate, make_generator
from pbe.data.mixture import Mixture
from pbe.data.recipe_config import RecipeConfig, override_recipe
from pbe.data.records import DataWarning, Source
from pbe.data.sources import MixedSourceConfig, SourceConfig, open_source

_SHUFFLE = 3  # beside the purposes of a hash in dataset.py


@dataclass
class DataConfig:
    """Where examples come from, and how they are loaded."""

    source: SourceConfig = field(default_factory=SourceConfig)
    """The training pictures."""
    val_source: SourceConfig | None = None
    """The pictures of validation."""
    test_source: SourceConfig | None = None
    """The pictures of the test."""
    donors: SourceConfig | None = None
    """Objects with masks, of all sizes, for `recipe.transplant`."""
    sources: list[MixedSourceConfig] = field(default_factory=list)
    """Several sources of training pictures in place of `source`, each with its share of the examples."""
    val_size: int = 0
    """Without a `val_source`: the number of photos of `source` to validate on, with all their objects, always the same
    ones, which are not trained on; a tenth of them where that is more than half. 0: no validation."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """How training examples are made."""
    val_recipe: dict[str, Any] = field(default_factory=dict)
    """What is different for validation and test, which are augmented only if it says `augment: true`. What COCOEE fixes
    is taken as it is, whatever the recipe."""
    batch_size: int = 4
    """Examples per step and process (one process per GPU)."""
    workers: int = 4
    """Processes that make examples, beside each process that trains; 0: none."""
    seed: int = 0
    """Decides all that is random about the examples and their order."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0), ("val_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if self.sources and (self.source.path or self.val_size):
            raise ValueError("data.sources takes the place of data.source, and needs a val_source in place of val_size")
        for key, recipe in self.recipes().items():
            recipe.check_donors(self.donors, key)

    def recipes(self) -> dict[str, RecipeConfig]:
        """The recipe of training, and that of validation and test, by their keys in the config."""
        return {"data.recipe": self.recipe, "data.val_recipe": self.recipe_for_validation()}

    def recipe_for_validation(self) -> RecipeConfig:
        """How examples of validation and test are made. ValueError for a wrong name or value in `val_recipe`."""
        return override_recipe(self.recipe, {"augment": False, "anneal_masks": 0, **self.val_recipe}, "data.val_recipe")


def check_sizes(
    config: DataConfig, multiple: int, exemplar_size: int, resolution: int | None = None, collage: bool = False
) -> None:
    """ValueError unless all examples suit a model whose pictures have sides of a `multiple` of pixels, whose exemplars
    are of `exemplar_size`, and whose holes show them or not. Warns (DataWarning) where they are not of its
    `resolution`."""
    for key, recipe in config.recipes().items():
        step = multiple * 8 if recipe.fit == "buckets" else multiple  # sides are eighths
        if recipe.resolution % step:
            raise ValueError(
                f"{key}.resolution must be a multiple of {step} for this model, got {recipe.resolution} ({recipe.fit})"
            )
        if recipe.exemplar_size != exemplar_size:
            raise ValueError(f"{key}.exemplar_size must be {exemplar_size} for this model, got {recipe.exemplar_size}")
        if recipe.collage != collage:
            raise ValueError(f"{key}.collage must be {str(collage).lower()} for this model: leave it out")
        if resolution is not None and recipe.resolution != resolution:
            warnings.warn(
                f"{key}.resolution is {recipe.resolution}, but the model's is {resolution}: each example has "
                f"{(recipe.resolution / resolution) ** 2:.3g} times the pixels that it is made for",
                DataWarning,
                stacklevel=2,
            )


def bucketed(
    order: Iterable[int], buckets: Sequence[tuple[int, int]], size: int, shuffle: torch.Generator | None = None
) -> list[Index]:
    """The examples of an order, each with its batch's bucket, in batches of `size` that are shuffled if wanted.

    Examples of one bucket come together; a batch that neighbouring buckets share has that of its middle example.
    """
    order = sorted(order, key=lambda i: buckets[i][1] - buckets[i][0])
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    numbers = range(len(batches)) if shuffle is None else torch.randperm(len(batches), generator=shuffle).tolist()
    return [(i, buckets[batch[len(batch) // 2]]) for batch in (batches[k] for k in numbers) for i in batch]


class ExampleSampler(DistributedSampler):
    """The order of training: a permutation by seed and epoch, cut into global batches of one slice per process.

    Global batch g is permutation[g B : (g + 1) B] with B = batch_size x processes, and process r takes the r-th
    `batch_size` of it: any number of processes sees the same order, and the same batches where B is the same. The
    last examples, which do not fill a global batch, are left out. Where the recipe's `fit` is "buckets", the rest are
    sorted into global batches of one shape each, whose order is drawn too.

    It is a DistributedSampler so that Lightning keeps it, and tells it the epoch.
    """

    dataset: ExampleDataset

    def __init__(self, dataset: ExampleDataset, batch_size: int, seed: int = 0, rank: int = 0, processes: int = 1):
        """ValueError if the dataset is too small for one global batch."""
        super().__init__(dataset, num_replicas=processes, rank=rank, seed=seed, drop_last=True)
        self.batch_size, self.global_batch = batch_size, batch_size * processes
        if len(dataset) < self.global_batch:
            raise ValueError(
                f"{dataset.source.name} has {len(dataset)} pictures, fewer than one batch of {self.global_batch} "
                f"({batch_size} x {processes} processes); lower data.batch_size"
            )
        self.position = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Order and examples are those of this epoch from now on."""
        super().set_epoch(epoch)
        self.dataset.set_epoch(epoch)

    def set_position(self, epoch: int, consumed_samples: int) -> None:
        """Carry on in this epoch after its first `consumed_samples`, of all processes together.

        Other epochs are not affected. ValueError if the epoch does not have that many.
        """
        if not 0 <= consumed_samples <= len(self.dataset):
            raise ValueError(f"consumed_samples must be 0 to {len(self.dataset)}, got {consumed_samples}")
        self.position = (epoch, consumed_samples)
        self.set_epoch(epoch)

    def permutation(self) -> Tensor:
        """The order of the whole epoch (N,)."""
        return torch.randperm(len(self.dataset), generator=make_generator(_SHUFFLE, self.seed, self.epoch))

    def __iter__(self) -> Iterator[Index]:
        epoch, consumed = self.position
        order: list[Any] = self.permutation().tolist()
        if self.dataset.recipe.fit == "buckets":
            whole = order[: len(order) // self.global_batch * self.global_batch]
            generator = make_generator(_SHUFFLE, self.seed, self.epoch, 1)
            order = bucketed(whole, self.dataset.buckets(), self.global_batch, generator)
        rest = order[consumed if epoch == self.epoch else 0 :]
        first = self.rank * self.batch_size
        starts = range(first, len(rest) // self.global_batch * self.global_batch, self.global_batch)
        return iter([i for start in starts for i in rest[start : start + self.batch_size]])

    def __len__(self) -> int:
        """Of a whole epoch in this process, wherever it carries on."""
        return len(self.dataset) // self.global_batch * self.batch_size


def ignore_signals(worker: int) -> None:
    """A data worker outlives a signal to the whole process group: it is for the process that trains to stop."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


class ExampleDataModule(lightning.LightningDataModule):
    """Train, validation and test loaders of `Example` batches.

    The order and the examples follow from `config.seed`; they depend neither on the number of workers nor on that of
    processes. Validation and test examples are the same in every epoch.
    """

    def __init__(self, config: DataConfig):
        super().__init__()
        self.config = config
        self.train: ExampleDataset | None = None
        self.val: ExampleDataset | None = None
        self.test: ExampleDataset | None = None
        self._position = (0, 0)

    def setup(self, stage: str) -> None:
        """Opens the sources that the stage needs: "fit", "validate" or "test". ValueError for one that is not set."""
        config = self.config
        val_recipe = config.recipe_for_validation()
        if stage in ("fit", "validate") and self.train is None:
            source, val = self._open_training(), None
            if config.val_source is not None:
                val = self._open(config.val_source, val_recipe)
            elif config.val_size:
                source, val = train_val_split(source, self._val_size(source))
            self.train = self._dataset(source, config.recipe)
            self.val = self._dataset(val, val_recipe) if val is not None else None
        if stage == "test" and self.test is None:
            if config.test_source is None:
                raise ValueError("data.test_source is not set: there is nothing to test on")
            self.test = self._dataset(self._open(config.test_source, val_recipe), val_recipe)

    def _val_size(self, source: Source) -> int:
        """The number of photos to hold out: a tenth where `val_size` is more than half of them, with a warning."""
        size, count = self.config.val_size, int(source.photos.max()) + 1
        if 2 * size <= count or count < 2:
            return size
        fewer = max(1, count // 10)
        warnings.warn(
            f"{source.name} has {count} photos: {fewer} are held out for validation, not data.val_size={size}, "
            "which is more than half of them",
            DataWarning,
            stacklevel=3,
        )
        return fewer

    def _open_training(self) -> Source:
        config = self.config
        if not config.sources:
            return self._open(config.source, config.recipe)
        opened = [self._open(source, config.recipe) for source in config.sources]
        return Mixture(opened, *zip(*((source.weight, source.noisy) for source in config.sources), strict=True))

    def _open(self, source: SourceConfig, recipe: RecipeConfig) -> Source:
        return open_source(source, (recipe.min_area, recipe.max_area))

    def _dataset(self, source: Source, recipe: RecipeConfig) -> ExampleDataset:
        donors = open_source(self.config.donors) if self.config.donors and recipe.needs_donors else None
        return ExampleDataset(source, recipe, self.config.seed, donors)

    def set_position(self, epoch: int, consumed_samples: int) -> None:
        """Training loaders made from now on carry on in this epoch after `consumed_samples` of all processes."""
        self._position = (epoch, consumed_samples)

    def train_dataloader(self) -> DataLoader[Example]:
        assert self.train is not None, "setup comes first"
        sampler = ExampleSampler(self.train, self.config.batch_size, self.config.seed, *self._rank_and_world_size())
        sampler.set_position(*self._position)
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[Example] | list:
        return self._in_order(self.val) if self.val is not None else []

    def test_dataloader(self) -> DataLoader[Example]:
        assert self.test is not None, "setup comes first"
        return self._in_order(self.test)

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """How often a picture could not be used in this process and its workers: by "train", "val" or "test", as far as
        they are set up, and by reason. All processes have the same keys."""
        datasets = {"train": self.train, "val": self.val, "test": self.test}
        return {split: dataset.skipped for split, dataset in datasets.items() if dataset is not None}

    def _rank_and_world_size(self) -> tuple[int, int]:
        """Of the trainer; a process of its own without one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _in_order(self, dataset: ExampleDataset) -> DataLoader[Example]:
        """Each process has the same number of examples, so a few at the end may come twice."""
        rank, processes = self._rank_and_world_size()
        order: Iterable[int] = DistributedSampler(dataset, processes, rank, shuffle=False)
        buckets = dataset.buckets() if dataset.recipe.fit == "buckets" else None
        return self._loader(dataset, bucketed(order, buckets, self.config.batch_size) if buckets else order)

    def _loader(self, dataset: ExampleDataset, sampler: Iterable[Index]) -> DataLoader[Example]:
        workers = self.config.workers
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )
