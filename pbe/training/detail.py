"""Training a detail adapter (`pbe.models.detail`): its settings, where it starts, and what is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from pbe.io.fields import Range, check_fields
from pbe.models.detail import DetailConfig, add_detail, detail_parts, is_detail
from pbe.models.paint_by_example import PaintByExample
from pbe.training.initialization import initial_weights


@dataclass
class DetailTrainingConfig(DetailConfig):
    """A detail adapter, and how often its tokens are dropped: what the exemplar's own token says must not be forgotten,
    and no token may hold a patch to copy."""

    drop: Annotated[float, Range(0, 1)] = 0.1
    """The probability with which the null tokens take the place of all of an exemplar's, beside `drop_exemplar`, with
    which they always do."""
    drop_tokens: Annotated[float, Range(0, 1)] = 0.1
    """The probability with which a null token takes a single one's place."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "detail")


def start_detail(model: PaintByExample, config: DetailConfig, seed: int) -> None:
    """Gives a model an adapter with seeded weights, with which it predicts as it did."""
    add_detail(model, detail_parts(model, config), {})
    own = tuple(name for name, _ in model.named_parameters() if is_detail(name))
    weights = dict(initial_weights(model, torch.Generator().manual_seed(seed), own))
    model.load_state_dict({name: x.to(model.device) for name, x in weights.items()}, strict=False, assign=True)


def drop_detail(context: Tensor, null_context: Tensor, u: Tensor, drop: float, drop_tokens: float) -> Tensor:
    """The context (B, T + D, C) with null tokens in place of all D of detail where the first of the uniform draws `u`
    (B, 1 + D) is below `drop`, and of single ones where their own is below `drop_tokens`."""
    dropped = (u[:, :1] < drop) | (u[:, 1:] < drop_tokens)  # (B, D)
    dropped = F.pad(dropped, (context.shape[1] - dropped.shape[1], 0))
    return torch.where(dropped[..., None], null_context.to(context), context)
