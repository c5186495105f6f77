"""What ComfyUI gives to nodes that run in it: model folders, a device and a precision, progress and interruption.

Elsewhere, as in tests, there is the demo model, the library's own choice of a device, and no progress.
"""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import torch
from PIL import Image

from pbe.checkpoints.formats.opening import EXPORT_JSON
from pbe.editing.preview import Preview
from pbe.sampling import StepInfo

folder_paths: Any = None
model_management: Any = None
ProgressBar: Any = None
with suppress(ImportError):
    folder_paths, model_management = import_module("folder_paths"), import_module("comfy.model_management")
    ProgressBar = import_module("comfy.utils").ProgressBar

MODELS, ADAPTERS = "pbe", "loras"  # ComfyUI's names of its folders
FOLDERS = ("model_index.json", EXPORT_JSON)  # a folder with one of these is a model: diffusers', or exported networks
PREVIEW_SIDE = 512  # pixels to which ComfyUI enlarges a preview

if folder_paths is not None:
    folder_paths.add_model_folder_path(MODELS, os.path.join(folder_paths.models_dir, MODELS))


def models() -> list[str]:
    """The models to choose from: "demo", and files and folders in ComfyUI's folders for them."""
    names = [] if folder_paths is None else [PurePath(name) for name in folder_paths.get_filename_list(MODELS)]
    folders = {name.parent for name in names if name.name in FOLDERS and name.parent.name}
    loose = [name for name in names if folders.isdisjoint(name.parents)]
    files = [name for name in loose if name.suffix.lower() in folder_paths.supported_pt_extensions]
    return ["demo", *sorted(map(str, [*folders, *files]))]


def adapters() -> list[str]:
    """The files of adapters to choose from, in ComfyUI's folders for LoRAs."""
    return [] if folder_paths is None else folder_paths.get_filename_list(ADAPTERS)


def find(folder: str, name: str) -> Path:
    """Where one of `models()` or `adapters()` is; FileNotFoundError where it no longer is."""
    if folder_paths is None or (folder, name) == (MODELS, "demo"):
        return Path(name)
    roots = folder_paths.get_folder_paths(folder)
    for path in (Path(root, name) for root in roots):
        if path.exists():
            return path
    raise FileNotFoundError(f"there is no {name} in {' or '.join(roots)}")


def device_and_dtype(dtype: str) -> tuple[str | torch.device, str]:
    """Where models are to be, and for the precision "auto" the one that ComfyUI would take there."""
    if model_management is None:
        return "auto", dtype
    device = model_management.get_torch_device()
    if dtype == "auto":
        wide = "bfloat16" if model_management.should_use_bf16(device) else "float32"
        dtype = "float16" if model_management.should_use_fp16(device) else wide
    return device, dtype


def make_room(size: int = 0) -> None:
    """Lets ComfyUI move its own models off the device until there is room for so many bytes, and to compute."""
    if model_management is not None:
        needed = size + model_management.minimum_inference_memory()
        model_management.free_memory(needed, model_management.get_torch_device())


def progress(number: int) -> Preview | None:
    """What `number` edits, one after the other, call after each step: it shows how far they are, and raises what
    ComfyUI raises where it is interrupted."""
    if ProgressBar is None:
        return None
    bar, done, total = ProgressBar(number), 0, 0

    def tell(pictures: list[Image.Image], step: StepInfo) -> None:
        nonlocal done, total
        model_management.throw_exception_if_processing_interrupted()
        done += 1
        # each region that is edited by itself has as many steps again
        total = max(total, step.steps * number, done + step.steps - step.index - 1)
        bar.update_absolute(done, total, ("JPEG", pictures[0], PREVIEW_SIDE))

    return tell
