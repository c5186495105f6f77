"""Pictures of what the model makes of validation examples while it trains."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningModule
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from pbe.batch.job import RENAMED, Inputs, Job, read_inputs
from pbe.data.example import GRAY, Example, collate
from pbe.editing.edit import sample_latents
from pbe.editing.settings import EditSettings, settings_for
from pbe.editing.window import crop_window, place_window
from pbe.images.grids import grid
from pbe.images.reading import exemplar_tensor, shown_tensor
from pbe.images.windows import model_size
from pbe.io.atomic import replacing
from pbe.io.fields import Range, check_fields
from pbe.io.rows import read_rows
from pbe.io.suggest import did_you_mean
from pbe.models.clip import CLIP_MEAN, CLIP_STD
from pbe.models.collage import collages
from pbe.models.paint_by_example import Distilled, PaintByExample
from pbe.training.callbacks.loggers import log_picture
from pbe.training.distillation import ConsistencyDistillation
from pbe.training.module import PaintByExampleTraining
from pbe.training.task import data_of

# those that say how latents are sampled: a grid has no window, seam or composite
SAMPLING = ("steps", "guidance", "guidance_interval", "sampler", "eta", "spacing", "seed")

# of a batch file: what is edited, where and as what
COLUMNS = ("image", "mask", "box", "polygon", "select", "exemplar", "exemplar_mask", "exemplar_select")


@dataclass
class SamplesConfig:
    """Pictures of what the model makes of validation examples, and of edits of one's own."""

    every_n_steps: Annotated[int, Range(1)] | None = 1000
    """Optimiser steps between two grids; None: no grids."""
    count: Annotated[int, Range(1)] = 4
    """How many examples, the first of validation."""
    edits: str | None = None
    """A CSV or JSONL file of photos, masks and exemplars with the columns of `pbe edit --batch`, which get grids of
    their own; what else it has is not used. None: no such grids."""
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
    and the teacher's result beside a student's; and `edits-00001000.png`, the same without a target of one's own edits,
    whose windows are shown as the model sees them.

    Raises as `read_edits` for those. Where drawing fails for want of memory or of room on the disk, it warns, and
    training goes on.
    """

    def __init__(self, folder: Path, config: SamplesConfig):
        self.folder, self.config = folder, config
        self.edits = read_edits(Path(config.edits)) if config.edits else []
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
        data = data_of(trainer)
        if self.examples is None and data.val is not None:
            self.examples = first_examples(data.val_dataloader(), self.config.count)
        settings = self.config.settings(module.model.config.distilled)
        with module.averaged(), trainer.precision_plugin.forward_context():
            if isinstance(module, ConsistencyDistillation) and not self.beside and self.examples:
                with module.teaching():
                    taught = sample(module.model, self.examples, module.teacher_settings(settings.seed))
                self.beside = {"teacher": taught}
            grids = {}
            if self.examples:
                grids["step", "samples"] = sample_grid(module.model, self.examples, settings, self.beside)
            if self.edits:
                grids["edits", "edits"] = edits_grid(module.model, self.edits, settings)
        for (file, name), picture in grids.items():
            with replacing(self.folder / f"{file}-{step:08}.png", overwrite=True) as part:
                picture.save(part, "PNG")
            log_picture(trainer, name, picture)


def first_examples(loader: Iterable[Example], count: int) -> Example:
    """The first `count` examples that a loader gives, or fewer if the rest have other shapes, as one batch."""
    examples = (Example(*one) for batch in loader for one in zip(*batch, strict=True))
    first = next(examples)
    alike = itertools.takewhile(lambda one: one.image.shape == first.image.shape, examples)
    return collate([first, *itertools.islice(alike, count - 1)])


@torch.no_grad()
def sample(model: PaintByExample, examples: Example, settings: EditSettings) -> Tensor:
    """The model's own pictures (B, 3, H, W) in [-1, 1] of examples on any device, before any compositing."""
    source, mask, exemplar = (x.to(model.device) for x in (examples.source, examples.mask, examples.exemplar))
    hole = examples.hole.to(model.device) if model.config.collage else None
    condition = model.condition(source, mask, exemplar, hole=hole)
    condition = condition._replace(z_masked=condition.z_masked.float())  # whatever autocast chose
    z_0 = sample_latents(model, condition, settings, range(settings.seed, settings.seed + len(source)))
    H, W = source.shape[-2:]
    return model.vae.decode(z_0)[..., :H, :W]


