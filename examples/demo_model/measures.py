"""What the tables are made of: one number per case, from pictures and from features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor

from pbe.images.windows import Box

TIE = 1e-6  # similarities nearer than this are equal: float32 sums of one crop in two batches differ by as much


def retrieval(similarity: Tensor, own: Tensor, size: int = 16) -> np.ndarray:
    """How likely each query's own item is the most similar to it among `size` items: (N,) probabilities.

    similarity: (N, M) of N queries to the M items of a gallery. own: long (N,), the item that belongs to each query.
    The other size - 1 items are any of the gallery: the probability is over all choices of them, counted and not
    sampled. Items that are equally similar share a hit. ValueError if the gallery has fewer than `size` items.
    """
    items = similarity.shape[1]
    if not 2 <= size <= items:
        raise ValueError(f"retrieval among {size} items needs a gallery of at least {max(size, 2)}, got {items}")
    s = similarity.double()
    own_s = s.gather(1, own[:, None])
    ties = ((s - own_s).abs() <= TIE).sum(dim=1) - 1
    lower = (s < own_s - TIE).sum(dim=1)
    choices = comb(items - 1, size - 1)
    # own wins against k ties and size - 1 - k lower ones, and shares the hit with the k
    hits = [
        sum(comb(tied, k) * comb(below, size - 1 - k) / (1 + k) for k in range(min(tied, size - 1) + 1)) / choices
        for tied, below in zip(ties.tolist(), lower.tolist(), strict=True)
    ]
    return np.array(hits)


def border_gradients(pictures: Tensor, masks: Tensor, places: Sequence[Box]) -> np.ndarray:
    """The mean difference of neighbouring pixels across each mask's border: (N,), in grey levels of [0, 1].

    pictures: (N, 3, R, R) in [-1, 1]. masks: (N, 1, R, R), 1 = keep. Pairs with a pixel outside the photo's place
    in its window are left out. NaN where a border has no pair: the region is all of the photo.
    """
    return _mean_differences(pictures, masks, places, lambda a, b: a != b)


def inner_gradients(pictures: Tensor, masks: Tensor, places: Sequence[Box]) -> np.ndarray:
    """The same between neighbours inside the region: how sharp it is."""
    return _mean_differences(pictures, masks, places, lambda a, b: ~a & ~b)


def _mean_differences(
    pictures: Tensor, masks: Tensor, places: Sequence[Box], chosen: Callable[[Tensor, Tensor], Tensor]
) -> np.ndarray:
    means = []
    for picture, mask, place in zip(pictures, masks, places, strict=True):
        rows, columns = place.slices
        pixels, keep = picture[:, rows, columns] / 2, mask[0, rows, columns] > 0.5
        values = []
        for axis in (0, 1):
            n = keep.shape[axis]
            first, second = keep.narrow(axis, 0, n - 1), keep.narrow(axis, 1, n - 1)
            difference = pixels.diff(dim=axis + 1).abs().mean(dim=0)  # of the three colours
            values.append(difference[chosen(first, second)])
        means.append(torch.cat(values).mean().item())
    return np.array(means)


def region_distances(first: Tensor, second: Tensor, masks: Tensor) -> np.ndarray:
    """The root mean square difference of two pictures (N, 3, R, R) inside the regions: (N,), in grey levels of
    [0, 1]."""
    repaint = 1 - masks
    squares = ((first - second) / 2).square().mean(dim=1, keepdim=True)
    return ((squares * repaint).sum(dim=(1, 2, 3)) / repaint.sum(dim=(1, 2, 3))).sqrt().numpy()


def slopes(x: Sequence[float], y: np.ndarray) -> np.ndarray:
    """The least-squares slope of each row of y (N, K) over x (K,): (N,)."""
    centred = np.asarray(x, dtype=np.float64) - np.mean(x)
    if not centred.any():
        raise ValueError(f"a slope needs two different values of x, got {list(x)}")
    return (y - y.mean(axis=1, keepdims=True)) @ centred / (centred**2).sum()


def nearest(queries: Tensor, gallery: Tensor, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The Euclidean distance from each query (N, D) to the nearest row of a gallery (M, D), and which row it is."""
    distances, rows = [], []
    for part in queries.split(chunk):
        distance, row = torch.cdist(part, gallery).min(dim=1)
        distances.append(distance)
        rows.append(row)
    return torch.cat(distances).numpy(), torch.cat(rows).numpy()
