"""Operations on whole checkpoints: what `tools/checkpoint.py` offers, as functions.

Each takes opened checkpoints and returns tensors under the original keys, lazily where it can: nothing is read before
the tensors are written.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import clip_config, pbe_entry
from pbe.checkpoints.key_map import shorten
from pbe.checkpoints.loading import Source, build
from pbe.checkpoints.meta_device import build_on_meta
from pbe.models.adm import ADMConfig
from pbe.models.clip import CLIPConfig
from pbe.models.exemplar import ExemplarConfig, ExemplarEncoder
from pbe.models.paint_by_example import PaintByExampleConfig
from pbe.models.stable_diffusion import StableDiffusionConfig

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0"
EMA_PREFIX = "model_ema."

Tensors = dict[str, Tensor]


def config_of(source: Source) -> PaintByExampleConfig | StableDiffusionConfig | CLIPConfig | ADMConfig:
    """The sizes of the networks in a checkpoint; raises `CheckpointError` where they do not fit together."""
    return build(source).config


def entry_of(source: Source) -> dict[str, Any]:
    """The `pbe` entry for a file made from this one: what shapes cannot tell, and what its own entry said."""
    return {**pbe_entry(config_of(source)), **own_entry(source)}


def own_entry(source: Source) -> dict[str, Any]:
    entry = source.checkpoint.extras.get("pbe")
    return dict(entry) if isinstance(entry, dict) else {}


def network(source: Source, dtype: torch.dtype | None = None) -> Tensors:
    """The networks' tensors alone: no optimizer, no averaged copies, no schedule; in `dtype`, or as they are."""
    return {name: source.tensor(name, dtype=dtype) for name in source.recipes}


def extract_ema(source: Source, dtype: torch.dtype | None = None) -> Tensors:
    """The networks' tensors with the averaged copies in the place of the parameters they average.

    A copy is called `model_ema.` and the parameter's name after `model.`, without its dots.
    """
    names = {name: EMA_PREFIX + name.removeprefix("model.").replace(".", "") for name in source.recipes}
    averaged = {name: ema for name, ema in names.items() if ema in source.checkpoint.tensors}
    if not averaged:
        raise CheckpointError(
            f"{source.checkpoint.path} holds no averaged copies (names that begin with {EMA_PREFIX!r})"
        )
    missing = [name for name in names if name.startswith("model.") and name not in averaged]
    if missing:
        raise CheckpointError(f"{source.checkpoint.path} has no averaged copy of {len(missing)}: {shorten(missing)}")
    tensors = network(source, dtype)
    for name, ema in averaged.items():
        tensors[name] = source.checkpoint.tensor(ema).to(dtype=dtype)
        if tensors[name].shape != source.shapes[name]:
            raise CheckpointError(f"{source.checkpoint.path}: {ema} has another shape than {name}")
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# From Stable Diffusion to Paint by Example


def input_order(source: Source) -> str:
    """What the UNet's input channels are: "z_t", Stable Diffusion; "z_t, mask, z_masked", its inpainting model with
    mask 1 = repaint; "z_t, z_masked, mask", Paint by Example with mask 1 = keep."""
    channels = source.shapes[f"{FIRST_CONVOLUTION}.weight"][1]
    if channels == 4:
        return "z_t"
    if channels == 9:
        if "paint-by-example" in source.layout.name:
            return "z_t, z_masked, mask"
        return own_entry(source).get("inputs", "z_t, mask, z_masked")
    raise CheckpointError(
        f"{source.checkpoint.path}: a UNet of {channels} inputs is neither Stable Diffusion's nor ours"
    )


def expand(source: Source) -> Tensors:
    """Stable Diffusion's tensors with a first convolution for Paint by Example's nine inputs (z_t, z_masked, mask).

    Of a 4-channel model the new inputs' weights are zero, so that it computes what it did. Of SD-inpainting the
    channels are put in order, and its mask m' = 1 - m is rewritten: -W_m for the kernel, and W_m's sum onto the bias,
    which is exact except in the outermost rows and columns, where both conventions pad with 0.
    """
    order = input_order(source)
    tensors = network(source)
    weight, bias = tensors[f"{FIRST_CONVOLUTION}.weight"], tensors[f"{FIRST_CONVOLUTION}.bias"]  # (C, in, 3, 3), (C,)
    if order == "z_t":
        weight = torch.cat([weight, weight.new_zeros(weight.shape[0], 5, *weight.shape[2:])], dim=1)
    elif order == "z_t, mask, z_masked":
        z_t, mask, z_masked = weight.split([4, 1, 4], dim=1)
        weight = torch.cat([z_t, z_masked, -mask], dim=1)
        bias = bias + mask.sum(dim=(1, 2, 3), dtype=torch.float64).to(bias.dtype)
    else:
        raise CheckpointError(f"{source.checkpoint.path} already has Paint by Example's nine inputs")
    tensors[f"{FIRST_CONVOLUTION}.weight"], tensors[f"{FIRST_CONVOLUTION}.bias"] = weight, bias
    return tensors


