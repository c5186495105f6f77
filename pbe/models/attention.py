"""Scaled dot-product attention, by whichever way of PyTorch is fast where it runs."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SCORES = 1024**2
"""Up to how many scores of one head are held at once: more of them would take memory that a training run needs."""


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """Of queries (B, heads, N, d) over keys and values (B, heads, T, d): (B, heads, N, d). Vaswani et al. 2017 (arXiv
    1706.03762), equation 1; `is_causal` hides later positions.

    Training in bfloat16 on a CPU, PyTorch's fused kernel takes 2 to 20 times as long for its backward pass as the plain
    products do, the more the fewer the channels of a head.
    """
    fused_is_slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if fused_is_slow and not is_causal and q.shape[-2] * k.shape[-2] <= MAX_SCORES:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, T)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
