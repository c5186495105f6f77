"""Editing on a small card: each network is on the device only while it computes.

model = offload(pbe.load_model("model.ckpt", device="cpu", dtype="float16"), "cuda")
pictures = pbe.edit(model, "photo.png", "mask.png", "exemplar.png")
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pbe.acceleration.prepare import PreparedModel
from pbe.models.paint_by_example import PaintByExample


def offload(model: PaintByExample, device: str | torch.device) -> PaintByExample:
    """The model itself, with its networks in the CPU's memory, from where `pbe.edit` copies each to `device` in turn.

    The projection and the learned vector stay on the device: they say where and in what precision the model computes,
    and `prepare_for_inference` chooses its layouts for that device. So do what is small: a tiny decoder, and a detail
    adapter's resampler.

    Raises:
        ValueError: for a prepared model, whose layouts may be those of the device that it was prepared on.
    """
    if isinstance(model, PreparedModel):
        raise ValueError("offload the model before it is prepared: its layouts are those of one device")
    model.to("cpu")
    for network in filter(None, (model.proj_out, model.tiny_decoder, model.detail)):
        network.to(device)
    model.learnable_vector = nn.Parameter(model.learnable_vector.detach().to(device))
    return model


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A context in which the module's parameters are on `device`; afterwards they are where they were before.

    Parameters from elsewhere are copied there, and the copies are dropped afterwards: changes to them are lost.
    """
    parameters = list(module.parameters())
    homes = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = copied(parameter.data, device)
        yield
    finally:
        for parameter, home in zip(parameters, homes, strict=True):
            parameter.data = home


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, in its memory format; the same tensor if it is there already."""
    return tensor.to(device)
