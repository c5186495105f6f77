"""Files of adapters, our own and others', and models that are used with them.

Each format is a table of names made from this library's own layers: kohya's underscores are ambiguous, so that no name
is ever split at them.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pbe.checkpoints.detail import Detail, holds_detail, read_detail, use_detail
from pbe.checkpoints.diffusers_layouts import diffusers_unet
from pbe.checkpoints.formats.lazy_tensors import release_mapped
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError, find_checkpoint, open_checkpoint
from pbe.checkpoints.infer_config import Hints, is_number
from pbe.checkpoints.key_map import KeyMap, average_name, shorten
from pbe.checkpoints.layouts import find_layout
from pbe.io.json_text import parse_json, shown
from pbe.models.adapters import FACTORS, Update
from pbe.models.detail import remove_detail
from pbe.models.lora import QUERIES, UNET, LoRAConfig, check_plain, has_effect, layers_of, target_layers
from pbe.models.paint_by_example import Distilled, PaintByExample
from pbe.models.stable_diffusion import StableDiffusion
from pbe.models.unet import UNet, UNetConfig

AdapterLike = str | Path | tuple[str | Path, float]  # a file, or a file and its strength
Model = TypeVar("Model", bound=PaintByExample | StableDiffusion)

FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0"
OF_TEXT = re.compile(r"lora_te\d?_.*|(base_model\.model\.)?text_encoder(_2)?\..*")
MAX_PATTERNS = 1000
FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")


class Format(NamedTuple):
    """How a kind of files names what it holds of a layer: a template of the layer's name, a dot, and a suffix.

    modules: templates in {ours}, the layer's name here; {path}, diffusers' for it; {kohya}, with underscores for dots;
    {processor}, as attention processors once had it. suffixes: what each is, by the names of `pbe.models.adapters`.
    """

    modules: tuple[str, ...]
    suffixes: Mapping[str, str]

    def table(self, paths: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """By name in the file, the layer and what the tensor is of it; `paths` are diffusers' names by ours."""
        table: dict[str, tuple[str, str]] = {}
        for ours, path in paths.items():
            processor = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", path)
            for template in self.modules:
                module = template.format(ours=ours, path=path, kohya=path.replace(".", "_"), processor=processor)
                table |= {f"{module}.{suffix}": (ours, role) for suffix, role in self.suffixes.items()}
        return table


PEFT = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up", "lora_magnitude_vector": "magnitude"}
ONCE = {"lora.down.weight": "lora_down", "lora.up.weight": "lora_up", "lora_magnitude_vector.weight": "magnitude"}
KOHYA = {name if name[:4] != "lora" else f"{name}.weight": name for name in FACTORS}
FORMATS = {
    "kohya": Format(("lora_unet_{kohya}", "lycoris_{kohya}"), {**KOHYA, "alpha": "alpha", "dora_scale": "magnitude"}),
    "peft": Format(("base_model.model.{path}", "base_model.model.unet.{path}"), {**PEFT, **ONCE}),
    "diffusers": Format(("unet.{path}", "{path}"), {**PEFT, **ONCE}),
    "diffusers-old": Format(("unet.{processor}", "{processor}"), {"down.weight": "lora_down", "up.weight": "lora_up"}),
    "pbe": Format(("{ours}",), {"lora_down": "lora_down", "lora_up": "lora_up", "lora_magnitude": "magnitude"}),
}
SUFFIXES = tuple(f".{name}" for format in FORMATS.values() for name in format.suffixes if name != "alpha")


def holds_adapters(file: Checkpoint) -> bool:
    """Whether any tensor has a name as adapters have."""
    return any(name.endswith(SUFFIXES) for name in file.names()) or holds_detail(file)


def is_of_adapters(path: Path) -> bool:
    """Whether a file or folder holds adapters rather than a model; raises as `open_checkpoint`."""
    if path.is_dir():
        return any((path / name).is_file() for name in FOLDER_FILES)
    file = open_checkpoint(path)
    return find_layout(file.names()) is None and holds_adapters(file)


