"""Writing checkpoints: this library's own files, and diffusers folders of Paint by Example.

Everything is written beside its destination and renamed, so that a crash leaves no half file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pbe.checkpoints.diffusers_layouts import diffusers_image_encoder, diffusers_unet, diffusers_vae
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.key_map import KeyMap, same
from pbe.io.atomic import replacing, warn_once
from pbe.models.clip import CLIP_MEAN, CLIP_STD, CLIPVisionConfig
from pbe.models.paint_by_example import PaintByExampleConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# sqrt(beta_t) is linear in t (arXiv 2112.10752): pbe.sampling's schedule, as files describe it
BETA_START, BETA_END, NUM_TIMESTEPS = 0.00085, 0.012, 1000


def save_checkpoint(
    tensors: Mapping[str, Tensor], path: str | Path, entry: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Writes tensors under the original keys, and the dictionary `entry` under `pbe`.

    The suffix chooses the format: `.safetensors` (needs the extra `safetensors`), or `.ckpt`, `.pt`, `.pth`, `.bin`:
    the zip pickle of `torch.save` with the tensors under `state_dict`.

    Raises `ValueError` for another suffix, `FileExistsError` for an existing file unless `overwrite` is set.
    """
    path = Path(path)
    check_suffix(path)
    tensors = {name: compact(tensor) for name, tensor in tensors.items()}
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; it is not replaced by a file")
    with replacing(path, overwrite) as part:
        if path.suffix == ".safetensors":
            save_safetensors(tensors, part, {"pbe": json.dumps(entry)})
        else:
            save_pickle({"state_dict": tensors, "pbe": dict(entry)}, part)


def check_suffix(path: Path) -> None:
    """Raises `ValueError` for a name that `save_checkpoint` does not write."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a checkpoint's name must end in {', '.join(SUFFIXES)}")


def save_pickle(value: Any, path: Path) -> None:
    """torch.save by an open file: with a path its error does not say why nothing can be written."""
    with path.open("wb") as file:
        torch.save(value, file)


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(f"writing {path} needs the extra safetensors: pip install safetensors") from error
    path.touch()
    mode = path.stat().st_mode  # as the umask has it: save_file makes private files
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    try:
        path.chmod(mode)
    except OSError as error:  # CIFS, FUSE
        warn_once(f"files keep the permissions that their file system gives: chmod fails ({error.strerror})")


def compact(tensor: Tensor) -> Tensor:
    """The tensor with no more storage than it needs: what is pickled is the storage, not the view."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def save_diffusers(
    tensors: Mapping[str, Tensor], config: PaintByExampleConfig, folder: str | Path, overwrite: bool = False
) -> None:
    """Writes a folder for diffusers' `PaintByExamplePipeline`, as the hub's is; needs the extra `safetensors`.

    Releases of diffusers that moved the pipeline to `deprecated` find its encoder by no name that model_index.json
    could give; they take it from a module of the folder, ENCODER, with `trust_remote_code=True`. Older ones ignore it.

    `tensors` have the original keys. Raises `ValueError` where diffusers' classes cannot express `config`, and
    `FileExistsError` for an existing folder, unless `overwrite` is set and it is a diffusers folder.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileExistsError(f"{folder} exists and is not a diffusers folder; it is not replaced")
    configs = diffusers_configs(config)
    # for which the JSON files have no place
    beyond_json = config.distilled or config.collage or config.exemplar.tokens != "class"
    about = {"pbe": json.dumps(pbe_entry(config))} if beyond_json else {}
    unet, vae = config.unet, config.vae
    rules = [
        *diffusers_unet(len(unet.channel_mult), unet.num_res_blocks, unet.attention_levels),
        *diffusers_vae(len(vae.channel_mult), vae.num_res_blocks),
        *diffusers_image_encoder(config.exemplar.mapper_layers),
        *same("tiny_decoder"),
    ]
    mappings = KeyMap(rules).to_theirs(tensors)
    with replacing(folder, overwrite) as part:
        for name, content in configs.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(json.dumps(content, indent=2) + "\n")
        (part / "image_encoder" / "paint_by_example.py").write_text(ENCODER)
        for component, file in COMPONENT_FILES.items():
            if f"{component}/config.json" not in configs:
                continue
            weights = {
                name.removeprefix(f"{component}."): compact(mapping.build(*map(tensors.__getitem__, mapping.sources)))
                for name, mapping in mappings.items()
                if name.startswith(f"{component}.")
            }
            save_safetensors(weights, part / component / file, about if component == "unet" else {})


ENCODER = """\
# The encoder that model_index.json names, for releases of diffusers that moved it.
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder  # noqa: F401
"""
COMPONENT_FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "image_encoder": "model.safetensors",
    "tiny_decoder": "diffusion_pytorch_model.safetensors",
}


def diffusers_configs(config: PaintByExampleConfig) -> dict[str, dict[str, Any]]:
    """The folder's JSON files by their path in it."""
    exemplar = config.exemplar
    if exemplar.mapper_heads != 1 or exemplar.mapper_layers != (exemplar.vision.num_layers + 1) // 5:
        raise ValueError(
            f"diffusers' exemplar encoder has 1 head and (CLIP layers + 1) // 5 mapper blocks, not "
            f"{exemplar.mapper_heads} heads and {exemplar.mapper_layers} blocks for {exemplar.vision.num_layers} layers"
        )
    latent_size = config.resolution // config.vae.downsampling
    scheduler = f"{config.distilled.sampler.upper()}Scheduler" if config.distilled else "PNDMScheduler"
    return {
        **({"tiny_decoder/config.json": {"_class_name": "TinyDecoder"}} if config.tiny_decoder else {}),
        "model_index.json": {
            "_class_name": "PaintByExamplePipeline",
            "_diffusers_version": "0.12.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["paint_by_example", "PaintByExampleImageEncoder"],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "unet/config.json": unet_json(config.unet, latent_size),
        "vae/config.json": vae_json(config.vae, config.resolution),
        "image_encoder/config.json": image_encoder_json(exemplar.vision, config.unet.context_dim),
        "scheduler/scheduler_config.json": {
            "_class_name": scheduler,
            "beta_start": BETA_START,
            "beta_end": BETA_END,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": NUM_TIMESTEPS,
            "set_alpha_to_one": False,
            **({} if config.distilled else {"skip_prk_steps": True}),
            "steps_offset": 1,
        },
        # the whole exemplar squeezed into a square, as the model was trained; CLIP's own recipe would crop it
        "feature_extractor/preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_resize": True,
            "image_mean": list(CLIP_MEAN),
            "image_std": list(CLIP_STD),
            "resample": 3,
            "size": {"height": exemplar.vision.image_size, "width": exemplar.vision.image_size},
        },
    }


def unet_json(config: UNetConfig, latent_size: int) -> dict[str, Any]:
    has_attention = [i in config.attention_levels for i in range(len(config.channel_mult))]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.level_heads) or config.num_heads,  # diffusers' name for the number of heads
        "block_out_channels": [config.model_channels * m for m in config.channel_mult],
        "cross_attention_dim": config.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has_attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": config.out_channels,
        "sample_size": latent_size,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)],
    }


def vae_json(config: VAEConfig, resolution: int) -> dict[str, Any]:
    levels = len(config.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config.channels * m for m in config.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": resolution,
        "scaling_factor": config.latent_scale,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def image_encoder_json(config: CLIPVisionConfig, context_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["PaintByExampleImageEncoder"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "image_size": config.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
        "projection_dim": context_dim,
    }
