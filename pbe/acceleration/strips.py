"""The autoencoder of large pictures in strips of rows: the same result in less memory.

The feature maps at the picture's own size take the memory: of 2048x2048 pixels 2 GiB in 16 bits for the decoder's 256
channels, and twice as much for what lies between two convolutions. Here each layer goes over strips of rows, read with
the rows beside them that a kernel reaches. Only a residual block's input and its hidden map are ever whole, and its
output takes its input's place. GroupNorm has the statistics of the whole map, and attention sees all positions: nothing
is blended or left out, and only the rounding differs.
"""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pbe.models.blocks import of_kind
from pbe.models.vae import AttnBlock, AutoencoderKL, Decoder, Encoder, Level, Middle, ResnetBlock, pad_to_multiple

# The most pixels of a picture that goes through whole, with a peak of 1.5 GiB in 16 bits.
WHOLE_PIXELS = 2**20
# The pixels of a part of a batch: enough to keep any device busy; its peak of 0.4 GiB is below that of a UNet on 4
# such pictures.
PART_PIXELS = 2**18
# The values of one strip: 64 MiB in 16 bits. The rows read twice are 2 of 64 in a picture 2048 pixels wide.
STRIP_VALUES = 2**25
# The queries whose scores torch holds at once where it has no fused attention.
MAX_QUERIES = 8192

Layer = Callable[[Tensor], Tensor]
Network = TypeVar("Network", Encoder, Decoder)


class StripVAE(AutoencoderKL):
    """An `AutoencoderKL` made of the same layers that takes large pictures in strips, large batches in parts."""

    def __init__(self, vae: AutoencoderKL):
        nn.Module.__init__(self)  # the networks are there already
        self.config = vae.config
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv

    def moments(self, image: Tensor) -> Tensor:
        image = pad_to_multiple(image, self.config.downsampling)
        pixels = image.shape[2] * image.shape[3]
        return self.quant_conv(in_parts(self.encoder, encode_in_strips, image, pixels))

    def decode(self, z_0: Tensor) -> Tensor:
        pixels = z_0.shape[2] * z_0.shape[3] * self.config.downsampling**2
        z = self.post_quant_conv(z_0 / self.config.latent_scale)
        return in_parts(self.decoder, decode_in_strips, z, pixels)


