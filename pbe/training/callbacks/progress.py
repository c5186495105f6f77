"""One bar over all steps of a training run."""

from __future__ import annotations

import math
import sys
from typing import Any

from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30  # where the output is a file


class StepsBar(Callback):
    """Shows the optimiser steps taken and those of the whole run, the time that remains, and the loss."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self.bar = tqdm(
            total=None if math.isinf(steps) else int(steps),
            initial=trainer.global_step,
            unit="step",
            smoothing=0,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self.bar.n:
            self.bar.set_postfix(loss=f"{trainer.progress_bar_metrics['loss']:.4f}", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, *_: Any) -> None:
        self.bar.close()

    def on_exception(self, *_: Any) -> None:
        self.bar.close()
