"""Fuzzing of models' shapes: a file that names the tensors of a model, and more, is loaded or refused in bounded time.

    python -m tests.fuzz.models --seconds 600

The tensors of a small model of each family are given other shapes, empty and huge ones, and fewer or more layers, up to
3,000 of a kind; the entry `pbe` gets values of all types, and keys whose hashes collide. All numbers are one compressed
block of zeros, so that the file stays small whatever it asks for.
"""

import json
import re
import struct
import sys
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hypothesis import strategies as st
from torch import nn

import pbe
from pbe.checkpoints.infer_config import Hints
from pbe.checkpoints.loading import open_recognised
from pbe.checkpoints.meta_device import build_on_meta
from pbe.checkpoints.surgery import describe, expand, extract_ema
from pbe.models.adm import ADM, ADMConfig
from pbe.models.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import PaintByExample, PaintByExampleConfig
from pbe.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from pbe.models.unet import UNetConfig
from pbe.models.vae import VAEConfig
from tests.fuzz.pickled import a_state, a_tensor, text, torch_zip, whole
from tests.fuzz.running import main

UNET = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (0,), "context_dim": 64}
VAE = VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
VISION = CLIPVisionConfig(width=64, num_layers=2, num_heads=2, patch_size=14, image_size=28, mlp_width=64)
TEXT = CLIPTextConfig(width=64, num_layers=2, num_heads=2, vocab_size=50, mlp_width=64)
MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "Paint by Example": (
        PaintByExample,
        PaintByExampleConfig(UNetConfig(**UNET), VAE, ExemplarConfig(VISION, mapper_layers=1), resolution=64),
    ),
    "Stable Diffusion": (StableDiffusion, StableDiffusionConfig(UNetConfig(in_channels=4, **UNET), VAE, TEXT, 64)),
    "CLIP": (CLIP, CLIPConfig(VISION, TEXT, embed_dim=32)),
    "guided diffusion": (ADM, ADMConfig(3, 6, 32, (1, 2), 1, (1,), head_channels=32, resolution=16)),
}
Shapes = dict[str, tuple[int, ...]]
NUMEL = 1 << 18  # of the block of zeros
SIDES = st.sampled_from([0, 1, 2, 3, 7, 64, 1 << 14, 1 << 40, (1 << 62) - 1])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
COLLIDING = b"".join(whole(k * (2**61 - 1)) + b"N" for k in range(20_000))


@cache
def shapes(name: str) -> Shapes:
    """The shapes of a sound model's tensors by name."""
    model, config = MODELS[name]
    return {key: tuple(tensor.shape) for key, tensor in build_on_meta(model, config).state_dict().items()}


class File(NamedTuple):
    """What a file says, and what it is used for."""

    shapes: Shapes
    entry: dict[str, Any] = {}  # noqa: RUF012  # never changed
    collides: bool = False  # whether there are keys with one hash
    is_zip: bool = True  # else it is one of safetensors
    use: Literal["describe", "expand", "extract_ema", "load"] = "load"


@st.composite
def files(draw: st.DrawFn) -> File:
    changed = dict(shapes(draw(st.sampled_from(list(MODELS)))))
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(list(changed)))
        shape = changed[name]
        match draw(st.integers(0, 4)):
            case 0 if shape:  # of this tensor, or of all that have this side
                at, side = draw(st.integers(0, len(shape) - 1)), draw(SIDES)
                names = [name] if draw(st.booleans()) else [n for n, s in changed.items() if shape[at] in s]
                for n in names:
                    changed[n] = tuple(side if one == shape[at] else one for one in changed[n])
            case 1:
                changed[name] = draw(st.lists(SIDES, max_size=5).map(tuple))
            case 2:  # a layer, or a whole network, is left out
                prefix = name[: draw(st.integers(1, len(name)))]
                changed = {n: s for n, s in changed.items() if not n.startswith(prefix)} or {name: shape}
            case 3 if numbers := list(re.finditer(r"\d+", name)):  # more of its kind, with or without their parts
                found, count = draw(st.sampled_from(numbers)), draw(st.sampled_from([2, 65, 300, 3_000]))
                layer = name[: found.end()]
                parts = [n for n in changed if n.startswith(layer)][: draw(st.sampled_from([1, 20]))]
                for k in range(count if len(parts) == 1 else count // 10):
                    for part in parts:
                        changed[f"{name[: found.start()]}{k}{part[found.end() :]}"] = changed[part]
            case _:
                other = draw(st.sampled_from([name.upper(), f"model_ema.{name.replace('.', '')}", f"module.{name}"]))
                changed[other] = shape
    hints = st.sampled_from([*vars(Hints()), "inputs", "lora", "config"])
    entry, collides = draw(st.dictionaries(hints, VALUES, max_size=3)), draw(st.integers(0, 9)) == 0
    return File(changed, entry, collides, draw(st.booleans()), draw(st.sampled_from(list(USES))))


USES = {
    "describe": lambda path: describe(open_recognised(path)),
    "expand": lambda path: expand(open_recognised(path)),
    "extract_ema": lambda path: extract_ema(open_recognised(path)),
    "load": lambda path: pbe.load_model(path, device="cpu", dtype="float32"),
}


def check(file: object, folder: Path) -> ValueError | OSError | None:
    """Why a file is refused; None: it is not. Whatever else the library raises breaks the rule."""
    assert isinstance(file, File)
    path = write_zip(folder, file) if file.is_zip else write_safetensors(folder, file)
    assert path.stat().st_size < 1 << 20, "the rule is about smaller files"
    try:
        USES[file.use](path)
    except (ValueError, OSError) as error:
        return error
    return None


def write_zip(folder: Path, file: File) -> Path:
    extras = text("pbe") + opcodes(file.entry) + (text("x") + b"}(" + COLLIDING + b"u" if file.collides else b"")
    program = a_state({name: a_tensor(shape, numel=NUMEL) for name, shape in file.shapes.items()}, extras)
    return torch_zip(folder / "fuzzed.ckpt", program, {"0": bytes(4 * NUMEL)})


def opcodes(value: Any) -> bytes:
    """Those of a JSON value."""
    match value:
        case dict():
            return b"}(" + b"".join(text(name) + opcodes(one) for name, one in value.items()) + b"u"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case str():
            return text(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case int() if not isinstance(value, bool):
            return whole(value)
    return {None: b"N", True: b"\x88", False: b"\x89"}[value]


def write_safetensors(folder: Path, file: File) -> Path:
    """Of numbers of one byte, of which there are few: larger tensors are empty."""
    header: dict[str, Any] = {"__metadata__": {"pbe": json.dumps(file.entry)}}
    end = 0
    for name, shape in file.shapes.items():
        shape = shape if prod(shape) <= 64 else (*shape[1:], 0)
        start, end = end, end + prod(shape)
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()[: (1 << 20) - 9 - end]
    path = folder / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(end))
    return path


if __name__ == "__main__":
    sys.exit(main(__doc__, files(), check))
