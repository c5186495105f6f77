"""The UNet for sampling: all that depends only on the timesteps and the context is computed before the loop."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pbe.acceleration.layers import FusedSelfAttention, PhaseUpsample
from pbe.models.blocks import ResBlock, timestep_embedding
from pbe.models.unet import SpatialTransformer, TransformerBlock, UNet, Upsample


class ShiftedBlock(nn.Module):
    """A residual block that finds what the timestep adds in it at `columns` of all blocks' shifts."""

    def __init__(self, block: ResBlock, start: int):
        super().__init__()
        self.block = block
        self.columns = slice(start, start + block.emb_layers[1].out_features)

    def shift(self, emb: Tensor) -> Tensor:
        return self.block.emb_layers(emb)

    def forward(self, x: Tensor, shifts: Tensor) -> Tensor:
        return self.block.body(x, copies(shifts[:, self.columns], len(x)))


class FoldedBlock(nn.Module):
    """A transformer block for a context of one token.

    Attention over one token has softmax 1: it is to_out(to_v(context)) at every position and step. `columns` is its
    place in all blocks' constants. Query, key and their norm are not needed.
    """

    def __init__(self, block: TransformerBlock, start: int, tile: bool):
        super().__init__()
        self.norm1, self.attn1 = block.norm1, FusedSelfAttention(block.attn1, tile)
        self.to_v, self.to_out = block.attn2.to_v, block.attn2.to_out
        self.norm3, self.ff = block.norm3, block.ff
        self.columns = slice(start, start + block.norm3.normalized_shape[0])

    def constant(self, context: Tensor) -> Tensor:
        """(K, C) of contexts (K, 1, context_dim)."""
        return self.to_out(self.to_v(context)).squeeze(1)

    def forward(self, x: Tensor, constants: Tensor) -> Tensor:
        return self.body(x, constants[:, None, self.columns])

    def body(self, x: Tensor, constant: Tensor) -> Tensor:
        """The block, given what its attention over the context adds, (K, 1, C): the same for all positions."""
        x = x + self.attn1(self.norm1(x))
        x = copies(x, len(constant)) + constant
        return x + self.ff(self.norm3(x))


class FusedBlock(nn.Module):
    """A transformer block for a context of several tokens."""

    def __init__(self, block: TransformerBlock, tile: bool):
        super().__init__()
        self.norm1, self.attn1 = block.norm1, FusedSelfAttention(block.attn1, tile)
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = copies(x, len(context))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class PreparedTransformer(nn.Module):
    """`SpatialTransformer` of prepared blocks; from the first one on there is a sample for each context."""

    def __init__(self, transformer: SpatialTransformer, blocks: list[FoldedBlock] | list[FusedBlock]):
        super().__init__()
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h*w, C)
        for block in self.transformer_blocks:
            y = block(y, context)
        y = y.transpose(1, 2).unflatten(2, (h, w))  # (K, C, h, w)
        return copies(x, len(y)) + self.proj_out(y)


