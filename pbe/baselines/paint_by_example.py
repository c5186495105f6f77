"""Paint by Example as the paper's benchmark ran it: the whole frame, PLMS, 50 steps, guidance 5."""

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from pbe.acceleration import prepare_for_inference
from pbe.baselines.systems import Edit, Weights
from pbe.checkpoints.loading import load_model
from pbe.editing.edit import edit as edit_picture
from pbe.models.paint_by_example import PaintByExample


@dataclass(frozen=True, eq=False)
class PaintByExampleSystem:
    """Paints the exemplar's object with this library's own `edit`, without putting the photo's pixels back."""

    model: PaintByExample
    steps: int = 50
    guidance: float = 5.0
    guidance_interval: list[int] | None = None
    sampler: str = "plms"
    spacing: Literal["leading", "trailing"] = "leading"
    resolution: int | None = None

    @classmethod
    def load(cls, weights: Weights) -> "PaintByExampleSystem":
        """Raises as `load_model` does, and ValueError where the file is not given or is of another kind."""
        model = load_model(weights.path("paint_by_example"), weights.device, weights.dtype)
        if not isinstance(model, PaintByExample):
            raise ValueError(f"{weights.paint_by_example} holds a {type(model).__name__}, not a Paint by Example")
        return cls(prepare_for_inference(model, consume=True))  # once, and not for each edit

    def __call__(self, edit: Edit) -> Image.Image:
        (picture,) = edit_picture(
            self.model,
            Image.fromarray(edit.photo),
            edit.repaint,
            edit.exemplar,
            steps=self.steps,
            guidance=self.guidance,
            guidance_interval=self.guidance_interval and tuple(self.guidance_interval),
            sampler=self.sampler,
            spacing=self.spacing,
            seed=edit.seed,
            window="full",
            composite=False,
            resolution=self.resolution,
        )
        return picture
