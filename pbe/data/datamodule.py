"""Loaders of examples for Lightning: the same order for any number of processes, resumable within an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from pbe.data.dataset import ExampleDataset, hold_out
from pbe.data.example import collate, make_generator
from pbe.data.recipe_config import RecipeConfig, changed
from pbe.data.records import Source
from pbe.data.sources import SourceConfig, open_source

_SHUFFLE = 3  # beside the purposes of a hash in dataset.py


@dataclass
class DataConfig:
    """Where examples come from, and how they are loaded.

    source: the training pictures. val_source: those of validation; without it, `val_size` photos held out of `source`
        with all their objects, always the same ones; 0: no validation. test_source: those of the test.
    donors: objects with masks, of all sizes, for `recipe.transplant`.
    recipe: how training examples are made. val_recipe: what is different for validation and test; they are never
        augmented unless it says `augment: true`. What COCOEE fixes is taken as it is, whatever the recipe.
    batch_size: examples a step and process (a GPU has one).
    workers: processes that make examples, beside each process that trains; 0: none.
    seed: of all that is random about the examples and their order.
    """

    source: SourceConfig = field(default_factory=SourceConfig)
    val_source: SourceConfig | None = None
    test_source: SourceConfig | None = None
    donors: SourceConfig | None = None
    val_size: int = 0
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    val_recipe: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 4
    workers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 or more, got {self.workers}")
        if self.val_size < 0:
            raise ValueError(f"data.val_size must be 0 or more, got {self.val_size}")
        for key, recipe in (("data.recipe", self.recipe), ("data.val_recipe", self.recipe_for_validation())):
            if recipe.needs_donors and self.donors is None:
                raise ValueError(f"{key}.transplant needs data.donors: a source of objects with masks")

    def recipe_for_validation(self) -> RecipeConfig:
        """How examples of validation and test are made. ValueError for a wrong name or value in `val_recipe`."""
        return changed(self.recipe, {"augment": False, **self.val_recipe}, "data.val_recipe")


def check_sizes(config: DataConfig, multiple: int, exemplar_size: int) -> None:
    """ValueError unless all examples suit a model whose pictures have sides of a `multiple` of pixels, and whose
    exemplars are of `exemplar_size`."""
    for key, recipe in (("data.recipe", config.recipe), ("data.val_recipe", config.recipe_for_validation())):
        if recipe.resolution % multiple:
            raise ValueError(
                f"{key}.resolution must be a multiple of {multiple} for this model, got {recipe.resolution}"
            )
        if recipe.exemplar_size != exemplar_size:
            raise ValueError(f"{key}.exemplar_size must be {exemplar_size} for this model, got {recipe.exemplar_size}")


class ExampleSampler(DistributedSampler):
    """The order of training: a permutation by seed and epoch, cut into global batches, one slice of each a process.

    Global batch g is permutation[g B : (g + 1) B] with B = batch_size x processes, and process r takes the r-th
    `batch_size` of it: any number of processes sees the same order, and the same batches where B is the same. What
    is left at the end and fills no global batch is left out.

    It is a DistributedSampler so that Lightning keeps it as it is, and tells it the epoch.
    """

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

    def __iter__(self) -> Iterator[int]:
        epoch, consumed = self.position
        rest = self.permutation()[consumed if epoch == self.epoch else 0 :]
        batches = rest[: len(rest) // self.global_batch * self.global_batch].view(-1, self.global_batch)
        first = self.rank * self.batch_size
        return iter(batches[:, first : first + self.batch_size].flatten().tolist())

    def __len__(self) -> int:
        """Of a whole epoch in this process, wherever it carries on."""
        return len(self.dataset) // self.global_batch * self.batch_size


class InOrder(DistributedSampler):
    """Pictures in their order, dealt out to the processes; each gets as many, so a few at the end may come twice.

    It leaves the dataset's epoch alone: validation sees the same examples in each.
    """

    def __init__(self, dataset: ExampleDataset, rank: int = 0, processes: int = 1):
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=False)


def open_for(recipe: RecipeConfig, source: SourceConfig) -> Source:
    """A source of the pictures that have a box for this recipe, as far as is known without opening them."""
    return open_source(source, (recipe.min_area, recipe.max_area))


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
            source, val = open_for(config.recipe, config.source), None
            if config.val_source is not None:
                val = open_for(val_recipe, config.val_source)
            elif config.val_size:
                source, val = hold_out(source, config.val_size)
            self.train = self._dataset(source, config.recipe)
            self.val = self._dataset(val, val_recipe) if val is not None else None
        if stage == "test" and self.test is None:
            if config.test_source is None:
                raise ValueError("data.test_source is not set: there is nothing to test on")
            self.test = self._dataset(open_for(val_recipe, config.test_source), val_recipe)

    def _dataset(self, source: Source, recipe: RecipeConfig) -> ExampleDataset:
        donors = open_source(self.config.donors) if recipe.needs_donors else None
        return ExampleDataset(source, recipe, self.config.seed, donors)

    def set_position(self, epoch: int, consumed_samples: int) -> None:
        """Training loaders made from now on carry on in this epoch after `consumed_samples` of all processes."""
        self._position = (epoch, consumed_samples)

    def train_dataloader(self) -> DataLoader:
        rank, processes = self._processes()
        sampler = ExampleSampler(self.train, self.config.batch_size, self.config.seed, rank, processes)
        sampler.set_position(*self._position)
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val, InOrder(self.val, *self._processes())) if self.val is not None else []

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test, InOrder(self.test, *self._processes()))

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """How often a picture could not be used in this process and its workers: by "train", "val" or "test", as far as
        they are set up, and by reason. All processes have the same keys."""
        datasets = {"train": self.train, "val": self.val, "test": self.test}
        return {split: dataset.skipped for split, dataset in datasets.items() if dataset is not None}

    def _processes(self) -> tuple[int, int]:
        """(rank, number of processes)"""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, dataset: ExampleDataset, sampler: DistributedSampler) -> DataLoader:
        workers = self.config.workers
        return DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )
