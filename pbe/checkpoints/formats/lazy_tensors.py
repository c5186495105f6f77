"""Tensors that stay in their file until they are used, and the checkpoints that they make.

Data are mapped into memory where the file keeps them as they are. The mapping is private: a change to a tensor stays in
memory and never reaches the file. A file must not be overwritten in place while it is open.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import zlib
from collections.abc import KeysView
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# Python 3.13 names this flag. Without it Linux refuses to map a file that is larger than the whole memory.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

# Where files lie in memory: the first byte's address, for as long as a tensor or a `MappedFile` needs them.
_mapped: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


class CheckpointError(ValueError):
    """A file is not the expected checkpoint; the message names it, says what it is and what was expected."""


def converted(tensor: Tensor, dtype: torch.dtype | None, name: str, device: torch.device | str | None = None) -> Tensor:
    """The tensor called `name` in `dtype`, or as it is.

    Raises `CheckpointError` where that makes a finite value infinite: float16 ends at 65504.
    """
    result = tensor.to(device=device, dtype=dtype)
    narrowed = result.dtype == torch.float16 != tensor.dtype and result.numel() > 0
    if narrowed and not torch.stack(torch.aminmax(result)).isfinite().all():
        finite = tensor[tensor.isfinite()].abs()
        if finite.half().isinf().any():
            raise CheckpointError(f"{name} holds {finite.max():.6g}, beyond float16's 65504: use bfloat16 or float32")
    return result


class MappedFile:
    """A whole file as private, copy-on-write memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if sys.platform == "win32":
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            else:
                flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                self.memory = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
        self.size = len(self.memory)
        _mapped[ctypes.addressof(ctypes.c_char.from_buffer(self.memory))] = self.memory


def release_pages(memory: mmap.mmap, start: int, end: int) -> None:
    """Give the pages that lie wholly inside these bytes back to the system; what was written to them is lost."""
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def release_mapped(tensor: Tensor) -> None:
    """Give the pages under a contiguous tensor that was mapped from a file, and is as it was there, back to the system.

    It stays valid, and is read again when it is used. One that lies elsewhere or was changed in place is left alone, as
    is one from within `torch.inference_mode`, which does not tell whether it was changed.
    """
    if tensor.device.type != "cpu" or tensor.is_inference() or tensor._version:
        return
    for address, memory in _mapped.items():
        start = tensor.data_ptr() - address
        if 0 <= start < len(memory):
            release_pages(memory, start, start + tensor.nbytes)


@dataclass(frozen=True)
class MappedRecord:
    """Bytes of a file that are tensor data as they stand."""

    file: MappedFile
    start: int
    nbytes: int

    def read(self, start: int, dtype: torch.dtype, numel: int) -> Tensor:
        start += self.start
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self.file.memory, dtype=dtype, count=numel, offset=start)
        # Pre-zip files align nothing, and kernels may rely on aligned elements.
        nbytes = numel * dtype.itemsize
        data = torch.frombuffer(self.file.memory, dtype=torch.uint8, count=nbytes, offset=start).clone()
        release_pages(self.file.memory, start, start + nbytes)
        return data.view(dtype)

    def release(self, start: int, nbytes: int) -> None:
        release_pages(self.file.memory, self.start + start, self.start + start + nbytes)


@dataclass(frozen=True)
class CompressedRecord:
    """A zip member that somebody's archiver compressed: read into memory whenever it is asked for."""

    file: MappedFile
    name: str
    start: int
    compressed: int
    nbytes: int
    crc: int

    def read(self, start: int, dtype: torch.dtype, numel: int) -> Tensor:
        end = start + numel * dtype.itemsize
        deflated = memoryview(self.file.memory)[self.start : self.start + self.compressed]
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(deflated, max_length=end)
        except zlib.error as error:
            raise CheckpointError(f"{self.file.path} is damaged: its member {self.name}: {error}") from error
        if len(data) != end or (end == self.nbytes and zlib.crc32(data) != self.crc):
            raise CheckpointError(f"{self.file.path} is damaged: its member {self.name} is not what it says")
        return torch.frombuffer(bytearray(memoryview(data)[start:]), dtype=dtype)

    def release(self, start: int, nbytes: int) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape and dtype are known, its data are read by `load`.

    The tensor covers `span` elements of its record from the byte `start` on.
    """

    record: MappedRecord | CompressedRecord
    start: int
    span: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Bytes in memory once it is read and copied; of a compressed record, all that comes before is inflated too."""
        if isinstance(self.record, CompressedRecord):
            return self.start + self.span * self.dtype.itemsize
        return self.shape.numel() * self.dtype.itemsize

    def load(self) -> Tensor:
        if self.span == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return self.record.read(self.start, self.dtype, self.span).as_strided(self.shape, self.stride)

    def release(self) -> None:
        self.record.release(self.start, self.span * self.dtype.itemsize)


@dataclass(frozen=True)
class StoredNumber:
    """An integer attribute of a TorchScript module, as a tensor of no dimensions."""

    value: int
    dtype: torch.dtype = torch.int64
    shape: torch.Size = torch.Size()
    cost: int = 0

    def load(self) -> Tensor:
        return torch.tensor(self.value, dtype=self.dtype)

    def release(self) -> None:
        """Nothing is held."""


StoredTensors = dict[str, StoredTensor | StoredNumber]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    path: the file or folder.
    kind: what it is, in words ("PyTorch zip checkpoint", "diffusers folder").
    tensors: the weights by name; entries know their `shape` and `dtype` and read nothing before `load()`.
    extras: whatever else it holds, as plain containers in which unread tensors are `TensorRef` and objects of other
        classes `Placeholder`: a Lightning checkpoint's `epoch` or `optimizer_states`, a safetensors file's metadata,
        a folder's parsed `configs` by component ("" for the folder itself), and this library's entry `pbe`.
    """

    path: Path
    kind: str
    tensors: StoredTensors
    extras: dict[Any, Any]

    @property
    def entry(self) -> dict[str, Any]:
        """What this library wrote beside the weights, its entry `pbe`; empty in a file of anyone else's."""
        entry = self.extras.get("pbe")
        return entry if isinstance(entry, dict) else {}

    def names(self) -> KeysView[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> torch.Size:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, mapped from the file where its layout there allows it.

        Changing a mapped tensor in place changes memory only, for everyone who has this tensor or one that shares its
        storage; the file stays as it is.
        """
        return self._entry(name).load()

    def release(self, name: str) -> None:
        """Give the tensor's memory back to the system, after it has been copied or converted.

        A mapped tensor stays valid: it is read from the file again when it is used, and changes made to it in place
        are gone.
        """
        self._entry(name).release()

    def _entry(self, name: str) -> StoredTensor | StoredNumber:
        if name not in self.tensors:
            raise KeyError(f"{self.path} holds no tensor named {name!r}")
        return self.tensors[name]
