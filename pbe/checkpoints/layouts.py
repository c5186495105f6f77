"""Which names a checkpoint gives its tensors, and how they correspond to this library's.

The library's modules hold the keys of the original checkpoints: CompVis names, and for CLIP Hugging Face's, as Paint by
Example has them; guided diffusion's own for its network. Every other layout is one table of rules; a name that no rule
lists is an error, and a name that is dropped on purpose is listed with its reason.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from pbe.checkpoints.key_map import Rule, Table, prefixes, same

# ----------------------------------------------------------------------------------------------------------------------
# Original files: Paint by Example, Stable Diffusion v1

SCHEDULE_BUFFERS = (
    r"betas|alphas_cumprod(_prev)?|sqrt_.*alphas_cumprod|log_one_minus_alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|posterior_variance|posterior_log_variance_clipped|posterior_mean_coef[12]|lvlb_weights|logvar"
    r"|(denoiser\.)?(log_)?sigmas"
)
ORIGINAL_DROPPED = {
    SCHEDULE_BUFFERS: "the noise schedule, computed by pbe.sampling",
    r".*\.position_ids": "0, 1, 2, …",
    r"scale_factor": "the latents' scale, which the autoencoder knows",
    r"(first_stage_model\.)?model_ema\..*": "averaged copies, which `pbe checkpoint extract-ema` puts in place",
    r"first_stage_model\.loss\..*": "the discriminator the autoencoder was trained with",
    r"cond_stage_model\.((model|transformer)\.)?(logit_scale|text_projection(\.weight)?)": "CLIP's contrastive head",
    r"embedding_manager\..*": "textual inversion's training state",
}

# some converters left the autoencoder's attention projections as the linear layers they had made of them
ORIGINAL_VAE = (
    *same("first_stage_model"),
    *(
        Rule((name,), (name,), "linear")
        for net in ("encoder", "decoder")
        for projection in ("q", "k", "v", "proj_out")
        for name in [f"first_stage_model.{net}.mid.attn_1.{projection}"]
    ),
)

PAINT_BY_EXAMPLE = Table(
    (*same("model.diffusion_model", "cond_stage_model", "proj_out", "learnable_vector"), *ORIGINAL_VAE),
    ORIGINAL_DROPPED,
)

SD_TEXT_MODEL = "cond_stage_model.transformer.text_model"
STABLE_DIFFUSION = Table(
    (
        *same("model.diffusion_model", SD_TEXT_MODEL),
        *ORIGINAL_VAE,
        # some fine-tunes were saved by releases of transformers that left the tower's own name out
        *(
            Rule(
                (f"cond_stage_model.transformer.text_model.{part}",),
                (f"cond_stage_model.transformer.{part}",),
                alias=True,
            )
            for part in ("embeddings", "encoder", "final_layer_norm")
        ),
    ),
    ORIGINAL_DROPPED,
)

# ----------------------------------------------------------------------------------------------------------------------
# CLIP files

HF_CLIP = Table(
    same("vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"),
    {r".*\.position_ids": "0, 1, 2, …"},
)


def openai_clip(vision_layers: int, text_layers: int) -> Table:
    """OpenAI's own CLIP files, whose in-projections are fused and whose projections multiply from the right."""
    rules = [
        Rule(("vision_model.embeddings.class_embedding",), ("visual.class_embedding",)),
        Rule(("vision_model.embeddings.patch_embedding",), ("visual.conv1",)),
        Rule(("vision_model.embeddings.position_embedding.weight",), ("visual.positional_embedding",)),
        Rule(("vision_model.pre_layrnorm",), ("visual.ln_pre",)),
        Rule(("vision_model.post_layernorm",), ("visual.ln_post",)),
        Rule(("visual_projection.weight",), ("visual.proj",), "transposed"),
        Rule(("text_model.embeddings.token_embedding",), ("token_embedding",)),
        Rule(("text_model.embeddings.position_embedding.weight",), ("positional_embedding",)),
        Rule(("text_model.final_layer_norm",), ("ln_final",)),
        Rule(("text_projection.weight",), ("text_projection",), "transposed"),
        *same("logit_scale"),
    ]
    towers = (("vision_model", "visual.transformer", vision_layers), ("text_model", "transformer", text_layers))
    for ours, theirs, layers in towers:
        for i in range(layers):
            a, b = f"{ours}.encoder.layers.{i}", f"{theirs}.resblocks.{i}"
            rules += [
                Rule((f"{a}.layer_norm1",), (f"{b}.ln_1",)),
                Rule((f"{a}.layer_norm2",), (f"{b}.ln_2",)),
                Rule((f"{a}.mlp.fc1",), (f"{b}.mlp.c_fc",)),
                Rule((f"{a}.mlp.fc2",), (f"{b}.mlp.c_proj",)),
                Rule((f"{a}.self_attn.out_proj",), (f"{b}.attn.out_proj",)),
            ]
            for kind in ("weight", "bias"):
                q_k_v = tuple(f"{a}.self_attn.{p}_proj.{kind}" for p in "qkv")
                rules.append(Rule(q_k_v, (f"{b}.attn.in_proj_{kind}",)))
    return Table(tuple(rules), {"input_resolution|context_length|vocab_size": "sizes, which the shapes tell"})


