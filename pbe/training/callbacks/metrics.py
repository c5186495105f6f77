"""What a training run measures, and the file it is written to."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from pbe.io.atomic import replacing
from pbe.training.task import data_of, sum_over_processes


class TrainingMetrics(Callback):
    """Logs, every `trainer.log_every_n_steps` optimiser steps, means over the samples of all processes since last time.

    It averages the 1-D tensors in `metrics` of a training step's result: one value per sample, NaN where it has none.
    Beside them: the learning rate, pictures per second outside of validation, the highest memory use in GiB (the
    device's on CUDA, else the process's), and how many pictures could not be used so far.

    What was summed since the last line is in the checkpoints: a resumed run logs what an uninterrupted one does.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # (2,) each: sum and count, on the device until they are logged
        self.seconds = 0.0  # before this process began
        self.since = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_step = trainer.global_step
        self.since = time.monotonic() - self.seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, values in outputs["metrics"].items():
            counted = ~values.isnan()
            total = torch.stack([values.nansum(), counted.sum()]).float()
            self.totals[name] = self.totals[name].to(total.device) + total if name in self.totals else total
        step = trainer.global_step
        if step == self.last_step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.last_step = step
        totals = self.reduced(trainer)
        metrics = {f"train/{name}": total / count for name, (total, count) in totals.items() if count}
        metrics["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics["pictures_per_second"] = totals["loss"][1] / (time.monotonic() - self.since)
        metrics["peak_memory_gib"] = peak_memory(pl_module.device)
        metrics |= skipped_pictures(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        self.totals, self.since = {}, time.monotonic()

    def reduced(self, trainer: Trainer) -> dict[str, list[float]]:
        """[sum, count] of each metric over all processes; the one place where the device is waited for."""
        if not self.totals:
            return {}
        totals = sum_over_processes(trainer, torch.stack(list(self.totals.values())))
        return dict(zip(self.totals, totals.tolist(), strict=True))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["metrics"] = {"totals": self.reduced(trainer), "seconds": time.monotonic() - self.since}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seconds = checkpoint["metrics"]["seconds"]
        # Sums over all processes go on in the first one alone.
        own = 1.0 if trainer.is_global_zero else 0.0
        totals = checkpoint["metrics"]["totals"].items()
        self.totals = {name: torch.tensor(total) * own for name, total in totals}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.since += time.monotonic() - self.paused


def skipped_pictures(trainer: Trainer) -> dict[str, float]:
    """How many pictures could not be used so far, over all processes, by split and reason; none: nothing."""
    skipped = data_of(trainer).skipped
    counts = torch.tensor([n for reasons in skipped.values() for n in reasons.values()], dtype=torch.float64)
    counts = sum_over_processes(trainer, counts)
    names = [f"data/skipped_{split}_{reason.replace(' ', '_')}" for split, of in skipped.items() for reason in of]
    return {name: n for name, n in zip(names, counts.tolist(), strict=True) if n}


def peak_memory(device: torch.device) -> float:
    """The highest use of memory so far in GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class JSONLinesLogger(Logger):
    """Appends metrics to a file, one JSON object per line, with `step`.

    Lines of steps after `step` are removed first: a run that continues from a checkpoint takes those steps again.
    """

    def __init__(self, path: Path, step: int):
        super().__init__()
        self.path = path
        self._trim(step)

    @rank_zero_only
    def _trim(self, step: int) -> None:
        if not self.path.exists():
            return
        # The last line may be cut where a process was killed.
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with replacing(self.path, overwrite=True) as part:
            part.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Nothing: the run's settings lie beside the file."""
