"""Network sizes from the shapes of their parameters, so that a checkpoint needs no config beside it.

What shapes cannot tell (the number of attention heads, the latents' scale, the resolution) is the original's constant,
or stands in an entry `pbe` that files written by this library carry, or in the configs of a diffusers folder.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, TypeGuard

from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.key_map import MAX_LAYERS, count
from pbe.checkpoints.original_layouts import SD_TEXT_MODEL
from pbe.io.fields import Range, check, field_types
from pbe.io.json_text import shown
from pbe.models.adm import ADMConfig
from pbe.models.clip import Activation, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import Distilled, PaintByExampleConfig
from pbe.models.stable_diffusion import StableDiffusionConfig
from pbe.models.tiny_autoencoder import TinyConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig

WholeModel = PaintByExampleConfig | StableDiffusionConfig
ModelSizes = WholeModel | VAEConfig | CLIPConfig | CLIPVisionConfig | ADMConfig | TinyConfig

MAX_HINT = 1 << 16  # of heads, or of pixels along a side
TINY_PREFIX = "tiny_decoder."  # of a Paint by Example's own
Count = Annotated[int, Range(1, MAX_HINT)]
LevelHeads = Annotated[list[Count], Range(1, MAX_LAYERS), "a list of whole numbers, one per level"]
CLIP_HEAD_WIDTH = 64  # in every CLIP that OpenAI released
DISTILLED = {
    "sampler": Literal["lcm", "tcd"],
    "steps": Annotated[int, Range(1, 50)],
    "guidance": Annotated[float, Range(0, MAX_HINT)],
}


@dataclass(frozen=True)
class Hints:
    """What the shapes cannot tell; None stands for the original's constant. `CheckpointError` for impossible values."""

    unet_heads: Count | None = None
    level_heads: LevelHeads | None = None
    vision_heads: Count | None = None
    text_heads: Count | None = None
    clip_activation: Activation | None = None
    mapper_heads: Count | None = None
    adm_head_channels: Count | None = None
    exemplar_tokens: Literal["class", "all"] | None = None
    latent_scale: Annotated[float, Range(0, MAX_HINT, above=True)] | None = None
    resolution: Count | None = None
    distilled: Distilled | None = None
    collage: bool | None = None

    def __post_init__(self) -> None:
        for name, annotation in field_types(Hints).items():
            checked(name, getattr(self, name), annotation)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "Hints":
        """The hints in a file's `pbe` entry, whose other fields are ignored."""
        values = {field.name: entry.get(field.name) for field in fields(cls)}
        values["distilled"] = read_distilled(entry.get("distilled"))
        return cls(**values)

    @classmethod
    def from_configs(cls, configs: Mapping[str, Mapping[str, Any]]) -> "Hints":
        """The hints in the `config.json` files of a diffusers folder, by component, or of a CLIP's folder, under ""."""
        alone = configs.get("", {})
        unet, vae = configs.get("unet", {}), configs.get("vae", alone)
        clip = alone.get("model_cfg", alone)  # open_clip's settings are one level down
        vision = configs.get("image_encoder") or get(clip, "vision_config") or alone
        text = configs.get("text_encoder") or get(clip, "text_config") or get(clip, "text_cfg") or {}
        activations: list[Any] = [get(tower, "hidden_act") or "quick_gelu" for tower in (vision, text) if tower]
        if clip is not alone:
            activations = ["quick_gelu" if get(clip, "quick_gelu") else "gelu"]
        for activation in activations:
            if activation not in ("quick_gelu", "gelu") or activation != activations[0]:
                raise CheckpointError(f"hidden_act={shown(activation)}; expected 'quick_gelu' or 'gelu' in both towers")
        if "down_block_types" not in alone and alone.get("act_fn", "relu") != "relu":  # an AutoencoderTiny's
            raise CheckpointError(f"act_fn={shown(alone['act_fn'])}; only 'relu' is supported")
        sample_size, widths = unet.get("sample_size"), vae.get("block_out_channels", ())
        if not isinstance(widths, list | tuple) or len(widths) > 16:
            raise CheckpointError(f"block_out_channels={shown(widths)}; expected a list of one width per level")
        levels = len(widths)
        # named attention_head_dim by a historical slip; it counts heads in every v1 model
        heads = unet.get("num_attention_heads") or unet.get("attention_head_dim")
        return cls(
            unet_heads=None if isinstance(heads, list) else heads,
            level_heads=heads if isinstance(heads, list) else None,
            vision_heads=vision.get("num_attention_heads"),
            text_heads=text.get("num_attention_heads") or text.get("heads"),
            clip_activation=activations[0] if activations else None,
            latent_scale=vae.get("scaling_factor"),
            resolution=sample_size * 2 ** (levels - 1) if isinstance(sample_size, int) and levels else None,
        )


def get(tower: object, name: str) -> Any:
    """What the settings of a CLIP or one of its towers say; `CheckpointError` where they are not a JSON object."""
    if not isinstance(tower, Mapping):
        raise CheckpointError(f"{shown(tower)} for the sizes of a CLIP tower; expected a JSON object")
    return tower.get(name)


