"""What happens beside the training steps: metrics, sample grids, checkpoints."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.example import Example, collate
from pbe.files import replacing
from pbe.grids import grid
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.paint_by_example import Condition, PaintByExample, latent_mask
from pbe.sampling import NoiseSchedule, ddim, guided_eps, make_generators, randn

# ----------------------------------------------------------------------------------------------------------------------
# Metrics


class TrainingMetrics(Callback):
    """Logs, every `trainer.log_every_n_steps` optimiser steps, means over the samples of all processes since last time.

    What is averaged are the 1-D tensors in `metrics` of a training step's result, a value a sample, NaN where a sample
    has none. Beside them: the learning rate, pictures per second outside of validation, the highest memory use in GiB
    (the device's on CUDA, else the process's), and how many pictures could not be used so far.

    What was summed since the last line is in the checkpoints: a resumed run logs what an uninterrupted one does.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # (2,) each: sum and count, on the device until they are logged
        self.seconds = 0.0  # before this process began
        self.since = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.last_step = trainer.global_step
        self.since = time.monotonic() - self.seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, values in outputs["metrics"].items():
            counted = ~values.isnan()
            total = torch.stack([values.nansum(), counted.sum()]).float()
            self.totals[name] = self.totals[name].to(total.device) + total if name in self.totals else total
        step = trainer.global_step
        if step == self.last_step or step % trainer.log_every_n_steps:
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
        totals = torch.stack(list(self.totals.values()))
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        return dict(zip(self.totals, totals.tolist(), strict=True))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["metrics"] = {"totals": self.reduced(trainer), "seconds": time.monotonic() - self.since}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.seconds = checkpoint["metrics"]["seconds"]
        # Sums over all processes go on in the first one alone.
        own = 1.0 if trainer.is_global_zero else 0.0
        totals = checkpoint["metrics"]["totals"].items()
        self.totals = {name: torch.tensor(total) * own for name, total in totals}

    def on_validation_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.since += time.monotonic() - self.paused


def skipped_pictures(trainer: Trainer) -> dict[str, float]:
    """How many pictures could not be used so far, over all processes, by split and reason; none: nothing."""
    skipped = trainer.datamodule.skipped
    counts = torch.tensor([n for reasons in skipped.values() for n in reasons.values()], dtype=torch.float64)
    if trainer.world_size > 1:
        counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
    names = [f"data/skipped_{split}_{reason.replace(' ', '_')}" for split, of in skipped.items() for reason in of]
    return {name: n for name, n in zip(names, counts.tolist(), strict=True) if n}


def peak_memory(device: torch.device) -> float:
    """The highest use of memory so far in GiB: of the CUDA device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class JSONLinesLogger(Logger):
    """Appends metrics to a file, one JSON object a line, with `step`.

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
            file.write(json.dumps({"step": int(step), **metrics}) + "\n")

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Nothing: the run's settings lie beside the file."""


# ----------------------------------------------------------------------------------------------------------------------
# Sample grids


@dataclass
class SamplesConfig:
    """Pictures of what the model makes of validation examples, every `every_n_steps` (None: never)."""

    every_n_steps: int | None = 1000
    count: int = 4
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"samples.every_n_steps must be at least 1, or null for none, got {self.every_n_steps}")
        if self.count < 1:
            raise ValueError(f"samples.count must be at least 1, got {self.count}")
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"samples.steps must be 1 to 1000, got {self.steps}")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"samples.guidance must be finite and at least 0, got {self.guidance}")


class SampleGrids(Callback):
    """Writes `step-00001000.png` into `folder`: source | masked | exemplar | result | target of the same examples.

    Where that fails for want of memory or of room on the disk, it warns, and training goes on.
    """

    def __init__(self, folder: Path, config: SamplesConfig):
        self.folder, self.config = folder, config
        self.examples: Example | None = None

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.config.every_n_steps
        if step == self.last_step or every is None or step % every:
            return
        self.last_step = step
        if trainer.is_global_zero:
            try:
                self.write(trainer, pl_module, step)
            except (OSError, torch.OutOfMemoryError) as error:
                warnings.warn(f"no sample grid of step {step}: {error}", stacklevel=2)
        trainer.strategy.barrier("samples")

    def write(self, trainer: Trainer, pl_module: lightning.LightningModule, step: int) -> None:
        if self.examples is None:
            self.examples = first_examples(trainer.datamodule.val_dataloader(), self.config.count)
        with pl_module.averaged(), trainer.precision_plugin.forward_context():
            picture = sample_grid(pl_module.model, self.examples, self.config)
        with replacing(self.folder / f"step-{step:08}.png", overwrite=True) as part:
            picture.save(part, "PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", T.pil_to_tensor(picture), step)


def first_examples(loader: Iterable[Example], count: int) -> Example:
    """The first `count` examples that a loader gives, or as many as it has, as one batch."""
    examples = (Example(*one) for batch in loader for one in zip(*batch, strict=True))
    return collate(list(itertools.islice(examples, count)))


@torch.no_grad()
def sample_grid(model: PaintByExample, examples: Example, config: SamplesConfig) -> Image.Image:
    """A row for each example (on any device): source | masked | exemplar | result | target. The result is the model's
    own picture, before any compositing."""
    masked_image, mask, exemplar = (
        x.to(model.device) for x in (examples.masked_image, examples.mask, examples.exemplar)
    )
    condition = Condition(
        z_masked=model.vae.encode(masked_image).mean.float(),
        mask=latent_mask(mask, model.config.vae.downsampling),
        context=model.encode_exemplar(exemplar),
    )
    generators = make_generators(config.seed, len(masked_image))
    x_T = randn(condition.z_masked.shape[1:], generators, model.device)
    eps = guided_eps(model, condition, config.guidance)
    z_0 = ddim(eps, x_T, NoiseSchedule.scaled_linear(), config.steps)
    H, W = masked_image.shape[-2:]
    result = model.vae.decode(z_0)[..., :H, :W]
    mean, std = (exemplar.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    columns = {
        "source": examples.source / 2 + 0.5,
        "masked": masked_image / 2 + 0.5,
        "exemplar": exemplar * std + mean,
        "result": result / 2 + 0.5,
        "target": examples.image / 2 + 0.5,
    }
    rows = [[to_picture(one) for one in row] for row in zip(*columns.values(), strict=True)]
    return grid(rows, column_labels=list(columns), cell_height=max(128, min(H, 320)))


def to_picture(image: Tensor) -> Image.Image:
    """A PIL picture of (3, H, W) values in [0, 1]."""
    return T.to_pil_image(image.float().clamp(0, 1).mul(255).round().byte().cpu())


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

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
