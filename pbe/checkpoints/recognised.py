"""A checkpoint seen under this library's names, and what may stand in the place of its own weights."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pbe.checkpoints.formats.lazy_tensors import converted
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError
from pbe.checkpoints.infer_config import Hints, Shapes
from pbe.checkpoints.key_map import EMA_PREFIX, KeyMap, TensorMapping, average_name, mismatches, shorten
from pbe.checkpoints.layouts import Layout
from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.models.clip import CLIP, Activation, CLIPVisionTower

WeightChoice = Literal["auto", "ema", "raw"]


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


def averaged(checkpoint: RecognisedCheckpoint) -> RecognisedCheckpoint:
    """A checkpoint with the averaged copies in the place of the parameters that they average.

    A copy is called `model_ema.` and the parameter's name after `model.`, without its dots. Raises `CheckpointError`
    where there are none, not one for each parameter after `model.`, or one of another shape.
    """
    file = checkpoint.file
    names = {name: average_name(name) for name in checkpoint.mappings}
    found = {name: ema for name, ema in names.items() if ema in file.tensors}
    if not found:
        raise CheckpointError(f"{file.path} holds no averaged copies (names that begin with {EMA_PREFIX!r})")
    missing = [name for name in names if name.startswith("model.") and name not in found]
    if missing:
        raise CheckpointError(f"{file.path} has no averaged copy of {len(missing)}: {shorten(missing)}")
    for name, ema in found.items():
        if tuple(file.shape(ema)) != checkpoint.shapes[name]:
            shapes = f"{tuple(file.shape(ema))}, not {checkpoint.shapes[name]} as {name}"
            raise CheckpointError(f"{file.path}: {ema} has the shape {shapes}")
    copies = {name: TensorMapping((ema,)) for name, ema in found.items()}
    return checkpoint._replace(mappings={**checkpoint.mappings, **copies})


def choose_weights(checkpoint: RecognisedCheckpoint, weights: WeightChoice) -> RecognisedCheckpoint:
    """The checkpoint with the weights that `load_model` takes of it; says which where "auto" chooses."""
    if weights not in get_args(WeightChoice):
        raise ValueError(f"weights={weights!r} is not one of {', '.join(get_args(WeightChoice))}")
    if weights == "ema":
        return averaged(checkpoint)
    file = checkpoint.file
    if weights == "raw" or not any(name.startswith(EMA_PREFIX) for name in file.names()):
        return checkpoint
    if "config" in file.entry:  # written by training
        warnings.warn(f"{file.path}: its averages are used, as in its sample grids (weights='raw': not)", stacklevel=3)
        return averaged(checkpoint)
    warnings.warn(f"{file.path}: its averages are not used (weights='ema': they are)", stacklevel=3)
    return checkpoint


def with_vae(checkpoint: RecognisedCheckpoint, vae: RecognisedCheckpoint) -> RecognisedCheckpoint:
    """A checkpoint with another autoencoder in the place of its own, if it has one.

    Raises `CheckpointError` where the two have different sizes.
    """
    own = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(VAE_PREFIX)}
    new = {VAE_PREFIX + name: shape for name, shape in vae.shapes.items()}
    if own and (faults := mismatches(new, own)):
        raise CheckpointError(f"the autoencoder has other sizes than that of {checkpoint.path}: it {'; '.join(faults)}")
    scale, before = vae.hints.latent_scale, checkpoint.hints.latent_scale
    if scale and before and scale != before:
        other = f"that of {checkpoint.path} is {before}"
        warnings.warn(f"{vae.path}: its latents' scale is {scale}, {other}: are they the same latents?", stacklevel=3)
    mappings, tensors = dict(checkpoint.mappings), dict(checkpoint.file.tensors)
    for name, mapping in vae.mappings.items():
        sources = tuple(f"{vae.path}: {source}" for source in mapping.sources)
        mappings[VAE_PREFIX + name] = mapping._replace(sources=sources)
        tensors |= {ours: vae.file.tensors[theirs] for ours, theirs in zip(sources, mapping.sources, strict=True)}
    return checkpoint._replace(
        file=replace(checkpoint.file, tensors=tensors),
        mappings=mappings,
        shapes=Shapes(checkpoint.path, {**checkpoint.shapes, **new}),
        hints=replace(checkpoint.hints, latent_scale=scale or before),
    )


def stated_activation(checkpoint: RecognisedCheckpoint) -> Activation | None:
    """What a CLIP was trained with, where the file says it or is of OpenAI's own kind."""
    is_openai = checkpoint.file.kind == "TorchScript archive" or "input_resolution" in checkpoint.file.names()
    return checkpoint.hints.clip_activation or ("quick_gelu" if is_openai else None)


def doubt_activation(checkpoint: RecognisedCheckpoint) -> None:
    """Warns of a CLIP that does not say what it was trained with."""
    if checkpoint.layout.model in (CLIP, CLIPVisionTower) and stated_activation(checkpoint) is None:
        warnings.warn(
            f"{checkpoint.path} is taken for a CLIP with QuickGELU, as OpenAI's; with GELU, as in most of open_clip's, "
            "its numbers are wrong: give the folder with its config, or state it by `pbe checkpoint slim --activation`",
            stacklevel=3,
        )
