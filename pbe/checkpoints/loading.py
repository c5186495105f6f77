"""From a file to a model: recognise, infer sizes, build on the meta device, fill tensor by tensor."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pbe.checkpoints.adapters import AdapterLike, add_adapters, holds_adapters
from pbe.checkpoints.formats.lazy_tensors import converted
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError, open_checkpoint
from pbe.checkpoints.infer_config import Hints, Shapes
from pbe.checkpoints.key_map import KeyMap, TensorMapping, mismatches, shorten
from pbe.checkpoints.layouts import LAYOUTS, Layout, Model, find_layout
from pbe.checkpoints.meta_device import build_on_meta
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.tiny_autoencoder import TinyAutoencoder, TinyDecoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    adapters: Sequence[AdapterLike] = (),
    tiny_decoder: str | Path | None = None,
) -> Model:
    """The model that a checkpoint holds, in evaluation mode.

    `path` is a file or folder in any layout that `pbe.checkpoints.layouts` lists: the class follows from it; or "demo",
    the small Paint by Example that is part of this package.
    `device` "auto" is CUDA, else MPS, else the CPU. `dtype` "auto" is what edits fast there (`choose_dtype`): to train
    the model, or to save it, ask for "float32". "stored" leaves each tensor as it is in the file, whose layers may
    differ, for `prepare_for_inference` to convert. `adapters` are files of them, or pairs of a file and its strength
    (`pbe.add_adapters`). `tiny_decoder` is a file or folder with TAESD's decoder, for a Paint by Example's drafts and
    previews, in the place of its own if it has one.

    What is not converted is memory-mapped on the CPU, not read: keep the file where it is while the model is in use.
    Otherwise tensors are converted one by one, so that the file's contents never stand in memory beside the model.

    Raises `FileNotFoundError`, or `CheckpointError` where the file has no known layout, is damaged, does not fit, or
    overflows float16;
    `ValueError` for an unknown device or precision, and for a tiny decoder of other latents or another kind of model.
    """
    device = choose_device(device)
    converted = None if dtype == "stored" else choose_dtype(dtype, device)
    checkpoint = open_recognised(path)
    warn_of_averages(checkpoint.file)
    model = build(checkpoint)
    state = {name: checkpoint.tensor(name, device, converted) for name in checkpoint.mappings}
    model.load_state_dict(state, assign=True)
    if adapters:
        if not isinstance(model, PaintByExample | StableDiffusion):
            raise ValueError(f"{path} is {checkpoint.layout.name}, which takes no adapters")
        add_adapters(model, *adapters)
    if tiny_decoder is not None:
        if not isinstance(model, PaintByExample):
            raise ValueError(f"{path} holds {type(model).__name__}; a tiny decoder is for Paint by Example")
        loaded = load_model(tiny_decoder, device, dtype)
        decoder = loaded.decoder if isinstance(loaded, TinyAutoencoder) else loaded
        if not isinstance(decoder, TinyDecoder):
            raise CheckpointError(f"{tiny_decoder} holds {type(loaded).__name__}; expected TAESD's decoder")
        model.config, model.tiny_decoder = replace(model.config, tiny_decoder=decoder.config), decoder
    return model.eval()


def warn_of_averages(file: Checkpoint) -> None:
    """Says of a file that training wrote that its averages, which validation and sample grids showed, are not used."""
    written_by_training = "config" in file.entry
    if written_by_training and any(name.startswith("model_ema.") for name in file.names()):
        warnings.warn(
            f"{file.path}: its averaged weights are not used; "
            "`pbe checkpoint extract-ema` puts them in the parameters' place",
            stacklevel=3,
        )


class RecognisedCheckpoint(NamedTuple):
    """A checkpoint of a known layout, seen under our names.

    mappings: by our name, how to make each tensor from the file's. shapes: the tensors' own, by our name.
    hints: what the file says beside its tensors.
    """

    file: Checkpoint
    layout: Layout
    key_map: KeyMap
    mappings: dict[str, TensorMapping]
    shapes: Shapes
    hints: Hints

    @property
    def path(self) -> Path:
        return self.file.path

    def tensor(self, name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor under our name; what was read of the file to convert it is given back to the system.

        Raises `CheckpointError` where it overflows float16.
        """
        mapping = self.mappings[name]
        mapped = mapping.build(*(self.file.tensor(source) for source in mapping.sources))
        tensor = converted(mapped, dtype, f"{self.path}: {name}", device).contiguous()
        if tensor.data_ptr() != mapped.data_ptr():
            self.release(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """One tensor's dtype in the file, under our name."""
        return self.file.dtype(self.mappings[name].sources[0])

    def release(self, name: str) -> None:
        """Gives what was read of one tensor, under our name, back to the system."""
        for source in self.mappings[name].sources:
            self.file.release(source)


def open_recognised(path: str | Path) -> RecognisedCheckpoint:
    """Opens a checkpoint of any known layout; raises `FileNotFoundError` or `CheckpointError`."""
    return recognise(open_checkpoint(path))


def recognise(file: Checkpoint, layout: Layout | None = None) -> RecognisedCheckpoint:
    """A checkpoint under our names, of a layout if that is given; `CheckpointError` if its layout is not known."""
    path, names = file.path, list(file.names())
    layout = layout or find_layout(names)
    if layout is None and holds_adapters(file):
        raise CheckpointError(f"{path} holds adapters alone: give it beside a checkpoint (--adapter), not as one")
    if layout is None:
        if any(name.startswith("model_ema.") for name in names):
            raise CheckpointError(f"{path} holds averaged copies without the parameters that they average")
        known = "; ".join(layout.name for layout in LAYOUTS)
        raise CheckpointError(
            f"{path} is a {file.kind} of {len(names)} tensors ({shorten(names, 4)}), which fits no known model: {known}"
        )
    try:
        key_map = layout.key_map_of(names)
        mappings = key_map.to_ours(names)
    except ValueError as error:
        raise CheckpointError(f"{path} looks like {layout.name}, but has {error}") from None
    missing = [source for mapping in mappings.values() for source in mapping.sources if source not in file.tensors]
    if missing:
        raise CheckpointError(f"{path} looks like {layout.name}, but lacks {shorten(missing)}")
    shapes = {name: mapping.shape(*map(file.shape, mapping.sources)) for name, mapping in mappings.items()}
    return RecognisedCheckpoint(file, layout, key_map, mappings, Shapes(path, shapes), hints_of(file))


def hints_of(file: Checkpoint) -> Hints:
    """What a checkpoint says beside its tensors; `CheckpointError` where that is impossible or not supported."""
    where = "entry 'pbe'" if file.entry else "config.json"
    try:
        return Hints.from_entry(file.entry) if file.entry else Hints.from_configs(file.extras.get("configs", {}))
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: its {where} says {error}") from None


def build(checkpoint: RecognisedCheckpoint) -> Model:
    """The model that a checkpoint fits, on the meta device; `CheckpointError` where its tensors do not fit together."""
    layout = checkpoint.layout
    empty = [name for name, shape in checkpoint.shapes.items() if 0 in shape]
    try:
        if empty:
            raise ValueError(f"no numbers in {len(empty)} tensors: {shorten(empty)}")
        model = build_on_meta(layout.model, layout.infer(checkpoint.shapes, checkpoint.hints))
    except CheckpointError:
        raise
    except (ValueError, IndexError, ArithmeticError, RuntimeError) as error:  # too few numbers, zeros, too large ones
        likeness = f"{checkpoint.path} looks like {layout.name}"
        raise CheckpointError(f"{likeness}, but no such model has its sizes: {error}") from error
    check_names_and_shapes(checkpoint, {name: tuple(p.shape) for name, p in model.state_dict().items()})
    return model


def check_names_and_shapes(checkpoint: RecognisedCheckpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises one error that lists every missing, unexpected and mis-shaped tensor, and those that are not floats."""
    faults = mismatches(checkpoint.shapes, expected)
    dtypes = {name: checkpoint.dtype(name) for name in expected if name in checkpoint.shapes}
    integers = [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.is_floating_point]
    if integers:
        faults.append(f"has numbers other than floats in {len(integers)}: {shorten(integers)}")
    if faults:
        likeness = f"{checkpoint.path} looks like {checkpoint.layout.name}"
        raise CheckpointError(f"{likeness}, but {'; '.join(faults)}")


def choose_device(device: str | torch.device) -> torch.device:
    """A device by name; "auto" is CUDA where there is one, else MPS, else the CPU. `ValueError` if it is not there."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device == "auto":
        return torch.device(next(name for name, count in counts.items() if count))
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not a device; choose auto, cpu, cuda, cuda:1, mps, …") from None
    if chosen.type == "meta":
        raise ValueError("device='meta' holds no values: nothing can be computed there; choose auto, cpu, cuda, mps, …")
    if (chosen.index or 0) >= counts.get(chosen.type, 1):
        raise ValueError(f"device={str(device)!r} is not there: torch sees {counts[chosen.type]} of type {chosen.type}")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A precision by name; "auto" is float16 on CUDA, bfloat16 on a CPU that computes in it, else float32."""
    if dtype == "auto":
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if device.type == "cpu" and has_native_bfloat16() else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return chosen


def has_native_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: elsewhere every product converts it, and float32 is faster.

    False where torch does not tell, as older releases do not, or computes without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.cpu, "get_capabilities")):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is ARM's
