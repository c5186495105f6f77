"""What ends a training run early: signals, between two batches and once its last step is saved, and patience."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from lightning import LightningModule
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from pbe.io.signals import handling
from pbe.training.task import TrainingTask


class Terminated(Exception):
    """Training was stopped by the signal `signum`; the message says where a resumed run goes on."""

    def __init__(self, signum: int, message: str):
        super().__init__(f"stopped by {signal.Signals(signum).name} {message}")
        self.signum = signum


class Patience(EarlyStopping):
    """Ends a run once as many validations in a row had no lower validation loss. A run that goes on may have another
    patience than before."""

    def __init__(self, patience: int):
        super().__init__("", patience=patience, check_on_train_epoch_end=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, TrainingTask)
        self.monitor = pl_module.val_loss
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= self.patience and trainer.is_global_zero:
            why = f"{self.monitor} was not below {self.best_score:.4g} in the last {self.wait_count} validations"
            print(f"stopped after step {trainer.global_step}: {why}", file=sys.stderr)


class StopSignals:
    """Keeps SIGTERM, Ctrl+C and SLURM's signal before a requeue until `asked`; a second Ctrl+C raises at once.

    While nothing trains, the first raises at once, as there is nothing to save.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False

    def handled(self) -> AbstractContextManager[None]:
        """Takes the signals for as long as the block lasts."""
        slurm = [signal.SIGUSR1] if SLURMEnvironment.detect() else []
        return handling(self.receive, signal.SIGTERM, signal.SIGINT, *slurm)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.training:
            raise Terminated(signum, "before the first step")
        if self.received == signum == signal.SIGINT:
            raise Terminated(signum, "at once, perhaps before its last step was saved")
        self.received = self.received or signum

    def begin(self) -> None:
        """From now on a signal waits for the end of a batch. Lightning's handler of SIGTERM gives way to this one."""
        self.training = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.receive)

    def asked(self, trainer: Trainer) -> int | None:
        """The signal that some process received, if one did."""
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return self.received or signal.SIGTERM
        return None


def requeue() -> None:
    """Asks SLURM to start this job again."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=False)
