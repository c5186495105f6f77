"""Several sources of training pictures as one, each with its share of every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pbe.data.example import make_generator
from pbe.data.records import Record, Source


class Mixture:
    """Sources of which each gives its share of the examples: an epoch has as many as the sources have records.

    Of a source with more records than its share an epoch has a part, each time the next one, in an order drawn once; a
    smaller source comes again and again. `of_epoch` is a source as any other.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], noisy: Sequence[float]):
        """weights: above 0. noisy: probabilities, see `Record.noisy`. ValueError for a source without records."""
        for source in sources:
            if not len(source):
                raise ValueError(f"{source.name} holds no picture")
        self.name = " + ".join(source.name for source in sources)
        self._sources = dict(enumerate(sources))
        self._noisy = np.array(noisy)
        ends = np.cumsum(weights) / np.sum(weights) * sum(map(len, sources))
        self._starts = np.concatenate([[0], np.round(ends).astype(np.int64)])
        self._orders = {
            k: torch.randperm(len(source), generator=make_generator(k, len(source))).numpy()
            for k, source in enumerate(sources)
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def photos(self) -> np.ndarray:
        """Each of the first epoch's records counts as a photo of its own."""
        return np.arange(len(self))

    def __getitem__(self, i: int) -> Record:
        return self.of_epoch(i, 0)

    def of_epoch(self, i: int, epoch: int) -> Record:
        """Record `i` of an epoch."""
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        order, count = self._orders[k], int(self._starts[k + 1] - self._starts[k])
        number = order[(epoch * count + i - int(self._starts[k])) % len(order)]
        return self._sources[k][int(number)]._replace(noisy=float(self._noisy[k]))
