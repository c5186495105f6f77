"""The names in diffusers' folders; those of a whole model begin with the component's folder."""

from collections.abc import Collection

from pbe.checkpoints.clip_layouts import POSITION_IDS, TEXT_TOWER, VISION_TOWER, unnamed_tower
from pbe.checkpoints.key_map import KeyMap, Rule, count, renamed, same
from pbe.checkpoints.original_layouts import SD_TEXT_MODEL, VAE_ATTENTION, VAE_PREFIX

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


def diffusers_vae(levels: int, num_res_blocks: int, ours: str = VAE_PREFIX, theirs: str = "vae.") -> list[Rule]:
    """CompVis numbers the decoder's levels by resolution, diffusers in the order they run."""
    n = num_res_blocks
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


def diffusers_vae_alone(names: Collection[str]) -> KeyMap:
    """diffusers' `AutoencoderKL`, whose depth its tensors' names tell."""
    levels, blocks = (count(names, f"encoder.down_blocks.{part}") for part in ("*.", "0.resnets.*."))
    return KeyMap(diffusers_vae(levels, blocks, "", ""))
