"""A model's prepared form: who owns which weights."""

import copy
from typing import Any, NoReturn, get_args

import torch
from torch import nn

from pbe.acceleration.compiled import Compile, compile_networks, is_compiled
from pbe.acceleration.layers import PhaseUpsample
from pbe.acceleration.packing import convert, relayout
from pbe.acceleration.strips import StripVAE
from pbe.acceleration.unet import PreparedUNet
from pbe.checkpoints.formats.lazy_tensors import release_mapped
from pbe.models.lora import merge_lora
from pbe.models.paint_by_example import PaintByExample
from pbe.models.unet import UNet
from pbe.models.vae import AutoencoderKL


class PreparedModel(PaintByExample):
    """A `PaintByExample` for sampling alone; made by `prepare_for_inference`."""

    def __init__(self, model: PaintByExample, unet: PreparedUNet, vae: AutoencoderKL):
        nn.Module.__init__(self)  # the networks are there already
        self.config = model.config
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.first_stage_model = vae
        self.cond_stage_model = model.cond_stage_model
        self.proj_out, self.learnable_vector = model.proj_out, model.learnable_vector

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: nobody could load it."""
        raise RuntimeError("a prepared model cannot be saved: save the model that it was prepared from")


@torch.no_grad()
def prepare_for_inference(
    model: PaintByExample,
    *,
    consume: bool = False,
    dtype: torch.dtype | None = None,
    compile: Compile | None = None,
    sum_phases: bool = True,
    tile_attention: bool = True,
    strips: bool = True,
) -> PreparedModel:
    """The same model in a form that samples faster.

    The cross-attention over the exemplar's one token is folded to a constant, guidance's two halves share their
    beginning, the timesteps' embeddings are computed at once, self-attention's projections are one, upsampling is
    fused with its convolution, and adapters (LoRA) are merged.

    The model stays as it is and shares its weights with the prepared one, which adds about 8 % of its own; so prepare
    again after the model's weights, device or precision have changed. The prepared model is not for training or saving.

    Args:
        consume: give the model up. Its weights move, layer by layer, into the layout that its device computes fastest
            in: oneDNN's on a CPU, or channels-last if it is compiled; channels-last on CUDA in 16 bits. What sampling
            does not need is freed, and so are the pages of a memory-mapped file. `model` is left without its networks.
        dtype: with `consume`, the precision to convert the weights to on their way (default: the model's own). From a
            mapped model ("stored") this takes less time and memory than from a converted one.
        compile: "regions" or "whole", for many edits of one size: see `pbe.acceleration.compiled`.
        sum_phases: fuse upsampling with its convolution by summing kernels, which changes the rounding.
        tile_attention: on a CPU in bfloat16, compute self-attention in tiles, which rounds the scores to bfloat16;
            not if it is compiled.
        strips: take pictures of more than 1024x1024 pixels through the autoencoder in strips of rows, which needs about
            half the memory and changes the rounding.

    Raises:
        ValueError: for another kind of model, one that is prepared already, or one that was compiled; for a `dtype`
            without `consume`, or an unknown `compile`.
    """
    if not isinstance(model, PaintByExample) or isinstance(model, PreparedModel):
        raise ValueError(f"only an ordinary Paint by Example model can be prepared, not a {type(model).__name__}")
    if compile not in (None, *get_args(Compile)):
        raise ValueError(f"compile must be 'regions' or 'whole', got {compile!r}")
    for name, network in model.named_children():
        if is_compiled(network):
            raise ValueError(f"{name} is compiled, which would be lost: prepare the model before, with compile='whole'")
    if dtype is not None and not consume:
        raise ValueError(f"dtype={dtype} needs consume=True: without it the weights are shared with the model")
    unet, vae = model.unet, model.vae
    if not consume:
        unet, vae = shared_copy(unet), shared_copy(vae)
    given = list(model.parameters()) if consume else []
    merge_lora(unet)
    unet = PreparedUNet(
        unet,
        one_token=model.config.exemplar.tokens == "class",
        sum_phases=sum_phases,
        tile_attention=tile_attention and compile is None,
    )
    if sum_phases:
        for level in vae.decoder.up:
            if hasattr(level, "upsample"):
                level.upsample = PhaseUpsample(level.upsample.conv)
    if strips:
        vae = StripVAE(vae)
    prepared = PreparedModel(model, unet, vae)
    if consume:
        for name, _ in list(model.named_children()):
            delattr(model, name)
        needed = {id(parameter) for parameter in prepared.parameters()}
        while given:  # emptied, so that each layer's weights are freed with it
            parameter = given.pop()
            if id(parameter) not in needed:
                release_mapped(parameter)
        del parameter
        dtype = dtype or prepared.dtype
        for network in (unet, vae):
            relayout(network, prepared.device, dtype, packed=compile is None)
        convert(prepared, dtype)
    if compile is not None:
        compile_networks(prepared, compile)
    return prepared


def shared_copy(module: UNet | AutoencoderKL) -> UNet | AutoencoderKL:
    """The module's tree anew, its leaves holding the very same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})
