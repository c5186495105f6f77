"""Paint by Example: repaint the masked part of a photo as the object of an exemplar picture (arXiv 2211.13227).

import pbe
model = pbe.load_model("model.ckpt")
pictures = pbe.edit(model, "photo.png", "mask.png", "exemplar.png", num_images=4)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pbe.acceleration import prepare_for_inference
    from pbe.checkpoints.adapters import add_adapters, remove_adapters
    from pbe.checkpoints.loading import load_model
    from pbe.editing.edit import edit
    from pbe.editing.regions import Region, edit_regions
    from pbe.editing.settings import EditSettings
    from pbe.images.grabcut import select_object
    from pbe.models.paint_by_example import PaintByExample

__version__ = "0.1.0"
__all__ = [
    "EditSettings",
    "PaintByExample",
    "Region",
    "__version__",
    "add_adapters",
    "edit",
    "edit_regions",
    "load_model",
    "prepare_for_inference",
    "remove_adapters",
    "select_object",
]

# Imported on first use: torch takes seconds, and `pbe --help` needs none of it.
_HOMES = {
    "EditSettings": "pbe.editing.settings",
    "PaintByExample": "pbe.models.paint_by_example",
    "Region": "pbe.editing.regions",
    "add_adapters": "pbe.checkpoints.adapters",
    "edit": "pbe.editing.edit",
    "edit_regions": "pbe.editing.regions",
    "load_model": "pbe.checkpoints.loading",
    "prepare_for_inference": "pbe.acceleration",
    "remove_adapters": "pbe.checkpoints.adapters",
    "select_object": "pbe.images.grabcut",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pbe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
