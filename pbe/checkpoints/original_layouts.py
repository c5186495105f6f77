"""The names in files of the original repositories, which are this library's: Paint by Example, Stable Diffusion v1."""

from pbe.checkpoints.clip_layouts import POSITION_IDS, TEXT_TOWER, unnamed_tower
from pbe.checkpoints.key_map import KeyMap, Rule, renamed, same

VAE_PREFIX = "first_stage_model."
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
    r"(first_stage_model\.)?loss\..*": "the networks the autoencoder was trained with",
    r"n_averaged": "how many steps torch's averages cover",
    r"cond_stage_model\.((model|transformer)\.)?(logit_scale|text_projection(\.weight)?)": "CLIP's contrastive head",
    r"embedding_manager\..*": "textual inversion's training state",
}

VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def original_vae(prefix: str) -> list[Rule]:
    """An autoencoder whose names begin with `prefix`.

    Some converters left its attention's projections as the linear layers they had made of them, under either name.
    """
    rules = same(*(f"{prefix}{part}" for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")))
    for net in ("encoder", "decoder"):
        attention = f"{prefix}{net}.mid.attn_1."
        for names in ({name: name for name in VAE_ATTENTION}, VAE_ATTENTION):
            rules += renamed(names, attention, attention, "linear", alias=True)
    return rules


PAINT_BY_EXAMPLE = KeyMap(
    [
        *same("model.diffusion_model", "cond_stage_model", "proj_out", "learnable_vector", "tiny_decoder"),
        *original_vae(VAE_PREFIX),
    ],
    ORIGINAL_DROPPED,
)

SD_TEXT_MODEL = "cond_stage_model.transformer.text_model"
STABLE_DIFFUSION = KeyMap(
    [
        *same("model.diffusion_model", SD_TEXT_MODEL),
        *unnamed_tower(SD_TEXT_MODEL, "cond_stage_model.transformer", TEXT_TOWER),
        *original_vae(VAE_PREFIX),
    ],
    ORIGINAL_DROPPED,
)

ORIGINAL_VAE = KeyMap(original_vae(""), ORIGINAL_DROPPED)
