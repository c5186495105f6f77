"""The exemplar encoder: one CLIP class token, mapped (Paint by Example, arXiv 2211.13227, section 3.2).

Attribute names are the keys of the original checkpoint: `transformer` is CLIP's vision tower; `c_qkv`, `c_proj` and
`c_fc` are linear layers. The last projection (`proj_out`) and the learned unconditional vector (`learnable_vector`)
stand at the top of the original file, and so in `pbe.models.paint_by_example`.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.attention import attention
from pbe.models.clip import CLIPVisionConfig, CLIPVisionTower, check_heads


@dataclass(frozen=True)
class ExemplarConfig:
    """Sizes of `ExemplarEncoder`; the defaults are those of Paint by Example.

    `tokens` is what passes of CLIP's tokens: "class" alone, the paper's information bottleneck, or "all" of them, its
    ablation, with which a model can copy the exemplar.
    """

    vision: CLIPVisionConfig = CLIPVisionConfig()
    mapper_layers: int = 5
    mapper_heads: int = 1
    tokens: Literal["class", "all"] = "class"

    def __post_init__(self) -> None:
        if self.tokens not in ("class", "all"):
            raise ValueError(f"tokens must be 'class' or 'all', got {self.tokens!r}")
        check_heads(self.vision.width, self.mapper_heads)

    @property
    def num_tokens(self) -> int:
        """Of an exemplar's context."""
        return 1 if self.tokens == "class" else self.vision.num_positions


class MapperAttention(nn.Module):
    """Multi-head self-attention of x (B, T, C) with one projection for query, key and value.

    Over the bottleneck's single token the softmax is 1 and this is a linear map of the value.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, T, 3 C) -> 3 of (B, heads, T, C / heads); the original interleaves q, k, v per head
        qkv = self.c_qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        y = attention(*qkv.chunk(3, dim=-1))
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MapperMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class MapperBlock(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MapperAttention(width, num_heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MapperMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Mapper(nn.Module):
    """A few transformer blocks that decode the class token into a condition."""

    def __init__(self, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(MapperBlock(width, num_heads) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ExemplarEncoder(nn.Module):
    """CLIP's class token, or all its tokens, through the mapper and a LayerNorm."""

    def __init__(self, config: ExemplarConfig):
        super().__init__()
        self.config = config
        width = config.vision.width
        self.transformer = nn.ModuleDict({"vision_model": CLIPVisionTower(config.vision)})
        self.mapper = Mapper(width, config.mapper_layers, config.mapper_heads)
        self.final_ln = nn.LayerNorm(width)

    @property
    def vision(self) -> CLIPVisionTower:
        """CLIP's vision tower."""
        return cast(CLIPVisionTower, self.transformer["vision_model"])

    def forward(self, exemplar: Tensor) -> Tensor:
        """Tokens (B, T, width) for CLIP-normalised exemplars (B, 3, S, S); T = 1 for the class token alone."""
        return self.mapped(self.vision.tokens(exemplar))

    def mapped(self, tokens: Tensor) -> Tensor:
        """`forward` of all of CLIP's tokens (B, N, width)."""
        if self.config.tokens == "class":
            tokens = tokens[:, :1]
        return self.final_ln(self.mapper(self.vision.post_layernorm(tokens)))
