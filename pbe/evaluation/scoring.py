"""Scoring a folder of results: every score that the given networks allow, over all items and for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pbe.evaluation.backbones import Backbone
from pbe.evaluation.bootstrap import Bootstrap, Moments
from pbe.evaluation.cocoee import (
    read_rgb,
    real_photo,
    released_box,
    released_exemplar,
    released_region,
    squared,
    to_tensor,
)
from pbe.evaluation.lpips import LPIPS
from pbe.evaluation.metrics import (
    FID_BOOTSTRAP,
    BackgroundLPIPS,
    BackgroundMSE,
    BackgroundSSIM,
    BootstrappedMetric,
    FeatureSimilarity,
    FrechetDistance,
    LogDensity,
    PictureMean,
    QualityScore,
)
from pbe.evaluation.quality_score import GaussianMixture
from pbe.evaluation.test_set import Item, TestSet, read_result, result_files
from pbe.images.windows import mask_bounding_box
from pbe.io.atomic import replacing

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

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

    backbones: by kind; only the CLIP that the paper used makes scores that compare with the paper's.
    real: the moments of real photos by the same kinds, for FID.
    mixture: on the features it was fitted on, CLIP ViT-B/32's for QS; on others it gives the bare log-density.
    """

    backbones: Mapping[str, Backbone]
    real: Mapping[str, Moments] = field(default_factory=dict)
    mixture: GaussianMixture | None = None
    lpips: LPIPS | None = None
    bootstrap: Bootstrap = Bootstrap()

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
class Score:
    """One score of one system, with its bootstrap interval and the number of pictures it is over."""

    name: str
    value: float
    low: float
    high: float
    count: int
    higher_is_better: bool
    backbone: str | None = None  # its kind
    is_surrogate: bool = False
    is_released: bool = False  # computed as the paper's

    @property
    def key(self) -> str:
        return f"{self.name}/{self.backbone}" if self.backbone else self.name


@dataclass(frozen=True)
class SystemScores:
    """A system's scores, and those of each item by the score's key, in the test set's order (NaN: none)."""

    system: str
    scores: tuple[Score, ...]
    per_item: Mapping[str, np.ndarray]


