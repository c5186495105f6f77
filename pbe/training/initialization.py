"""Where training starts: a checkpoint's weights, or seeded ones, part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pbe.checkpoints.loading import build, load_model, open_recognised, open_vae
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.original_layouts import VAE_PREFIX
from pbe.io.fields import check_fields
from pbe.models.blocks import ResBlock
from pbe.models.detail import DetailAttention, Resampler, is_detail
from pbe.models.lora import is_adapter
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.unet import SpatialTransformer, TransformerBlock, UNet
from pbe.models.vae import AutoencoderKL, VAEConfig

Network = TypeVar("Network", bound=nn.Module)
Part = Literal["unet", "mapper", "final_ln", "proj_out", "null_context", "clip"]

# The parts of the model that can be trained or started again, by how their parameters' names begin. The autoencoder is
# not among them: the loss is measured in its latents, which it would learn to make constant.
PARTS: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "mapper": "cond_stage_model.mapper.",
    "final_ln": "cond_stage_model.final_ln.",
    "proj_out": "proj_out.",
    "null_context": "learnable_vector",
    "clip": "cond_stage_model.transformer.",
}


@dataclass
class ModelConfig:
    """What training starts from."""

    init: str = "scratch"
    """A checkpoint of Paint by Example in any layout that `pbe.load_model` reads, or "scratch". Of a file with averages
    too, training starts from the weights that they average."""
    reset: list[Part] = field(default_factory=list)
    """Parts that start from seeded weights, whatever `init` holds."""
    size: PaintByExampleConfig | None = None
    """From scratch only: the networks' sizes, but for the autoencoder's, which its file decides."""
    vae: str | None = None
    """From scratch only: a trained autoencoder, of the task `vae`, in a file or folder of its own, or in a model's."""
    tokens: Literal["class", "all"] | None = None
    """What passes of the exemplar, see `ExemplarConfig`; None: as `init` or `size` has it."""
    collage: bool | None = None
    """Whether the hole of the masked image shows the exemplar, see `pbe.models.collage`; None: as `init` or `size` has
    it."""

    def __post_init__(self) -> None:
        check_fields(self, "model")

    def changed(self, size: PaintByExampleConfig) -> PaintByExampleConfig:
        """What `init` or `size` has, with this config's own `tokens` and `collage`."""
        tokens = size.exemplar.tokens if self.tokens is None else self.tokens
        collage = size.collage if self.collage is None else self.collage
        return replace(size, exemplar=replace(size.exemplar, tokens=tokens), collage=collage)


def trained_names(model: PaintByExample, parts: Sequence[Part]) -> set[str]:
    """The names of the parameters of these parts that a gradient can reach."""
    prefixes = tuple(PARTS[part] for part in parts)
    names = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    if model.config.exemplar.num_tokens > 1:
        return names
    return names - {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, TransformerBlock)
        for name, _ in module.named_parameters()
        # The softmax over a single token is 1, whatever query and key are.
        if name.startswith(("norm2.", "attn2.to_q.", "attn2.to_k."))
    }


def is_trained_adapter(name: str) -> bool:
    """Whether a name in a checkpoint is an adapter's, or its average's."""
    return is_adapter(name) or is_detail(name) or name.startswith("model_ema.")


