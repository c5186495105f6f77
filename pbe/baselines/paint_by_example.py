"""Paint by Example as the paper's evaluation ran it: the whole frame, PLMS, 50 steps, guidance 5."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pbe.acceleration import prepare_for_inference
from pbe.baselines.systems import System, Task, WeightFiles
from pbe.checkpoints.formats.opening import is_exported
from pbe.editing.edit import edit
from pbe.editing.loading import load_editor
from pbe.editing.settings import EditSettings, settings_for
from pbe.models.paint_by_example import PaintByExample

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class PaintByExampleSystem(System):
    """Paints the exemplar's object with this library's own `edit`, without putting the image's pixels back."""

    model: PaintByExample
    settings: EditSettings = EditSettings(window="full", composite=False)

    @classmethod
    def load(cls, weights: WeightFiles) -> PaintByExampleSystem:
        """Raises as `WeightFiles.load` does."""
        path = Path(weights.path("paint_by_example"))
        if is_exported(path):
            model = load_editor(path, weights.device, weights.dtype, adapters=weights.adapters)
        else:  # once, and not for each task
            model = prepare_for_inference(weights.load("paint_by_example", PaintByExample), consume=True)
        return cls(model, settings_for({}, model.config.distilled, cls.settings))

    def with_settings(self, **settings: Any) -> Self:
        return replace(self, settings=replace(self.settings, **settings))

    def __call__(self, task: Task) -> Image.Image:
        settings = asdict(self.settings) | {"seed": task.seed}
        (picture,) = edit(self.model, Image.fromarray(task.image), task.repaint, task.exemplar, **settings)
        assert isinstance(picture, Image.Image)  # as the image that was given
        return picture
