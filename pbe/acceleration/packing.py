"""Weights in the layout that a device computes fastest in.

On a CPU oneDNN computes with blocked weights, and reorders plain ones at every call; packed once, deep convolutions run
up to twice as fast. Elsewhere convolutions get channels-last weights, and with them channels-last activations, where
kernels are made for those: on CUDA in 16 bits.
"""

import torch
from torch import Tensor, nn

from pbe.acceleration.layers import swap
from pbe.checkpoints.formats.lazy_tensors import release_mapped


class PackedConv2d(nn.Module):
    """`conv` with its weight in oneDNN's blocked layout; channels-last in and out."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        size = [2, conv.in_channels, 16, 16]  # any size does
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            conv.weight.detach(), self.padding, self.stride, self.dilation, self.groups, size
        )
        self.bias = None if conv.bias is None else conv.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


class PackedLinear(nn.Module):
    """`linear` with its weight in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear | nn.Conv2d):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().flatten(1))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedPointwise(PackedLinear):
    """A 1x1 convolution as a linear layer over the channels, channels-last in and out.

    As a convolution its best layout depends on the picture's size, and another one costs thirty times the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def relayout(module: nn.Module, device: torch.device, dtype: torch.dtype, packed: bool) -> None:
    """Gives the layers inside, which are on `device` already, the weights that are fastest there, in `dtype`.

    With `packed` also in layouts that only oneDNN knows.
    """
    if packed and can_pack(device, dtype):
        pack(module, dtype)
    elif device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32):
        to_channels_last(module, dtype)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this precision."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Replaces the convolutions and linear layers inside, and gives their pages of a mapped file back."""
    sizes = (layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    buffer = torch.empty(max(sizes, default=0), dtype=dtype)

    def packed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
        stored = layer.weight.detach()
        layer.weight = nn.Parameter(staged(stored, buffer), requires_grad=False)
        convert(layer, dtype)
        if isinstance(layer, nn.Linear):
            form: nn.Module = PackedLinear(layer)
        elif layer.kernel_size == layer.stride == (1, 1):
            form = PackedPointwise(layer)
        else:
            form = PackedConv2d(layer)
        release_mapped(stored)
        return form

    swap(module, nn.Conv2d, packed)
    swap(module, nn.Linear, packed)


def staged(weight: Tensor, buffer: Tensor) -> Tensor:
    """The weight in the buffer's precision, written over the buffer; one of four dimensions channels-last.

    oneDNN packs a kernel in another order by way of memory that is fresh for each layer, and the system takes longer to
    give that than packing takes.
    """
    place = buffer[: weight.numel()]
    if weight.ndim == 4:
        out, into, height, width = weight.shape
        # converted first: together with the change of order it takes longer
        return place.view(out, height, width, into).permute(0, 3, 1, 2).copy_(weight.to(buffer.dtype))
    return place.view(weight.shape).copy_(weight)


def to_channels_last(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives convolutions their own weights in channels-last order, one by one."""
    convert(module, dtype)
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            weight = child.weight.detach()
            # not `contiguous`, which leaves 1x1 kernels the strides by which CUDA takes them for channels-first
            child.weight = nn.Parameter(weight.to(memory_format=torch.channels_last), requires_grad=False)
            release_mapped(weight)


def convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Converts the parameters inside to `dtype`, one by one, and gives their pages of a mapped file back."""
    for parameter in module.parameters():
        if parameter.dtype != dtype:
            stored = parameter.detach()
            parameter.data = stored.to(dtype)
            release_mapped(stored)
