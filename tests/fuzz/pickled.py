"""Checkpoints written opcode by opcode, since `torch.save` writes only what is sound."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

HEAD = b"\x80\x02"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    """A whole number, cut to 16 bytes."""
    return b"\x8a\x10" + max(-(2**127), min(value, 2**127 - 1)).to_bytes(16, "little", signed=True)


def torch_zip(path: Path, program: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """A zip as `torch.save` writes it, compressed, around the opcodes of a pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("archive/data.pkl", HEAD + program + b".")
        for key, data in (storages or {"0": bytes(16)}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def a_tensor(shape: tuple[int, ...], key: str = "0", numel: int = 4, dtype: str = "FloatStorage") -> bytes:
    """The opcodes of a contiguous tensor."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.insert(0, strides[0] * n)
    size, stride = (b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (shape, strides[: len(shape)]))
    storage = b"(" + text("storage") + f"ctorch\n{dtype}\n".encode() + text(key) + text("cpu") + whole(numel) + b"tQ"
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + storage + b"K\x00" + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"


def a_state(tensors: Mapping[str, bytes], extras: bytes = b"") -> bytes:
    """The opcodes of a Lightning dictionary; `extras` are further keys and values."""
    return b"}(" + text("state_dict") + b"}(" + b"".join(text(n) + t for n, t in tensors.items()) + b"u" + extras + b"u"
