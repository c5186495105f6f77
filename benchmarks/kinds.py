"""Where the arithmetic and the time of a network go, by kind of operation."""

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import network_classes
from pbe.acceleration import prepare_for_inference
from pbe.acceleration.packing import PackedConv2d, PackedLinear, PackedPointwise
from pbe.checkpoints.loading import build, open_recognised
from pbe.checkpoints.meta_device import build_on_meta
from pbe.models.paint_by_example import PaintByExample

KINDS = ("convolutions", "linear layers", "attention", "norms", "rest")
# by name, for diffusers' class has another parent
ATTENTION = ("Attention", "FusedSelfAttention", "AttnBlock")


def kind_of(module: nn.Module) -> str:
    """What a module computes itself, without the modules in it."""
    if isinstance(module, nn.Conv2d | PackedConv2d | PackedPointwise):
        return "convolutions"
    if isinstance(module, nn.Linear | PackedLinear):
        return "linear layers"
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return "norms"
    return "attention" if type(module).__name__ in ATTENTION else "rest"


def seconds_by_kind(network: nn.Module, call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The time of a call that runs `network`, divided among KINDS; on a GPU the time on its stream."""
    cuda = device.type == "cuda"

    def now() -> Any:  # seconds, or a CUDA event
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    running = ["rest"]  # the kinds of the modules that are being called, innermost last
    marks: list[tuple[Any, str]] = []  # moments, and the kind that runs from each on

    def enter(module: nn.Module, inputs: object) -> None:
        running.append(kind_of(module))
        marks.append((now(), running[-1]))

    def leave(module: nn.Module, inputs: object, output: object) -> None:
        running.pop()
        marks.append((now(), running[-1]))

    hooks = []
    for module in network.modules():
        if kind_of(module) != "rest":
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        marks.append((now(), "rest"))
        call()
        marks.append((now(), "rest"))
    finally:
        for hook in hooks:
            hook.remove()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = dict.fromkeys(KINDS, 0.0)
    for (start, kind), (end, _) in itertools.pairwise(marks):
        seconds[kind] += start.elapsed_time(end) / 1000 if cuda else end - start
    return seconds


def flops_by_kind(call: Callable[[], object]) -> dict[str, float]:
    """TFLOP of a call's products, which are nearly all of its arithmetic."""
    with FlopCounterMode(display=False) as counter:
        call()
    kinds = {"convolution": "convolutions", "mm": "linear layers", "addmm": "linear layers"}
    counts: dict[str, float] = {}
    for op, flops in counter.get_flop_counts()["Global"].items():
        kind = kinds.get(str(op).removeprefix("aten."), "attention")  # batched products
        counts[kind] = counts.get(kind, 0.0) + flops / 1e12
    return counts


@torch.no_grad()
def count_flops(
    ckpt: str, resolution: int, batch: int, diffusers: str | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """TFLOP by part ("unet": a call with both halves of guidance, or "decode"), form and kind.

    Forms are the "ordinary" networks, the "prepared" ones, those with "plain upsampling" and, from a folder, those of
    "diffusers". Nothing is computed and no weight is read.
    """
    model = build_on_meta(PaintByExample, build(open_recognised(ckpt)).config)
    side = resolution // model.config.vae.downsampling
    unet_in = torch.empty(batch, 9, side, side, device="meta")
    t = torch.empty(batch, device="meta")
    context = torch.empty(2 * batch, 1, model.config.unet.context_dim, device="meta")
    z = unet_in[:, :4]
    forms = {"prepared": prepare_for_inference(model)}
    forms["plain upsampling"] = prepare_for_inference(model, sum_phases=False)
    unet = {
        "ordinary": lambda: model.unet(torch.cat([unet_in] * 2), torch.cat([t] * 2), context),
    }
    decode = {"ordinary": lambda: model.vae.decode(z)}
    for form, prepared in forms.items():
        unet[form] = partial(prepared.unet, unet_in, t, context)
        decode[form] = partial(prepared.vae.decode, z)
    if diffusers:
        their_unet, their_vae = diffusers_on_meta(Path(diffusers))
        unet["diffusers"] = lambda: their_unet(torch.cat([unet_in] * 2), t[0], encoder_hidden_states=context)
        decode["diffusers"] = lambda: their_vae.decode(z)
    parts = {"unet": unet, "decode": decode}
    return {part: {form: flops_by_kind(call) for form, call in calls.items()} for part, calls in parts.items()}


def diffusers_on_meta(folder: Path) -> tuple[nn.Module, nn.Module]:
    """The UNet and the autoencoder of a diffusers folder, without weights."""
    classes = network_classes()
    with torch.device("meta"):
        unet, vae = (classes[name].from_config(classes[name].load_config(folder / name)) for name in ("unet", "vae"))
    return unet, vae
