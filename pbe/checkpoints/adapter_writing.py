"""Writing files of adapters, in the names of the formats that `pbe.checkpoints.adapters` reads."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pbe.checkpoints.adapters import FORMATS, Adapter, diffusers_paths
from pbe.checkpoints.key_map import shorten
from pbe.checkpoints.writing import compact, save_safetensors
from pbe.io.atomic import replacing
from pbe.models.adapters import Update
from pbe.models.lora import UNET, LoRAConfig, layers_of
from pbe.models.unet import UNetConfig

WrittenFormat = Literal["peft", "diffusers", "kohya", "pbe"]
PEFT_CONFIG = "adapter_config.json"


def write_adapter(
    adapter: Adapter, path: str | Path, format: WrittenFormat = "peft", *, model: nn.Module, overwrite: bool = False
) -> None:
    """Writes adapters for a model, which may be on the meta device, to a `.safetensors` file in a format's names.

    peft: also a folder for `PeftModel.from_pretrained`, where the name does not end in .safetensors. diffusers: PEFT's
    names as `load_lora_weights` takes them. kohya: takes every kind of adapters. pbe: one rank and alpha for all
    layers. Numbers stay as they are, except that alpha may absorb the square root of rslora; texts of the metadata and
    the entry `pbe` are kept.

    Raises `ValueError` where the format cannot hold the adapters, or for another suffix; `FileExistsError` for an
    existing file or PEFT's folder unless `overwrite` is set, and for anything else that is there.
    """
    if adapter.detail:
        raise ValueError(f"{adapter.path} holds a detail adapter, which only this library's own files hold")
    path = Path(path)
    is_folder = check_adapter_path(path, format)
    tensors, metadata = named_tensors(adapter, format, model)
    with replacing(path, overwrite) as part:
        if is_folder:
            part.mkdir()
            (part / PEFT_CONFIG).write_text(metadata["lora_adapter_metadata"])
        save_safetensors(tensors, part / "adapter_model.safetensors" if is_folder else part, metadata)


def check_adapter_path(path: Path, format: WrittenFormat) -> bool:
    """Whether `write_adapter` writes a folder there; raises as it does for a name that it does not write or replace."""
    is_folder = format == "peft" and path.suffix != ".safetensors"
    if not is_folder and path.suffix != ".safetensors":
        raise ValueError(f"{path}: a file of adapters in {format} names must end in .safetensors")
    if path.exists() and not ((path / PEFT_CONFIG).is_file() if is_folder else path.is_file()):
        raise FileExistsError(f"{path} exists and is not {'a folder of PEFT' if is_folder else 'a file'}")
    return is_folder


def named_tensors(
    adapter: Adapter, format: WrittenFormat, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file of adapters in a format's names holds: its tensors and its metadata. `ValueError` as above."""
    layers, config = layers_of(model), model.get_submodule(UNET[:-1]).config
    assert isinstance(config, UNetConfig)
    paths, writes = diffusers_paths(config, layers), FORMATS[format]._replace(modules=FORMATS[format].modules[:1])
    names: dict[tuple[str, str], str] = {}
    for name, of_layer in writes.table(paths).items():
        names.setdefault(of_layer, name)  # the first of a format's names is the one that is written
    tensors: dict[str, Tensor] = {}
    unheld: dict[str, list[str]] = {}
    for layer, update in adapter.updates.items():
        for role, tensor in roles(update, tuple(layers[layer].weight.shape), format):
            if (layer, role) in names:
                tensors[names[layer, role]] = compact(tensor)
            else:
                unheld.setdefault(role, []).append(layer)
    if unheld:
        found = "; ".join(f"{role} of {len(of)} layers, as {of[0]}" for role, of in unheld.items())
        raise ValueError(f"{format} names cannot hold {found}; kohya's can")
    texts = {name: x for name, x in adapter.metadata.items() if isinstance(x, str)}
    metadata = {name: x for name, x in texts.items() if name not in ("format", "pbe")}
    told = adapter.metadata.get("pbe")
    entry = {name: x for name, x in told.items() if name != "lora"} if isinstance(told, dict) else {}
    entry |= {"distilled": asdict(adapter.distilled)} if adapter.distilled else {}
    entry |= lora_entry(adapter) if format == "pbe" else {}
    if format in ("peft", "diffusers"):
        prefix, settings = "unet." if format == "diffusers" else "", peft_settings(adapter, paths)
        metadata["lora_adapter_metadata"] = json.dumps({prefix + name: x for name, x in settings.items()}, indent=2)
    return tensors, metadata | ({"pbe": json.dumps(entry)} if entry else {})


def roles(update: Update, shape: tuple[int, ...], format: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an update of a weight of this shape by what they are, shaped as a format has them.

    A magnitude that is not one number per output is called so, which only kohya's names have.
    """
    for role, x in update.factors.items():
        if update.kind == "LoRA" and "lora_mid" not in update.factors:  # some files have matrices for convolutions
            x = x.reshape(len(x), -1, *(shape[2:] if role == "lora_down" else [1] * len(shape[2:])))
        yield role, x
    if (m := update.magnitude) is not None and format == "kohya":
        yield "magnitude", m
    elif m is not None and len(m) != shape[0]:
        yield "DoRA by inputs", m
    elif m is not None:
        yield "magnitude", m.flatten() if m.ndim == 2 else m.transpose(0, 1)
    if format == "kohya" and (update.alpha is not None or update.rank):
        yield "alpha", torch.tensor(alpha_of(update))


def alpha_of(update: Update, rslora: bool = False) -> float:
    """The alpha by which a format with or without rslora scales as the update does."""
    if update.rslora == rslora or not update.rank:
        return float(update.rank or 1) if update.alpha is None else float(update.alpha)
    return update.scale * (sqrt(update.rank) if rslora else update.rank)


def lora_entry(adapter: Adapter) -> dict[str, Any]:
    """Rank and alpha as training keeps them."""
    found = {(update.rank or 1, alpha_of(update)) for update in adapter.updates.values()}
    if len(found) > 1:
        shown = shorten([f"{rank} and {alpha:g}" for rank, alpha in sorted(found)], 4)
        raise ValueError(f"pbe names hold one rank and alpha for all layers, got {shown}; kohya's, PEFT's hold any")
    return {"lora": {**asdict(LoRAConfig(*found.pop())), "targets": list(adapter.updates)}}


def peft_settings(adapter: Adapter, paths: dict[str, str]) -> dict[str, Any]:
    """The settings that PEFT keeps beside the tensors, which has either DoRA in all layers or in none."""
    updates = {paths[layer]: update for layer, update in adapter.updates.items()}
    with_dora = [path for path, update in updates.items() if update.magnitude is not None]
    if 0 < len(with_dora) < len(updates):
        raise ValueError(f"PEFT has DoRA in all layers, and {len(updates) - len(with_dora)} have none; kohya's can")
    rslora = all(update.rslora for update in updates.values())
    ranks = {path: update.rank for path, update in updates.items()}
    alphas = {path: alpha_of(update, rslora) for path, update in updates.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.metadata.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: x for path, x in ranks.items() if x != rank},
        "alpha_pattern": {path: x for path, x in alphas.items() if x != alpha},
        "target_modules": list(updates),
        "use_rslora": rslora,
        "use_dora": bool(with_dora),
    }