class PreparedUNet(nn.Module):
    """`UNet` made of the same weights, which it takes apart: `unet` itself is not whole afterwards.

    Called as `UNet` it predicts the same noise. A sampling loop calls `bind`, which computes what the contexts and
    timesteps contribute once, and shares what several contexts of a sample have in common: everything up to the
    first attention over the context.
    """

    def __init__(self, unet: UNet, one_token: bool, sum_phases: bool, tile_attention: bool):
        super().__init__()
        self.config, self.one_token = unet.config, one_token
        self.time_embed, self.out = unet.time_embed, unet.out
        self.input_blocks, self.middle_block = unet.input_blocks, unet.middle_block
        self.output_blocks = unet.output_blocks

        shifts = constants = 0  # columns given out
        for layers in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for i, layer in enumerate(layers):
                if isinstance(layer, ResBlock):
                    layers[i] = ShiftedBlock(layer, shifts)
                    shifts = layers[i].columns.stop
                elif isinstance(layer, SpatialTransformer):
                    blocks = []
                    for block in layer.transformer_blocks:
                        if one_token:
                            blocks.append(FoldedBlock(block, constants, tile_attention))
                            constants = blocks[-1].columns.stop
                        else:
                            blocks.append(FusedBlock(block, tile_attention))
                    layers[i] = PreparedTransformer(layer, blocks)
                elif isinstance(layer, Upsample) and sum_phases:
                    layers[i] = PhaseUpsample(layer.conv)

    def forward(self, unet_in: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """As `UNet.forward`; the noise (K, out_channels, h, w) for K contexts, a multiple of the B samples."""
        return self.predict(unet_in, self.shifts(t, unet_in.dtype), self.folded(context))

    def bind(self, context: Tensor, timesteps: Sequence[int] = ()) -> Callable[[Tensor, Tensor], Tensor]:
        """predict(unet_in (B, 9, h, w), t (B,)) → noise (K, 4, h, w) for contexts (K, T, context_dim).

        With `timesteps`, all that they contribute is computed at once. The closure must then be given no other ones:
        it looks them up on the device, where a check would cost a wait at every step, and gives NaN for those between
        them; one above them all is an index out of bounds.

        Raises:
            ValueError: for contexts of several tokens, if the model was prepared for one.
        """
        folded = self.folded(context)
        if not timesteps:
            return lambda unet_in, t: self.predict(unet_in, self.shifts(t, unet_in.dtype), folded)
        t = torch.tensor(sorted(set(timesteps)), device=context.device)
        table = self.shifts(t, context.dtype)
        table = torch.cat([table, torch.full_like(table[:1], torch.nan)])
        row = torch.full((max(timesteps) + 1,), len(t), device=t.device)  # t → its row, the last one for others
        row[t] = torch.arange(len(t), device=t.device)
        return lambda unet_in, t: self.predict(unet_in, table[row[t]], folded)

    def shifts(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """What timesteps t (B,) contribute to all residual blocks, side by side: (B, their channels)."""
        emb = timestep_embedding(t, self.config.model_channels).to(dtype)
        emb = self.time_embed(emb)
        return torch.cat([m.shift(emb) for m in self.modules() if isinstance(m, ShiftedBlock)], dim=1)

    def folded(self, context: Tensor) -> Tensor:
        """What contexts (K, 1, context_dim) contribute to all transformer blocks, side by side: (K, their channels).

        Several tokens are attended to at every step: for a model prepared for them the context remains as it is.
        """
        if not self.one_token:
            return context
        if context.shape[1] != 1:
            raise ValueError(
                f"this model is prepared for a context of one token, not {context.shape[1]}: "
                "use the model that it was prepared from"
            )
        return torch.cat([m.constant(context) for m in self.modules() if isinstance(m, FoldedBlock)], dim=1)

    def predict(self, unet_in: Tensor, shifts: Tensor, context: Tensor) -> Tensor:
        """The noise (K, 4, h, w) of unet_in (B, 9, h, w), given `shifts` and `folded`."""
        x = unet_in
        skips = []
        for layers in self.input_blocks:
            x = run(layers, x, shifts, context)
            skips.append(x)
        x = run(self.middle_block, x, shifts, context)
        for layers in self.output_blocks:
            x = torch.cat([x, copies(skips.pop(), len(x))], dim=1)
            size = skips[-1].shape[-2:] if skips else x.shape[-2:]
            x = run(layers, x, shifts, context, size)
        return self.out(x)


def run(
    layers: nn.ModuleList, x: Tensor, shifts: Tensor, context: Tensor, size: tuple[int, int] | None = None
) -> Tensor:
    """Applies one entry of `input_blocks` or `output_blocks`, handing each layer what it takes."""
    for layer in layers:
        if isinstance(layer, ShiftedBlock):
            x = layer(x, shifts)
        elif isinstance(layer, PreparedTransformer):
            x = layer(x, context)
        elif isinstance(layer, PhaseUpsample | Upsample):
            x = layer(x, *size)
        else:
            x = layer(x)
    return x


def copies(x: Tensor, count: int) -> Tensor:
    """x (B, …) one after the other until there are `count` samples; x itself if there are as many."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))
