"""Operations on whole checkpoints: what `pbe checkpoint` offers, as functions.

Each takes opened checkpoints and returns tensors under the original keys, lazily where it can: nothing is read before
the tensors are written.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import ModelSizes, is_number, pbe_entry
from pbe.checkpoints.key_map import EMA_PREFIX, MAX_LAYERS
from pbe.checkpoints.loading import build
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.recognised import (
    RecognisedCheckpoint,
    averaged,
    doubt_activation,
    stated_activation,
    with_vae,
)
from pbe.io.json_text import shown
from pbe.models.clip import CLIPConfig, CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig, ExemplarEncoder
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.stable_diffusion import StableDiffusionConfig

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0"
OUR_INPUTS = "z_t, z_masked, mask"

Tensors = dict[str, Tensor]


def config_of(checkpoint: RecognisedCheckpoint) -> ModelSizes:
    """The sizes of the networks in a checkpoint; raises `CheckpointError` where they do not fit together."""
    return build(checkpoint).config


def entry_of(checkpoint: RecognisedCheckpoint) -> dict[str, Any]:
    """The `pbe` entry for a file made from this one: what shapes cannot tell, and what its own entry said."""
    activation = {"clip_activation": stated} if (stated := stated_activation(checkpoint)) else {}
    return {**pbe_entry(config_of(checkpoint)), **activation, **checkpoint.file.entry}


def network(checkpoint: RecognisedCheckpoint, dtype: torch.dtype | None = None) -> Tensors:
    """The networks' tensors alone: no optimizer, no averaged copies, no schedule; in `dtype`, or as they are."""
    return {name: checkpoint.tensor(name, dtype=dtype) for name in checkpoint.mappings}


def extract_ema(checkpoint: RecognisedCheckpoint, dtype: torch.dtype | None = None) -> Tensors:
    """The networks' tensors with the averaged copies in the place of the parameters; raises as `averaged`."""
    return network(averaged(checkpoint), dtype)


# ----------------------------------------------------------------------------------------------------------------------
# From Stable Diffusion to Paint by Example


def input_order(checkpoint: RecognisedCheckpoint) -> str:
    """What the UNet's input channels are: "z_t", Stable Diffusion; "z_t, mask, z_masked", its inpainting model with
    mask 1 = repaint; "z_t, z_masked, mask", Paint by Example with mask 1 = keep."""
    channels = checkpoint.shapes[f"{FIRST_CONVOLUTION}.weight"][1]
    if channels == 4:
        return "z_t"
    if channels == 9 and checkpoint.layout.model is PaintByExample:
        return OUR_INPUTS
    if channels == 9:
        inputs = checkpoint.file.entry.get("inputs", "z_t, mask, z_masked")
        if inputs not in ("z_t, mask, z_masked", OUR_INPUTS):
            raise CheckpointError(f"{checkpoint.path}: its entry 'pbe' says inputs={shown(inputs)}")
        return inputs
    raise CheckpointError(f"{checkpoint.path}: its UNet has {channels} input channels; expected 4 or 9")


def expand(checkpoint: RecognisedCheckpoint) -> Tensors:
    """Stable Diffusion's tensors with a first convolution for Paint by Example's nine inputs (z_t, z_masked, mask).

    Of a 4-channel model the new inputs' weights are zero, so that it computes what it did. Of SD-inpainting the
    channels are put in order, and its mask m' = 1 - m is rewritten: -W_m for the kernel, and W_m's sum onto the bias,
    which is exact except in the outermost rows and columns, where both conventions pad with 0.
    """
    order = input_order(checkpoint)
    tensors = network(checkpoint)
    weight, bias = tensors[f"{FIRST_CONVOLUTION}.weight"], tensors[f"{FIRST_CONVOLUTION}.bias"]  # (C, in, 3, 3), (C,)
    if order == "z_t":
        weight = torch.cat([weight, weight.new_zeros(weight.shape[0], 5, *weight.shape[2:])], dim=1)
    elif order == "z_t, mask, z_masked":
        z_t, mask, z_masked = weight.split([4, 1, 4], dim=1)
        weight = torch.cat([z_t, z_masked, -mask], dim=1)
        bias = bias + mask.sum(dim=(1, 2, 3), dtype=torch.float64).to(bias.dtype)
    else:
        raise CheckpointError(f"{checkpoint.path} already has Paint by Example's nine inputs ({OUR_INPUTS})")
    tensors[f"{FIRST_CONVOLUTION}.weight"], tensors[f"{FIRST_CONVOLUTION}.bias"] = weight, bias
    return tensors


def with_exemplar_encoder(
    tensors: Mapping[str, Tensor], clip: RecognisedCheckpoint, context_dim: int, seed: int
) -> tuple[Tensors, ExemplarConfig]:
    """Expanded tensors with CLIP's vision tower in the text tower's place and a fresh mapper: where training starts.

    `clip` is a CLIP of any layout, its vision tower alone, or a Paint by Example whose vision tower is taken.
    """
    doubt_activation(clip)
    sizes, ours = config_of(clip), "cond_stage_model.transformer.vision_model."
    if isinstance(sizes, CLIPVisionConfig):
        vision, theirs = sizes, ""
    elif isinstance(sizes, CLIPConfig):
        vision, theirs = sizes.vision, "vision_model."
    elif isinstance(sizes, PaintByExampleConfig):
        vision, theirs = sizes.exemplar.vision, ours
    else:
        raise CheckpointError(f"{clip.path} is {clip.layout.name}; a CLIP with a vision tower is needed")
    dtype = tensors[f"{FIRST_CONVOLUTION}.weight"].dtype
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("cond_stage_model.")}
    for name in clip.mappings:
        if name.startswith(theirs):
            result[ours + name.removeprefix(theirs)] = clip.tensor(name, dtype=dtype)
    config = ExemplarConfig(vision=vision)
    fresh = fresh_exemplar_mapping(config, context_dim, torch.Generator().manual_seed(seed))
    return result | {name: tensor.to(dtype) for name, tensor in fresh.items()}, config


