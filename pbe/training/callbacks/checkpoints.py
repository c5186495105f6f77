"""The checkpoints of a training run, and the folder they lie in."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from pbe.io.atomic import replacing

CHECKPOINT_NAME = re.compile(r"step-(\d+)\.ckpt")


@dataclass
class CheckpointConfig:
    """How often checkpoints are written, in optimiser steps, and how many of the last are kept."""

    every_n_steps: int = 1000
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {getattr(self, name)}")


class Checkpoints(Checkpoint):
    """Writes `step-00001000.ckpt` into `folder`, one more at the end, and removes those before the last `keep`.

    They also hold how much of the epoch's data was consumed, from where the data module continues.

    Raises `FloatingPointError` in place of writing parameters that are not finite.
    """

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.position = (0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fast_dev_run:  # which leaves nothing behind
            return
        global_batch = trainer.datamodule.config.batch_size * trainer.world_size
        self.position = (trainer.current_epoch, (batch_idx + 1) * global_batch)
        step = trainer.global_step
        # The end is saved here too: later, Lightning counts an epoch that max_steps cut short as a whole one, from
        # where a longer run could not continue.
        ends = step == trainer.max_steps or trainer.should_stop
        ends |= trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if step != self.last_step and (ends or step % self.config.every_n_steps == 0):
            self.save(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["data_position"] = self.position
        checkpoint["global_batch"] = trainer.datamodule.config.batch_size * trainer.world_size
        checkpoint["num_records"] = len(trainer.datamodule.train)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Lightning counts batches, and the position counts pictures: both go on only with batches of the same size.
        global_batch = trainer.datamodule.config.batch_size * trainer.world_size
        if checkpoint["global_batch"] != global_batch:
            raise ValueError(
                f"the run had {checkpoint['global_batch']} pictures in a batch over all processes and cannot go on "
                f"with {global_batch}: change data.batch_size with the number of devices"
            )
        num_records = len(trainer.datamodule.train)
        if checkpoint["num_records"] != num_records:
            raise ValueError(
                f"the run's data had {checkpoint['num_records']} records and now has {num_records}: "
                "it cannot go on among others where it was"
            )
        self.position = checkpoint["data_position"]
        trainer.datamodule.set_position(*self.position)

    def save(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
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


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that training wrote, from the first step to the last."""
    found = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in folder.glob("step-*.ckpt")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def step_of(checkpoint: Path) -> int:
    """The number of optimiser steps after which a checkpoint was written, from its name."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


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
