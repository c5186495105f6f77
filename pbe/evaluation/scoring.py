"""Scoring a folder of results: every figure that the given networks allow, over all items and for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pbe.evaluation.backbones import Backbone
from pbe.evaluation.bootstrap import Moments
from pbe.evaluation.cocoee import (
    read_rgb,
    real_photo,
    released_box,
    released_reference,
    released_region,
    squared,
    to_tensor,
)
from pbe.evaluation.lpips import LPIPS
from pbe.evaluation.metrics import (
    BackgroundLPIPS,
    BackgroundMSE,
    BackgroundSSIM,
    FeatureSimilarity,
    FrechetDistance,
    LogDensity,
    PictureMean,
    QualityScore,
)
from pbe.evaluation.quality_score import GaussianMixture
from pbe.evaluation.test_set import Benchmark, Item, read_result, result_files
from pbe.images.windows import mask_bounding_box
from pbe.io.atomic import replacing

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FID_RESAMPLES = 100  # each costs as much as the figure itself

TITLES = {
    "fid": "FID",
    "qs": "QS",
    "log_density": "log-density",
    "clip_score": "CLIP score",
    "foreground_similarity": "foreground similarity",
    "foreground_fid": "foreground FID",
    "background_lpips": "background LPIPS",
    "background_mse": "background MSE",
    "background_ssim": "background SSIM",
}


@dataclass(frozen=True)
class Judges:
    """What results are scored with.

    backbones: by kind; only the CLIP that the paper used makes figures that compare with the paper's.
    real: the moments of real photos by the same kinds, for FID.
    mixture: on the features it was fitted on, CLIP ViT-B/32's for QS; on others it gives the bare log-density.
    """

    backbones: Mapping[str, Backbone]
    real: Mapping[str, Moments] = field(default_factory=dict)
    mixture: GaussianMixture | None = None
    lpips: LPIPS | None = None
    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mixture is not None and self.mixture_backbone() is None:
            known = ", ".join(identity(backbone) for backbone in self.backbones.values()) or "none"
            raise ValueError(
                f"the mixture was fitted on the features of {self.mixture.features!r}; the backbones here are: {known}"
            )

    def mixture_backbone(self) -> str | None:
        """The kind of backbone whose features the mixture is of."""
        features = self.mixture.features if self.mixture else None
        return next((kind for kind, one in self.backbones.items() if identity(one) == features), None)


def identity(backbone: Backbone) -> str:
    """Which features a backbone gives: for CLIP its name, which stands for one set of weights, else with the file."""
    return backbone.name if backbone.kind == "clip" else f"{backbone.name} {backbone.sha256[:12]}"


@dataclass(frozen=True)
class Figure:
    """One figure of one system, with its bootstrap interval and the number of pictures it is over."""

    name: str
    value: float
    low: float
    high: float
    count: int
    higher_is_better: bool
    backbone: str | None = None  # its kind
    is_stand_in: bool = False
    is_released: bool = False  # computed as the paper's

    @property
    def key(self) -> str:
        return f"{self.name}/{self.backbone}" if self.backbone else self.name


@dataclass(frozen=True)
class Scores:
    """A system's figures, and its scores for each item by figure's key, in the benchmark's order (NaN: none)."""

    system: str
    figures: tuple[Figure, ...]
    per_item: Mapping[str, np.ndarray]


