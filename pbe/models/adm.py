"""The pixel-space UNet of guided diffusion, "ADM" (Dhariwal and Nichol 2021, arXiv 2105.05233).

Attribute names are the keys of OpenAI's checkpoints. Residual blocks with scale and shift change the resolution too,
attention is over all positions of the lower levels, and the output holds the noise and the reverse process's variance.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.blocks import Layers, ResBlock, UShaped, timestep_embedding


@dataclass(frozen=True)
class ADMConfig:
    """Sizes of `ADM`; the defaults are those of `256x256_diffusion_uncond.pt`.

    `attention_levels` are the indices of `channel_mult` that have attention, in heads of `head_channels`; the middle
    block always has it. `num_classes` is None for an unconditional model. `resolution` is the side in pixels of the
    pictures it was trained on.
    """

    in_channels: int = 3
    out_channels: int = 6
    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3, 4, 5)
    head_channels: int = 64
    num_classes: int | None = None
    resolution: int = 256

    def __post_init__(self) -> None:
        if not all(0 <= i < len(self.channel_mult) for i in self.attention_levels):
            raise ValueError(f"attention_levels {self.attention_levels} must index channel_mult {self.channel_mult}")
        for i in {*self.attention_levels, len(self.channel_mult) - 1}:
            if self.widths[i] % self.head_channels:
                raise ValueError(
                    f"{self.widths[i]} channels at level {i} do not divide into heads of "
                    f"head_channels={self.head_channels}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(round(m * self.model_channels) for m in self.channel_mult)

    @property
    def multiple(self) -> int:
        """What a picture's sides must be multiples of."""
        return 2 ** (len(self.channel_mult) - 1)


class SelfAttention(nn.Module):
    """Multi-head attention over the positions of a feature map, around a skip, in heads of `head_channels`."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.num_heads = channels // head_channels
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2)).transpose(1, 2)  # (B, h*w, 3 C)
        # -> 3 of (B, heads, h*w, C / heads); the released models hold q, k, v per head
        q, k, v = qkv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj_out(y.transpose(2, 3).flatten(1, 2))  # (B, C, h*w)
        return x + y.unflatten(2, x.shape[2:])


class ADM(UShaped):
    """Predicts the noise in pictures and the variance of the step back, given the timestep and perhaps a class."""

    def __init__(self, config: ADMConfig):
        super().__init__()
        self.config = config
        C, widths = config.model_channels, config.widths
        emb_dim, top = 4 * C, len(widths) - 1

        def residual(in_channels: int, out_channels: int, resample: Literal["down", "up"] | None = None) -> ResBlock:
            return ResBlock(in_channels, out_channels, emb_dim, scale_shift=True, resample=resample)

        def block(in_channels: int, level: int) -> Layers:
            layers = Layers([residual(in_channels, widths[level])])
            if level in config.attention_levels:
                layers.append(SelfAttention(widths[level], config.head_channels))
            return layers

        self.time_embed = nn.Sequential(nn.Linear(C, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, emb_dim)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Layers([nn.Conv2d(config.in_channels, channels, 3, padding=1)])])
        skip_channels = [channels]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(block(channels, level))
                channels = width
                skip_channels.append(channels)
            if level < top:
                self.input_blocks.append(Layers([residual(channels, channels, "down")]))
                skip_channels.append(channels)

        self.middle_block = Layers(
            [residual(channels, channels), SelfAttention(channels, config.head_channels), residual(channels, channels)]
        )

        self.output_blocks = nn.ModuleList()
        for level in range(top, -1, -1):
            for i in range(config.num_res_blocks + 1):
                layers = block(channels + skip_channels.pop(), level)
                channels = widths[level]
                if level > 0 and i == config.num_res_blocks:
                    layers.append(residual(channels, channels, "up"))
                self.output_blocks.append(layers)

        self.out = nn.Sequential(
            nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1)
        )

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The noise and the variance's interpolation (B, 6, H, W): three channels each.

        `x_t` (B, 3, H, W) are noised pictures of [-1, 1], `t` (B,) timesteps of the 1000, `y` (B,) classes.

        Raises:
            ValueError: for sides that are not multiples of `config.multiple`, and for classes that a conditional model
                lacks or an unconditional one is given.
        """
        if any(side % self.config.multiple for side in x_t.shape[2:]):
            raise ValueError(
                f"this network takes pictures with sides that are multiples of {self.config.multiple}, "
                f"not {x_t.shape[3]}x{x_t.shape[2]} (width x height)"
            )
        if (y is None) != (self.config.num_classes is None):
            given = "no classes y" if y is None else "classes y"
            raise ValueError(f"{given} for a network with num_classes={self.config.num_classes}: one needs the other")
        # The angles need float32; from here on the parameters decide the precision.
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x_t.dtype))  # (B, 4 C)
        if y is not None:
            emb = emb + self.label_emb(y)
        return self.walk(x_t, emb)
