"""The checkpoints of a training run, and the folder they lie in."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from pbe.io.atomic import replacing
from pbe.io.fields import Range, check_fields
from pbe.training.task import data_of

CHECKPOINT_NAME = re.compile(r"step-(\d+)\.ckpt")


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and for how long they are kept."""

    every_n_steps: Annotated[int, Range(1)] = 1000
    """Optimiser steps between two checkpoints; the end of a run has one too."""
    keep: Annotated[int, Range(1)] = 3
    """How many of the last are kept."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoint")


class Checkpoints(Checkpoint):
    """Writes `step-00001000.ckpt` into `folder`, one more at the end, and removes those before the last `keep`.

    They also hold how much of the epoch's data was consumed, from where the data module continues.

    Raises `FloatingPointError` in place of writing parameters that are not finite.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.position = (0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # which leaves nothing behind
            return
        self.position = (trainer.current_epoch, (batch_idx + 1) * global_batch(trainer))
        step = trainer.global_step
        # The end is saved here too: later, Lightning counts an epoch that max_steps cut short as a whole one, from
        # where a longer run could not continue.
        ends = step == trainer.max_steps or trainer.should_stop
        ends |= trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if step != self.last_step and (ends or step % self.config.every_n_steps == 0):
            self.save(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["data_position"] = self.position
        checkpoint["global_batch"], checkpoint["num_records"] = global_batch(trainer), num_records(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts batches, and the position counts pictures: both go on only with batches of the same size.
        if checkpoint["global_batch"] != global_batch(trainer):
            raise ValueError(
                f"the run had {checkpoint['global_batch']} pictures in a batch over all processes and cannot go on "
                f"with {global_batch(trainer)}: change data.batch_size with the number of devices"
            )
        if checkpoint["num_records"] != num_records(trainer):
            raise ValueError(
                f"the run's data had {checkpoint['num_records']} records and now has {num_records(trainer)}: "
                "restore the data, or begin another run with run="
            )
        self.position = checkpoint["data_position"]
        data_of(trainer).set_position(*self.position)

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self.last_step = trainer.global_step
        bad = [name for name, p in pl_module.named_parameters() if p.requires_grad and not p.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"after step {step} {len(bad)} parameters are not finite, as {bad[0]}; the checkpoints are older"
            )
        trainer.save_checkpoint(self.folder / f"step-{step:08}.ckpt")
        if trainer.is_global_zero:
            for path in list_checkpoints(self.folder)[: -self.config.keep]:
                trainer.strategy.remove_checkpoint(path)


def global_batch(trainer: Trainer) -> int:
    """Pictures in a batch over all processes."""
    return data_of(trainer).config.batch_size * trainer.world_size


def num_records(trainer: Trainer) -> int:
    """Objects that training draws from."""
    train = data_of(trainer).train
    assert train is not None
    return len(train)


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
        trial = folder / f".{os.getpid()}.trial"
        trial.write_bytes(b"x")
        trial.unlink()
    except OSError as error:
        raise OSError(f"the run's folder {folder} cannot be written: {error.strerror or error}") from error


def clear_parts(folder: Path) -> None:
    """Removes the checkpoints of a run whose writing was interrupted."""
    for part in (folder / "checkpoints").glob(".step-*.part"):
        part.unlink()


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises `OSError` unless the disk has room for `num_bytes` of checkpoints."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the checkpoints to keep there need about "
            f"{num_bytes / 1e9:.1f} GB: free some, choose another run=, or keep fewer with checkpoint.keep"
        )
