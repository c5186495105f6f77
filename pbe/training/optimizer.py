"""The optimisers of every training task: AdamW and three others behind one name, with a warm-up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from pbe.io.fields import Range, check_fields
from pbe.io.suggest import did_you_mean
from pbe.training.initialization import PARTS

if TYPE_CHECKING:
    import lightning
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

# What can have settings of its own, by how its parameters' names begin.
NETWORKS = dict[str, str]([*PARTS.items(), ("discriminator", "discriminator.")])


class Kind(NamedTuple):
    """An optimiser."""

    package: str
    name: str
    moments: tuple[str, ...]  # what it keeps in a parameter's shape
    floats: float  # how many float32 values it keeps of each parameter in all


KINDS = {
    "adamw": Kind("torch.optim", "AdamW", ("exp_avg", "exp_avg_sq"), 2),
    "adamw8bit": Kind("bitsandbytes.optim", "AdamW8bit", ("state1", "state2"), 0.5),
    "schedulefree": Kind("schedulefree", "AdamWScheduleFree", ("z", "exp_avg_sq"), 2),
    "prodigy": Kind("prodigyopt", "Prodigy", ("exp_avg", "exp_avg_sq"), 4),
}


@dataclass
class PartOptimizerConfig:
    """What is different for one part of the model; None: as for the others."""

    lr: Annotated[float, Range(0, above=True)] | None = None
    """Its highest learning rate."""
    weight_decay: Annotated[float, Range(0)] | None = None
    """Of its parameters."""


@dataclass
class OptimizerConfig:
    """Settings of the optimiser; the defaults are Paint by Example's."""

    name: Literal["adamw", "adamw8bit", "schedulefree", "prodigy"] = "adamw"
    """AdamW; with its moments in 8 bits (bitsandbytes), a quarter of their memory; schedule-free (arXiv 2405.15682),
    which averages the parameters in place of a decay, and validates, samples and saves the average; Prodigy (arXiv
    2306.06101), which finds the learning rate, and of which `lr` is a factor, 1. All but AdamW need the extra
    `optim`."""
    lr: Annotated[float, Range(0, above=True)] = 1e-5
    """The highest learning rate."""
    weight_decay: Annotated[float, Range(0)] = 0.01
    """Of all parameters that train."""
    warmup_steps: Annotated[int, Range(0)] = 10_000
    """Optimiser steps in which the rate rises to `lr` along a line."""
    warmup_start: Annotated[float, Range(0, 1)] = 1e-6
    """The share of `lr` that the warm-up starts from."""
    decay_steps: Annotated[int, Range(1)] | None = None
    """Steps after the warm-up in which the rate falls to 0 along a cosine; None: it stays."""
    parts: dict[str, PartOptimizerConfig] = field(default_factory=dict)
    """What is different for parts of the model, by their names in `training.train`: `{clip: {lr: 1e-6}, null_context:
    {weight_decay: 0}}`; an autoencoder's `training.adversarial` trains a `discriminator`."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        for part, config in self.parts.items():
            if part not in NETWORKS:
                raise ValueError(f"optimizer.parts.{part}: the model has no such part{did_you_mean(part, NETWORKS)}")
            check_fields(config, f"optimizer.parts.{part}")
            if self.name == "prodigy" and config.lr is not None:
                raise ValueError(f"optimizer.parts.{part}.lr: prodigy finds one learning rate for all parts")
        if self.name == "prodigy" and self.lr < 0.1:
            raise ValueError(f"optimizer.lr is a factor of the rate that prodigy finds: set it to 1, got {self.lr:g}")
        if self.name == "schedulefree" and self.decay_steps is not None:
            raise ValueError(f"optimizer.decay_steps={self.decay_steps}: schedulefree needs no decay, set it to null")


def lr_factor(step: int, config: OptimizerConfig) -> float:
    """The learning rate of optimiser step `step`, from 0, as a factor of the highest."""
    if step < config.warmup_steps:
        return config.warmup_start + (1 - config.warmup_start) * step / config.warmup_steps
    if config.decay_steps is None:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min((step - config.warmup_steps) / config.decay_steps, 1)))


def part_of(name: str) -> str | None:
    """The part of a model that a parameter of its training module belongs to."""
    return next((part for part, prefix in NETWORKS.items() if name.removeprefix("model.").startswith(prefix)), None)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """The parameters that train, as an optimiser takes them: a group for each of `config.parts`, after the others.

    ValueError for a part of which nothing trains.
    """
    groups: dict[str | None, list[nn.Parameter]] = {None: [], **{part: [] for part in config.parts}}
    for name, parameter in named:
        if parameter.requires_grad:
            part = part_of(name) if config.parts else None
            groups[part if part in groups else None].append(parameter)
    if empty := [part for part in config.parts if not groups[part]]:
        raise ValueError(f"optimizer.parts.{empty[0]}: nothing of this part trains")
    given = {part: {k: x for k, x in vars(own).items() if x is not None} for part, own in config.parts.items()}
    return [{"params": group, **given.get(part or "", {})} for part, group in groups.items() if group]


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimiser's class; ImportError where its package is missing."""
    kind = KINDS[name]
    try:
        found: type[Optimizer] = getattr(import_module(kind.package), kind.name)
    except ImportError as error:
        package = kind.package.partition(".")[0]
        raise ImportError(f"optimizer.name={name} needs {package}, the extra optim: pip install pbe[optim]") from error
    return found


def build_optimizer(groups: Sequence[dict[str, Any]], config: OptimizerConfig, fused: bool = False) -> Optimizer:
    """The optimiser over groups of parameters; `fused`: AdamW's step as one operation."""
    own: dict[str, Any] = {"adamw": {"fused": fused}, "prodigy": {"safeguard_warmup": config.warmup_steps > 0}}
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, **own.get(config.name, {})}
    optimizer = optimizer_class(config.name)(groups, **settings)
    if config.name == "schedulefree":
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def check_moments(state: dict[int, dict[str, Any]], groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
    """ValueError for an optimiser's saved state, by parameter, that is not one of the parameters' groups."""
    trained = [parameter for group in groups for parameter in group["params"]]
    for i, saved in state.items():
        inner = next((x for x in saved.values() if isinstance(x, dict)), {})  # where bitsandbytes has its 8-bit moments
        shapes = [{**saved, **inner}[name].shape for name in KINDS[config.name].moments]
        if set(shapes) != {trained[i].shape}:
            raise ValueError("its optimizer's state does not fit the parameters that train")
    if not state:
        raise ValueError("its optimizer has no state")


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """The average that schedule-free makes in the parameters' place; afterwards they are the same to the bit."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.data for parameter in trained]
    for parameter in trained:
        parameter.data = parameter.data.clone()  # the optimiser's own way back would round
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["train_mode"] = True
        for parameter, data in zip(trained, before, strict=True):
            parameter.data = data


def make_optimizer(module: lightning.LightningModule, config: OptimizerConfig) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: the optimiser of what trains, and its learning rate's schedule."""
    trainer = module.trainer
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    # The fused step removes fp16's loss scale itself, too late for Lightning to clip the gradients before.
    clips_scaled = scaled and bool(trainer.gradient_clip_val)
    groups = parameter_groups(module.named_parameters(), config)
    optimizer = build_optimizer(groups, config, fused=module.device.type == "cuda" and not clips_scaled)
    if not scaled:
        # Where nothing is scaled Lightning would refuse too: it looks at this mark of a fused optimizer alone.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
