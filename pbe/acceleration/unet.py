"""The UNet for sampling: all that depends only on the timesteps and the context is computed before the loop."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from pbe.acceleration.layers import FusedSelfAttention, PhaseUpsample, swap
from pbe.models.blocks import Context, ResBlock, Signals, copies, of_kind, timestep_embedding
from pbe.models.detail import DetailAttention, split
from pbe.models.unet import TransformerBlock, UNet, Upsample

# The input blocks from the first on, and the output blocks up to the last, that run where deep features are reused:
# DeepCache's choice, a tenth to a seventh of the time. With 2, in bfloat16, N = 3 gains 1.7 times rather than 2.35.
SHALLOW = 1


class ShiftedBlock(nn.Module):
    """A residual block to which the timestep adds `columns` of the shifts of all blocks, side by side."""

    takes = ("emb",)
    columns: slice

    def __init__(self, block: ResBlock):
        super().__init__()
        self.block, self.channels = block, block.emb_channels

    def shift(self, emb: Tensor) -> Tensor:
        return self.block.emb_layers(emb)

    def forward(self, x: Tensor, shifts: Tensor) -> Tensor:
        return self.block.body(x, copies(shifts[:, self.columns], x.shape[0]))


class FoldedDetail(nn.Module):
    """Attention over detail tokens that stay the same, with its queries and its output folded into them.

    The score of head h at y = norm2(x) and token j is W_q,h y · k_hj / sqrt(d) = y · (W_q,h' k_hj / sqrt(d)), and
    W_o Σ p_hj v_hj = Σ p_hj (W_o,h v_hj): two products with H D rows in the place of two with C.
    """

    def __init__(self, norm2: nn.LayerNorm, attention: DetailAttention):
        super().__init__()
        self.norm2, self.num_heads, self.num_detail = norm2, attention.num_heads, attention.num_detail
        self.to_k_detail, self.to_v_detail = attention.to_k_detail, attention.to_v_detail
        (to_out,) = of_kind(attention.to_out, nn.Linear)
        # parameters, and no layers: packed ones could not be transposed
        self.w_q, self.w_o = attention.to_q.weight, to_out.weight

    def rows(self, context: Tensor) -> Tensor:
        """(K, 2 H D, C) of contexts (K, 1 + D or 1 + 2 D, context_dim), the keys' first."""
        _, for_keys, for_values = split(context, 1, self.num_detail)
        by_head = (self.num_heads, -1)
        k = self.to_k_detail(for_keys).unflatten(-1, by_head)  # (K, D, H, d)
        v = self.to_v_detail(for_values).unflatten(-1, by_head)
        k = torch.einsum("kthd,hdc->khtc", k * k.shape[-1] ** -0.5, self.w_q.unflatten(0, by_head))
        v = torch.einsum("kthd,chd->khtc", v, self.w_o.unflatten(1, by_head))
        return torch.cat([k.flatten(1, 2), v.flatten(1, 2)], dim=1)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        keys, values = rows.chunk(2, dim=1)  # (K, H D, C) each
        scores = self.norm2(x) @ keys.transpose(1, 2)  # (K, N, H D)
        return scores.unflatten(-1, (self.num_heads, -1)).softmax(dim=-1).flatten(-2) @ values


class FoldedBlock(nn.Module):
    """A transformer block for a context of one token, and perhaps tokens of detail.

    Attention over one token has softmax 1: it is to_out(to_v(context)) at every position and step, and query, key and
    their norm are not needed but for detail. `number` is the block's place among all of them.
    """

    number: int

    def __init__(self, block: TransformerBlock, tile: bool):
        super().__init__()
        self.norm1, self.attn1 = block.norm1, FusedSelfAttention(block.attn1, tile)
        self.to_v, self.to_out = block.attn2.to_v, block.attn2.to_out
        self.norm3, self.ff = block.norm3, block.ff
        attn2 = block.attn2
        self.detail = FoldedDetail(block.norm2, attn2) if isinstance(attn2, DetailAttention) else None

    def folded(self, context: Tensor) -> Tensor:
        """(K, 1, C) of contexts (K, 1, context_dim): what they add at all positions. Where detail's tokens follow in
        them, so do the rows of `FoldedDetail`."""
        rows = self.to_out(self.to_v(context[:, :1]))
        if self.detail is None or context.shape[1] == 1:
            return rows
        return torch.cat([rows, self.detail.rows(context)], dim=1)

    def forward(self, x: Tensor, folded: Sequence[Tensor]) -> Tensor:
        return self.body(x, folded[self.number])

    def body(self, x: Tensor, folded: Tensor) -> Tensor:
        """The block, given what `folded` made of the contexts."""
        x = x + self.attn1(self.norm1(x))
        x = copies(x, folded.shape[0])
        attended = folded[:, :1]
        if self.detail is not None and folded.shape[1] > 1:
            attended = attended + self.detail(x, folded[:, 1:])
        x = x + attended
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
        x = copies(x, context.shape[0])
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class PreparedUNet(UNet):
    """A `UNet` made of another one's layers, which it replaces in place: `unet` cannot be used afterwards.

    Called as `UNet` it predicts the same noise. A sampling loop calls `bind`, which computes what the contexts and
    timesteps contribute once, and shares what several contexts of a sample have in common: everything up to the
    first attention over the context.
    """

    def __init__(self, unet: UNet, one_token: bool, sum_phases: bool, tile_attention: bool):
        nn.Module.__init__(self)  # the layers are there already
        self.config, self.one_token = unet.config, one_token
        self.time_embed, self.out = unet.time_embed, unet.out
        self.input_blocks, self.middle_block = unet.input_blocks, unet.middle_block
        self.output_blocks = unet.output_blocks

        swap(self, ResBlock, ShiftedBlock)
        swap(self, TransformerBlock, partial(FoldedBlock if one_token else FusedBlock, tile=tile_attention))
        if sum_phases:
            swap(self, Upsample, lambda layer: PhaseUpsample(layer.conv))
        start = 0
        for shifted in of_kind(self.modules(), ShiftedBlock):
            shifted.columns = slice(start, start + shifted.channels)
            start += shifted.channels
        for number, folded in enumerate(of_kind(self.modules(), FoldedBlock)):
            folded.number = number

    def forward(self, unet_in: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """As `UNet.forward`; the noise (K, out_channels, h, w) for K contexts, a multiple of the B samples."""
        return self.predict(unet_in, self.shifts(t, unet_in.dtype), self.folded(context))

    def bind(
        self, context: Tensor, timesteps: Sequence[int] = (), reuse: int = 1
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """predict(unet_in (B, 9, h, w), t (B,)) → noise (K, 4, h, w) for contexts (K, T, context_dim).

        With `timesteps`, all that they contribute is computed at once. The closure must then be given no other ones:
        it looks them up on the device, where a check would cost a wait at every step, and gives NaN for those between
        them; one above them all is an index out of bounds.

        With `reuse` N only the closure's first of every N calls runs the whole network. The others take the deep
        features of that one (DeepCache, Ma et al. 2023, arXiv 2312.00858) and run the outermost block at either end: an
        approximation, good where calls follow each other closely in t, for the same samples. Calls are counted, not
        steps: a sampler that evaluates twice in a step takes two of the N.

        Raises:
            ValueError: for contexts of several tokens, if the model was prepared for one; for `reuse` below 1.
        """
        if reuse < 1:
            raise ValueError(f"reuse must be at least 1, which is off, got {reuse}")
        folded = self.folded(context)
        shifts = self.table(timesteps, context) if timesteps else self.shifts
        if reuse == 1:
            return lambda unet_in, t: self.predict(unet_in, shifts(t, unet_in.dtype), folded)
        calls, deep = count(), None

        def predict(unet_in: Tensor, t: Tensor) -> Tensor:
            nonlocal deep
            deep = deep if next(calls) % reuse else None
            noise, deep = self.predict_from(unet_in, shifts(t, unet_in.dtype), folded, deep)
            return noise

        return predict

    def table(self, timesteps: Sequence[int], context: Tensor) -> Callable[[Tensor, torch.dtype], Tensor]:
        """`shifts` for these timesteps alone, computed at once in the context's dtype."""
        t = torch.tensor(sorted(set(timesteps)), device=context.device)
        table = self.shifts(t, context.dtype)
        table = torch.cat([table, torch.full_like(table[:1], torch.nan)])
        row = torch.full((max(timesteps) + 1,), len(t), device=t.device)  # t → its row, the last one for others
        row[t] = torch.arange(len(t), device=t.device)
        return lambda t, dtype: table[row[t]]

    def shifts(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """What timesteps t (B,) contribute to all residual blocks, side by side: (B, their channels)."""
        emb = timestep_embedding(t, self.config.model_channels).to(dtype)
        emb = self.time_embed(emb)
        return torch.cat([block.shift(emb) for block in of_kind(self.modules(), ShiftedBlock)], dim=1)

    def folded(self, context: Tensor) -> Context:
        """What each of the transformer blocks makes of contexts (K, 1, context_dim), and detail's tokens after them.

        Several tokens are attended to at every step: for a model prepared for them the context remains as it is.
        """
        if not self.one_token:
            return context
        blocks = of_kind(self.modules(), FoldedBlock)
        if context.shape[1] != 1 and not any(block.detail for block in blocks):
            raise ValueError(
                f"this model is prepared for a context of one token, not {context.shape[1]}: "
                "use the model that it was prepared from"
            )
        return tuple(block.folded(context) for block in blocks)

    def predict(self, unet_in: Tensor, shifts: Tensor, context: Context) -> Tensor:
        """The noise (K, 4, h, w) of unet_in (B, 9, h, w), given `shifts` and `folded`."""
        return self.walk(unet_in, shifts, context)

    def predict_from(
        self, unet_in: Tensor, shifts: Tensor, context: Context, deep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `predict`, and the deep features (K, C, h', w') that the outermost output block starts from.

        With `deep`, those of another call, neither they nor the blocks below are computed.
        """
        inputs, outputs = [*self.input_blocks], [*self.output_blocks]
        skips = self.descend(inputs if deep is None else inputs[:SHALLOW], unet_in, shifts, context)
        if deep is None:
            x = self.middle_block(skips[-1], Signals(shifts, context, skips[-1].shape[-2:]))
            deep = self.ascend(outputs[:-SHALLOW], x, skips, shifts, context)
        return self.out(self.ascend(outputs[-SHALLOW:], deep, skips, shifts, context)), deep
