"""Scores of a test set as torchmetrics `Metric`s, which gather over processes; each computes an `Interval`.

An interval tells how much the score would move with other pictures of the same test set. It follows from the pictures
and the seed alone, not from their order, the batches or the number of processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.utilities import dim_zero_cat

from pbe.evaluation.bootstrap import Bootstrap, Interval, Moments, frechet_distance
from pbe.evaluation.quality_score import GaussianMixture

BOOTSTRAP = Bootstrap()
FID_BOOTSTRAP = Bootstrap(resamples=100)  # each draw costs as much as the score itself
QS_RANGE = 300  # the log-density at which the released script's quality score is full
SSIM_REACH = 5  # pixels from the centre to the edge of SSIM's Gaussian window, whose sigma is 1.5


class BootstrappedMetric(Metric):
    """A metric that computes a value with its bootstrap interval."""

    is_differentiable = False
    full_state_update = False
    higher_is_better: bool

    def __init__(self, bootstrap: Bootstrap):
        super().__init__()
        self.bootstrap = bootstrap


# --- distances between sets -------------------------------------------------------------------------------


class FrechetDistance(BootstrappedMetric):
    """Fréchet distance between the features of real and generated pictures: FID on any backbone's features.

    Of the real pictures only sums are kept, so that there may be any number; or their `real` moments are given. The
    features of the generated ones are kept for the interval, which holds the real pictures fixed. Resampling makes
    the distance itself larger; the interval is the draws' around the score. The score's own bias remains: compare
    only scores over the same number of pictures.
    """

    higher_is_better = False
    real_count: Tensor
    real_total: Tensor
    real_outer: Tensor
    generated: list[Tensor]

    def __init__(self, num_features: int, real: Moments | None = None, bootstrap: Bootstrap = FID_BOOTSTRAP):
        super().__init__(bootstrap)
        if real is not None and real.mean.shape != (num_features,):
            raise ValueError(f"the real pictures' moments are of {len(real.mean)} features, not of {num_features}")
        self.num_features, self.real = num_features, real
        self.add_state("real_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("real_total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        outer = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.add_state("real_outer", outer, dist_reduce_fx="sum")
        self.add_state("generated", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool = False) -> None:
        """Adds features (B, C) of real or generated pictures."""
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features must be (B, {self.num_features}), got {tuple(features.shape)}")
        if not real:
            self.generated.append(features)
            return
        if self.real is not None:
            raise ValueError("the moments of the real pictures were given: no more can be added")
        features = features.double()
        self.real_count += len(features)
        self.real_total += features.sum(dim=0)
        self.real_outer += features.T @ features

    def compute(self) -> Interval:
        real = self.real or Moments.from_sums(self.real_total, self.real_outer, int(self.real_count))
        features = dim_zero_cat(self.generated).double()
        features = features[features[:, 0].argsort(stable=True)]
        value = frechet_distance(real, Moments.of(features))
        draws = self.bootstrap.draws(lambda drawn: frechet_distance(real, Moments.of(drawn), quick=True), features)
        found = self.bootstrap.interval(value, draws, centred=True)
        return found._replace(low=found.low.clamp(min=0))


# --- means over pictures ----------------------------------------------------------------------------------


class PictureMean(BootstrappedMetric):
    """The mean over pictures of what a subclass's `score` gives for each; NaN, for no score, is left out."""

    scores: list[Tensor]

    def __init__(self, bootstrap: Bootstrap = BOOTSTRAP):
        super().__init__(bootstrap)
        self.add_state("scores", [], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, *inputs: Any, **_: Any) -> Tensor:
        """One score per picture: (B,)."""

    def update(self, *inputs: Tensor) -> None:
        self.scores.append(self.score(*inputs).double())

    def compute(self) -> Interval:
        scores = dim_zero_cat(self.scores)
        scores = scores[~scores.isnan()].sort().values
        if not len(scores):
            raise ValueError(f"{type(self).__name__} has no picture to compute a mean of")
        return self.bootstrap.interval(scores.mean(), self.bootstrap.draws(torch.mean, scores))


class LogDensity(PictureMean):
    """The log-density of a picture's features under a mixture fitted to real pictures."""

    higher_is_better = True

    def __init__(self, mixture: GaussianMixture, bootstrap: Bootstrap = BOOTSTRAP):
        super().__init__(bootstrap)
        self.mixture = mixture

    def score(self, features: Tensor) -> Tensor:
        """Of features (B, C)."""
        return self.mixture.to(features.device).log_density(features)


class QualityScore(LogDensity):
    """QS (Paint by Example, arXiv 2211.13227): 100 × the log-density divided by 300 and clipped to [0, 1].

    The range is that of CLIP ViT-B/32's features; other features' densities lie elsewhere.
    """

    def score(self, features: Tensor) -> Tensor:
        """Of features (B, C)."""
        return 100 * (super().score(features) / QS_RANGE).clamp(0, 1)


class FeatureSimilarity(PictureMean):
    """100 × the cosine between the features of a result's region and of its exemplar: the CLIP score, if they are
    CLIP's and of pictures prepared as by the released script."""

    higher_is_better = True

    def score(self, features: Tensor, exemplar: Tensor) -> Tensor:
        """Of two (B, C)."""
        return 100 * F.cosine_similarity(features.double(), exemplar.double(), dim=1)


class BackgroundMSE(PictureMean):
    """Mean squared difference to the image outside the mask; colours in [0, 1]."""

    higher_is_better = False

    def score(self, result: Tensor, image: Tensor, keep: Tensor) -> Tensor:
        """Of (B, 3, H, W) twice, and the mask (B, 1, H, W) with 1 = keep."""
        squared = (result.double() - image.double()).square().mean(dim=1, keepdim=True)
        return (squared * keep).sum(dim=(1, 2, 3)) / keep.sum(dim=(1, 2, 3))


class BackgroundSSIM(PictureMean):
    """Structural similarity (Wang et al. 2004) to the image outside the mask; colours in [0, 1].

    Only windows count that lie inside the picture and hold no pixel of the mask; a picture without any has no score.
    """

    higher_is_better = True

    def score(self, result: Tensor, image: Tensor, keep: Tensor) -> Tensor:
        """Of (B, 3, H, W) twice, and the mask (B, 1, H, W) with 1 = keep."""
        # float32 errs by a few 1e-6, and is 16 times as fast on a CPU as float64
        _, ssim = structural_similarity_index_measure(
            result.float(), image.float(), data_range=1.0, reduction="none", return_full_image=True
        )
        hidden = F.pad(1 - keep.double(), [SSIM_REACH] * 4, value=1.0)
        counts = 1 - F.max_pool2d(hidden, 2 * SSIM_REACH + 1, stride=1)  # (B, 1, H, W)
        return (ssim.double().mean(dim=1, keepdim=True) * counts).sum(dim=(1, 2, 3)) / counts.sum(dim=(1, 2, 3))


class BackgroundLPIPS(PictureMean):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) to the image, the mask's pixels grey in both."""

    higher_is_better = False

    def __init__(self, lpips: Callable[[Tensor, Tensor], Tensor], bootstrap: Bootstrap = BOOTSTRAP):
        super().__init__(bootstrap)
        self.lpips = lpips

    def score(self, result: Tensor, image: Tensor, keep: Tensor) -> Tensor:
        """Of (B, 3, H, W) twice in [0, 1], and the mask (B, 1, H, W) with 1 = keep."""
        result, image = ((2 * picture - 1) * keep for picture in (result, image))
        return self.lpips(result, image)