def in_parts(network: Network, by_strips: Callable[[Network, Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
    """The network's output for a batch x of pictures of `pixels` pixels each: in parts, or each in strips."""
    if pixels > WHOLE_PIXELS:
        return torch.cat([by_strips(network, one) for one in x.split(1)])
    return torch.cat([network(part) for part in x.split(max(1, PART_PIXELS // pixels))])


@torch.no_grad()
def encode_in_strips(encoder: Encoder, image: Tensor) -> Tensor:
    """`Encoder.forward` of an image (B, 3, H, W)."""
    x = in_strips(encoder.conv_in, image)
    for i, level in enumerate(of_kind(encoder.down, Level)):
        for block in of_kind(level.block, ResnetBlock):
            x = residual_block(block, x)
        if i < len(encoder.down) - 1:
            x = in_strips(level.downsample, x, above=0, below=2)
    x = middle(encoder.mid, x)
    return convolved(encoder.norm_out, encoder.conv_out, x)


@torch.no_grad()
def decode_in_strips(decoder: Decoder, z: Tensor) -> Tensor:
    """`Decoder.forward` of latents (B, z, h, w)."""
    x = middle(decoder.mid, in_strips(decoder.conv_in, z))
    for i, level in reversed([*enumerate(of_kind(decoder.up, Level))]):
        # not in a function of its own: its caller would keep the x that it is given
        for block in of_kind(level.block, ResnetBlock):
            x = residual_block(block, x)
        if i > 0:
            x = in_strips(level.upsample, x)
    return convolved(decoder.norm_out, decoder.conv_out, x)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks; each may overwrite x


def residual_block(block: ResnetBlock, x: Tensor) -> Tensor:
    h = convolved(block.norm1, block.conv1, x)
    skip = shortcut(block.nin_shortcut, x, h.shape[1])
    y = convolved(block.norm2, block.conv2, h, onto=skip)
    return h.copy_(y) if h.shape[1] < x.shape[1] else y  # else x's memory would stay, of which y is a part


def shortcut(layer: nn.Module, x: Tensor, channels: int) -> Tensor:
    """layer(x), a 1x1 convolution or the identity, in x's place if it has no more channels."""
    if isinstance(layer, nn.Identity):
        return x
    if channels > x.shape[1]:
        return in_strips(layer, x, above=0, below=0)
    for rows in strips(x):
        x[:, :channels, rows] = layer(x[:, :, rows])
    return x[:, :channels]


def middle(mid: Middle, x: Tensor) -> Tensor:
    x = residual_block(mid.block_1, x)
    x = attention(mid.attn_1, x)
    return residual_block(mid.block_2, x)


def attention(block: AttnBlock, x: Tensor) -> Tensor:
    B, C, h, w = x.shape
    y = block.norm(x)
    # (B, C, h, w) -> (B, 1 head, h*w, C); in another order torch would not take a fused kernel
    q, k, v = (conv(y).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for conv in (block.q, block.k, block.v))
    y = torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(MAX_QUERIES, dim=2)], dim=2)
    return x + block.proj_out(y.squeeze(1).transpose(1, 2).reshape(B, C, h, w))


# ----------------------------------------------------------------------------------------------------------------------
# Strips


def strips(x: Tensor) -> Iterator[slice]:
    """The rows of x (B, C, H, W) in strips of an even number, which halving and doubling keep whole."""
    B, C, H, W = x.shape
    step = max(2, STRIP_VALUES // (B * C * W) // 2 * 2)
    return (slice(start, min(start + step, H)) for start in range(0, H, step))


def in_strips(layer: Layer, x: Tensor, above: int = 1, below: int = 1, onto: Tensor | None = None) -> Tensor:
    """layer(x) of x (B, C, H, W), strip by strip; with `onto` the sum of both, in its place.

    The layer gives as many rows as it takes, or twice or half as many. For a row of its output it reads the rows of x
    from `above` above to `below` below.
    """
    H, y = x.shape[2], onto
    for rows in strips(x):
        first, last = max(0, rows.start - above), min(H, rows.stop + below)
        part = layer(x[:, :, first:last])
        taken, given = last - first, part.shape[2]
        start, stop, skipped = (n * given // taken for n in (rows.start, rows.stop, rows.start - first))
        part = part[:, :, skipped : skipped + stop - start]
        if y is None:
            y = empty_rows(part, H * given // taken)
        if onto is None:
            y[:, :, start:stop] = part
        else:
            y[:, :, start:stop] += part
    assert y is not None, "a picture has rows"
    return y


def empty_rows(part: Tensor, height: int) -> Tensor:
    """An empty tensor like `part` (B, C, rows, W), but with `height` rows, in its memory format."""
    B, C, _, W = part.shape
    return torch.empty(B, C, height, W, dtype=part.dtype, device=part.device, memory_format=memory_format(part))


def memory_format(part: Tensor) -> torch.memory_format:
    return torch.channels_last if part.stride(1) == 1 else torch.contiguous_format


def convolved(norm: nn.GroupNorm, conv: nn.Module, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """conv(SiLU(norm(x))), a 3x3 convolution; with `onto` the sum of both, in its place."""
    scale, shift = affine(norm, x)

    def layer(part: Tensor) -> Tensor:
        y = torch.addcmul(shift, part.to(scale.dtype), scale)
        return conv(F.silu(y, inplace=True).to(part.dtype))

    return in_strips(layer, x, onto=onto)


def affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """What GroupNorm multiplies x (B, C, H, W) by and adds to it, (B, C, 1, 1) each, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    moments = []
    for rows in strips(x):
        part = x[:, :, rows].to(wide)
        # only a CPU's kernel takes channels-last, and a GPU's refuses it
        part = part.contiguous(memory_format=memory_format(part) if part.is_cpu else torch.contiguous_format)
        B, C, H, W = part.shape
        # by far the fastest way to moments (B, groups) in both memory formats
        _, mean, rstd = torch.native_group_norm(part, None, None, B, C, H * W, norm.num_groups, 0.0)
        moments.append((mean, rstd**-2, H / x.shape[2]))
    mean = reduce(torch.add, [share * m for m, _, share in moments])
    var = reduce(torch.add, [share * (v + (m - mean) ** 2) for m, v, share in moments])  # within strips and between
    times = x.shape[1] // norm.num_groups
    scale = norm.weight * (var + norm.eps).rsqrt().repeat_interleave(times, dim=1)  # (B, C)
    shift = norm.bias - mean.repeat_interleave(times, dim=1) * scale
    return scale[:, :, None, None], shift[:, :, None, None]