def with_exemplar_encoder(
    tensors: Mapping[str, Tensor], clip: Source, context_dim: int, seed: int
) -> tuple[Tensors, ExemplarConfig]:
    """Expanded tensors with CLIP's vision tower in the text tower's place and a fresh mapper: where training starts.

    `clip` is a CLIP of either layout, or a Paint by Example whose vision tower is taken.
    """
    prefix = "cond_stage_model.transformer."
    if clip.layout.name.endswith("clip"):
        vision, names = clip_config(clip.shapes, clip.hints).vision, "vision_model."
    elif clip.layout.name.endswith("paint-by-example"):
        vision, names = config_of(clip).exemplar.vision, f"{prefix}vision_model."
    else:
        raise CheckpointError(
            f"{clip.checkpoint.path} is {clip.layout.description}; a CLIP with a vision tower is needed"
        )
    dtype = tensors[f"{FIRST_CONVOLUTION}.weight"].dtype
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("cond_stage_model.")}
    for name in clip.recipes:
        if name.startswith(names):
            result[prefix + "vision_model." + name.removeprefix(names)] = clip.tensor(name, dtype=dtype)
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
# Comparing and merging


class Difference(NamedTuple):
    """How one tensor differs between two checkpoints; `largest` is the largest absolute difference of its values."""

    name: str
    what: str
    largest: float


def diff(a: Source, b: Source) -> Iterator[Difference]:
    """What differs between two checkpoints under our names: tensors, shapes, values. Dtypes are not compared."""
    for name in sorted({*a.recipes, *b.recipes}):
        if name not in b.recipes:
            yield Difference(name, f"only in {a.checkpoint.path}", float("inf"))
        elif name not in a.recipes:
            yield Difference(name, f"only in {b.checkpoint.path}", float("inf"))
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


def set_vae(source: Source, vae: Mapping[str, Tensor]) -> Tensors:
    """The networks' tensors with the autoencoder `vae`, under its keys in the original layout, in its own's place.

    Raises `CheckpointError` unless it has the same names and shapes.
    """
    tensors = network(source)
    own = {name: tuple(shape) for name, shape in source.shapes.items() if name.startswith("first_stage_model.")}
    other = {name: tuple(x.shape) for name, x in vae.items()}
    if own != other:
        odd = sorted({name for name, _ in own.items() ^ other.items()})
        raise CheckpointError(f"the autoencoder has other sizes than that of {source.checkpoint.path}: {shorten(odd)}")
    return {**tensors, **{name: x.to(source.dtype(name)) for name, x in vae.items()}}


def merge(sources: Sequence[Source], weights: Sequence[float]) -> Tensors:
    """The weighted sum of checkpoints, computed in float32, in the first one's dtypes.

    Raises `CheckpointError` unless all have the same sizes and the same meaning of the UNet's inputs.
    """
    if len(sources) != len(weights) or not sources:
        raise ValueError(f"{len(sources)} checkpoints and {len(weights)} weights: one weight each is needed")
    first = sources[0]
    for other in sources[1:]:
        if other.recipes.keys() != first.recipes.keys() or config_of(other) != config_of(first):
            raise CheckpointError(f"{other.checkpoint.path} has other sizes than {first.checkpoint.path}")
        if f"{FIRST_CONVOLUTION}.weight" in first.shapes and input_order(other) != input_order(first):
            raise CheckpointError(
                f"{other.checkpoint.path} has the inputs {input_order(other)}, {first.checkpoint.path} has "
                f"{input_order(first)}: expand brings them into one order"
            )
    merged = {}
    for name in first.recipes:
        total = torch.zeros(first.shapes[name])
        for source, weight in zip(sources, weights, strict=True):
            total += weight * source.tensor(name, dtype=torch.float32)
            source.release(name)
        merged[name] = total.to(first.dtype(name))
    return merged


# ----------------------------------------------------------------------------------------------------------------------
# Describing


def describe(source: Source) -> dict[str, Any]:
    """What a checkpoint holds: layout, sizes, dtypes, parameters by network, and what stands beside the networks."""
    checkpoint = source.checkpoint
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, shape in source.shapes.items():
        numel = torch.Size(shape).numel()
        parameters[network_of(name)] += numel
        dtypes[str(source.dtype(name)).removeprefix("torch.")] += numel
    dropped = Counter(reason for name in checkpoint.names() if (reason := source.table.reason(name)))
    return {
        "file": str(checkpoint.path),
        "kind": checkpoint.kind,
        "layout": source.layout.description,
        "config": config_of(source),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "dtypes": dict(dtypes),
        "averaged copies": any(name.startswith(EMA_PREFIX) for name in checkpoint.names()),
        "optimizer": checkpoint.has("optimizer_states"),
        "also": {key: checkpoint.extras[key] for key in ("epoch", "global_step", "pbe") if checkpoint.has(key)},
        "not loaded": dict(dropped),
    }


NETWORKS = {
    "model.diffusion_model": "UNet",
    "first_stage_model": "VAE",
    "cond_stage_model.transformer.vision_model": "CLIP vision",
    "cond_stage_model.transformer.text_model": "CLIP text",
    "vision_model": "CLIP vision",
    "text_model": "CLIP text",
    **dict.fromkeys(("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"), "ADM"),
}


def network_of(name: str) -> str:
    """The network that a tensor belongs to, in words."""
    return next((words for prefix, words in NETWORKS.items() if name.startswith(prefix + ".")), "condition")