def diffusers_paths(config: UNetConfig, layers: Iterable[str]) -> dict[str, str]:
    """diffusers' names of these layers of a UNet, by ours."""
    rules = diffusers_unet(len(config.channel_mult), config.num_res_blocks, config.attention_levels)
    mappings = KeyMap(rules).to_theirs(layers)
    return {mapping.sources[0]: theirs.removeprefix("unet.") for theirs, mapping in mappings.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class Adapter:
    """A file of adapters for a UNet: what it changes, by the name of the layer.

    text: how many tensors of a text encoder it also holds. distilled: what it makes of a model, see `Distilled`.
    detail: it is a detail adapter, and changes no layer.
    """

    path: Path
    format: str
    updates: dict[str, Update]
    text: int
    metadata: dict[str, Any]
    distilled: Distilled | None = None
    detail: Detail | None = None


def open_adapter(path: str | Path) -> tuple[Checkpoint, dict[str, Any]]:
    """A file of adapters, or PEFT's or diffusers' folder, and the settings that PEFT keeps beside the tensors."""
    path = find_checkpoint(path)
    if path.is_dir():
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not files:
            raise CheckpointError(f"{path} is a folder without adapters; expected one of {', '.join(FOLDER_FILES)}")
        path = files[0]
    file = open_checkpoint(path)
    beside, header = path.with_name("adapter_config.json"), file.extras.get("lora_adapter_metadata")
    if path.stem == "adapter_model" and beside.is_file():
        header = beside.read_bytes()
    elif header is None:
        return file, {}
    try:
        settings = parse_json(header)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its PEFT settings are not valid JSON ({error})") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: its PEFT settings are {shown(settings)}; expected a JSON object")
    return file, {name.removeprefix("unet."): value for name, value in settings.items()}


def read_adapter(path: str | Path, model: nn.Module) -> Adapter:
    """The adapters in a file or folder for a model, which may be on the meta device: checked, and not multiplied yet.

    Raises `FileNotFoundError`; `CheckpointError` where the file has tensors that are not known or do not fit the model.
    """
    file, settings = open_adapter(path)
    if holds_detail(file):
        return Adapter(file.path, "detail", {}, 0, file.extras, detail=read_detail(file, model))
    layers, config = layers_of(model), model.get_submodule(UNET[:-1]).config
    assert isinstance(config, UNetConfig)
    paths = diffusers_paths(config, layers)
    averages = {average_name(name) for name in file.names()} & file.names()
    names = [name for name in file.names() if name not in averages and not OF_TEXT.fullmatch(name)]
    tables = {name: format.table(paths) for name, format in FORMATS.items()}
    format = max(FORMATS, key=lambda one: sum(name in tables[one] for name in names))
    if unknown := [name for name in names if name not in tables[format]]:
        kind = f"looks like adapters in {format} names, but has" if len(unknown) < len(names) else "holds no adapters:"
        raise CheckpointError(f"{path} {kind} {len(unknown)} tensors of no layer of the model: {shorten(unknown)}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name in names:
        layer, role = tables[format][name]
        if role in parts.setdefault(layer, {}):
            raise CheckpointError(f"{path} names {role} of {layer} twice: {name}")
        average = average_name(name)  # which is what training's sample grids showed
        parts[layer][role] = file.tensor(average if average in averages else name)
    if not parts:
        raise CheckpointError(f"{path} holds {len(file.names())} tensors of a text encoder, and none of the UNet")
    faults, updates = [], {}
    try:
        settings = settings or own_settings(file, model, parts)
        if settings.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"peft_type is {shown(settings['peft_type'])}; only LORA's files are read")
        distilled = Hints.from_entry(file.entry).distilled
        for name, part in parts.items():
            shape = tuple(layers[name].weight.shape)
            updates[name] = update = make_update(part, paths[name], len(shape), format, settings)
            try:
                update.check(shape, 4 if name == FIRST_CONVOLUTION else 0)
            except ValueError as error:
                faults.append(f"{name}: {error}")
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if faults:
        raise CheckpointError(f"{path} does not fit the model in {len(faults)} layers: {shorten(faults, 4)}")
    metadata = {name: value for name, value in file.extras.items() if name != "lora_adapter_metadata"} | settings
    text = len(file.names()) - len(names) - len(averages)
    return Adapter(file.path, format, updates, text, metadata, distilled)


