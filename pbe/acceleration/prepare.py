"""A model's prepared form, and which of the two models owns which weights."""

import copy
from typing import Any, NoReturn, TypeVar, cast, get_args

import torch
from torch import nn

from pbe.acceleration.compiled import Compile, compile_networks, is_compiled
from pbe.acceleration.layers import PhaseUpsample, swap
from pbe.acceleration.packing import convert, relayout
from pbe.acceleration.strips import StripVAE
from pbe.acceleration.unet import PreparedUNet
from pbe.checkpoints.formats.lazy_tensors import release_mapped
from pbe.models.lora import merge_lora
from pbe.models.paint_by_example import PaintByExample
from pbe.models.vae import AutoencoderKL, Upsample

Network = TypeVar("Network", bound=nn.Module)


class PreparedModel(PaintByExample):
    """A `PaintByExample` for sampling alone; made by `prepare_for_inference`."""

    def __init__(self, model: PaintByExample, unet: PreparedUNet, vae: AutoencoderKL):
        nn.Module.__init__(self)  # the networks are there already
        self.config = model.config
        self.model = nn.ModuleDict({"diffusion_model": unet})
        self.first_stage_model = vae
        self.cond_stage_model = model.cond_stage_model
        self.proj_out, self.learnable_vector = model.proj_out, model.learnable_vector
        self.tiny_decoder, self.detail = model.tiny_decoder, model.detail

    @property
    def unet(self) -> PreparedUNet:
        """The denoising network: `unet(unet_in, t, context)`, and `bind` for a loop."""
        return cast(PreparedUNet, self.model["diffusion_model"])

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Always an error: no model could load it."""
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
    first layers, the embeddings of all timesteps are computed at once, self-attention's projections are one product,
    upsampling is fused with its convolution, and adapters (LoRA) are merged.

    The model stays as it is and shares its weights with the prepared one, which adds about 8 % of its own; so prepare
    again after the model's weights, device or precision have changed. The prepared model is not for training or saving.

    Args:
        consume: take the model's networks, so that `model` cannot be used afterwards. Layer by layer, the weights move
            into the layout that is fastest on the device: on a CPU oneDNN's, or channels-last if compiled; on CUDA in
            16 bits channels-last. What sampling does not need is freed, and so are the pages of a memory-mapped file.
        dtype: with `consume`, the precision to convert the weights to (default: the model's own). For a model loaded
            with dtype "stored" this takes less time and memory than converting it while loading.
        compile: "regions" or "whole", for many edits of one size: see `pbe.acceleration.compiled`.
        sum_phases: fuse upsampling with its convolution by summing kernels, which changes the rounding.
        tile_attention: on a CPU in bfloat16, compute self-attention in tiles, which rounds the scores to bfloat16;
            not if it is compiled.
        strips: encode and decode pictures of more than 1024x1024 pixels in strips of rows, which needs about half the
            memory and changes the rounding.

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
    prepared_unet = PreparedUNet(
        unet,
        one_token=model.config.exemplar.tokens == "class",
        sum_phases=sum_phases,
        tile_attention=tile_attention and compile is None,
    )
    if sum_phases:
        swap(vae.decoder, Upsample, lambda layer: PhaseUpsample(layer.conv))
    if strips:
        vae = StripVAE(vae)
    prepared = PreparedModel(model, prepared_unet, vae)
    if consume:
        for name, _ in list(model.named_children()):
            delattr(model, name)
        release_unneeded(given, prepared)
        dtype = dtype or prepared.dtype
        for network in filter(None, (prepared.unet, prepared.vae, prepared.tiny_decoder)):
            relayout(network, prepared.device, dtype, packed=compile is None)
        convert(prepared, dtype)
    if compile is not None:
        compile_networks(prepared, compile)
    return prepared


def release_unneeded(given: list[nn.Parameter], prepared: PreparedModel) -> None:
    """Gives back the pages of those mapped parameters that the prepared model does not hold.

    `given` is emptied: no list may keep the weights of layers that are replaced later.
    """
    needed = {id(parameter) for parameter in prepared.parameters()}
    while given:
        parameter = given.pop()
        if id(parameter) not in needed:
            release_mapped(parameter)


def shared_copy(module: Network) -> Network:
    """A copy of the module's tree, whose leaves hold the very same parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})
