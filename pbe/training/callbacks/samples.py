"""Pictures of what the model makes of validation examples while it trains."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.example import Example, collate
from pbe.editing.edit import sample_latents
from pbe.editing.settings import EditSettings, settings_for
from pbe.images.grids import grid
from pbe.io.atomic import replacing
from pbe.io.fields import Range, check_fields
from pbe.io.suggest import did_you_mean
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.paint_by_example import Distilled, PaintByExample
from pbe.training.distillation import ConsistencyDistillation
from pbe.training.module import PaintByExampleTraining
from pbe.training.task import data_of

# those that say how latents are sampled: a grid has no window, seam or composite
SAMPLING = ("steps", "guidance", "guidance_interval", "sampler", "eta", "spacing", "seed")


@dataclass
class SamplesConfig:
    """Pictures of what the model makes of validation examples."""

    every_n_steps: Annotated[int, Range(1)] | None = 1000
    """Optimiser steps between two grids; None: no grids."""
    count: Annotated[int, Range(1)] = 4
    """How many examples, the first of validation."""
    edit: dict[str, Any] = field(default_factory=lambda: {"seed": 0})
    """How they are edited: the settings of `EditSettings` that say how latents are sampled; where they do not, as the
    model was distilled for, or by the sampler ddim."""

    def __post_init__(self) -> None:
        check_fields(self, "samples")
        for name in self.edit:
            if name not in SAMPLING:
                raise ValueError(f"samples.edit.{name}: a grid has no such setting{did_you_mean(name, SAMPLING)}")
        try:
            self.settings()
        except ValueError as error:
            raise ValueError(f"samples.edit.{error}") from None

    def settings(self, distilled: Distilled | None = None) -> EditSettings:
        """`edit`, checked, for a model."""
        return settings_for(self.edit, distilled, EditSettings(sampler="ddim"))


class SampleGrids(Callback):
    """Writes `step-00001000.png` into `folder`: source | masked | exemplar | result | target of the same examples,
    and the teacher's result beside a student's.

    Where that fails for want of memory or of room on the disk, it warns, and training goes on.
    """

    def __init__(self, folder: Path, config: SamplesConfig):
        self.folder, self.config = folder, config
        self.examples: Example | None = None
        self.beside: dict[str, Tensor] = {}  # a distillation's teacher, which stays as it is

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, self.config.every_n_steps
        if step == self.last_step or every is None or step % every:
            return
        self.last_step = step
        assert isinstance(pl_module, PaintByExampleTraining)
        if trainer.is_global_zero:
            try:
                self.write(trainer, pl_module, step)
            except (OSError, torch.OutOfMemoryError) as error:
                warnings.warn(f"no sample grid of step {step}: {error}", stacklevel=2)
        trainer.strategy.barrier("samples")

    def write(self, trainer: Trainer, module: PaintByExampleTraining, step: int) -> None:
        if self.examples is None:
            self.examples = first_examples(data_of(trainer).val_dataloader(), self.config.count)
        settings = self.config.settings(module.model.config.distilled)
        with module.averaged(), trainer.precision_plugin.forward_context():
            if isinstance(module, ConsistencyDistillation) and not self.beside:
                with module.teaching():
                    taught = sample(module.model, self.examples, module.teacher_settings(settings.seed))
                self.beside = {"teacher": taught}
            picture = sample_grid(module.model, self.examples, settings, self.beside)
        with replacing(self.folder / f"step-{step:08}.png", overwrite=True) as part:
            picture.save(part, "PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", T.pil_to_tensor(picture), step)


def first_examples(loader: Iterable[Example], count: int) -> Example:
    """The first `count` examples that a loader gives, or all if it gives fewer, as one batch."""
    examples = (Example(*one) for batch in loader for one in zip(*batch, strict=True))
    return collate(list(itertools.islice(examples, count)))


@torch.no_grad()
def sample(model: PaintByExample, examples: Example, settings: EditSettings) -> Tensor:
    """The model's own pictures (B, 3, H, W) in [-1, 1] of examples on any device, before any compositing."""
    source, mask, exemplar = (x.to(model.device) for x in (examples.source, examples.mask, examples.exemplar))
    condition = model.condition(source, mask, exemplar)
    condition = condition._replace(z_masked=condition.z_masked.float())  # whatever autocast chose
    z_0 = sample_latents(model, condition, settings, range(settings.seed, settings.seed + len(source)))
    H, W = source.shape[-2:]
    return model.vae.decode(z_0)[..., :H, :W]


def sample_grid(
    model: PaintByExample, examples: Example, settings: EditSettings, beside: Mapping[str, Tensor] | None = None
) -> Image.Image:
    """A row for each example: source | masked | exemplar | result | what is `beside` it, as the result | target."""
    mean, std = (examples.exemplar.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    pictures = {"result": sample(model, examples, settings), **(beside or {}), "target": examples.image}
    columns = {
        "source": examples.source / 2 + 0.5,
        "masked": examples.masked_image / 2 + 0.5,
        "exemplar": examples.exemplar * std + mean,
        **{name: x / 2 + 0.5 for name, x in pictures.items()},
    }
    height = max(128, min(examples.source.shape[-2], 320))
    rows = [[to_picture(one) for one in row] for row in zip(*columns.values(), strict=True)]
    return grid(rows, column_labels=list(columns), cell_height=height)


def to_picture(image: Tensor) -> Image.Image:
    """A PIL picture of (3, H, W) values in [0, 1]."""
    return T.to_pil_image(image.float().clamp(0, 1).mul(255).round().byte().cpu())
