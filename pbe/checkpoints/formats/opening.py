"""Opening a checkpoint of any kind that people have: named tensors that are read one by one, and everything else.

Nothing in a file is ever executed; see `pickles.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from pbe.checkpoints.formats.containers import read_legacy, read_safetensors, read_zip
from pbe.checkpoints.formats.lazy_tensors import Checkpoint, CheckpointError, StoredTensors
from pbe.io.json_text import parse_json

__all__ = ["Checkpoint", "CheckpointError", "find_checkpoint", "open_checkpoint", "read_state_dict"]

EXPORT_JSON = "export.json"  # in a folder of pbe.export's
DEMO_MODEL = Path(__file__).resolve().parents[2] / "weights" / "demo.ckpt"

EXPECTED = (
    "expected a PyTorch checkpoint (.ckpt, .pt, .pth, .bin), a TorchScript archive, a .safetensors file "
    "or a diffusers folder"
)

# The parts of a diffusers folder that hold weights this library knows.
COMPONENTS = ("unet", "vae", "image_encoder", "text_encoder")
# In the order of preference: both may lie side by side.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
CONFIG_FILES = ("config.json", "open_clip_config.json")

# Files that are taken for a checkpoint, by how they begin (lower case).
OTHER_FORMATS = {
    b"version https://git-lfs": "is a Git LFS pointer: the weights themselves were not fetched (git lfs pull)",
    b"<!doctype html": "is an HTML page: a download of the web page instead of the file",
    b"<html": "is an HTML page: a download of the web page instead of the file",
    b"<?xml": "is an XML text, often a server's error message instead of the file",
    b"{": "is a JSON text",
    b"\x89png\r\n": "is a PNG picture",
    b"\xff\xd8\xff": "is a JPEG picture",
    b"gif8": "is a GIF picture",
    b"riff": "is a RIFF file such as a WebP picture",
    b"%pdf": "is a PDF document",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"bzh": "is compressed with bzip2: unpack it first",
    b"\xfd7zxz": "is compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard: unpack it first",
    b"7z\xbc\xaf": "is a 7-Zip archive: unpack it first",
    b"rar!": "is a RAR archive: unpack it first",
    b"\x89hdf": "is an HDF5 file (Keras or TensorFlow weights)",
    b"\x93numpy": "is a NumPy array",
    b"gguf": "is a GGUF file",
}


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is: `path`, or for "demo" the small model that is part of this package (docs/demo-model.md);
    for a folder `models--OWNER--NAME` of the hub's cache, the snapshot in it; for `hf:OWNER/NAME[/FILE][@REVISION]`
    where `hub.fetch` puts what the hub has.

    A file of one's own that is called demo is "./demo". Raises `CheckpointError` where the cache has several snapshots.
    """
    if os.fspath(path) == "demo":
        return DEMO_MODEL
    if (text := Path(path).as_posix()).startswith("hf:"):
        from pbe.checkpoints.formats.hub import fetch

        return fetch(text)
    path = Path(path)
    return _snapshot(path) if (path / "snapshots").is_dir() else path