# ----------------------------------------------------------------------------------------------------------------------
# OpenAI's guided diffusion: the state dict of the UNet alone

GUIDED_DIFFUSION = Table(same("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"))

# ----------------------------------------------------------------------------------------------------------------------
# diffusers folders; names begin with the component's folder

DIFFUSERS_DROPPED = {
    r".*\.position_ids": "0, 1, 2, …",
    r"safety_checker\..*": "no safety checker is built in",
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


def below(ours: str, theirs: str, children: Mapping[str, str]) -> list[Rule]:
    """One rule for each child of a module."""
    return [Rule((f"{ours}.{a}",), (f"{theirs}.{b}",)) for a, b in children.items()]


def diffusers_unet(levels: int, num_res_blocks: int, attention_levels: Collection[int]) -> list[Rule]:
    """CompVis numbers a UNet's blocks in the order they run; diffusers groups them by level."""
    ours, theirs, n = "model.diffusion_model", "unet", num_res_blocks
    rules = below(
        ours,
        theirs,
        {
            "time_embed.0": "time_embedding.linear_1",
            "time_embed.2": "time_embedding.linear_2",
            "input_blocks.0.0": "conv_in",
            "middle_block.1": "mid_block.attentions.0",
            "out.0": "conv_norm_out",
            "out.2": "conv_out",
        },
    )
    rules += below(f"{ours}.middle_block.0", f"{theirs}.mid_block.resnets.0", UNET_RESBLOCK)
    rules += below(f"{ours}.middle_block.2", f"{theirs}.mid_block.resnets.1", UNET_RESBLOCK)
    for level in range(levels):
        for j in range(n):
            a, b = f"{ours}.input_blocks.{1 + level * (n + 1) + j}", f"{theirs}.down_blocks.{level}"
            rules += below(f"{a}.0", f"{b}.resnets.{j}", UNET_RESBLOCK)
            if level in attention_levels:
                rules.append(Rule((f"{a}.1",), (f"{b}.attentions.{j}",)))
        if level < levels - 1:
            a = f"{ours}.input_blocks.{(level + 1) * (n + 1)}.0.op"
            rules.append(Rule((a,), (f"{theirs}.down_blocks.{level}.downsamplers.0.conv",)))
    for up in range(levels):
        has_attention = levels - 1 - up in attention_levels
        for j in range(n + 1):
            a, b = f"{ours}.output_blocks.{up * (n + 1) + j}", f"{theirs}.up_blocks.{up}"
            rules += below(f"{a}.0", f"{b}.resnets.{j}", UNET_RESBLOCK)
            if has_attention:
                rules.append(Rule((f"{a}.1",), (f"{b}.attentions.{j}",)))
        if up < levels - 1:
            a = f"{ours}.output_blocks.{up * (n + 1) + n}.{2 if has_attention else 1}.conv"
            rules.append(Rule((a,), (f"{theirs}.up_blocks.{up}.upsamplers.0.conv",)))
    return rules


def diffusers_vae(levels: int, num_res_blocks: int) -> list[Rule]:
    """CompVis numbers the decoder's levels by resolution, diffusers in the order they run."""
    ours, theirs, n = "first_stage_model", "vae", num_res_blocks
    rules = [Rule((f"{ours}.{name}",), (f"{theirs}.{name}",)) for name in ("quant_conv", "post_quant_conv")]
    for net in ("encoder", "decoder"):
        a, b = f"{ours}.{net}", f"{theirs}.{net}"
        rules += below(a, b, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"})
        rules += below(f"{a}.mid.block_1", f"{b}.mid_block.resnets.0", VAE_RESBLOCK)
        rules += below(f"{a}.mid.block_2", f"{b}.mid_block.resnets.1", VAE_RESBLOCK)
        rules.append(Rule((f"{a}.mid.attn_1.norm",), (f"{b}.mid_block.attentions.0.group_norm",)))
        for mine, name, older_name in (
            ("q", "to_q", "query"),
            ("k", "to_k", "key"),
            ("v", "to_v", "value"),
            ("proj_out", "to_out.0", "proj_attn"),
        ):
            names = (f"{a}.mid.attn_1.{mine}",)
            rules.append(Rule(names, (f"{b}.mid_block.attentions.0.{name}",), "linear"))
            rules.append(Rule(names, (f"{b}.mid_block.attentions.0.{older_name}",), "linear", alias=True))
    for level in range(levels):
        for j in range(n):
            a, b = f"{ours}.encoder.down.{level}.block.{j}", f"{theirs}.encoder.down_blocks.{level}.resnets.{j}"
            rules += below(a, b, VAE_RESBLOCK)
        a, b = (
            f"{ours}.encoder.down.{level}.downsample.conv",
            f"{theirs}.encoder.down_blocks.{level}.downsamplers.0.conv",
        )
        rules.append(Rule((a,), (b,)))
        up = levels - 1 - level
        for j in range(n + 1):
            a, b = f"{ours}.decoder.up.{level}.block.{j}", f"{theirs}.decoder.up_blocks.{up}.resnets.{j}"
            rules += below(a, b, VAE_RESBLOCK)
        a, b = f"{ours}.decoder.up.{level}", f"{theirs}.decoder.up_blocks.{up}"
        rules.append(Rule((f"{a}.upsample.conv",), (f"{b}.upsamplers.0.conv",)))
    return rules


MAPPER_BLOCK = {
    "ln_1": "norm1",
    "attn.c_proj": "attn1.to_out.0",
    "ln_2": "norm3",
    "mlp.c_fc": "ff.net.0.proj",
    "mlp.c_proj": "ff.net.2",
}


def diffusers_image_encoder(mapper_layers: int) -> list[Rule]:
    """diffusers keeps the whole condition in one module, and splits the mapper's in-projection."""
    ours, theirs = "cond_stage_model", "image_encoder"
    rules = [
        Rule((f"{ours}.transformer.vision_model",), (f"{theirs}.model.vision_model",)),
        # transformers 5 writes the tower without its own name, and reads both
        *(
            Rule((f"{ours}.transformer.vision_model.{part}",), (f"{theirs}.model.{part}",), alias=True)
            for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
        ),
        Rule((f"{ours}.final_ln",), (f"{theirs}.final_layer_norm",)),
        Rule(("proj_out",), (f"{theirs}.proj_out",)),
        Rule(("learnable_vector",), (f"{theirs}.uncond_vector",)),
    ]
    for i in range(mapper_layers):
        a, b = f"{ours}.mapper.resblocks.{i}", f"{theirs}.mapper.blocks.{i}"
        rules += below(a, b, MAPPER_BLOCK)
        rules.append(Rule((f"{a}.attn.c_qkv",), tuple(f"{b}.attn1.to_{p}" for p in "qkv")))
    return rules


# ----------------------------------------------------------------------------------------------------------------------
# Recognising a layout


class Layout(NamedTuple):
    """A kind of checkpoint: what it is called, and names or modules that a file of this kind has, all of them."""

    name: str
    description: str
    signature: tuple[str, ...]


LAYOUTS = (
    Layout(
        "paint-by-example",
        "Paint by Example, original layout",
        ("learnable_vector", "model.diffusion_model", "first_stage_model", "cond_stage_model.mapper"),
    ),
    Layout(
        "stable-diffusion",
        "Stable Diffusion v1, original layout",
        ("model.diffusion_model", "first_stage_model", "cond_stage_model.transformer"),
    ),
    Layout("diffusers-paint-by-example", "Paint by Example, diffusers folder", ("unet", "vae", "image_encoder")),
    Layout("diffusers-stable-diffusion", "Stable Diffusion v1, diffusers folder", ("unet", "vae", "text_encoder")),
    Layout("openai-clip", "CLIP, OpenAI's layout", ("visual.conv1", "visual.proj", "token_embedding")),
    Layout("hf-clip", "CLIP, Hugging Face's layout", ("vision_model", "text_model", "visual_projection")),
    Layout(
        "guided-diffusion",
        "guided diffusion (ADM), OpenAI's layout",
        ("input_blocks", "middle_block.1.qkv", "output_blocks"),
    ),
)


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout of tensors with these names, or None."""
    have = {prefix for name in names for prefix in prefixes(name)}
    return next((layout for layout in LAYOUTS if have.issuperset(layout.signature)), None)


def count(names: Iterable[str], template: str) -> int:
    """How many different numbers stand in the place of `*` in names that begin like `template`."""
    pattern = re.compile(re.escape(template).replace(r"\*", r"(\d+)"))
    return len({m[1] for m in map(pattern.match, names) if m})


def table_of(layout: Layout, names: Collection[str]) -> Table:
    """The rules for a file of this layout that holds tensors with these names."""
    if layout.name == "paint-by-example":
        return PAINT_BY_EXAMPLE
    if layout.name == "stable-diffusion":
        return STABLE_DIFFUSION
    if layout.name == "hf-clip":
        return HF_CLIP
    if layout.name == "guided-diffusion":
        return GUIDED_DIFFUSION
    if layout.name == "openai-clip":
        return openai_clip(count(names, "visual.transformer.resblocks.*."), count(names, "transformer.resblocks.*."))
    unet_levels = count(names, "unet.down_blocks.*.")
    return table_of_diffusers(
        unet_levels=unet_levels,
        unet_blocks=count(names, "unet.down_blocks.0.resnets.*."),
        attention_levels=[i for i in range(unet_levels) if count(names, f"unet.down_blocks.{i}.attentions.*.")],
        vae_levels=count(names, "vae.encoder.down_blocks.*."),
        vae_blocks=count(names, "vae.encoder.down_blocks.0.resnets.*."),
        mapper_layers=count(names, "image_encoder.mapper.blocks.*."),
    )


def table_of_diffusers(
    unet_levels: int,
    unet_blocks: int,
    attention_levels: Collection[int],
    vae_levels: int,
    vae_blocks: int,
    mapper_layers: int,
) -> Table:
    """The rules for a diffusers folder of a Paint by Example or Stable Diffusion of this depth."""
    rules = (
        *diffusers_unet(unet_levels, unet_blocks, attention_levels),
        *diffusers_vae(vae_levels, vae_blocks),
        *diffusers_image_encoder(mapper_layers),
        Rule((SD_TEXT_MODEL,), ("text_encoder.text_model",)),
        *(
            Rule((f"{SD_TEXT_MODEL}.{part}",), (f"text_encoder.{part}",), alias=True)
            for part in ("embeddings", "encoder", "final_layer_norm")
        ),
    )
    return Table(rules, DIFFUSERS_DROPPED)
