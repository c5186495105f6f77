"""The detail adapter: more of the exemplar than one token can say, as IP-Adapter's "plus" variant has it (Ye et al.
2023, arXiv 2308.06721).

A resampler makes D detail tokens of CLIP's tokens of all patches, and each transformer block attends to them beside its
context, by keys and values of their own. They follow the context's own tokens, (B, T + D, context_dim), so that what is
done with contexts (mixing, dropping, guidance, batches) is done with them too; a context without them is attended to as
if there were no adapter. The model stays as it is, under its own keys; `pbe.checkpoints.detail` has the files.

CLIP's tokens are those before its last layer. Of that one the class token alone is read in training: its other outputs
were never asked to say anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pbe.models.unet import Attention, TransformerBlock

if TYPE_CHECKING:
    from pbe.models.paint_by_example import PaintByExample

HEAD_WIDTH = 64
PROJECTIONS = ("to_k_detail", "to_v_detail")


@dataclass
class DetailConfig:
    """Sizes of a detail adapter."""

    tokens: int = 16
    """How many tokens are made of an exemplar."""
    layers: int = 4
    """Of the resampler."""
    width: int = 768
    """Of the resampler, in heads of 64."""

    def __post_init__(self) -> None:
        for name, step, most in (("tokens", 1, 1024), ("layers", 1, 64), ("width", HEAD_WIDTH, 8192)):
            value = getattr(self, name)
            if not isinstance(value, int) or value not in range(step, most + 1, step):
                kind = f"a multiple of {step}" if step > 1 else "a whole number"
                raise ValueError(f"detail.{name} must be {kind} from {step} to {most}, got {value!r}")


def sizes(config: DetailConfig) -> dict[str, int]:
    """The fields of `DetailConfig`, of a class that inherits from it too."""
    return {field.name: getattr(config, field.name) for field in fields(DetailConfig)}


class ResamplerLayer(nn.Module):
    """Queries attend to the patches and to themselves; a feed-forward network follows. Both are around a skip."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_patches, self.norm_queries = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, width, width // HEAD_WIDTH)
        self.attn.to_out = nn.Sequential(nn.Linear(width, width, bias=False))
        hidden = nn.Linear(width, 4 * width, bias=False)
        self.ff = nn.Sequential(nn.LayerNorm(width), hidden, nn.GELU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, patches: Tensor, queries: Tensor) -> Tensor:
        x = self.norm_queries(queries)
        queries = queries + self.attn(x, torch.cat([self.norm_patches(patches), x], dim=1))
        return queries + self.ff(queries)


class Resampler(nn.Module):
    """Detail tokens (B, D, context_dim) of CLIP's tokens (B, N, patch_width), one for each learned query, and in order.

    `null_tokens` (1, D, context_dim) stand in their place where there is no exemplar.
    """

    def __init__(self, config: DetailConfig, patch_width: int, context_dim: int):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.randn(1, config.tokens, config.width) / config.width**0.5)
        self.null_tokens = nn.Parameter(torch.zeros(1, config.tokens, context_dim))
        self.proj_in = nn.Linear(patch_width, config.width)
        self.layers = nn.ModuleList(ResamplerLayer(config.width) for _ in range(config.layers))
        self.proj_out = nn.Linear(config.width, context_dim)
        self.norm_out = nn.LayerNorm(context_dim)

    def forward(self, patches: Tensor) -> Tensor:
        patches = self.proj_in(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            queries = layer(patches, queries)
        return self.norm_out(self.proj_out(queries))


class DetailAttention(Attention):
    """A block's attention over a context, the layers of `attention`, and beside it over detail tokens: both outputs are
    added before `to_out` (decoupled cross-attention)."""

    def __init__(self, attention: Attention, num_context: int, num_detail: int):
        vars(self).update(vars(attention), _modules=dict(attention._modules))
        self.num_context, self.num_detail = num_context, num_detail
        dim, context_dim = attention.to_q.in_features, attention.to_k.in_features
        self.to_k_detail = nn.Linear(context_dim, dim, bias=False)
        self.to_v_detail = nn.Linear(context_dim, dim, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        assert context is not None
        own, for_keys, for_values = split(context, self.num_context, self.num_detail)
        q = self.to_q(x)
        if self.num_context == 1:  # the softmax of one score is 1
            y = self.to_v(own).expand_as(q)
        else:
            y = self.attend(q, self.to_k(own), self.to_v(own))
        if for_keys.shape[1]:
            y = y + self.attend(q, self.to_k_detail(for_keys), self.to_v_detail(for_values))
        return self.to_out(y)


def split(context: Tensor, num_context: int, num_detail: int) -> tuple[Tensor, Tensor, Tensor]:
    """The own tokens of a context (B, T, context_dim), and what the keys and the values of detail are made of, (B, D,
    context_dim) each: the same at strength 1, and no tokens at 0."""
    T, D, found = num_context, num_detail, context.shape[1]
    if found not in (T, T + D, T + 2 * D):
        raise ValueError(f"with this detail adapter a context has {T}, {T + D} or {T + 2 * D} tokens, not {found}")
    return context[:, :T], context[:, T : T + D], context[:, T:][:, -D:]


def at_strength(context: Tensor, num_detail: int, strength: float) -> Tensor:
    """A context (B, T + D, context_dim) whose D detail tokens count `strength` times: (B, T + 2 D, context_dim), where
    the last D, of which values are made, are scaled; at 0 without them, (B, T, context_dim)."""
    if strength == 1:
        return context
    own, detail = context[:, :-num_detail], context[:, -num_detail:]
    return torch.cat([own, detail, strength * detail], dim=1) if strength else own


# ----------------------------------------------------------------------------------------------------------------------
# In a model


def is_detail(name: str) -> bool:
    """Whether a parameter's name is a detail adapter's."""
    return name.startswith("detail.") or name.endswith(tuple(f".attn2.{layer}.weight" for layer in PROJECTIONS))


def detail_parts(model: PaintByExample, config: DetailConfig) -> dict[str, nn.Module]:
    """The modules of an adapter by their place in a model: its own tensors are on the meta device."""
    exemplar, context_dim = model.config.exemplar, model.config.unet.context_dim
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"detail": Resampler(config, exemplar.vision.width, context_dim)}
        for name, block in model.named_modules():
            if isinstance(block, TransformerBlock):
                parts[f"{name}.attn2"] = DetailAttention(block.attn2, exemplar.num_tokens, config.tokens)
    return parts


def detail_shapes(parts: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's own tensors by name."""
    named = {f"{place}.{name}": p for place, part in parts.items() for name, p in part.named_parameters()}
    return {name: tuple(p.shape) for name, p in named.items() if is_detail(name)}


def add_detail(model: PaintByExample, parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Puts the parts of an adapter into a model, with these tensors of its own; the others stay on the meta device.

    ValueError for tensors with other names than `detail_shapes` has.
    """
    for place, part in parts.items():
        *above, name = place.split(".")
        setattr(model.get_submodule(".".join(above)), name, part)
    # not strict: the model's own tensors are there already
    if unknown := model.load_state_dict(dict(tensors), strict=False, assign=True).unexpected_keys:
        raise ValueError(f"a detail adapter has no {', '.join(unknown)}")


def remove_detail(model: PaintByExample) -> None:
    """Takes an adapter out of a model, if it has one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, DetailAttention):
            plain = Attention.__new__(Attention)
            own = {key: layer for key, layer in module._modules.items() if key not in PROJECTIONS}
            vars(plain).update(vars(module), _modules=own)
            model.set_submodule(name, plain)
    model.detail = None