def sample_grid(
    model: PaintByExample, examples: Example, settings: EditSettings, beside: Mapping[str, Tensor] | None = None
) -> Image.Image:
    """A row for each example: source | masked | exemplar | result | what is `beside` it, as the result | target."""
    columns = sample_columns(examples, {"result": sample(model, examples, settings), **(beside or {})})
    columns["target"] = examples.image / 2 + 0.5
    return grid(to_rows(columns), column_labels=list(columns), cell_height=cell_height(examples))


def edits_grid(model: PaintByExample, edits: Sequence[Inputs], settings: EditSettings) -> Image.Image:
    """A row for each of one's own edits: source | masked | exemplar | result."""
    rows = []
    for edit in edits:
        example = edit_example(edit, model)
        columns = sample_columns(example, {"result": sample(model, example, settings)})
        rows += to_rows(columns)
    return grid(rows, column_labels=list(columns), cell_height=cell_height(example))


def sample_columns(examples: Example, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Examples and pictures (B, 3, H, W) made of them, in [0, 1], by column."""
    mean, std = (examples.exemplar.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return {
        "source": examples.source / 2 + 0.5,
        "masked": examples.masked_image / 2 + 0.5,
        "exemplar": examples.exemplar * std + mean,
        **{name: x / 2 + 0.5 for name, x in results.items()},
    }


def to_rows(columns: Mapping[str, Tensor]) -> list[list[Image.Image]]:
    return [[to_picture(one) for one in row] for row in zip(*columns.values(), strict=True)]


def cell_height(examples: Example) -> int:
    return max(128, min(examples.source.shape[-2], 320))


def read_edits(path: Path) -> list[Inputs]:
    """The pictures of a batch file's rows. ValueError naming the file, and the line of a row that cannot be used."""
    edits = []
    for line, row in read_rows(path, COLUMNS, renamed=RENAMED, ignore_others=True, allow_short=True):
        try:
            if isinstance(row, ValueError):
                raise row
            edits.append(inputs := read_inputs(Job.from_row({**row, "out": f"{line}.png"}, path.parent)))
            if len(inputs.exemplars) > 1:
                raise ValueError(f"a sample has one exemplar, got {len(inputs.exemplars)}")
        except (ValueError, OSError) as error:
            raise ValueError(f"samples.edits={path}, line {line}: {error}") from None
    if not edits:
        raise ValueError(f"samples.edits={path} has no rows")
    return edits


def edit_example(edit: Inputs, model: PaintByExample) -> Example:
    """The window of one edit as a batch of one, as `pbe edit` places it by default."""
    size, settings, repaint = model.config, EditSettings(), edit.canvas.repaint
    box = place_window(repaint, settings.window, settings.margin, size.resolution)
    shape = model_size(box, size.resolution, multiple=size.vae.downsampling)
    source, mask = crop_window([edit.picture], repaint, box, shape)
    (picture,) = edit.exemplars
    exemplar = exemplar_tensor(picture, size.exemplar.vision.image_size)
    hole = GRAY[None]
    if size.collage:
        shown = shown_tensor(picture, size.exemplar.vision.image_size)
        hole = collages(source, mask, exemplar, [picture.height / picture.width], shown)
    return Example(source, source, mask, exemplar, torch.zeros(1, dtype=torch.long), [""], hole=hole)


def to_picture(image: Tensor) -> Image.Image:
    """A PIL picture of (3, H, W) values in [0, 1]."""
    return T.to_pil_image(image.float().clamp(0, 1).mul(255).round().byte().cpu())