def score_results(
    benchmark: Benchmark,
    results: str | Path,
    judges: Judges,
    system: str,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Scores the results in a folder; `on_batch` is called with the number of items that were read.

    FileNotFoundError where results are missing, ValueError for one that is damaged or of another size than its source.
    """
    prepare = {kind: backbone.prepare for kind, backbone in judges.backbones.items()}
    dataset = _Items(benchmark.items, result_files(benchmark, results), prepare)
    metrics = _make_metrics(judges)
    for batch in DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list):
        for kind, backbone in judges.backbones.items():
            views = {name: [seen[kind][name] for seen in batch] for name in batch[0][kind]}
            _update(metrics, kind, {name: backbone(list_) for name, list_ in views.items()})
        for seen in batch:  # one by one: sources differ in size
            background = [x[None] for x in seen["background"]]
            for name in ("background_mse", "background_ssim", "background_lpips"):
                if (name, None) in metrics:
                    metrics[name, None].update(*background)
        if on_batch is not None:
            on_batch(len(batch))
    figures, per_item = [], {}
    for (name, kind), metric in metrics.items():
        means = isinstance(metric, PictureMean)
        count = len(dataset)
        if means:
            scores = torch.cat(metric.scores).numpy()
            count = int(np.isfinite(scores).sum())
            if not count:
                continue
        value, low, high = (x.item() for x in metric.compute())
        backbone = judges.backbones.get(kind)
        figure = Figure(
            name,
            value,
            low,
            high,
            count,
            metric.higher_is_better,
            kind,
            is_stand_in=backbone is not None and backbone.is_stand_in,
            is_released=backbone is not None and backbone.is_released_clip and name in ("fid", "qs", "clip_score"),
        )
        figures.append(figure)
        if means:
            per_item[figure.key] = scores
    return Scores(system, tuple(figures), per_item)


Metrics = dict[tuple[str, str | None], PictureMean | FrechetDistance]


def _make_metrics(judges: Judges) -> Metrics:
    """The metrics by the figure's name and the backbone's kind."""
    settings = {"level": judges.level, "seed": judges.seed}
    fid_settings = {**settings, "resamples": min(judges.resamples, FID_RESAMPLES)}
    settings["resamples"] = judges.resamples
    metrics: Metrics = {}
    for kind, backbone in judges.backbones.items():
        if kind in judges.real:
            metrics["fid", kind] = FrechetDistance(backbone.num_features, judges.real[kind], **fid_settings)
        if judges.mixture is not None and kind == judges.mixture_backbone():
            name, density = ("qs", QualityScore) if backbone.is_released_clip else ("log_density", LogDensity)
            metrics[name, kind] = density(judges.mixture, **settings)
        if kind == "clip":
            metrics["clip_score", kind] = FeatureSimilarity(**settings)
        if kind != "inception":  # its features are made for distances between sets
            metrics["foreground_similarity", kind] = FeatureSimilarity(**settings)
        metrics["foreground_fid", kind] = FrechetDistance(backbone.num_features, **fid_settings)
    metrics["background_mse", None] = BackgroundMSE(**settings)
    metrics["background_ssim", None] = BackgroundSSIM(**settings)
    if judges.lpips is not None:
        metrics["background_lpips", None] = BackgroundLPIPS(judges.lpips, **settings)
    return metrics


def _update(metrics: Metrics, kind: str, features: Mapping[str, Tensor]) -> None:
    """Adds a batch's features (B, C), by view, to a backbone's metrics."""
    seen = {
        "fid": ("whole",),
        "qs": ("whole",),
        "log_density": ("whole",),
        "clip_score": ("released region", "released reference"),
        "foreground_similarity": ("region", "reference"),
        "foreground_fid": ("region",),
    }
    for name, views in seen.items():
        if (name, kind) in metrics:
            metrics[name, kind].update(*(features[view] for view in views))
    metrics["foreground_fid", kind].update(features["reference"], real=True)


Prepare = Mapping[str, Callable[[Image.Image], Tensor]]


class _Items(Dataset):
    """What the networks see of each item, by backbone's kind and view, and the pictures for the background."""

    def __init__(self, items: Sequence[Item], results: Sequence[Path], prepare: Prepare):
        self.items, self.results, self.prepare = items, results, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.items[i]
        source, reference = read_rgb(item.source, "source"), read_rgb(item.reference, "reference")
        result, repaint = read_result(self.results[i], item, source), item.repaint()
        region, object_ = squared(result.crop(mask_bounding_box(repaint))), squared(reference)
        seen: dict[str, Any] = {}
        for kind, prepare in self.prepare.items():
            seen[kind] = {"whole": prepare(result), "region": prepare(region), "reference": prepare(object_)}
            if kind == "clip":
                seen[kind]["released region"] = released_region(result, released_box(item.mask))
                seen[kind]["released reference"] = released_reference(reference)
        keep = torch.from_numpy(1 - repaint.astype(np.float32))[None]
        seen["background"] = (to_tensor(result), to_tensor(source), keep)
        return seen


# --- real photos ------------------------------------------------------------------------------------------


class _RealPhotos(Dataset):
    def __init__(self, files: Sequence[Path], prepare: Callable[[Image.Image], Tensor]):
        self.files, self.prepare = files, prepare

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.prepare(real_photo(read_rgb(self.files[i], "real photo")))


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in a folder and its sub-folders, by name. FileNotFoundError for fewer than two."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if len(files) < 2:
        raise FileNotFoundError(f"{folder} has {len(files)} pictures; a set of real photos is needed")
    return files


def photo_features(
    files: Sequence[Path],
    backbone: Backbone,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Features (N, C) of photos as the released script prepares the real set."""
    features = []
    for batch in DataLoader(_RealPhotos(files, backbone.prepare), batch_size, num_workers=workers, collate_fn=list):
        features.append(backbone(batch))
        if on_batch is not None:
            on_batch(len(batch))
    return torch.cat(features)


def real_moments(
    folder: str | Path,
    backbone: Backbone,
    cache: str | Path,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Moments:
    """The moments of the photos in a folder, kept in the folder `cache` for the next time.

    They are computed anew where the photos' names or sizes, or the backbone's file, are others.
    """
    files = picture_files(folder)
    digest = hashlib.sha256(backbone.sha256.encode())
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
    path = Path(cache) / f"real-{backbone.kind.replace(':', '-')}-{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            return Moments(*(torch.from_numpy(stored[name]) for name in ("mean", "covariance")), int(stored["count"]))
    moments = Moments.of(photo_features(files, backbone, batch_size, workers, on_batch))
    with replacing(path, overwrite=True) as part, part.open("wb") as file:
        np.savez(file, mean=moments.mean.numpy(), covariance=moments.covariance.numpy(), count=moments.count)
    return moments
