"""The layouts of checkpoints: which names each gives its tensors, and how they correspond to this library's.

The library's modules hold the keys of the original checkpoints: CompVis names, and for CLIP Hugging Face's, as Paint by
Example has them; guided diffusion's own for its network. Every other layout is one list of rules; a name that no rule
lists is an error, and a name that is dropped on purpose is listed with its reason.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

from pbe.checkpoints import infer_config
from pbe.checkpoints.clip_layouts import HF_CLIP, HF_VISION, openai_clip, openai_vision
from pbe.checkpoints.diffusers_layouts import diffusers_folder, diffusers_vae_alone
from pbe.checkpoints.infer_config import Hints, ModelSizes, Shapes
from pbe.checkpoints.key_map import MAX_LAYERS, KeyMap, renamed, same
from pbe.checkpoints.original_layouts import ORIGINAL_VAE, PAINT_BY_EXAMPLE, STABLE_DIFFUSION, VAE_PREFIX
from pbe.models.adm import ADM
from pbe.models.clip import CLIP, CLIPVisionTower
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.tiny_autoencoder import TinyAutoencoder, TinyDecoder, TinyEncoder
from pbe.models.vae import AutoencoderKL

Tiny = TinyAutoencoder | TinyDecoder | TinyEncoder
Model = PaintByExample | StableDiffusion | AutoencoderKL | CLIP | CLIPVisionTower | ADM | Tiny

# ----------------------------------------------------------------------------------------------------------------------
# OpenAI's guided diffusion: the state dict of the UNet alone

GUIDED_DIFFUSION = KeyMap(same("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"))

# ----------------------------------------------------------------------------------------------------------------------
# TAESD's sequences; diffusers does not count the decoder's clamp

TAESD = KeyMap(same(*map(str, range(MAX_LAYERS))))
AUTOENCODER_TINY = KeyMap(
    [
        *renamed({f"encoder.{i}": f"encoder.layers.{i}" for i in range(MAX_LAYERS)}),
        *renamed({f"decoder.{i + 1}": f"decoder.layers.{i}" for i in range(MAX_LAYERS)}),
    ]
)

# ----------------------------------------------------------------------------------------------------------------------
# All layouts


class Layout(NamedTuple):
    """A kind of checkpoint.

    signature: names of tensors or modules that every file of this kind has.
    model, infer: the class that it fills, and the function that tells the class's config from the tensors' shapes.
    key_map: its names and ours; a function of the file's names where the depth of the networks decides.
    """

    name: str
    signature: tuple[str, ...]
    model: Callable[[Any], Model]
    infer: Callable[[Shapes, Hints], ModelSizes]
    key_map: KeyMap | Callable[[Collection[str]], KeyMap]

    def key_map_of(self, names: Collection[str]) -> KeyMap:
        """The key map of a file that holds tensors with these names."""
        return self.key_map if isinstance(self.key_map, KeyMap) else self.key_map(names)


vae_alone, vision_alone = (partial(f, prefix="") for f in (infer_config.vae_config, infer_config.vision_config))
LAYOUTS = (
    Layout(
        "Paint by Example, original layout",
        ("learnable_vector", "model.diffusion_model", "first_stage_model", "cond_stage_model.mapper"),
        PaintByExample,
        infer_config.paint_by_example_config,
        PAINT_BY_EXAMPLE,
    ),
    Layout(
        "Stable Diffusion v1, original layout",
        ("model.diffusion_model", "first_stage_model", "cond_stage_model.transformer"),
        StableDiffusion,
        infer_config.stable_diffusion_config,
        STABLE_DIFFUSION,
    ),
    Layout(
        "Paint by Example, diffusers folder",
        ("unet", "vae", "image_encoder"),
        PaintByExample,
        infer_config.paint_by_example_config,
        diffusers_folder,
    ),
    Layout(
        "Stable Diffusion v1, diffusers folder",
        ("unet", "vae", "text_encoder"),
        StableDiffusion,
        infer_config.stable_diffusion_config,
        diffusers_folder,
    ),
    Layout(
        "CLIP, OpenAI's layout",
        ("visual.conv1", "visual.proj", "token_embedding"),
        CLIP,
        infer_config.clip_config,
        openai_clip,
    ),
    Layout(
        "CLIP, Hugging Face's layout",
        ("vision_model", "text_model", "visual_projection"),
        CLIP,
        infer_config.clip_config,
        HF_CLIP,
    ),
    *(
        Layout(f"CLIP's vision tower, {name}", signature, CLIPVisionTower, vision_alone, key_map)
        for name, signature, key_map in (
            ("OpenAI's layout", ("visual.conv1", "visual.ln_pre"), openai_vision),
            ("open_clip's layout", ("conv1", "ln_pre", "transformer.resblocks"), openai_vision),
            ("Hugging Face's layout", ("vision_model.embeddings", "vision_model.pre_layrnorm"), HF_VISION),
            ("Hugging Face's layout without its name", ("embeddings.patch_embedding", "pre_layrnorm"), HF_VISION),
        )
    ),
    Layout("autoencoder, original layout", ("encoder.down", "decoder.up"), AutoencoderKL, vae_alone, ORIGINAL_VAE),
    Layout(
        "autoencoder, diffusers' layout",
        ("encoder.down_blocks", "decoder.up_blocks"),
        AutoencoderKL,
        vae_alone,
        diffusers_vae_alone,
    ),
    Layout(
        "guided diffusion (ADM), OpenAI's layout",
        ("input_blocks", "middle_block.1.qkv", "output_blocks"),
        ADM,
        infer_config.adm_config,
        GUIDED_DIFFUSION,
    ),
    Layout("TAESD, its decoder", ("1.weight", "3.conv"), TinyDecoder, infer_config.tiny_config, TAESD),
    Layout("TAESD, its encoder", ("0.weight", "1.conv"), TinyEncoder, infer_config.tiny_config, TAESD),
    Layout(
        "TAESD, diffusers' AutoencoderTiny",
        ("encoder.layers", "decoder.layers"),
        TinyAutoencoder,
        partial(infer_config.tiny_config, prefix="decoder."),
        AUTOENCODER_TINY,
    ),
)


# The networks of whole models by what stands in signatures for them, and what helps a file without one.
NETWORKS = {
    **dict.fromkeys(("model.diffusion_model", "unet"), "UNet"),
    **dict.fromkeys((VAE_PREFIX[:-1], "vae"), "autoencoder"),
    **dict.fromkeys(("cond_stage_model.transformer", "text_encoder"), "text tower"),
    **dict.fromkeys(("cond_stage_model.mapper", "image_encoder"), "exemplar encoder"),
}
WITHOUT = {
    "autoencoder": "`pbe checkpoint set-vae` puts one in, `--vae FILE` edits with one",
    "text tower": "`pbe checkpoint expand --clip FILE` needs none to start Paint by Example from it",
    "exemplar encoder": "a whole Paint by Example is needed; `pbe checkpoint expand --clip FILE` starts a new one",
}


def find_layout(names: Iterable[str], without: str | None = None) -> Layout | None:
    """The layout of tensors with these names, or None; files without the network called so in `NETWORKS` fit too."""
    has = having(names)

    def is_met(module: str) -> bool:
        return has(module) or (without is not None and NETWORKS.get(module) == without)

    return next((layout for layout in LAYOUTS if all(map(is_met, layout.signature))), None)


def having(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether there is a tensor or module of a given name among tensors with these."""
    names = [f"{name}." for name in names]
    return lambda module: any(name.startswith(f"{module}.") for name in names)


def lacking(names: Iterable[str]) -> str | None:
    """Which networks the models that tensors with these names resemble most have and they have not, in words."""
    has, found = having(names), {}
    for layout in LAYOUTS:
        missing = [module for module in layout.signature if not has(module)]
        is_partial = any(map(has, layout.signature)) and not any(has(module.split(".")[0]) for module in missing)
        if is_partial and all(module in NETWORKS for module in missing):
            found[layout.name] = [NETWORKS[module] for module in missing]
    fewest = min(map(len, found.values()), default=0)
    best = {name: missing for name, missing in found.items() if len(missing) == fewest}
    likenesses = [f"{name} without its {' and '.join(missing)}" for name, missing in best.items()]
    advice = dict.fromkeys(WITHOUT[network] for missing in best.values() for network in missing if network in WITHOUT)
    return f"is {' or '.join(likenesses)}: {'; '.join(advice)}" if best else None
