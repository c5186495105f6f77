"""From a file to a model: recognise, infer sizes, build on the meta device, fill tensor by tensor."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pbe.checkpoints.adapters import AdapterLike, add_adapters, holds_adapters
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError, open_checkpoint
from pbe.checkpoints.infer_config import Hints, Shapes
from pbe.checkpoints.key_map import EMA_PREFIX, KeyMap, mismatches, shorten
from pbe.checkpoints.layouts import LAYOUTS, Model, find_layout, lacking
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.checkpoints.recognised import (
    RecognisedCheckpoint,
    WeightChoice,
    choose_weights,
    doubt_activation,
    with_vae,
)
from pbe.io.json_text import shown
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.tiny_autoencoder import TinyAutoencoder, TinyDecoder
from pbe.models.vae import AutoencoderKL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTER = ("model.", VAE_PREFIX, "vae.")  # which some files put before all of their names


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    adapters: Sequence[AdapterLike] = (),
    tiny_decoder: str | Path | None = None,
    vae: str | Path | None = None,
    weights: WeightChoice = "auto",
) -> Model:
    """The model that a checkpoint holds, in evaluation mode.

    `path` is a file or folder in any layout that `pbe.checkpoints.layouts` lists: the class follows from it; or "demo",
    the small Paint by Example that is part of this package.
    `device` "auto" is CUDA, else MPS, else the CPU. `dtype` "auto" is what edits fast there (`choose_dtype`): to train
    the model, or to save it, ask for "float32". "stored" leaves each tensor as it is in the file, whose layers may
    differ, for `prepare_for_inference` to convert. `adapters` are files of them, or pairs of a file and its strength
    (`pbe.add_adapters`). `tiny_decoder` is a file or folder with TAESD's decoder, for a Paint by Example's drafts and
    previews, in the place of its own if it has one. `vae` is a file or folder with another autoencoder of the same
    latents. `weights` are the moving averages of training, "ema", or what was trained, "raw"; "auto" takes the averages
    of files that this library's training wrote, as their sample grids show them, and of all others what was trained.

    What is not converted is memory-mapped on the CPU, not read: keep the file where it is while the model is in use.
    Otherwise tensors are converted one by one, so that the file's contents never stand in memory beside the model.

    Raises `FileNotFoundError`, or `CheckpointError` where the file has no known layout, is damaged, does not fit,
    overflows float16, or has no averages for "ema"; `ValueError` for an unknown device, precision or choice of weights,
    for a tiny decoder of other latents, and for a model that takes no adapters, autoencoder or tiny decoder.
    """
    device = choose_device(device)
    converted = None if dtype == "stored" else choose_dtype(dtype, device)
    checkpoint = with_vae(open_recognised(path, "autoencoder"), open_vae(vae)) if vae else open_recognised(path)
    checkpoint = choose_weights(checkpoint, weights)
    doubt_activation(checkpoint)
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


def open_recognised(path: str | Path, without: str | None = None) -> RecognisedCheckpoint:
    """Opens a checkpoint of any known layout; raises `FileNotFoundError` or `CheckpointError`."""
    return recognise(open_checkpoint(path), without)


def recognise(file: Checkpoint, without: str | None = None) -> RecognisedCheckpoint:
    """A checkpoint under our names; `CheckpointError` if its layout is not known.

    `without` is the network, of `layouts.NETWORKS`, that the file need not have. What it holds beside the layout's
    networks is left out with a warning, where it is networks of its own; any other unknown tensor is an error.
    """
    path, layout = file.path, find_layout(file.names(), without)
    if "export" in file.extras:
        raise CheckpointError(f"{path} holds exported networks, which can only edit: pbe.export.load_exported opens it")
    for outer in OUTER:
        if layout is None and all(name.startswith(outer) for name in file.names()):
            inner = part_of(file, outer)
            layout = find_layout(inner.names(), without)
            file = inner if layout else file
    names = list(file.names())
    if layout is None and holds_adapters(file):
        raise CheckpointError(f"{path} holds adapters alone: give it beside a checkpoint (--adapter), not as one")
    if layout is None:
        if any(name.startswith(EMA_PREFIX) for name in names):
            raise CheckpointError(f"{path} holds averaged copies without the parameters that they average")
        if likeness := lacking(names):
            raise CheckpointError(f"{path} {likeness}")
        known = "; ".join(layout.name for layout in LAYOUTS)
        raise CheckpointError(
            f"{path} is a {file.kind} of {len(names)} tensors ({shorten(names, 4)}), which fits no known model: {known}"
        )
    try:
        key_map = layout.key_map_of(names)
        if others := other_networks(key_map, names):
            counted = shorten([f"{shown(name)} ({n} tensors)" for name, n in others.items()])
            warnings.warn(f"{path}: beside {layout.name} it holds networks that are left out: {counted}", stacklevel=3)
            reasons = dict.fromkeys((rf"{re.escape(name)}\..*" for name in others), "networks that no model here has")
            key_map = replace(key_map, dropped={**key_map.dropped, **reasons})
        mappings = key_map.to_ours(names)
    except ValueError as error:
        raise CheckpointError(f"{path} looks like {layout.name}, but has {error}") from None
    missing = [source for mapping in mappings.values() for source in mapping.sources if source not in file.tensors]
    if missing:
        raise CheckpointError(f"{path} looks like {layout.name}, but lacks {shorten(missing)}")
    shapes = {name: mapping.shape(*map(file.shape, mapping.sources)) for name, mapping in mappings.items()}
    return RecognisedCheckpoint(file, layout, key_map, mappings, Shapes(path, shapes), hints_of(file))


def part_of(file: Checkpoint, prefix: str) -> Checkpoint:
    """The tensors of a checkpoint whose names begin with `prefix`, called by the rest of them."""
    return replace(file, tensors={n.removeprefix(prefix): x for n, x in file.tensors.items() if n.startswith(prefix)})


def other_networks(key_map: KeyMap, names: Collection[str]) -> dict[str, int]:
    """Networks that a file holds beside its layout's, such as those of a loss, and how many tensors each has.

    A network has modules within modules: a lone layer of an unknown name may belong to the model.
    """
    own = {name.split(".")[0] for rule in key_map.rules for name in rule.theirs}
    others = [name for name in names if name.split(".")[0] not in own and key_map.reason(name) is None]
    deep = {name.split(".")[0] for name in others if name.count(".") > 1}
    return Counter(root for name in others if (root := name.split(".")[0]) in deep)


def open_vae(path: str | Path) -> RecognisedCheckpoint:
    """The autoencoder in a file of its own, or in that of a model of any layout; raises `FileNotFoundError`, or
    `CheckpointError` if there is none or it is not whole."""
    file = open_checkpoint(path)
    prefix = next((p for p in (VAE_PREFIX, "vae.") if any(name.startswith(p) for name in file.names())), "")
    part = part_of(file, prefix)
    layout = find_layout(part.names())
    if layout is None or layout.model is not AutoencoderKL:
        raise CheckpointError(f"{path} holds no autoencoder (names that begin with {VAE_PREFIX!r}, or its alone)")
    return recognise(part)


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
