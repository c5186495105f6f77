"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) over Paint by Example's nine-channel network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pbe.sampling.samplers import Eps
from pbe.sampling.schedule import Grid


class GuidedModel(Protocol):
    """What guidance asks of a model."""

    @property
    def unet(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(unet_in, t, context) → eps."""

    @property
    def null_context(self) -> Tensor:
        """(1, 1, 768)."""


class GuidanceCondition(Protocol):
    """What guidance asks of a condition."""

    @property
    def z_masked(self) -> Tensor:
        """(B, 4, h, w)."""

    @property
    def mask(self) -> Tensor:
        """(B, 1, h, w), 1 = keep."""

    @property
    def context(self) -> Tensor:
        """(B, T, 768)."""


Prediction = Callable[[Tensor, Tensor], Tensor]  # (unet_in (B, 9, h, w), t (B,)) → one eps for each of the contexts


@runtime_checkable
class Bindable(Protocol):
    """A network that takes what stays the same through the loop before it: see `pbe.acceleration`."""

    def bind(self, context: Tensor, timesteps: Sequence[int] = (), reuse: int = 1) -> Prediction: ...


def guided_eps(
    model: GuidedModel,
    condition: GuidanceCondition,
    guidance: float,
    grid: Grid | None = None,
    interval: tuple[int, int] | None = None,
    reuse: int = 1,
    null_context: Tensor | None = None,
) -> Eps:
    """The closure eps(x_t, t) that samplers call: eps_u + guidance (eps_c - eps_u) (arXiv 2211.13227).

    Both halves go through the network in one batch of 2B, unconditional first; at guidance 1 (conditional only) and 0
    (unconditional only) the other half is left out. The network runs in the condition's dtype; the two predictions
    are combined in x_t's, so that float32 latents keep guidance from magnifying a 16-bit network's rounding.

    With an `interval` (t_low, t_high) guidance is 1 outside of t_low < t <= t_high, where it does little good or harm
    (Kynkäänniemi et al. 2024, arXiv 2404.07724), and the network has half the work.

    With the `grid` that the sampler is given, a prepared model computes the embeddings of all its timesteps at once;
    the closure must then be given no others.

    With `reuse` N > 1 a prepared model runs whole at one of N evaluations, and at the others reuses its deep features:
    see `PreparedUNet.bind`. Above, inside and below an interval they are separate, and each begins with a whole one.

    A `null_context` (1, T, 768) stands in the place of the model's: of what eps_u paints guidance leads away.

    Raises:
        ValueError: if guidance is negative or not finite, there is not one context per sample, t_low is above t_high,
            or `reuse` is not 1 and the model not prepared; from the closure, if x_t is not shaped as z_masked, or
            samples lie on both sides of the interval.
    """
    if not (isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance must be finite and at least 0, got {guidance}")
    timesteps = [step.t for step in grid or ()]
    if interval is None or guidance == 1:
        return constantly_guided(model, condition, guidance, timesteps, reuse, null_context)
    t_low, t_high = interval
    if t_low > t_high:
        raise ValueError(f"the guidance interval is (t_low, t_high) with t_low <= t_high, got {interval}")
    inside = [t for t in timesteps if t_low < t <= t_high]
    outside = [t for t in timesteps if not t_low < t <= t_high]
    below, guided, above = (
        constantly_guided(model, condition, scale, known, reuse, null_context)
        for scale, known in ((1, outside), (guidance, inside), (1, outside))
    )

    def eps(x_t: Tensor, t: Tensor) -> Tensor:
        # waits for the device, once for half a network's run
        sides = set((t > t_low).long().add(t > t_high).tolist())
        if len(sides) > 1 and 1 in sides:
            raise ValueError(f"t must lie on one side of the interval {interval} for all samples, got {t.tolist()}")
        return (below, guided, above)[min(sides)](x_t, t)

    return eps


def constantly_guided(
    model: GuidedModel,
    condition: GuidanceCondition,
    guidance: float,
    timesteps: Sequence[int],
    reuse: int,
    null_context: Tensor | None = None,
) -> Eps:
    """`guided_eps` with the same guidance at all timesteps; `timesteps` may be empty, where they are not known."""
    context = condition.context  # (B, T, 768)
    if len(context) != len(condition.z_masked):
        raise ValueError(
            f"the condition must have one context per sample ({len(condition.z_masked)}), got {len(context)}; "
            "context.expand(B, -1, -1) gives all samples the same exemplar's"
        )
    null_context = (model.null_context if null_context is None else null_context).to(context).expand_as(context)
    kept = torch.cat([condition.z_masked, condition.mask.to(condition.z_masked)], dim=1)  # (B, 5, h, w)
    both = guidance not in (0, 1)
    if both:
        context = torch.cat([null_context, context])  # (2B, T, 768)
    elif guidance == 0:
        context = null_context
    unet = model.unet
    if isinstance(unet, Bindable):
        predict = unet.bind(context, timesteps, reuse)
    elif reuse == 1:
        predict = repeated(unet, context)
    else:
        raise ValueError(f"reuse={reuse} needs a model that pbe.acceleration.prepare_for_inference made, or reuse=1")
    shape = condition.z_masked.shape

    def eps(x_t: Tensor, t: Tensor) -> Tensor:
        if x_t.shape != shape:
            raise ValueError(f"x_t must be shaped as z_masked {tuple(shape)}, got {tuple(x_t.shape)}")
        unet_in = torch.cat([x_t.to(kept.dtype), kept], dim=1)
        prediction = predict(unet_in, t).to(x_t.dtype)
        if not both:
            return prediction
        eps_u, eps_c = prediction.chunk(2)
        return eps_u + guidance * (eps_c - eps_u)

    return eps


def repeated(unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor) -> Prediction:
    """The network's prediction with its samples repeated for each of their contexts (K, T, 768)."""

    def predict(unet_in: Tensor, t: Tensor) -> Tensor:
        times = len(context) // len(unet_in)
        return unet(torch.cat([unet_in] * times), t.repeat(times), context)

    return predict
