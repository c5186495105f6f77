"""The checkpoints of a training run, and the folder they lie in."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from pbe.data.dataset import ExampleDataset
from pbe.io.atomic import replacing
from pbe.io.fields import Range, check_fields
from pbe.training.callbacks.metrics import JSONLinesLogger
from pbe.training.callbacks.stopping import StopSignals, Terminated, requeue
from pbe.training.optimizer import check_moments, parameter_groups
from pbe.training.task import TrainingTask, beside, data_of

# entries beside "loops" that tell of a step's end
AT_STEP = ("data_position", "best_loss", "validation_due", "callbacks")
CHECKPOINT_NAME = re.compile(r"step-(\d+)\.ckpt")


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and for how long they are kept."""

    every_n_steps: Annotated[int, Range(1)] = 1000
    """Optimiser steps between two checkpoints; the end of a run has one too."""
    every_n_minutes: Annotated[float, Range(0, above=True)] | None = None
    """Minutes after which there is one more, at the next step's end; None: by steps alone."""
    keep: Annotated[int, Range(1)] = 3
    """How many of the last are kept."""
    best: bool = True
    """Also keep `best.ckpt`, the one with the lowest validation loss."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint")


class Checkpoints(Checkpoint):
    """Writes `step-00001000.ckpt` into `folder`, one more at the end, and removes those before the last `keep`.

    All describe the run at the end of an optimiser step, whenever they are written: where a validation follows, before
    it, so that a resumed run makes it (again). They also hold how much of the epoch's data was consumed, from where the
    data module continues.

    Raises `FloatingPointError` in place of writing parameters that are not finite, and `Terminated` between two batches
    once `stop` has received a signal.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, stop: StopSignals):
        self.folder, self.config, self.stop = folder, config, stop
        self.best_loss = math.inf
        self.at_step: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_step = self.last_saved = trainer.global_step
        self.last_time = time.monotonic()
        self.stop.begin()
        for logger in trainer.loggers:
            if isinstance(logger, JSONLinesLogger):
                logger.trim(self.last_step)
        if trainer.is_global_zero:  # where an older one was chosen
            for later in (path for path in list_checkpoints(self.folder) if step_of(path) > self.last_step):
                for path in filter(Path.exists, (later, beside(later))):
                    path.replace(f"{path}.old")
        if self.at_step.get("validation_due"):
            validate(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves nothing behind
            return
        step, loop = trainer.global_step, trainer.fit_loop
        assert loop._data_fetcher is not None
        if step != self.last_step:
            self.last_step = step
            self.at_step = {
                "loops": loop.state_dict(),
                "data_position": (trainer.current_epoch, (batch_idx + 1) * global_batch(trainer)),
                "best_loss": self.best_loss,
                # before the validation that may follow, which a run that goes on makes again
                "callbacks": {x.state_key: x.state_dict() for x in trainer.early_stopping_callbacks},
                "validation_due": loop.epoch_loop._should_check_val_fx(loop._data_fetcher),
            }
        # The end is saved here too: later, Lightning counts an epoch that max_steps cut short as a whole one, from
        # where a longer run could not continue.
        due = step == trainer.max_steps or trainer.should_stop or step % self.config.every_n_steps == 0
        due |= trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if self.config.every_n_minutes is not None:
            late = time.monotonic() - self.last_time >= 60 * self.config.every_n_minutes
            due |= trainer.strategy.reduce_boolean_decision(late, all=False)
        if due and step != self.last_saved:
            self.save(trainer, pl_module)
        self.stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.stop_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainingTask)
        loss = float(trainer.callback_metrics.get(pl_module.val_loss, math.nan))
        if self.config.best and self.at_step and not trainer.sanity_checking and loss < self.best_loss:
            self.best_loss = loss
            self.write(trainer, pl_module, "best.ckpt")
        if trainer.should_stop and self.at_step and self.last_step != self.last_saved:  # which patience decided
            self.save(trainer, pl_module)

    def stop_if_asked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the last step and raises `Terminated` where a signal asked for the end."""
        signum = self.stop.asked(trainer)
        if signum is None or not self.at_step:  # before the first step's end there is nothing to save
            return
        if self.last_step != self.last_saved:
            self.save(trainer, pl_module)
        if signum == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        raise Terminated(signum, f"after step {self.last_step}, which is saved; --resume goes on from there")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {**self.at_step, "loops": {**checkpoint["loops"], "fit_loop": self.at_step["loops"]}}
        records = train_records(trainer)
        checkpoint["global_batch"], checkpoint["num_records"] = global_batch(trainer), len(records)
        checkpoint["records_digest"] = records.digest
        assert isinstance(pl_module, TrainingTask)
        if pl_module.averaging:  # the average is what the file is for; training goes on from where it is itself
            before = checkpoint["state_dict"]
            names = [name for name, p in pl_module.named_parameters() if p.requires_grad]
            checkpoint["training_weights"] = {name: before[name] for name in names}
            with pl_module.averaged():
                checkpoint["state_dict"] = pl_module.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_state(checkpoint, trainer, pl_module)
        # Lightning counts batches, and the position counts pictures: both go on only with batches of the same size.
        if checkpoint["global_batch"] != global_batch(trainer):
            raise ValueError(
                f"the run had {checkpoint['global_batch']} pictures in a batch over all processes and cannot go on "
                f"with {global_batch(trainer)}: change data.batch_size with the number of devices"
            )
        records, change = train_records(trainer), ""
        if checkpoint["num_records"] != len(records):
            change = f"had {checkpoint['num_records']} records and now has {len(records)}"
        elif checkpoint.get("records_digest", records.digest) != records.digest:
            change = "had other records, or the same in another order"
        if change:
            raise ValueError(f"the run's data {change}: restore the data, or begin another run with run=")
        parameters = dict(pl_module.named_parameters())
        for name, value in checkpoint.get("training_weights", {}).items():
            parameters[name].data.copy_(value)
        loops = checkpoint["loops"]["fit_loop"]
        epoch, consumed = checkpoint["data_position"]
        self.best_loss = float(checkpoint.get("best_loss", math.inf))
        self.at_step = {name: checkpoint[name] for name in AT_STEP if name in checkpoint} | {"loops": loops}
        # Data workers make the next batches before Lightning tells of the next epoch.
        ended = loops["epoch_loop.batch_progress"]["is_last_batch"]
        data_of(trainer).set_position(*((epoch + 1, 0) if ended else (epoch, consumed)))

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        bad = [name for name, p in pl_module.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"after step {step} {len(bad)} parameters are not finite, as {bad[0]}; the checkpoints are older"
            )
        self.write(trainer, pl_module, f"step-{step:08}.ckpt")
        self.last_saved, self.last_time = step, time.monotonic()
        if trainer.is_global_zero:
            for path in list_checkpoints(self.folder)[: -self.config.keep]:
                trainer.strategy.remove_checkpoint(path)
                beside(path).unlink(missing_ok=True)

    def write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> None:
        # weights_only: Lightning would write to the log that it is not set
        trainer.save_checkpoint(self.folder / name, weights_only=False)
        assert isinstance(pl_module, TrainingTask)
        if trainer.is_global_zero:
            pl_module.write_beside(self.folder / name)


def validate(trainer: Trainer) -> None:
    """The validation that follows the step from which a run is resumed."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def check_state(checkpoint: dict[str, Any], trainer: Trainer, pl_module: LightningModule) -> None:
    """ValueError for a state of the loops or of the optimizer that is not this run's: Lightning would notice later, or
    never.

    The parameters were compared when they were loaded.
    """
    if not same_form(checkpoint["loops"]["fit_loop"], trainer.fit_loop.state_dict()):
        raise ValueError("its loops are not those of a training run")
    (optimizer,), (schedule,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    if not isinstance(schedule["last_epoch"], int):
        raise ValueError("its learning rate's schedule has no last_epoch")
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        return  # which divide the parameters
    assert isinstance(pl_module, TrainingTask)
    config = pl_module.optimizer_config
    check_moments(optimizer["state"], parameter_groups(pl_module.named_parameters(), config), config)


def same_form(value: Any, like: Any) -> bool:
    """Whether nested dictionaries hold what `like` has, of the same types."""
    if isinstance(like, dict):
        return isinstance(value, dict) and all(key in value and same_form(value[key], like[key]) for key in like)
    return type(value) is type(like)


def global_batch(trainer: Trainer) -> int:
    """Pictures in a batch over all processes."""
    return data_of(trainer).config.batch_size * trainer.world_size


def train_records(trainer: Trainer) -> ExampleDataset:
    """What training draws from."""
    train = data_of(trainer).train
    assert train is not None
    return train


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that training wrote, from the first step to the last."""
    return sorted((path for path in folder.glob("step-*.ckpt") if CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps after which a checkpoint was written, from its name."""
    found = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    assert found, checkpoint
    return int(found[1])


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits until it is on the disk, and renames it: what has the name is whole.

    Lightning's own holds all of it in memory once more, and writes it into a temporary folder that may be on another
    disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with replacing(path, overwrite=True) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"cannot write {path} ({free / 1e9:.1f} GB free): {error}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        # to the CPU: the state is copied to where the parameters are; and never a pickle that runs code
        return torch.load(path, map_location="cpu", weights_only=True)


def prepare_folder(folder: Path) -> None:
    """Makes a run's folder. Raises `OSError` if it cannot be written."""
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
    except OSError as error:
        raise OSError(f"the run's folder {folder} cannot be written: {error.strerror or error}") from error


def clear_parts(folder: Path) -> None:
    """Removes the checkpoints of a run whose writing was interrupted."""
    for part in (folder / "checkpoints").glob(".*.part"):
        part.unlink()


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises `OSError` unless the disk has room for `num_bytes` of checkpoints."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the checkpoints to keep there need about "
            f"{num_bytes / 1e9:.1f} GB: free some, choose another run=, or keep fewer with checkpoint.keep"
        )