def score_results(
    test_set: TestSet,
    results: str | Path,
    judges: Judges,
    system: str,
    batch_size: int = 16,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> SystemScores:
    """Scores the results in a folder; `on_batch` is called with the number of items that were read.

    FileNotFoundError where results are missing, ValueError for one that is damaged or of another size than its image.
    """
    prepare = {kind: backbone.prepare for kind, backbone in judges.backbones.items()}
    dataset = _Items(test_set.items, result_files(test_set, results), prepare)
    columns = _make_columns(judges)
    for batch in DataLoader(dataset, batch_size, num_workers=workers, collate_fn=list):
        for kind, backbone in judges.backbones.items():
            names = batch[0][kind]
            _update(columns, kind, {name: backbone([inputs[kind][name] for inputs in batch]) for name in names})
        for inputs in batch:  # one by one: images differ in size
            _update(columns, None, {name: x[None] for name, x in inputs["background"].items()})
        if on_batch is not None:
            on_batch(len(batch))
    found, per_item = [], {}
    for column in columns:
        metric, count = column.metric, len(dataset)
        values = torch.cat(metric.scores).numpy() if isinstance(metric, PictureMean) else None
        if values is not None:
            count = int(np.isfinite(values).sum())
            if not count:
                continue
        value, low, high = (x.item() for x in metric.compute())
        judge = judges.backbones[column.kind] if column.kind else None
        score = Score(
            column.name,
            value,
            low,
            high,
            count,
            metric.higher_is_better,
            column.kind,
            is_surrogate=judge is not None and judge.is_surrogate,
            is_released=judge is not None and judge.is_released_clip and column.name in ("fid", "qs", "clip_score"),
        )
        found.append(score)
        if values is not None:
            per_item[score.key] = values
    return SystemScores(system, tuple(found), per_item)


class _Column(NamedTuple):
    """A score's name, the kind of its backbone if it has one, its metric, and the names of the metric's inputs."""

    name: str
    kind: str | None
    metric: BootstrappedMetric
    inputs: tuple[str, ...]


def _make_columns(judges: Judges) -> list[_Column]:
    bootstrap = judges.bootstrap
    for_fid = replace(bootstrap, resamples=min(bootstrap.resamples, FID_BOOTSTRAP.resamples))
    columns = []
    for kind, backbone in judges.backbones.items():
        size = backbone.num_features
        if kind in judges.real:
            columns.append(_Column("fid", kind, FrechetDistance(size, judges.real[kind], for_fid), ("whole",)))
        if judges.mixture is not None and kind == judges.mixture_backbone():
            name, density = ("qs", QualityScore) if backbone.is_released_clip else ("log_density", LogDensity)
            columns.append(_Column(name, kind, density(judges.mixture, bootstrap), ("whole",)))
        if kind == "clip":
            released = ("released region", "released exemplar")
            columns.append(_Column("clip_score", kind, FeatureSimilarity(bootstrap), released))
        if kind != "inception":  # its features are made for distances between sets
            similarity = FeatureSimilarity(bootstrap)
            columns.append(_Column("foreground_similarity", kind, similarity, ("region", "exemplar")))
        columns.append(_Column("foreground_fid", kind, FrechetDistance(size, bootstrap=for_fid), ("region",)))
    pictures = ("result", "image", "keep")
    columns.append(_Column("background_mse", None, BackgroundMSE(bootstrap), pictures))
    columns.append(_Column("background_ssim", None, BackgroundSSIM(bootstrap), pictures))
    if judges.lpips is not None:
        columns.append(_Column("background_lpips", None, BackgroundLPIPS(judges.lpips, bootstrap), pictures))
    return columns


def _update(columns: Sequence[_Column], kind: str | None, inputs: Mapping[str, Tensor]) -> None:
    """Adds a batch's inputs by name, features (B, C) or pictures, to the metrics of a backbone."""
    for column in columns:
        if column.kind == kind:
            column.metric.update(*(inputs[name] for name in column.inputs))
            if column.name == "foreground_fid":
                column.metric.update(inputs["exemplar"], real=True)


class _Items(Dataset):
    """What the networks are given of each item, by backbone's kind and name, and the pictures for the background."""

    def __init__(
        self, items: Sequence[Item], results: Sequence[Path], prepare: Mapping[str, Callable[[Image.Image], Tensor]]
    ):
        self.items, self.results, self.prepare = items, results, prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, dict[str, Tensor]]:
        item = self.items[i]
        image, exemplar = read_rgb(item.image, "image"), read_rgb(item.exemplar, "exemplar")
        result, repaint = read_result(self.results[i], item, image), item.repaint()
        region, whole_exemplar = squared(result.crop(mask_bounding_box(repaint))), squared(exemplar)
        inputs: dict[str, dict[str, Tensor]] = {}
        for kind, prepare in self.prepare.items():
            inputs[kind] = {"whole": prepare(result), "region": prepare(region), "exemplar": prepare(whole_exemplar)}
            if kind == "clip":
                inputs[kind]["released region"] = released_region(result, released_box(item.mask))
                inputs[kind]["released exemplar"] = released_exemplar(exemplar)
        keep = torch.from_numpy(1 - repaint.astype(np.float32))[None]
        inputs["background"] = {"result": to_tensor(result), "image": to_tensor(image), "keep": keep}
        return inputs


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

    They are computed again where the photos' names or sizes, or the backbone's file, have changed.
    """
    files = picture_files(folder)
    digest = hashlib.sha256(backbone.sha256.encode())
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
    path = Path(cache) / f"real-{backbone.kind.replace(':', '-')}-{digest.hexdigest()[:16]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            mean, covariance = torch.from_numpy(stored["mean"]), torch.from_numpy(stored["covariance"])
            return Moments(mean, covariance, int(stored["count"]))
    moments = Moments.of(photo_features(files, backbone, batch_size, workers, on_batch))
    with replacing(path, overwrite=True) as part, part.open("wb") as stream:
        np.savez(stream, mean=moments.mean.numpy(), covariance=moments.covariance.numpy(), count=moments.count)
    return moments
