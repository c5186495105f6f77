"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) over Paint by Example's nine-channel network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pbe.sampling.schedule import Eps


class GuidedModel(Protocol):
    """What guidance asks of a model."""

    unet: Callable[[Tensor, Tensor, Tensor], Tensor]  # (unet_in, t, context) → eps
    null_context: Tensor  # (1, 1, 768)


class GuidanceCondition(Protocol):
    """What guidance asks of a condition."""

    z_masked: Tensor  # (B, 4, h, w)
    mask: Tensor  # (B, 1, h, w), 1 = keep
    context: Tensor  # (B, T, 768)


Prediction = Callable[[Tensor, Tensor], Tensor]  # (unet_in (B, 9, h, w), t (B,)) → one eps for each of the contexts


@runtime_checkable
class Bindable(Protocol):
    """A network that takes what stays the same through the loop before it: see `pbe.acceleration`."""

    def bind(self, context: Tensor, timesteps: Sequence[int] | None) -> Prediction: ...


def guided_eps(
    model: GuidedModel, condition: GuidanceCondition, scale: float, timesteps: Sequence[int] | None = None
) -> Eps:
    """The closure eps(x_t, t) that samplers call: eps_u + scale (eps_c - eps_u) (arXiv 2211.13227).

    Both halves go through the network in one batch of 2B, unconditional first; at scale 1 (conditional only) and 0
    (unconditional only) the other half is left out. The network runs in the condition's dtype; the two predictions
    are combined in x_t's, so that float32 latents keep guidance from magnifying a 16-bit network's rounding.

    With the `timesteps` that the sampler will visit, a prepared model computes all their embeddings at once; the
    closure must then be given no others.

    Raises:
        ValueError: if scale is negative or not finite; from the closure, if x_t is not shaped as z_masked.
    """
    if not (isfinite(scale) and scale >= 0):
        raise ValueError(f"the guidance scale must be finite and at least 0, got {scale}")

    context = condition.context  # (B, T, 768)
    null_context = model.null_context.to(context).expand_as(context)
    kept = torch.cat([condition.z_masked, condition.mask.to(condition.z_masked)], dim=1)  # (B, 5, h, w)
    both = scale not in (0, 1)
    if both:
        context = torch.cat([null_context, context])  # (2B, T, 768)
    elif scale == 0:
        context = null_context
    unet = model.unet
    predict = unet.bind(context, timesteps) if isinstance(unet, Bindable) else repeated(unet, context)
    shape = condition.z_masked.shape

    def eps(x_t: Tensor, t: Tensor) -> Tensor:
        if x_t.shape != shape:
            raise ValueError(f"x_t must be shaped as z_masked {tuple(shape)}, got {tuple(x_t.shape)}")
        unet_in = torch.cat([x_t.to(kept.dtype), kept], dim=1)
        prediction = predict(unet_in, t).to(x_t.dtype)
        if not both:
            return prediction
        eps_u, eps_c = prediction.chunk(2)
        return eps_u + scale * (eps_c - eps_u)

    return eps


def repeated(unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor) -> Prediction:
    """The network's prediction with its samples repeated for each of their contexts (K, T, 768)."""

    def predict(unet_in: Tensor, t: Tensor) -> Tensor:
        times = len(context) // len(unet_in)
        return unet(torch.cat([unet_in] * times), t.repeat(times), context)

    return predict
