"""The names of CLIP's tensors: Hugging Face's, which are this library's, and OpenAI's, which open_clip has too."""

from collections.abc import Collection, Iterable

from pbe.checkpoints.key_map import KeyMap, Rule, count, renamed, same

POSITION_IDS = {r".*\.position_ids": "0, 1, 2, …"}
TEXT_TOWER = ("embeddings", "encoder", "final_layer_norm")
VISION_TOWER = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")


def unnamed_tower(ours: str, theirs: str, parts: Iterable[str]) -> list[Rule]:
    """Aliases for the files of those releases of transformers that leave the tower's own name out."""
    return renamed({part: part for part in parts}, f"{ours}.", f"{theirs}.", alias=True)


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
    dropped = {
        "input_resolution|context_length|vocab_size": "sizes, which the shapes tell",
        "attn_mask": "causal attention's mask, which is computed",
    }
    return KeyMap(rules, dropped)


# ----------------------------------------------------------------------------------------------------------------------
# Vision towers alone; where the tower's own name is left out, so is the first part of each name

HEAD = {r"(visual\.)?proj|(visual_projection|text_projection)(\.weight)?|logit_(scale|bias)": "CLIP's contrastive head"}
HF_VISION = KeyMap(
    [
        *renamed({part: f"vision_model.{part}" for part in VISION_TOWER}),
        *renamed({part: part for part in VISION_TOWER}, alias=True),
    ],
    {**POSITION_IDS, **HEAD},
)


def openai_vision(names: Collection[str]) -> KeyMap:
    """The vision tower of OpenAI's and open_clip's files, under `visual.` or as open_clip's `model.visual` saves it."""
    outer = "visual." if any(name.startswith("visual.") for name in names) else ""
    whole = openai_clip([name if outer else f"visual.{name}" for name in names])
    rules = [
        Rule(
            tuple(name.removeprefix("vision_model.") for name in rule.ours),
            tuple(outer + name.removeprefix("visual.") for name in rule.theirs),
        )
        for rule in whole.rules
        if rule.ours[0].startswith("vision_model.")
    ]
    return KeyMap(rules, {**whole.dropped, **HEAD})
