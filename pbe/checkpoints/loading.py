"""From a file to a model: recognise, infer sizes, build on the meta device, fill tensor by tensor."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pbe.checkpoints import infer_config as sizes
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError, open_checkpoint
from pbe.checkpoints.key_map import Recipe, Table, UnlistedNames, shorten
from pbe.checkpoints.layouts import LAYOUTS, Layout, recognise, table_of
from pbe.checkpoints.meta_device import build_on_meta
from pbe.models.adm import ADM
from pbe.models.clip import CLIP
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MODELS: Mapping[str, tuple[type[nn.Module], Callable]] = {
    "paint-by-example": (PaintByExample, sizes.paint_by_example_config),
    "diffusers-paint-by-example": (PaintByExample, sizes.paint_by_example_config),
    "stable-diffusion": (StableDiffusion, sizes.stable_diffusion_config),
    "diffusers-stable-diffusion": (StableDiffusion, sizes.stable_diffusion_config),
    "openai-clip": (CLIP, sizes.clip_config),
    "hf-clip": (CLIP, sizes.clip_config),
    "guided-diffusion": (ADM, sizes.adm_config),
}


def load_model(
    path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> PaintByExample | StableDiffusion | CLIP | ADM:
    """The model that a checkpoint holds, in evaluation mode.

    `path` is a file or folder in any layout that `pbe.checkpoints.layouts` lists: the class follows from it; or "demo",
    the small Paint by Example that is part of this package.
    `device` "auto" is CUDA, else MPS, else the CPU. `dtype` "auto" is what edits fast there (`choose_dtype`): to train
    the model, or to save it, ask for "float32". "stored" leaves each tensor as it is in the file, whose layers may
    differ, for `prepare_for_inference` to convert.

    What is not converted is memory-mapped on the CPU, not read: keep the file where it is while the model is in use.
    Otherwise tensors are converted one by one, so that the file's contents never stand in memory beside the model.

    Raises `FileNotFoundError`, or `CheckpointError` where the file is none of these, is damaged, or does not fit.
    """
    device = choose_device(device)
    dtype = None if dtype == "stored" else choose_dtype(dtype, device)
    source = open_source(path)
    warn_of_averages(source)
    model = build(source)
    state = {name: source.tensor(name, device, dtype) for name in source.recipes}
    model.load_state_dict(state, assign=True)
    return model.eval()


def warn_of_averages(source: "Source") -> None:
    """Says of a file that training wrote that its averages, which validation and sample grids showed, are not used."""
    entry = source.checkpoint.extras.get("pbe")
    written_by_training = isinstance(entry, dict) and "config" in entry
    if written_by_training and any(name.startswith("model_ema.") for name in source.checkpoint.names()):
        warnings.warn(
            f"{source.checkpoint.path}: its averaged weights are not used; "
            "`tools/checkpoint.py extract-ema` puts them in the parameters' place",
            stacklevel=3,
        )


def build(source: "Source") -> nn.Module:
    """The model that a checkpoint fits, on the meta device; `CheckpointError` where its tensors do not fit together."""
    model_class, infer = MODELS[source.layout.name]
    try:
        model = build_on_meta(model_class, infer(source.shapes, source.hints))
    except CheckpointError:
        raise
    except (ValueError, IndexError, ZeroDivisionError) as error:  # shapes of too few or of no numbers
        likeness = f"{source.checkpoint.path} looks like {source.layout.description}"
        raise CheckpointError(f"{likeness}, but its sizes make no such model: {error}") from error
    check_names_and_shapes(source, {name: tuple(p.shape) for name, p in model.state_dict().items()})
    return model


class Source(NamedTuple):
    """A checkpoint seen under our names."""

    checkpoint: Checkpoint
    layout: Layout
    table: Table
    recipes: dict[str, Recipe]
    shapes: sizes.Shapes
    hints: sizes.Hints

    def tensor(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor under our name; what was read of the file to convert it is given back to the system."""
        recipe = self.recipes[name]
        mapped = recipe.build(*(self.checkpoint.tensor(source) for source in recipe.sources))
        tensor = mapped.to(device=device, dtype=dtype).contiguous()
        if tensor.data_ptr() != mapped.data_ptr():
            self.release(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype in the file, under our name."""
        return self.checkpoint.dtype(self.recipes[name].sources[0])

    def release(self, name: str) -> None:
        """Gives what was read of one tensor, under our name, back to the system."""
        for source in self.recipes[name].sources:
            self.checkpoint.release(source)


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint of any known layout under our names; raises as `load_model` does."""
    return view(open_checkpoint(path))


def view(checkpoint: Checkpoint) -> Source:
    """A checkpoint under our names; `CheckpointError` if it is of no known layout."""
    path, names = checkpoint.path, list(checkpoint.names())
    layout = recognise(names)
    entry = checkpoint.extras.get("pbe")
    if isinstance(entry, dict) and "lora" in entry:
        raise CheckpointError(
            f"{path} holds adapters alone; `pbe checkpoint merge-lora` makes them part of a checkpoint"
        )
    if layout is None:
        if any(name.startswith("model_ema.") for name in names):
            raise CheckpointError(f"{path} holds averaged copies without the parameters they stand for")
        known = "; ".join(layout.description for layout in LAYOUTS)
        raise CheckpointError(
            f"{path} is a {checkpoint.kind} of {len(names)} tensors ({shorten(names, 4)}), "
            f"which fits no known model: {known}"
        )
    table = table_of(layout, names)
    try:
        recipes = table.to_ours(names)
    except UnlistedNames as error:
        raise CheckpointError(f"{path} looks like {layout.description}, but has {error}") from None
    missing = [s for recipe in recipes.values() for s in recipe.sources if s not in checkpoint.tensors]
    if missing:
        raise CheckpointError(f"{path} looks like {layout.description}, but lacks {shorten(missing)}")
    shapes = sizes.Shapes(
        path, {n: recipe.shape(*map(checkpoint.shape, recipe.sources)) for n, recipe in recipes.items()}
    )
    return Source(checkpoint, layout, table, recipes, shapes, hints_of(checkpoint))


def hints_of(checkpoint: Checkpoint) -> sizes.Hints:
    entry = checkpoint.extras.get("pbe")
    if isinstance(entry, dict):
        try:
            return sizes.Hints.from_entry(entry)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.path}: its entry 'pbe' says {error}") from None
    configs = checkpoint.extras.get("configs", {})
    whole = configs.get("", {})
    towers = {"vision_config": whole.get("vision_config", {}), "text_config": whole.get("text_config", {})}
    for name, tower in {**configs, **towers}.items():
        if tower.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise CheckpointError(
                f"{checkpoint.path}: {name} was trained with {tower['hidden_act']!r}, and only 'quick_gelu' is known"
            )
    try:
        return sizes.Hints.from_diffusers(configs)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: its config.json says {error}") from None