def fresh_exemplar_mapping(config: ExemplarConfig, context_dim: int, generator: torch.Generator) -> Tensors:
    """Initial values of what the exemplar's condition adds to CLIP, under the original keys.

    Norms are the identity, biases zero, weights normal with variance 1 / fan-in, the unconditional vector normal.
    """
    encoder = build_on_meta(ExemplarEncoder, config)
    shapes = {f"cond_stage_model.{n}": p.shape for n, p in encoder.state_dict().items() if "transformer." not in n}
    shapes |= {"proj_out.weight": (context_dim, config.vision.width), "proj_out.bias": (context_dim,)}
    tensors = {"learnable_vector": torch.randn(1, 1, context_dim, generator=generator)}
    for name, shape in shapes.items():
        if len(shape) == 2:
            tensors[name] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        else:
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Comparing, and putting an autoencoder in another's place


class Difference(NamedTuple):
    """How one tensor differs between two checkpoints; `largest` is the largest absolute difference of its values."""

    name: str
    what: str
    largest: float


def diff(a: RecognisedCheckpoint, b: RecognisedCheckpoint) -> Iterator[Difference]:
    """What differs between two checkpoints under our names: tensors, shapes, values. Dtypes are not compared."""
    for name in sorted({*a.mappings, *b.mappings}):
        if name not in b.mappings:
            yield Difference(name, f"only in {a.path}", float("inf"))
        elif name not in a.mappings:
            yield Difference(name, f"only in {b.path}", float("inf"))
        elif a.shapes[name] != b.shapes[name]:
            yield Difference(name, f"shape {a.shapes[name]} against {b.shapes[name]}", float("inf"))
        else:
            x, y = a.tensor(name, dtype=torch.float32), b.tensor(name, dtype=torch.float32)
            # equal infinities and equal NaNs are no difference; an unequal one is an infinite difference
            gap = (x - y).abs().nan_to_num(float("inf"))
            gap[(x == y) | (x.isnan() & y.isnan())] = 0
            if gap.numel() and gap.max() > 0:
                yield Difference(name, "values", gap.max().item())
            a.release(name)
            b.release(name)


def set_vae(checkpoint: RecognisedCheckpoint, vae: RecognisedCheckpoint) -> tuple[Tensors, dict[str, Any]]:
    """The networks' tensors with the autoencoder `vae` in the place of the own one, in its precision, if there is one;
    and the entry `pbe` for them. Raises as `with_vae`."""
    result = with_vae(checkpoint, vae)
    dtypes = {name: checkpoint.dtype(name) for name in checkpoint.mappings}
    tensors = {name: result.tensor(name, dtype=dtypes.get(name)) for name in result.mappings}
    config = config_of(result)
    assert isinstance(config, PaintByExampleConfig | StableDiffusionConfig)
    return tensors, {**entry_of(result), "latent_scale": config.vae.latent_scale}


# ----------------------------------------------------------------------------------------------------------------------
# Describing


def describe(checkpoint: RecognisedCheckpoint) -> dict[str, Any]:
    """What a checkpoint holds: layout, sizes, dtypes, parameters by network, and what stands beside the networks."""
    file = checkpoint.file
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, shape in checkpoint.shapes.items():
        parameters[network_of(name)] += math.prod(shape)
        dtypes[str(checkpoint.dtype(name)).removeprefix("torch.")] += math.prod(shape)
    return {
        "file": str(file.path),
        "kind": file.kind,
        "layout": checkpoint.layout.name,
        "config": config_of(checkpoint),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "dtypes": dict(dtypes),
        "averaged copies": any(name.startswith(EMA_PREFIX) for name in file.names()),
        "optimizer": "optimizer_states" in file.extras,
        "also": {
            **{key: file.extras[key] for key in ("epoch", "global_step") if is_number(file.extras.get(key))},
            **({"pbe": file.entry} if file.entry else {}),
        },
        "not loaded": dict(Counter(reason for name in file.names() if (reason := checkpoint.key_map.reason(name)))),
    }


NETWORKS = {
    "model.diffusion_model": "UNet",
    "first_stage_model": "VAE",
    "cond_stage_model.transformer.vision_model": "CLIP vision",
    "cond_stage_model.transformer.text_model": "CLIP text",
    "vision_model": "CLIP vision",
    "text_model": "CLIP text",
    "tiny_decoder": "tiny decoder",
    **dict.fromkeys(("embeddings", "pre_layrnorm", "encoder.layers", "post_layernorm"), "CLIP vision"),
    **dict.fromkeys((f"{net}{i}" for net in ("encoder.", "decoder.", "") for i in range(MAX_LAYERS)), "TAESD"),
    **dict.fromkeys(("encoder", "decoder", "quant_conv", "post_quant_conv"), "VAE"),
    **dict.fromkeys(("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"), "ADM"),
}


def network_of(name: str) -> str:
    """The network that a tensor belongs to, in words."""
    return next((words for prefix, words in NETWORKS.items() if name.startswith(prefix + ".")), "condition")