def read_distilled(value: object) -> Distilled | None:
    """What a file's entry says of distillation; `CheckpointError` for anything but its three settings."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != DISTILLED.keys():
        raise CheckpointError(f"distilled={shown(value)} is not a mapping of {', '.join(DISTILLED)}")
    return Distilled(**{name: checked(f"distilled.{name}", value[name], kind) for name, kind in DISTILLED.items()})


def checked(name: str, value: object, annotation: Any) -> Any:
    """The value, as `pbe.io.fields.check` gives it; `CheckpointError` for another type or an impossible value."""
    try:
        return check(name, value, annotation)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by our names; asking for a missing one raises `CheckpointError` that names the file."""

    def __init__(self, path: object, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__(shapes)
        self.path = path

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise CheckpointError(f"{self.path} has no tensor for {name!r}, which its layout needs: is the file complete?")


def unet_config(shapes: Shapes, hints: Hints, prefix: str = "model.diffusion_model.") -> UNetConfig:
    """Sizes of the UNet whose parameters' names begin with `prefix`."""
    model_channels, in_channels = shapes[f"{prefix}input_blocks.0.0.weight"][:2]
    widths, blocks, attention_levels = [0], [0], set()
    attended = {m[1] for m in map(re.compile(rf"{re.escape(prefix)}input_blocks\.(\d+)\.1\.").match, shapes) if m}
    for i in range(1, count(shapes, f"{prefix}input_blocks.*.")):
        block = f"{prefix}input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:  # a downsampling ends the level
            widths.append(0)
            blocks.append(0)
            continue
        widths[-1] = shapes[f"{block}.0.out_layers.3.weight"][0]
        blocks[-1] += 1
        if str(i) in attended:
            attention_levels.add(len(widths) - 1)
    if len(set(blocks)) > 1 or any(width % model_channels for width in widths):
        raise CheckpointError(
            f"{shapes.path} has {blocks} blocks and {widths} channels per level; a UNet of this family has one number "
            f"of blocks and multiples of {model_channels} channels"
        )
    heads = hints.level_heads or [hints.unet_heads or UNetConfig.num_heads]
    return UNetConfig(
        in_channels=in_channels,
        out_channels=shapes[f"{prefix}out.2.weight"][0],
        model_channels=model_channels,
        channel_mult=tuple(width // model_channels for width in widths),
        num_res_blocks=blocks[0],
        attention_levels=tuple(sorted(attention_levels)),
        num_heads=heads[0],
        level_heads=tuple(heads) if len(set(heads)) > 1 else (),
        context_dim=shapes[f"{prefix}middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
    )


def vae_config(shapes: Shapes, hints: Hints, prefix: str = "first_stage_model.") -> VAEConfig:
    """Sizes of the autoencoder whose parameters' names begin with `prefix`."""
    channels = shapes[f"{prefix}encoder.conv_in.weight"][0]
    levels = count(shapes, f"{prefix}encoder.down.*.")
    widths = [shapes[f"{prefix}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return VAEConfig(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count(shapes, f"{prefix}encoder.down.0.block.*."),
        latent_channels=shapes[f"{prefix}post_quant_conv.weight"][0],
        latent_scale=hints.latent_scale or VAEConfig.latent_scale,
    )


def tower_sizes(shapes: Shapes, width: int, heads: int | None, hints: Hints, prefix: str) -> dict[str, Any]:
    """The settings that both towers of CLIP have, by field of `CLIPVisionConfig` and `CLIPTextConfig`."""
    return {
        "width": width,
        "num_layers": count(shapes, f"{prefix}encoder.layers.*."),
        "num_heads": heads or max(1, width // CLIP_HEAD_WIDTH),
        "mlp_width": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "activation": hints.clip_activation or CLIPVisionConfig.activation,
    }


def vision_config(shapes: Shapes, hints: Hints, prefix: str) -> CLIPVisionConfig:
    """Sizes of the CLIP vision tower whose parameters' names begin with `prefix`."""
    width, _, patch_size, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
    image_size = round((shapes[f"{prefix}embeddings.position_embedding.weight"][0] - 1) ** 0.5) * patch_size
    sizes = tower_sizes(shapes, width, hints.vision_heads, hints, prefix)
    return CLIPVisionConfig(patch_size=patch_size, image_size=image_size, **sizes)


def text_config(shapes: Shapes, hints: Hints, prefix: str) -> CLIPTextConfig:
    """Sizes of the CLIP text tower whose parameters' names begin with `prefix`."""
    vocab_size, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    context_length = shapes[f"{prefix}embeddings.position_embedding.weight"][0]
    sizes = tower_sizes(shapes, width, hints.text_heads, hints, prefix)
    return CLIPTextConfig(vocab_size=vocab_size, context_length=context_length, **sizes)


def paint_by_example_config(shapes: Shapes, hints: Hints) -> PaintByExampleConfig:
    return PaintByExampleConfig(
        unet=unet_config(shapes, hints),
        vae=vae_config(shapes, hints),
        exemplar=ExemplarConfig(
            vision=vision_config(shapes, hints, "cond_stage_model.transformer.vision_model."),
            mapper_layers=count(shapes, "cond_stage_model.mapper.resblocks.*."),
            mapper_heads=hints.mapper_heads or ExemplarConfig.mapper_heads,
            tokens=hints.exemplar_tokens or ExemplarConfig.tokens,
        ),
        resolution=hints.resolution or PaintByExampleConfig.resolution,
        tiny_decoder=tiny_config(shapes, hints, TINY_PREFIX)
        if any(n.startswith(TINY_PREFIX) for n in shapes)
        else None,
        distilled=hints.distilled,
        collage=hints.collage or False,
    )


def stable_diffusion_config(shapes: Shapes, hints: Hints) -> StableDiffusionConfig:
    has_text = any(name.startswith(SD_TEXT_MODEL) for name in shapes)
    return StableDiffusionConfig(
        unet=unet_config(shapes, hints),
        vae=vae_config(shapes, hints),
        text=text_config(shapes, hints, f"{SD_TEXT_MODEL}.") if has_text else None,
        resolution=hints.resolution or StableDiffusionConfig.resolution,
    )


def clip_config(shapes: Shapes, hints: Hints) -> CLIPConfig:
    return CLIPConfig(
        vision=vision_config(shapes, hints, "vision_model."),
        text=text_config(shapes, hints, "text_model."),
        embed_dim=shapes["visual_projection.weight"][0],
    )


def adm_config(shapes: Shapes, hints: Hints) -> ADMConfig:
    """Sizes of guided diffusion's UNet."""
    model_channels = shapes["time_embed.0.weight"][1]
    # all but the highest level end, on the way up, with a second residual block, which doubles the size
    up = [
        i
        for i in range(count(shapes, "output_blocks.*."))
        if any(f"output_blocks.{i}.{j}.in_layers.2.weight" in shapes for j in (1, 2))
    ]
    num_res_blocks = up[0] if up else count(shapes, "output_blocks.*.") - 1
    firsts = [1 + level * (num_res_blocks + 1) for level in range(len(up) + 1)]  # each level's first input block
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts]
    return ADMConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        model_channels=model_channels,
        channel_mult=tuple(width / model_channels for width in widths),
        num_res_blocks=num_res_blocks,
        attention_levels=tuple(n for n, i in enumerate(firsts) if f"input_blocks.{i}.1.qkv.weight" in shapes),
        head_channels=hints.adm_head_channels or ADMConfig.head_channels,
        num_classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        resolution=hints.resolution or 8 * 2 ** len(up),  # the released models end at 8x8
    )


def tiny_config(shapes: Shapes, hints: Hints, prefix: str = "") -> TinyConfig:
    """Sizes of the TAESD network, encoder or decoder, whose parameters' names begin with `prefix` and a number."""
    found = map(re.compile(rf"{re.escape(prefix)}(\d+)\.weight").fullmatch, shapes)
    convolutions = sorted(int(m[1]) for m in found if m)
    first, last = (shapes[f"{prefix}{i}.weight"] for i in (convolutions[0], convolutions[-1]))  # (out, in, 3, 3)
    num_resamplings = sum(f"{prefix}{i}.bias" not in shapes for i in convolutions)  # they alone have none
    return TinyConfig(
        channels=first[0],
        latent_channels=first[1] if convolutions[0] == 1 else last[0],  # a decoder begins with its clamp
        num_resamplings=num_resamplings,
        num_blocks=(count(shapes, f"{prefix}*.conv.") - 1) // num_resamplings,
    )


def activation_of(tower: CLIPVisionConfig | CLIPTextConfig) -> dict[str, Activation]:
    """What the entry says of a tower's activation: nothing of the usual one, which may not have been stated."""
    return {"clip_activation": "gelu"} if tower.activation == "gelu" else {}


def pbe_entry(config: ModelSizes) -> dict[str, Any]:
    """The entry that files written by this library carry, from which `Hints.from_entry` reads the sizes back."""
    if isinstance(config, ADMConfig):
        return {"adm_head_channels": config.head_channels, "resolution": config.resolution}
    if isinstance(config, TinyConfig):
        return {}
    if isinstance(config, VAEConfig):
        return {"latent_scale": config.latent_scale}
    if isinstance(config, CLIPVisionConfig):
        return {"vision_heads": config.num_heads, **activation_of(config)}
    if isinstance(config, CLIPConfig):
        return {**pbe_entry(config.vision), "text_heads": config.text.num_heads}
    entry: dict[str, Any] = {
        "unet_heads": config.unet.num_heads,
        **({"level_heads": list(config.unet.level_heads)} if config.unet.level_heads else {}),
        "latent_scale": config.vae.latent_scale,
        "resolution": config.resolution,
    }
    if isinstance(config, StableDiffusionConfig):
        text = config.text
        return {**entry, **({"text_heads": text.num_heads, **activation_of(text)} if text else {})}
    exemplar = config.exemplar
    return {
        **entry,
        **pbe_entry(exemplar.vision),
        "mapper_heads": exemplar.mapper_heads,
        "exemplar_tokens": exemplar.tokens,
        **({"distilled": asdict(config.distilled)} if config.distilled else {}),
        **({"collage": True} if config.collage else {}),
    }