def starting_model(config: ModelConfig, seed: int) -> PaintByExample:
    """The model that training starts from, float32 on the CPU, with memory of its own.

    Raises `ValueError` where settings are missing or contradict each other, `FileNotFoundError` and `CheckpointError`
    as `pbe.load_model`.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.init == "scratch":
        if config.size is None or config.vae is None:
            missing = "model.size" if config.size is None else "model.vae (train one: configs/vae.yaml)"
            raise ValueError(f"model.init=scratch needs {missing}")
        vae, state = read_vae(config.vae)
        size, seeded = replace(config.size, vae=vae), tuple(PARTS.values())
    else:
        for name in ("size", "vae"):
            if getattr(config, name) is not None:
                raise ValueError(f"model.{name} is for model.init=scratch; {config.init} brings its own")
        loaded = load_model(config.init, "cpu", torch.float32, weights="raw")
        if not isinstance(loaded, PaintByExample):
            raise ValueError(
                f"model.init={config.init} holds {type(loaded).__name__}, training needs Paint by Example: "
                "`pbe checkpoint expand --clip` makes it from Stable Diffusion"
            )
        # A float32 file is mapped into memory, and must not be what is trained.
        state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        size, seeded = loaded.config, tuple(PARTS[part] for part in config.reset)
    # what it was distilled for, training unlearns
    model = build_on_meta(PaintByExample, replace(config.changed(size), distilled=None))
    state |= initial_weights(model, generator, seeded)
    model.load_state_dict(state, assign=True)
    return model.train()


def known_size(config: ModelConfig) -> PaintByExampleConfig | None:
    """The networks' sizes, of a checkpoint by its names and shapes alone; None where they cannot be known yet."""
    if config.init == "scratch":
        return config.size and config.changed(config.size)
    try:
        checkpoint = open_recognised(config.init)
        size = checkpoint.layout.infer(checkpoint.shapes, checkpoint.hints)
    except (OSError, ValueError, IndexError, ZeroDivisionError):  # `starting_model` says what is wrong
        return None
    return config.changed(size) if isinstance(size, PaintByExampleConfig) else None


def seeded(model_class: Callable[[Any], Network], size: Any, seed: int) -> Network:
    """A network with seeded weights."""
    network = build_on_meta(model_class, size)
    network.load_state_dict(dict(initial_weights(network, torch.Generator().manual_seed(seed))), assign=True)
    return network


def loaded_vae(path: str | Path, latent_scale: float | None = None) -> AutoencoderKL:
    """The autoencoder in a checkpoint, as `read_vae` finds it; with another `latent_scale` where one is given."""
    size, state = read_vae(path)
    vae = build_on_meta(AutoencoderKL, size if latent_scale is None else replace(size, latent_scale=latent_scale))
    vae.load_state_dict({name.removeprefix(VAE_PREFIX): x for name, x in state.items()}, assign=True)
    return vae


def read_vae(path: str | Path) -> tuple[VAEConfig, dict[str, Tensor]]:
    """The sizes and float32 tensors, under their keys in Paint by Example, of the autoencoder in a checkpoint; raises
    as `open_vae`."""
    vae = open_vae(path)
    config = build(vae).config
    assert isinstance(config, VAEConfig)
    return config, {VAE_PREFIX + name: vae.tensor(name).to(torch.float32, copy=True) for name in vae.mappings}


def initial_weights(
    model: nn.Module, generator: torch.Generator, prefixes: tuple[str, ...] = ("",)
) -> Iterator[tuple[str, Tensor]]:
    """Fresh float32 values for the parameters whose names begin with one of `prefixes`.

    Layers are drawn as torch draws them, uniform within 1 / sqrt(fan-in). As in the original UNet, what ends a
    residual branch and the network itself is zero, so that it starts as the identity of its skips.
    """
    zeroed = {id(layer) for module in model.modules() for layer in last_layers(module)}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if name.startswith(prefixes):
                shape = parameter.shape
                yield name, torch.zeros(shape) if id(module) in zeroed else draw(module, name, shape, generator)


def last_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a module that begin as zero."""
    if isinstance(module, ResBlock):
        return [module.out_layers[-1]]
    if isinstance(module, SpatialTransformer):
        return [module.proj_out]
    if isinstance(module, UNet):
        return [module.out[-1]]
    if isinstance(module, DetailAttention):
        return [module.to_v_detail]
    return []


def draw(module: nn.Module, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The initial value of one of a module's own parameters."""
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        bound = 1 / math.sqrt(module.weight[0].numel())  # of one output: the fan-in
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if isinstance(module, nn.Embedding):
        return torch.randn(shape, generator=generator) * 0.02
    if isinstance(module, Resampler):
        scale = 0 if name.endswith("null_tokens") else shape[-1] ** -0.5
        return torch.randn(shape, generator=generator) * scale
    if name.endswith("class_embedding"):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    assert name.endswith("learnable_vector"), name
    return torch.randn(shape, generator=generator)
