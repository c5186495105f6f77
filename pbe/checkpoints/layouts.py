"""The layouts of checkpoints: which names each gives its tensors, and how they correspond to this library's.

The library's modules hold the keys of the original checkpoints: CompVis names, and for CLIP Hugging Face's, as Paint by
Example has them; guided diffusion's own for its network. Every other layout is one list of rules; a name that no rule
lists is an error, and a name that is dropped on purpose is listed with its reason.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

from pbe.checkpoints import infer_config
from pbe.checkpoints.infer_config import Hints, ModelSizes, Shapes
from pbe.checkpoints.key_map import MAX_LAYERS, KeyMap, Rule, count, renamed, same
from pbe.models.adm import ADM
from pbe.models.clip import CLIP
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.tiny_autoencoder import TinyAutoencoder, TinyDecoder, TinyEncoder

Model = PaintByExample | StableDiffusion | CLIP | ADM | TinyAutoencoder | TinyDecoder | TinyEncoder

POSITION_IDS = {r".*\.position_ids": "0, 1, 2, …"}
TEXT_TOWER = ("embeddings", "encoder", "final_layer_norm")
VISION_TOWER = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


def unnamed_tower(ours: str, theirs: str, parts: Iterable[str]) -> list[Rule]:
    """Aliases for the files of those releases of transformers that leave the tower's own name out."""
    return renamed({part: part for part in parts}, f"{ours}.", f"{theirs}.", alias=True)


# ----------------------------------------------------------------------------------------------------------------------
# Original files: Paint by Example, Stable Diffusion v1

SCHEDULE_BUFFERS = (
    r"betas|alphas_cumprod(_prev)?|sqrt_.*alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]|lvlb_weights|logvar"
    r"|(denoiser\.)?(log_)?sigmas"
)
ORIGINAL_DROPPED = {
    **POSITION_IDS,
    SCHEDULE_BUFFERS: "the noise schedule, computed by pbe.sampling",
    r"scale_factor": "the latents' scale, which the autoencoder knows",
    r"(first_stage_model\.)?model_ema\..*": "averaged copies, which `pbe checkpoint extract-ema` puts in place",
    r"first_stage_model\.loss\..*": "the discriminator the autoencoder was trained with",
    r"cond_stage_model\.((model|transformer)\.)?(logit_scale|text_projection(\.weight)?)": "CLIP's contrastive head",
    r"embedding_manager\..*": "textual inversion's training state",
}

VAE_PROJECTIONS = [
    f"first_stage_model.{net}.mid.attn_1.{name}"
    for net in ("encoder", "decoder")
    for name in ("q", "k", "v", "proj_out")
]
ORIGINAL_VAE = [
    *same("first_stage_model"),
    # some converters left the autoencoder's attention projections as the linear layers they had made of them
    *renamed({name: name for name in VAE_PROJECTIONS}, form="linear"),
]

PAINT_BY_EXAMPLE = KeyMap(
    [*same("model.diffusion_model", "cond_stage_model", "proj_out", "learnable_vector", "tiny_decoder"), *ORIGINAL_VAE],
    ORIGINAL_DROPPED,
)

SD_TEXT_MODEL = "cond_stage_model.transformer.text_model"
STABLE_DIFFUSION = KeyMap(
    [
        *same("model.diffusion_model", SD_TEXT_MODEL),
        *unnamed_tower(SD_TEXT_MODEL, "cond_stage_model.transformer", TEXT_TOWER),
        *ORIGINAL_VAE,
    ],
    ORIGINAL_DROPPED,
)

# ----------------------------------------------------------------------------------------------------------------------
# CLIP files

HF_CLIP = KeyMap(
    same("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"), POSITION_IDS
)

OPENAI_CLIP_MODULES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "logit_scale": "logit_scale",
}
OPENAI_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def openai_clip(names: Collection[str]) -> KeyMap:
    """OpenAI's own CLIP files, whose in-projections are fused and whose projections multiply from the right."""
    rules = renamed(OPENAI_CLIP_MODULES)
    projections = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    rules += renamed(projections, form="transposed")
    for ours, theirs in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for i in range(count(names, f"{theirs}.resblocks.*.")):
            a, b = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
            rules += renamed(OPENAI_CLIP_LAYER, f"{a}.", f"{b}.")
            for kind in ("weight", "bias"):
                q_k_v = tuple(f"{a}.self_attn.{p}_proj.{kind}" for p in "qkv")
                rules.append(Rule(q_k_v, (f"{b}.attn.in_proj_{kind}",)))
    return KeyMap(rules, {"input_resolution|context_length|vocab_size": "sizes, which the shapes tell"})


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
# diffusers folders; names begin with the component's folder

UNET_MODULES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.1": "mid_block.attentions.0",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
UNET_RESBLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RESBLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_ATTENTION_ONCE = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}  # in older folders
MAPPER_BLOCK = {
    "ln_1": "norm1",
    "attn.c_proj": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}


