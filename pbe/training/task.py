"""What the training of any model has: its optimiser, its loss's check, its log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from pbe.data.datamodule import ExampleDataModule
from pbe.training.loss import check_finite
from pbe.training.optimizer import OptimizerConfig, averaged, make_optimizer


class TrainingTask(lightning.LightningModule):
    """A module that trains; `about` goes into the entry `pbe` of its checkpoints.

    Raises `FloatingPointError` in the step whose loss is not finite, naming the batch's files.
    """

    val_loss = "val/loss"
    """The validation metric that is lowest for the best checkpoint."""

    def __init__(self, optimizer: OptimizerConfig, about: Mapping[str, Any] | None):
        super().__init__()
        self.optimizer_config, self.about = optimizer, dict(about or {})
        self.averaging: Optimizer | None = None  # where the optimiser averages

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        made = make_optimizer(self, self.optimizer_config)
        self.averaging = made["optimizer"] if self.optimizer_config.name == "schedulefree" else None
        return made

    def averaged(self) -> AbstractContextManager[None]:
        """The averages in the parameters' place, where there are any."""
        return averaged(self.averaging) if self.averaging else nullcontext()

    def step_result(self, loss: Tensor, files: Sequence[str], metrics: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a training step returns: the loss, and metrics of one value per sample for `TrainingMetrics`."""
        check_finite(loss, self.global_step + 1, files)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return {"loss": loss, "metrics": metrics}

    def write_beside(self, checkpoint: Path) -> None:
        """Writes what is to lie `beside` a checkpoint just written, if anything."""

    def log_validation(self, metrics: Mapping[str, float]) -> None:
        """Logs metrics at the number of optimiser steps taken, which in validation Lightning would count one less."""
        # sync_dist: all processes have the same values, and Lightning warns where it is not told
        self.log_dict({**metrics, "step": float(self.global_step)}, sync_dist=True)


def beside(checkpoint: Path) -> Path:
    """Where a file for others lies that belongs to a checkpoint."""
    return checkpoint.with_suffix(".safetensors")


def sum_over_processes(trainer: Trainer, values: Tensor) -> Tensor:
    """The sums of values that each process has."""
    if trainer.world_size == 1:
        return values
    return trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum")


def data_of(trainer: Trainer) -> ExampleDataModule:
    """The data that a trainer was given, in an attribute that Lightning's types do not know."""
    data: ExampleDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data
