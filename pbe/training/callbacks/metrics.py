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
        self.at_step: dict[str, Tensor] = {}  # `totals` at the last optimiser step's end, of which checkpoints tell
        self.skipped: dict[str, dict[str, int]] = {}  # pictures that could not be used in this process until then
        self.skipped_before: dict[str, float] = {}  # and over all processes, before this one began
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
        if step == self.last_step:
            return
        self.last_step = step
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.write(trainer, pl_module)
        self.at_step, self.skipped = dict(self.totals), data_of(trainer).skipped

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what was summed since last time, and begins again."""
        totals = self.reduced(trainer, self.totals)
        metrics = {f"train/{name}": total / count for name, (total, count) in totals.items() if count}
        group = trainer.optimizers[0].param_groups[0]
        metrics["lr"] = group["lr"] * group.get("d", 1.0)  # which Prodigy finds
        metrics["pictures_per_second"] = totals["loss"][1] / (time.monotonic() - self.since)
        metrics["peak_memory_gib"] = peak_memory(pl_module.device)
        metrics |= self.skipped_pictures(trainer, data_of(trainer).skipped)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.totals, self.since = {}, time.monotonic()

    def reduced(self, trainer: Trainer, totals: dict[str, Tensor]) -> dict[str, list[float]]:
        """[sum, count] of each metric over all processes; the one place where the device is waited for."""
        if not totals:
            return {}
        return dict(zip(totals, sum_over_processes(trainer, torch.stack(list(totals.values()))).tolist(), strict=True))

    def skipped_pictures(self, trainer: Trainer, skipped: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
        """How many pictures could not be used since the run began, over all processes, by split and reason; none:
        nothing. `skipped` are those of this process, since it began."""
        counts = torch.tensor([n for reasons in skipped.values() for n in reasons.values()], dtype=torch.float64)
        names = [f"data/skipped_{split}_{reason.replace(' ', '_')}" for split, of in skipped.items() for reason in of]
        now = dict(zip(names, sum_over_processes(trainer, counts).tolist(), strict=True)) if names else {}
        before = self.skipped_before
        return {name: n for name in {**before, **now} if (n := before.get(name, 0) + now.get(name, 0))}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        totals, seconds = self.reduced(trainer, self.at_step), time.monotonic() - self.since
        skipped = self.skipped_pictures(trainer, self.skipped)
        checkpoint["metrics"] = {"totals": totals, "seconds": seconds, "skipped": skipped}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seconds = checkpoint["metrics"]["seconds"]
        self.skipped_before = checkpoint["metrics"].get("skipped", {})
        # Sums over all processes go on in the first one alone.
        own = 1.0 if trainer.is_global_zero else 0.0
        totals = checkpoint["metrics"]["totals"].items()
        self.totals = {name: torch.tensor(total) * own for name, total in totals}
        self.at_step = dict(self.totals)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.since += time.monotonic() - self.paused


def peak_memory(device: torch.device) -> float:
    """The highest use of memory so far in GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class JSONLinesLogger(Logger):
    """Appends metrics to a file, one JSON object per line, with `step`.

    A run that continues from a checkpoint makes some lines again: `trim` removes them first.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @rank_zero_only
    def trim(self, step: int) -> None:
        """Removes the lines of steps after `step`, and those of the validations that follow it."""
        if not self.path.exists():
            return

        def keep(line: dict[str, Any]) -> bool:
            return line["step"] < step or (line["step"] == step and not any(name.startswith("val/") for name in line))

        # The last line may be cut where a process was killed.
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        with replacing(self.path, overwrite=True) as part:
            part.write_text("".join(line for line in lines if keep(json.loads(line))))

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