def diffusers_unet(levels: int, num_res_blocks: int, attention_levels: Collection[int]) -> list[Rule]:
    """CompVis numbers a UNet's blocks in the order they run; diffusers groups them by level."""
    ours, theirs, n = "model.diffusion_model.", "unet.", num_res_blocks
    rules = renamed(UNET_MODULES, ours, theirs)
    rules += renamed(UNET_RESBLOCK, f"{ours}middle_block.0.", f"{theirs}mid_block.resnets.0.")
    rules += renamed(UNET_RESBLOCK, f"{ours}middle_block.2.", f"{theirs}mid_block.resnets.1.")
    for level in range(levels):
        down, first = f"{theirs}down_blocks.{level}", 1 + level * (n + 1)
        for j in range(n):
            block = f"{ours}input_blocks.{first + j}"
            rules += renamed(UNET_RESBLOCK, f"{block}.0.", f"{down}.resnets.{j}.")
            if level in attention_levels:
                rules += renamed({f"{block}.1": f"{down}.attentions.{j}"})
        if level < levels - 1:
            rules += renamed({f"{ours}input_blocks.{first + n}.0.op": f"{down}.downsamplers.0.conv"})
    for level in range(levels):  # from the lowest resolution
        up, first = f"{theirs}up_blocks.{level}", level * (n + 1)
        has_attention = levels - 1 - level in attention_levels
        for j in range(n + 1):
            block = f"{ours}output_blocks.{first + j}"
            rules += renamed(UNET_RESBLOCK, f"{block}.0.", f"{up}.resnets.{j}.")
            if has_attention:
                rules += renamed({f"{block}.1": f"{up}.attentions.{j}"})
        if level < levels - 1:
            upsample = f"{ours}output_blocks.{first + n}.{2 if has_attention else 1}.conv"
            rules += renamed({upsample: f"{up}.upsamplers.0.conv"})
    return rules


def diffusers_vae(levels: int, num_res_blocks: int) -> list[Rule]:
    """CompVis numbers the decoder's levels by resolution, diffusers in the order they run."""
    ours, theirs, n = "first_stage_model.", "vae.", num_res_blocks
    rules = renamed({name: name for name in ("quant_conv", "post_quant_conv")}, ours, theirs)
    for net in ("encoder", "decoder"):
        a, b = f"{ours}{net}.", f"{theirs}{net}."
        rules += renamed({"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}, a, b)
        rules += renamed({"mid.attn_1.norm": "mid_block.attentions.0.group_norm"}, a, b)
        rules += renamed(VAE_RESBLOCK, f"{a}mid.block_1.", f"{b}mid_block.resnets.0.")
        rules += renamed(VAE_RESBLOCK, f"{a}mid.block_2.", f"{b}mid_block.resnets.1.")
        a, b = f"{a}mid.attn_1.", f"{b}mid_block.attentions.0."
        rules += renamed(VAE_ATTENTION, a, b, "linear")
        rules += renamed(VAE_ATTENTION_ONCE, a, b, "linear", alias=True)
    for level in range(levels):
        a, b = f"{ours}encoder.down.{level}.", f"{theirs}encoder.down_blocks.{level}."
        for j in range(n):
            rules += renamed(VAE_RESBLOCK, f"{a}block.{j}.", f"{b}resnets.{j}.")
        rules += renamed({"downsample.conv": "downsamplers.0.conv"}, a, b)
        a, b = f"{ours}decoder.up.{level}.", f"{theirs}decoder.up_blocks.{levels - 1 - level}."
        for j in range(n + 1):
            rules += renamed(VAE_RESBLOCK, f"{a}block.{j}.", f"{b}resnets.{j}.")
        rules += renamed({"upsample.conv": "upsamplers.0.conv"}, a, b)
    return rules


def diffusers_image_encoder(mapper_layers: int) -> list[Rule]:
    """diffusers keeps the whole condition in one module, and splits the mapper's in-projection."""
    ours, theirs = "cond_stage_model", "image_encoder"
    rules = renamed(
        {
            f"{ours}.transformer.vision_model": "model.vision_model",
            f"{ours}.final_ln": "final_layer_norm",
            "proj_out": "proj_out",
            "learnable_vector": "uncond_vector",
        },
        theirs=f"{theirs}.",
    )
    rules += unnamed_tower(f"{ours}.transformer.vision_model", f"{theirs}.model", VISION_TOWER)
    for i in range(mapper_layers):
        a, b = f"{ours}.mapper.resblocks.{i}", f"{theirs}.mapper.blocks.{i}"
        rules += renamed(MAPPER_BLOCK, f"{a}.", f"{b}.")
        rules.append(Rule((f"{a}.attn.c_qkv",), tuple(f"{b}.attn1.to_{p}" for p in "qkv")))
    return rules


def diffusers_folder(names: Collection[str]) -> KeyMap:
    """A diffusers folder of a Paint by Example or a Stable Diffusion, whose depth its tensors' names tell."""
    unet_levels = count(names, "unet.down_blocks.*.")
    unet_blocks = count(names, "unet.down_blocks.0.resnets.*.")
    attention_levels = [i for i in range(unet_levels) if count(names, f"unet.down_blocks.{i}.attentions.*.")]
    vae_levels, vae_blocks = (count(names, f"vae.encoder.down_blocks.{part}") for part in ("*.", "0.resnets.*."))
    rules = [
        *diffusers_unet(unet_levels, unet_blocks, attention_levels),
        *diffusers_vae(vae_levels, vae_blocks),
        *diffusers_image_encoder(count(names, "image_encoder.mapper.blocks.*.")),
        *renamed({SD_TEXT_MODEL: "text_encoder.text_model"}),
        *unnamed_tower(SD_TEXT_MODEL, "text_encoder", TEXT_TOWER),
        *same("tiny_decoder"),
    ]
    return KeyMap(rules, {**POSITION_IDS, r"safety_checker\..*": "no safety checker is built in"})


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


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout of tensors with these names, or None."""
    names = [f"{name}." for name in names]

    def has(module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in names)

    return next((layout for layout in LAYOUTS if all(map(has, layout.signature))), None)
