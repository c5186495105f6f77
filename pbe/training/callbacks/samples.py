"""Pictures of what the model makes of validation examples while it trains."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.data.example import Example, collate
from pbe.images.grids import grid
from pbe.io.atomic import replacing
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.paint_by_example import Condition, PaintByExample, latent_mask
from pbe.sampling import NoiseSchedule, ddim, guided_eps, leading, make_generators, randn


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
    steps = leading(NoiseSchedule.scaled_linear(), config.steps)
    z_0 = ddim(guided_eps(model, condition, config.guidance, steps), x_T, steps)
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