def check_names_and_shapes(source: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one error that lists every missing, unexpected and mis-shaped tensor, and those that are no weights."""
    missing = [name for name in expected if name not in source.shapes]
    unexpected = [name for name in source.shapes if name not in expected]
    misshaped = [
        f"{name} {source.shapes[name]} for {shape}"
        for name, shape in expected.items()
        if name in source.shapes and source.shapes[name] != shape
    ]
    no_weights = [
        f"{name} ({source.dtype(name)})"
        for name in expected
        if name in source.shapes and not source.dtype(name).is_floating_point
    ]
    faults = (
        ("lacks", missing),
        ("has no place for", unexpected),
        ("has the wrong shape in", misshaped),
        ("has other numbers than floats in", no_weights),
    )
    if any(names for _, names in faults):
        text = "; ".join(f"{verb} {len(names)}: {shorten(names)}" for verb, names in faults if names)
        raise CheckpointError(f"{source.checkpoint.path} looks like {source.layout.description}, but {text}")


def choose_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" is CUDA where there is one, else MPS, else the CPU. `ValueError` if it is not there."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device == "auto":
        return torch.device(next(name for name, count in counts.items() if count))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not a device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps', …") from None
    if (chosen.index or 0) >= counts.get(chosen.type, 1):
        raise ValueError(f"device={str(device)!r} is not there: torch sees {counts[chosen.type]} of type {chosen.type}")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A precision by name; "auto" is float16 on CUDA, bfloat16 on a CPU that computes in it, else float32."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
        return dtype
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and has_native_bfloat16() else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: elsewhere every product converts it, and float32 is faster.

    False where torch does not tell, as older releases do not, or computes without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.cpu, "get_capabilities")):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's
