"""Examples of a source by index: the same example in every process and run."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from pbe.data.crop import SQUARE, nearest_bucket, usable
from pbe.data.example import Example, hash64, make_generator
from pbe.data.mixture import Mixture
from pbe.data.picture_sizes import THREADS
from pbe.data.recipe import Stages, make_example
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import PackedStrings, Record, Source, UnusablePicture, upright_size

REASONS = ("missing", "unreadable", "no box")
MAX_ATTEMPTS = 100  # this many unusable pictures in a row are an error
MAX_WARNINGS = 20  # per process; the counts go on
_MAX_WORKERS = 256
_EXAMPLE, _STEP, _REPLACEMENT = range(3)  # what a hash is for
Index = int | tuple[int, tuple[int, int]]  # an example's number, and the bucket of its batch where there are buckets


class UnusablePictureWarning(UserWarning):
    """Another picture was taken in place of one that is missing, unreadable or without a fitting box."""


class ExampleDataset(Dataset[Example]):
    """One example per record of the source and epoch.

    All that is random about example `i` follows from `seed`, the epoch and `i`. Where its picture cannot be used,
    another one, which these numbers choose, takes its place. That is counted (`skipped`), with one warning per file and
    process.

    `set_epoch` also reaches workers that are already running.
    """

    def __init__(self, source: Source, recipe: RecipeConfig, seed: int = 0, donors: Source | None = None):
        """donors: whose objects `recipe.transplant` puts in. ValueError if a source is empty, or donors are missing."""
        for needed in (source, donors):
            if needed is not None and not len(needed):
                raise ValueError(f"{needed.name} holds no picture")
        recipe.check_donors(donors)
        self.source, self.recipe, self.seed, self.donors = source, recipe, seed, donors
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        # One row per worker, since workers cannot add to one number at once.
        self._skipped = torch.zeros(_MAX_WORKERS, len(REASONS), dtype=torch.int64).share_memory_()
        self._warned: set[str] = set()
        self._tried = self._failed = 0  # pictures, in this process
        self._buckets: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.source)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Examples are drawn for this epoch from now on, in all workers."""
        self._epoch.fill_(epoch)

    @cached_property
    def digest(self) -> str:
        """Of the source's records and their order, wherever their files are."""
        return digest_of(self.source)

    @property
    def skipped(self) -> dict[str, int]:
        """How often a picture could not be used, by reason, in all workers together."""
        return dict(zip(REASONS, self._skipped.sum(dim=0).tolist(), strict=True))

    def buckets(self) -> list[tuple[int, int]]:
        """The bucket nearest to the photo of each example of the epoch, by the size that the file says."""
        if not self._buckets or isinstance(self.source, Mixture):  # whose records are others in each epoch
            with ThreadPoolExecutor(THREADS) as pool:
                self._buckets = list(pool.map(self._bucket, range(len(self))))
        return self._buckets

    def _bucket(self, i: int) -> tuple[int, int]:
        try:
            with usable(self.source.name):
                return nearest_bucket(upright_size(self._record(i).image))
        except UnusablePicture:
            return SQUARE  # another takes its place

    def __getitem__(self, i: Index) -> Example:
        """Example `i` of the epoch. ValueError if 100 pictures in a row cannot be used; it names the first."""
        return self.stages(i).example

    def stages(self, i: Index) -> Stages:
        """Example `i` of the epoch and how it came about, to be looked at. Errors as above."""
        i, bucket = i if isinstance(i, tuple) else (i, None)
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        key, first = (self.seed, self.epoch, i), None
        recipe = self.recipe.of_epoch(self.epoch)
        for attempt in range(MAX_ATTEMPTS):
            number = i if attempt == 0 else hash64(_REPLACEMENT, *key, attempt) % len(self)
            generator = make_generator(_EXAMPLE, *key, attempt)
            self._tried += 1
            try:
                record = self._record(number)._replace(bucket=bucket)
                return make_example(record, recipe, generator, self.step_seed(i), self.donors)
            except UnusablePicture as problem:
                self._skip(number, problem)
                first = first or problem
        raise ValueError(f"{self.source.name}: {MAX_ATTEMPTS} pictures in a row cannot be used; the first: {first}")

    def step_seed(self, i: int) -> int:
        """Of the training step's draws for example `i` of the epoch."""
        return hash64(_STEP, self.seed, self.epoch, i) >> 1  # 63 bits: what a signed integer holds

    def _record(self, number: int) -> Record:
        with usable(f"{self.source.name}[{number}]"):
            return self.source.of_epoch(number, self.epoch) if isinstance(self.source, Mixture) else self.source[number]

    def _skip(self, number: int, problem: UnusablePicture) -> None:
        worker = get_worker_info()
        self._skipped[worker.id % _MAX_WORKERS if worker else 0, REASONS.index(problem.reason)] += 1
        self._failed += 1
        if str(problem) in self._warned or len(self._warned) == MAX_WARNINGS:
            return
        self._warned.add(str(problem))
        so_far = f"; further ones are only counted, after {self._failed} of {self._tried} pictures"
        last = so_far if len(self._warned) == MAX_WARNINGS else ""
        # stacklevel: the caller of `stages`
        warnings.warn(f"{problem}; another picture takes its place{last}", UnusablePictureWarning, stacklevel=3)


def digest_of(source: Source) -> str:
    """A checksum of a source's arrays, and so of its records and their order, wherever their files are."""
    digest, parts = hashlib.sha256(), [source]
    while parts:
        value: Any = parts.pop()
        if isinstance(value, np.ndarray):
            digest.update(np.ascontiguousarray(value).data)
        elif isinstance(value, dict):
            parts += value.values()
        elif isinstance(value, PackedStrings) or hasattr(value, "photos"):  # or a source within this one
            parts += vars(value).values()
    return digest.hexdigest()


class Subset:
    """Some of a source's records, as a source: a share held out for validation, or the rest."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray, name: str):
        self.source, self.name = source, name
        self._indices = np.asarray(indices, dtype=np.int32)  # an array: workers share it, where lists would be copied

    @property
    def photos(self) -> np.ndarray:
        return np.unique(self.source.photos[self._indices], return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Record:
        return self.source[int(self._indices[i])]


def train_val_split(source: Source, n: int) -> tuple[Source, Source]:
    """(training, validation): the records of n photos of a source, chosen at random but always the same ones, are
    held out for validation.

    ValueError unless n is above 0 and less than the number of photos.
    """
    photos = source.photos
    count = int(photos.max()) + 1
    if not 0 < n < count:
        raise ValueError(
            f"{n} pictures (data.val_size) cannot be held out of the {count} of {source.name}; give data.val_source"
        )
    chosen = np.zeros(count, dtype=bool)
    chosen[torch.randperm(count, generator=make_generator(count))[:n].numpy()] = True
    held = chosen[photos]  # (N,)
    return (
        Subset(source, np.flatnonzero(~held), f"{source.name} (training)"),
        Subset(source, np.flatnonzero(held), f"{source.name} (held out)"),
    )
