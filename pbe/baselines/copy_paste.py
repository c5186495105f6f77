"""The exemplar's own pixels in the place of the masked region: likeness without understanding."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pbe.baselines.poisson import poisson_blend
from pbe.baselines.systems import System, Task, WeightFiles
from pbe.images import windows
from pbe.images.windows import Box


@dataclass(frozen=True)
class CopyPaste(System):
    """Pastes the exemplar's cut-out, stretched to the mask's box, into the mask; with `poisson`, seamlessly."""

    poisson: bool = False

    @classmethod
    def load(cls, weights: WeightFiles) -> "CopyPaste":
        return cls()

    @classmethod
    def load_poisson(cls, weights: WeightFiles) -> "CopyPaste":
        return cls(poisson=True)

    def __call__(self, task: Task) -> Image.Image:
        box = windows.mask_bounding_box(task.repaint)
        # apart, since Pillow would blacken what lies beside the object, whose gradients blending reads
        colours, alpha = (stretched(task.cutout[..., part], box) for part in (slice(0, 3), 3))
        alpha = alpha[..., None] / 255 * task.repaint[box.slices][..., None]
        if self.poisson:
            return blend(task, colours, alpha[..., 0] >= 0.5)
        result = task.image.copy()
        pasted = task.image[box.slices] * (1 - alpha) + colours * alpha
        result[box.slices] = np.rint(pasted)
        return Image.fromarray(result)


def stretched(pixels: np.ndarray, box: Box) -> np.ndarray:
    """uint8 pixels (h, w) or (h, w, 3) at the size of a box, in float64."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((box.width, box.height), Image.Resampling.BICUBIC), dtype=np.float64)


def blend(task: Task, colours: np.ndarray, shown: np.ndarray) -> Image.Image:
    """The image with the `shown` pixels of colours in the mask's box cloned in; without any, the image."""
    if not shown.any():
        return Image.fromarray(task.image)
    box = windows.mask_bounding_box(task.repaint)
    height, width = task.size
    # blending looks one pixel beyond the region, where the colours go on as at the box's edge
    around = ((box.y0, height - box.y1), (box.x0, width - box.x1), (0, 0))
    source = np.pad(colours, around, mode="edge")
    region = np.pad(shown, around[:2])
    result = np.where(region[..., None], poisson_blend(task.image, source, region), task.image)
    return Image.fromarray(np.rint(result).clip(0, 255).astype(np.uint8))
