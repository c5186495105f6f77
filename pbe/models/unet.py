"""The denoising UNet of Stable Diffusion v1 and Paint by Example (Rombach et al. 2022, arXiv 2112.10752).

Attribute names are the keys of the CompVis checkpoints. `input_blocks`, `middle_block` and `output_blocks` are lists of
short sequences: a residual block, then a transformer or a change of resolution where the level has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.attention import attention
from pbe.models.blocks import Context, Layers, ResBlock, UShaped, copies, timestep_embedding


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of `UNet`; the defaults are those of Paint by Example (Stable Diffusion v1 with 9 input channels).

    `attention_levels` are the indices of `channel_mult` that have transformers; the middle block always has one.
    `num_heads` is the same at every level, so heads grow wider with the channels, unless `level_heads` has a number for
    each level; the middle block's is the last one.
    """

    in_channels: int = 9
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: int = 8
    context_dim: int = 768
    level_heads: tuple[int, ...] = ()

    def heads(self, level: int) -> int:
        """How many attention heads a level has."""
        return self.level_heads[level] if self.level_heads else self.num_heads

    def __post_init__(self) -> None:
        if not all(0 <= i < len(self.channel_mult) for i in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels} must index channel_mult {self.channel_mult}")
        if self.level_heads and len(self.level_heads) != len(self.channel_mult):
            raise ValueError(f"level_heads {self.level_heads} must be one number for each of {self.channel_mult}")
        for i in {*self.attention_levels, len(self.channel_mult) - 1}:
            width = self.model_channels * self.channel_mult[i]
            if width % self.heads(i):
                raise ValueError(f"{width} channels at level {i} do not divide into num_heads={self.heads(i)}")


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) over `context` (B, T, context_dim); without a context, over itself."""

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.to_out(self.attend(self.to_q(x), self.to_k(context), self.to_v(context)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, C) of queries (B, N, C), and keys and values (B, T, C)."""
        # (B, N, C) -> (B, heads, N, C / heads)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        return attention(q, k, v).transpose(1, 2).flatten(2)


class GEGLU(nn.Module):
    """A linear map gated by the GELU of another (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention (`attn1`), attention over the context (`attn2`) and a feed-forward network."""

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, around a skip."""

    takes = ("context",)

    def __init__(self, channels: int, context_dim: int, num_heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, num_heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h, w = x.shape[-2:]
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h*w, C)
        for block in self.transformer_blocks:
            y = block(y, context)
        y = y.transpose(1, 2).unflatten(2, (h, w))  # (B, C, h, w)
        return copies(x, y.shape[0]) + self.proj_out(y)


class Downsample(nn.Module):
    """Halves both sides, rounding up."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest neighbour to the size (h, w) of the next level, then a convolution.

    The next level is twice as large, less the row or column that its own downsampling rounded up.
    """

    takes = ("size",)

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class UNet(UShaped):
    """Predicts the noise in latents, given the timestep and a context to attend to."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        C, mult = config.model_channels, config.channel_mult
        emb_dim = 4 * C

        def transformer(channels: int, level: int) -> SpatialTransformer:
            return SpatialTransformer(channels, config.context_dim, config.heads(level))

        self.time_embed = nn.Sequential(nn.Linear(C, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        self.input_blocks = nn.ModuleList([Layers([nn.Conv2d(config.in_channels, C, 3, padding=1)])])
        channels = C
        skip_channels = [C]
        for level, m in enumerate(mult):
            for _ in range(config.num_res_blocks):
                layers = Layers([ResBlock(channels, m * C, emb_dim)])
                channels = m * C
                if level in config.attention_levels:
                    layers.append(transformer(channels, level))
                self.input_blocks.append(layers)
                skip_channels.append(channels)
            if level < len(mult) - 1:
                self.input_blocks.append(Layers([Downsample(channels)]))
                skip_channels.append(channels)

        self.middle_block = Layers(
            [ResBlock(channels, channels, emb_dim), transformer(channels, -1), ResBlock(channels, channels, emb_dim)]
        )

        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(config.num_res_blocks + 1):
                layers = Layers([ResBlock(channels + skip_channels.pop(), m * C, emb_dim)])
                channels = m * C
                if level in config.attention_levels:
                    layers.append(transformer(channels, level))
                if level > 0 and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(layers)

        self.out = nn.Sequential(nn.GroupNorm(32, C), nn.SiLU(), nn.Conv2d(C, config.out_channels, 3, padding=1))

    def forward(self, unet_in: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The predicted noise eps (B, out_channels, h, w).

        `unet_in` (B, in_channels, h, w) may have any size, `t` (B,) holds timesteps, `context` is (B, T, context_dim).
        """
        # The angles need float32; from here on the parameters decide the precision.
        emb = timestep_embedding(t, self.config.model_channels).to(unet_in.dtype)
        return self.walk(unet_in, self.time_embed(emb), context)