def own_settings(file: Checkpoint, model: nn.Module, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Rank and alpha in the words of PEFT, of a file that training wrote; empty for anyone else's.

    Files may also list their layers: once by expressions, which are not run, since one can backtrack for ever.
    """
    if "lora" not in file.entry:
        return {}
    try:
        settings = dict(file.entry["lora"])
        named = isinstance(settings.get("targets"), str) or not settings.pop("targets", None)
        config = LoRAConfig(**settings)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"its entry 'lora' has unknown or impossible values: {error}") from None
    if any(len(part["lora_down"]) != config.rank for part in parts.values() if "lora_down" in part):
        raise ValueError(f"its entry 'lora' says rank {config.rank}, which its tensors do not have")
    layers = [name for name in target_layers(model, config.targets) if named and not name.endswith(QUERIES)]
    last = "magnitude" if config.dora else "lora_up"
    if lacking := [name for name in layers if last not in parts.get(name, ())]:
        raise ValueError(f"it lacks the adapters of {len(lacking)} layers: {shorten(lacking)}")
    return {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.rslora}


def make_update(part: Mapping[str, Tensor], path: str, ndim: int, format: str, settings: Mapping[str, Any]) -> Update:
    """The update of a weight of `ndim` dimensions, of the layer that diffusers calls `path`, from its tensors by role
    and PEFT's settings beside them."""
    alpha, rslora = alpha_pattern(settings, path), settings.get("use_rslora") is True
    if "alpha" in part:
        alpha, rslora = part["alpha"].flatten()[:2].tolist(), False
        alpha = alpha[0] if len(alpha) == 1 else alpha
    if alpha is not None and not (is_number(alpha) and math.isfinite(alpha)):
        raise ValueError(f"alpha of {path} is {shown(alpha)}; expected a finite number")
    magnitude = part.get("magnitude")
    if magnitude is not None and format != "kohya":  # there the axis follows from the shape; PEFT's is the output's
        magnitude = magnitude.reshape(-1, *[1] * (ndim - 1))
    return Update({name: x for name, x in part.items() if name in FACTORS}, alpha, rslora, magnitude)


def alpha_pattern(settings: Mapping[str, Any], path: str) -> Any:
    """The alpha that PEFT's settings give a layer, None where they say nothing.

    Patterns are expressions for the end of the name; only those that are plain names are read, and none is run.
    """
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or len(patterns) > MAX_PATTERNS:
        raise ValueError(f"alpha_pattern is {shown(patterns)}; expected numbers of at most {MAX_PATTERNS} layers")
    for pattern, alpha in patterns.items():
        name = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(f"alpha_pattern has {shown(pattern)}, which is not a layer's name")
        if path == name or (path.endswith(f".{name}") and pattern[0] != "^"):
            return alpha
    return settings.get("lora_alpha")


# ----------------------------------------------------------------------------------------------------------------------
# Using them


class Applied(NamedTuple):
    """What a model with adapters keeps: the adapters and their strengths, and what it was without them."""

    adapters: tuple[tuple[Adapter, float], ...]
    weights: dict[str, Tensor]  # by the layer's name
    config: Any


def like(weight: Tensor, other: Tensor) -> nn.Parameter:
    """The weight where the other one is, and in its precision: a model may have been moved since."""
    return nn.Parameter(weight.detach().to(other), other.requires_grad)


def with_strength(given: AdapterLike) -> tuple[str | Path, float]:
    """A file and its strength, 1 if not given; ValueError for one that is not a finite number."""
    path, strength = given if isinstance(given, tuple) else (given, 1.0)
    if not (is_number(strength) and math.isfinite(strength)):
        raise ValueError(f"the strength of {path} must be a finite number, got {strength!r}")
    return path, float(strength)


def open_with_strength(model: PaintByExample | StableDiffusion, given: AdapterLike) -> tuple[Adapter, float]:
    """An adapter's part that has an effect on a model, and its strength; warns of what has none."""
    path, strength = with_strength(given)
    adapter = read_adapter(path, model)
    left_out = {"tensors of a text encoder": adapter.text}
    updates = {name: x for name, x in adapter.updates.items() if has_effect(model, name)}
    left_out["queries and keys of attention over one token"] = len(adapter.updates) - len(updates)
    adapter = replace(adapter, updates=updates)
    if counted := " and ".join(f"{count} {what}" for what, count in left_out.items() if count):
        warnings.warn(f"{path}: {counted} have no effect here and are left out", stacklevel=3)
    return adapter, strength


@torch.no_grad()
def add_adapters(model: Model, *adapters: AdapterLike, dtype: torch.dtype | None = None) -> Model:
    """Adds adapters to a model, beside those that it has; returns the model.

    Each is a file, or PEFT's folder, in any format of `FORMATS`, or such a path and its strength (1 if not given; 0
    shows nothing, negative values the opposite). A layer's weight becomes W + Σ strength · difference, summed in
    float32 from the weight as it was and in `dtype` (default: as it was), so that an edit takes the time that it took.
    `remove_adapters` puts the old weights back, which stay mapped from their file if they were. What has no effect is
    left out with a warning: a text encoder's, and while the context has one token its attention's queries and keys.
    One of the files may be a detail adapter, whose strength is that at an edit's `detail=1`.

    Raises, with the model as before: `FileNotFoundError` and `CheckpointError` as `read_adapter`, and where a weight
    overflows its precision; `ValueError` for a strength that is not finite, for a second detail adapter, and for a
    prepared model or one in training.
    """
    if not isinstance(model, PaintByExample | StableDiffusion) or type(model.unet) is not UNet:
        raise ValueError(f"a {type(model).__name__} takes no adapters: add them to a model as it was loaded")
    check_plain(model)
    before: Applied = getattr(model, "_applied_adapters", None) or Applied((), {}, model.config)
    everything = (*before.adapters, *(open_with_strength(model, one) for one in adapters))
    details = [(adapter, strength) for adapter, strength in everything if adapter.detail and strength]
    if len(details) > 1:
        raise ValueError(f"a model takes one detail adapter, not {', '.join(str(one.path) for one, _ in details)}")
    layers = layers_of(model)
    old: dict[str, Tensor] = {}
    new: dict[str, nn.Parameter] = {}
    for name in dict.fromkeys(name for adapter, _ in everything for name in adapter.updates):
        weight = layers[name].weight
        old[name] = base = like(before.weights.get(name, weight), weight)
        total = base.to(torch.promote_types(base.dtype, torch.float32))
        for adapter, strength in everything:
            if name in adapter.updates and strength:
                total = total + strength * adapter.updates[name].difference(base)
        total = total.to(dtype or base.dtype)
        if not total.isfinite().all():
            paths = ", ".join(str(adapter.path) for adapter, _ in everything)
            raise CheckpointError(f"{paths}: with these adapters {name}.weight is not finite in {total.dtype}")
        new[name] = nn.Parameter(total, base.requires_grad)
        release_mapped(base)
    for adapter, strength in details:
        assert isinstance(model, PaintByExample), "read_detail takes no other"
        assert adapter.detail
        use_detail(model, adapter.detail, strength, dtype or model.dtype)
    for name, parameter in new.items():
        layers[name].weight = parameter
    distilled = [adapter.distilled for adapter, strength in everything if adapter.distilled and strength]
    if distilled and isinstance(model, PaintByExample):
        model.config = replace(before.config, distilled=distilled[-1])
    model._applied_adapters = Applied(everything, old, before.config)  # type: ignore[assignment]  # not a module
    return model


def remove_adapters(model: Model) -> Model:
    """Puts the weights back that the model had before `add_adapters`, to the bit; returns the model."""
    if state := getattr(model, "_applied_adapters", None):
        layers = layers_of(model)
        for name, weight in state.weights.items():
            layers[name].weight = like(weight, layers[name].weight)
        if isinstance(model, PaintByExample):
            remove_detail(model)
        model.config = state.config
        del model._applied_adapters
    return model
