"""The file formats of checkpoints: each `read_` function opens one, and reads no tensor before it is used."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.formats.lazy_tensors import (
    Checkpoint,
    CheckpointError,
    CompressedRecord,
    MappedFile,
    MappedRecord,
    StoredNumber,
    StoredTensor,
    StoredTensors,
)
from pbe.checkpoints.formats.pickles import MAX_DIMENSIONS, Placeholder, StorageRef, TensorRef, read_pickle
from pbe.io.json_text import parse_json

MAX_PICKLE_BYTES = 1 << 24  # the largest real data.pkl is a few megabytes
# What may come of a file: tensors of a few times its bytes, but not of a small one that is compressed, or names the
# same bytes again and again.
MAX_TENSORS = 10_000  # the released model with its averages has 2,076
MAX_GROWTH, SMALL_TENSOR_BYTES = 8, 1 << 26
MAX_NAME = 500  # characters of a tensor's name
MAX_ENTRY = 1 << 17  # of the text of the entry `pbe`
# Where files keep their weights, if not at the top, in the order of preference.
PLACES = ("params_ema", "params", "model", "module", "model_state_dict")
# Names that wrappers of a network add to its own: torch.compile, DataParallel, FSDP, activation checkpointing.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


def read_zip(path: Path) -> Checkpoint:
    """torch.save's zip archives and TorchScript's: `<root>/data.pkl` beside one member per storage."""
    file = MappedFile(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, RuntimeError, ValueError, struct.error, OSError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: {file.size:,} bytes that begin as a zip archive, but the zip directory "
            f"at the end is missing or unreadable ({error}); copy or download the file again"
        ) from error
    pickles = sorted((name for name in members if re.fullmatch(r"([^/]+/)?data\.pkl", name)), key=len)
    if not pickles:
        names = ", ".join(sorted(members)[:5]) or "nothing"
        raise CheckpointError(
            f"{path} is a plain zip archive without data.pkl (it holds {names}); expected a zip written by torch.save"
        )
    root = pickles[0].removesuffix("data.pkl")

    def record(name: str) -> MappedRecord | CompressedRecord:
        if name not in members:
            raise CheckpointError(f"{path} is damaged: its member {name} is missing")
        info = members[name]
        # The local header repeats the name and has extra bytes of its own; the data follow.
        start = info.header_offset + 30
        if not 30 <= start <= file.size or file.memory[start - 30 : start - 26] != b"PK\3\4" or info.flag_bits & 1:
            raise CheckpointError(f"{path} is damaged: its member {name} has no readable header")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{path} has an unsupported compression; expected a zip written by torch.save")
        start += sum(struct.unpack("<HH", file.memory[start - 4 : start]))
        if start + info.compress_size > file.size:
            raise CheckpointError(f"{path} is damaged: its member {name} ends after the end of the file")
        if info.compress_type != zipfile.ZIP_STORED:
            return CompressedRecord(file, name, start, info.compress_size, info.file_size, info.CRC)
        return MappedRecord(file, start, info.compress_size)

    def contents(name: str) -> bytes:
        member = record(name)
        if member.nbytes > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path} is damaged: its member {name} claims {member.nbytes:,} bytes")
        if isinstance(member, MappedRecord):  # torch may leave checksums out, so none is checked here
            return file.memory[member.start : member.start + member.nbytes]
        return member.read(0, torch.uint8, member.nbytes).numpy().tobytes() if member.nbytes else b""

    if f"{root}byteorder" in members and (order := contents(f"{root}byteorder").strip()) != b"little":
        raise CheckpointError(f"{path} was written with {order!r:.20} byte order; expected little-endian")
    top, _ = _read_pickle(path, io.BytesIO(contents(pickles[0])))

    def locate(storage: StorageRef) -> MappedRecord | CompressedRecord:
        return record(f"{root}data/{storage.key}")

    if f"{root}constants.pkl" in members:
        return _script_module(path, top, locate)
    return _state_dict(path, "PyTorch zip checkpoint", top, locate)


def read_legacy(path: Path) -> Checkpoint:
    """torch.save before 1.6: four pickles (magic, protocol, system, object), the storages' keys, then their bytes.

    Each storage is an 8-byte count of elements followed by the elements.
    """
    file = MappedFile(path)
    magic, _ = _read_pickle(path, file.memory)
    if magic != LEGACY_MAGIC:
        raise CheckpointError(f"{path} is a Python pickle, but not one that torch.save wrote; expected a checkpoint")
    protocol, _ = _read_pickle(path, file.memory)
    if protocol != LEGACY_PROTOCOL:
        raise CheckpointError(f"{path} is damaged: its protocol is not {LEGACY_PROTOCOL}")
    system, _ = _read_pickle(path, file.memory)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} was not written as little-endian; expected little-endian")
    top, storages = _read_pickle(path, file.memory)
    keys, _ = _read_pickle(path, file.memory)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise CheckpointError(f"{path} is damaged: its list of storages does not agree with its tensors")

    records = {}
    position = file.memory.tell()
    for key in keys:
        count, start = file.memory[position : position + 8], position + 8
        position = start + storages[key].nbytes
        if position > file.size:
            raise CheckpointError(
                f"{path} is cut short: {file.size:,} bytes, but its storages need {position:,} or more; "
                "copy or download the file again"
            )
        if int.from_bytes(count, "little") * storages[key].dtype.itemsize != storages[key].nbytes:
            raise CheckpointError(f"{path} is damaged: storage {key} does not have the size that its tensors name")
        records[key] = MappedRecord(file, start, storages[key].nbytes)

    def locate(storage: StorageRef) -> MappedRecord:
        if storage.key not in records:
            raise CheckpointError(f"{path} is damaged: the data of storage {storage.key} are missing")
        return records[storage.key]

    return _state_dict(path, "pre-zip PyTorch checkpoint", top, locate)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def read_safetensors(path: Path) -> Checkpoint:
    """A safetensors file; its metadata are the extras, and the entry `pbe` among them is parsed from JSON.

    The library checks the header: sizes, overlaps and the file's length. The data are mapped here, since its own
    mapping stays resident as a whole until every tensor is gone.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"reading {path} needs the extra safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as checked:
            extras = dict(checked.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is a safetensors file that is cut short or damaged ({path.stat().st_size:,} bytes: {error}); "
            "copy or download the file again"
        ) from error
    if "pbe" in extras:
        try:
            extras["pbe"] = parse_json(extras["pbe"])
        except ValueError as error:
            raise CheckpointError(f"the metadata entry 'pbe' of {path} is not valid JSON ({error})") from None

    file = MappedFile(path)
    data = 8 + int.from_bytes(file.memory[:8], "little")
    tensors: StoredTensors = {}
    for name, entry in json.loads(file.memory[8:data]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise CheckpointError(f"{path}: {name} is stored as {entry['dtype']}; expected one of {known}")
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        try:
            if len(shape) > MAX_DIMENSIONS:
                raise ValueError(f"{len(shape)} dimensions")
            like = torch.empty(shape, dtype=dtype, device="meta")
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # an empty tensor may claim any size
            raise CheckpointError(f"{path} is damaged: {name} has an impossible shape ({error})") from error
        record = MappedRecord(file, data + begin, end - begin)
        tensors[name] = StoredTensor(record, 0, like.numel(), dtype, like.shape, like.stride())
    if not tensors:
        raise CheckpointError(f"{path} is a safetensors file that holds no tensors")
    return _checked(Checkpoint(path, "safetensors file", tensors, extras))


def _checked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, its names without those of wrappers, if what it asks for is in proportion to its file, and its
    entry `pbe` is plain data."""
    path, tensors = checkpoint.path, {WRAPPERS.sub("", name): x for name, x in checkpoint.tensors.items()}
    if len(tensors) < len(checkpoint.tensors):
        raise CheckpointError(f"{path} holds tensors of one name with and without module. or _orig_mod. in it")
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{path} holds {len(tensors):,} tensors; expected at most {MAX_TENSORS:,}")
    if (longest := max(map(len, tensors))) > MAX_NAME:
        raise CheckpointError(f"{path} names a tensor in {longest:,} characters; expected at most {MAX_NAME}")
    needed, size = sum(tensor.cost for tensor in tensors.values()), path.stat().st_size
    if needed > max(SMALL_TENSOR_BYTES, MAX_GROWTH * size):
        raise CheckpointError(f"{path} has {size:,} bytes, and its tensors need {needed:,}: it is not sound")
    _check_plain(checkpoint.entry, path)
    return replace(checkpoint, tensors=tensors)


def _check_plain(entry: dict[str, Any], path: Path) -> None:
    """Raises unless an entry is what JSON can hold, and not long: whoever reads it may then walk, compare and print it.

    It is encoded step by step, since the text of lists that hold each other has no end.
    """
    length = 0
    try:
        for piece in json.JSONEncoder().iterencode(entry):
            length += 8 + len(piece)
            if length > MAX_ENTRY:
                raise ValueError(f"more than {MAX_ENTRY:,} bytes")
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its entry 'pbe' is not plain settings ({error})") from None


def _read_pickle(path: Path, stream: Any) -> tuple[Any, dict[str, StorageRef]]:
    try:
        return read_pickle(stream)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: its pickle cannot be read ({error}); expected what torch.save writes"
        ) from error


def _stored(path: Path, name: str, tensor: TensorRef, locate: Callable[[StorageRef], Any]) -> StoredTensor:
    record = locate(tensor.storage)
    if tensor.storage.offset + tensor.storage.nbytes > record.nbytes:
        raise CheckpointError(
            f"{path} is damaged: {name} needs {tensor.storage.nbytes:,} bytes of storage {tensor.storage.key}, "
            f"which has {record.nbytes:,}"
        )
    start = tensor.storage.offset + tensor.offset * tensor.dtype.itemsize
    return StoredTensor(record, start, tensor.span, tensor.dtype, torch.Size(tensor.shape), tensor.stride)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(x, TensorRef) for x in value.values())


def _state_dict(path: Path, kind: str, top: Any, locate: Callable[[StorageRef], Any]) -> Checkpoint:
    """The weights are `top["state_dict"]`, or else the tensors of `top` itself or of one of `PLACES`; the rest are
    extras."""
    if not isinstance(top, dict):
        what = repr(top) if isinstance(top, Placeholder) else f"a {type(top).__name__}"
        raise CheckpointError(f"{path} is a {kind} that holds {what}; expected a dict of named tensors")
    weights, extras = top, {}
    place = "state_dict" if isinstance(top.get("state_dict"), dict) else None
    if place is None and not _holds_tensors(top):
        place = next((key for key in PLACES if _holds_tensors(top.get(key))), None)
    if place:
        weights = top[place]
        extras = {key: value for key, value in top.items() if key != place}
    tensors: StoredTensors = {}
    others = {}
    for name, value in weights.items():
        if isinstance(value, TensorRef) and not isinstance(name, str):
            raise CheckpointError(f"{path} has a tensor with a name of type {type(name).__name__}; expected text")
        if isinstance(value, TensorRef):
            tensors[name] = _stored(path, name, value, locate)
        else:
            others[name] = value
    if not tensors:
        names = ", ".join(str(name) for name in list(weights)[:5] if isinstance(name, str)) or "nothing"
        raise CheckpointError(
            f"{path} is a {kind} that holds no tensors where they are expected, under 'state_dict' or by name at the "
            f"top level (found: {names})"
        )
    if weights is top:
        extras = others
    elif others and place:
        extras[place] = others
    return _checked(Checkpoint(path, kind, tensors, extras))


def _script_module(path: Path, top: Any, locate: Callable[[StorageRef], Any]) -> Checkpoint:
    """The tensor attributes of a module tree under their dotted names, as `state_dict` names them.

    Integers of the top module (OpenAI CLIP's `context_length`) become tensors too.
    """
    tensors: StoredTensors = {}
    seen = 0

    def walk(module: Placeholder, prefix: str, depth: int) -> None:
        nonlocal seen
        seen += 1 + len(module.state)
        if depth > 100 or seen > 100_000 or len(prefix) > MAX_NAME:
            raise CheckpointError(f"{path} is damaged: its modules contain each other without end")
        for key, value in module.state.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{path} is damaged: an attribute has a name of type {type(key).__name__}")
            name = prefix + key
            if isinstance(value, TensorRef):
                tensors[name] = _stored(path, name, value, locate)
            elif isinstance(value, Placeholder) and isinstance(value.state, dict):
                walk(value, f"{name}.", depth + 1)
            elif type(value) is int and not prefix and abs(value) < 2**63:
                tensors[name] = StoredNumber(value)

    if not isinstance(top, Placeholder) or not isinstance(top.state, dict):
        raise CheckpointError(f"{path} is a TorchScript archive that does not hold a module")
    walk(top, "", 0)
    if not any(isinstance(tensor, StoredTensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is a TorchScript archive that holds no tensors")
    return _checked(Checkpoint(path, "TorchScript archive", tensors, {}))
