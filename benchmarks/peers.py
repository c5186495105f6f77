"""diffusers' classes, wherever its releases keep them."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def paint_by_example() -> ModuleType:
    """diffusers' package of the pipeline, which later releases moved."""
    old, new = "diffusers.pipelines.paint_by_example", "diffusers.pipelines.deprecated.paint_by_example"
    return import_module(old if find_spec(old) else new)


def network_classes() -> dict[str, Any]:
    """The classes of the networks in a diffusers folder, by the folder of each."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    encoder = import_module(f"{paint_by_example().__name__}.image_encoder").PaintByExampleImageEncoder
    return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "image_encoder": encoder}


def load_pipeline(folder: str, dtype: Any) -> Any:
    """The pipeline of a diffusers folder."""
    import diffusers

    # where the package moved, diffusers does not find the name that model_index.json gives its encoder
    setattr(diffusers.pipelines, "paint_by_example", paint_by_example())  # noqa: B010
    return diffusers.PaintByExamplePipeline.from_pretrained(folder, torch_dtype=dtype)