def _snapshot(cache: Path) -> Path:
    """The snapshot that `refs/main` names, or the only one."""
    found = {path.name: path for path in sorted((cache / "snapshots").iterdir()) if path.is_dir()}
    main = cache / "refs" / "main"
    named = main.read_text(errors="replace").strip() if main.is_file() else ""
    if named in found or len(found) == 1:
        return found.get(named) or next(iter(found.values()))
    listed = ", ".join(map(str, found.values())) or "none"
    raise CheckpointError(f"{cache} has no snapshot {named or 'that refs/main names'}; give one of: {listed}")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint, or "demo", without reading its tensors or executing anything in it.

    Reads zip and pre-zip files of `torch.save` (Lightning checkpoints, whose weights are their `state_dict`, and plain
    state dicts), TorchScript archives, safetensors files, diffusers folders (names are prefixed with the component, as
    in "unet.conv_in.weight") and Hugging Face model folders. The kind is told from the content, not from the suffix.

    Raises `FileNotFoundError`; `CheckpointError` where it is none of these or is damaged; `ImportError` where
    safetensors is needed and not installed.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}; {EXPECTED}")
    if not path.is_file():  # opening a pipe would wait for its other end
        raise CheckpointError(f"{path} is a pipe, a socket or a device; {EXPECTED}")
    return _read_file(path)


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds networks for another runtime (`pbe.export`)."""
    return (find_checkpoint(path) / EXPORT_JSON).is_file()


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All weights of a checkpoint of any kind as CPU tensors, memory-mapped. Raises as `open_checkpoint` does."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def _read_file(path: Path) -> Checkpoint:
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty; {EXPECTED}")
    # First, since the length that a safetensors file begins with may look like any other beginning.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return read_safetensors(path)
    if head.startswith(b"PK\3\4"):
        return read_zip(path)
    if head.startswith(b"\x80"):
        return read_legacy(path)
    raise CheckpointError(f"{path} {_describe(head, size)}; {EXPECTED}")


def _describe(head: bytes, size: int) -> str:
    text = head.lstrip().lower()
    for magic, description in OTHER_FORMATS.items():
        if text.startswith(magic) or head.lower().startswith(magic):
            return description
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if not any(head):
        return f"begins with zeros: {size:,} bytes of a download that did not finish"
    return f"is of an unknown kind: {size:,} bytes that begin with {head[:8]!r}"


def _open_folder(path: Path) -> Checkpoint:
    if is_exported(path):
        about = _read_json(path / EXPORT_JSON)
        return Checkpoint(path, "folder of exported networks", {}, {"export": about, "pbe": about.get("pbe")})
    if (path / "model_index.json").is_file():
        index = _read_json(path / "model_index.json")
        components = [name for name in COMPONENTS if _is_listed(index, name)]
        if components and (path / "tiny_decoder").is_dir():  # this library's own, which diffusers would warn of
            components.append("tiny_decoder")
        if not components:
            raise CheckpointError(f"{path / 'model_index.json'} lists none of {', '.join(COMPONENTS)}")
        if absent := [name for name in components if not (path / name).is_dir()]:
            raise CheckpointError(f"{path} lacks its parts {', '.join(absent)}, which model_index.json lists")
        parts = {f"{name}.": _read_component(path / name) for name in components}
        kind, extras = "diffusers folder", {"model_index": index}
    elif any((path / name).is_file() for name in CONFIG_FILES):
        parts = {"": _read_component(path)}
        kind, extras = "Hugging Face model folder", {}
    else:
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".ckpt", ".safetensors", ".pt", ".bin"))
        what = f"give one of the files in it: {', '.join(inside[:8])}" if inside else EXPECTED
        lacks = "neither model_index.json (diffusers) nor config.json (a Hugging Face model)"
        raise CheckpointError(f"{path} is a folder with {lacks}; {what}")
    tensors: StoredTensors = {}
    extras["configs"] = {}
    for prefix, part in parts.items():
        component = prefix.removesuffix(".")
        configs = [path / component / name for name in CONFIG_FILES]
        extras["configs"][component] = _read_json(next(filter(Path.is_file, configs), configs[0]))
        tensors |= {prefix + name: tensor for name, tensor in part.tensors.items()}
        extras |= {"pbe": part.extras["pbe"]} if "pbe" in part.extras else {}
    return Checkpoint(path, kind, tensors, extras)


def _is_listed(index: dict[str, Any], component: str) -> bool:
    """model_index.json says [library, class] for a part, [null, null] for one that is left out."""
    entry = index.get(component)
    return isinstance(entry, list) and len(entry) > 0 and entry[0] is not None


def _read_component(folder: Path) -> Checkpoint:
    """The weights in one folder: one file, or the shards that an index lists."""
    for variant in ("", ".fp16"):  # hubs offer both; the full precision where both were fetched
        for name in WEIGHT_FILES:
            stem, suffix = name.rsplit(".", 1)
            if (folder / f"{stem}{variant}.{suffix}").is_file():
                return _read_file(folder / f"{stem}{variant}.{suffix}")
            for index in (f"{stem}{variant}.{suffix}.index.json", f"{stem}.{suffix}.index{variant}.json"):
                if (folder / index).is_file():
                    return _read_shards(folder / index)
    raise CheckpointError(f"{folder} holds no weights; expected one of {', '.join(WEIGHT_FILES)}, or its .index.json")


def _read_shards(index: Path) -> Checkpoint:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in weight_map.values()
    ):
        raise CheckpointError(f"{index} has no `weight_map` from tensors to files beside it")
    shards = {}
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {file} that {index.name} lists")
        shards[file] = _read_file(index.parent / file)
    missing = [name for name, file in weight_map.items() if name not in shards[file].tensors]
    if missing:
        raise CheckpointError(f"{index} lists {missing[0]!r} in {weight_map[missing[0]]}, which does not hold it")
    tensors = {name: shards[file].tensors[name] for name, file in weight_map.items()}
    extras = {key: value for shard in shards.values() for key, value in shard.extras.items()}
    return Checkpoint(index, "sharded weights", tensors, extras)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; expected it beside the weights")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value
