"""Reading torch's pickles as data: nothing that a file names is imported or called.

A pickle is a program: it may name any function and have it called. `read_pickle` rebuilds plain containers, numbers and
text; tensors become `TensorRef`s that say where their data lie; every other global becomes an inert `Placeholder`.

What the file's program can reach is sealed: it may set attributes on whatever it has built or named (the BUILD opcode),
so everything handed to it is immutable, refuses a state, or merely keeps it.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch

# What one pickle may ask for. The released model with its averages and its optimizer's states takes 320,000 steps.
MAX_STEPS = 750_000  # opcodes, and items of the tuples that they copy or walk
MAX_TUPLE_ITEMS = 10_000  # hashing a tuple walks all that it nests, in C: too much of it ends or stalls the process
MAX_OTHER_KEYS = 10_000  # keys other than text, with what they nest: only text's hashes cannot be made to collide
MAX_PLACEHOLDERS = 10_000  # classes a file may name; real checkpoints name a handful
MAX_DIMENSIONS = 64  # torch's own limit


class Sealed:
    """Base of what a pickle is given to hold: a state set from the file is refused."""

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"the file sets attributes on a {type(self).__name__}")


@dataclass(frozen=True, eq=False)
class StorageRef(Sealed):
    """A range of one storage: the record's key in the file, and the range in bytes.

    `dtype` is that of the storage's elements, uint8 for an untyped storage.
    """

    key: str
    dtype: torch.dtype
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class TensorRef(Sealed):
    """A tensor that has not been read: a strided view (`offset` and `stride` in elements) of a storage."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one that the view touches, both included."""
        if not all(self.shape):
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


class _PlaceholderType(type):
    name: str

    def __repr__(cls) -> str:
        return cls.name


class Placeholder(metaclass=_PlaceholderType):
    """Stands for an object, a class or a function of the file that is not rebuilt.

    It keeps what the file gives it (`args`, `state`, and `items` appended, added or set) and does nothing. There is one
    subclass per global of a file, with `name` "module.name"; placeholders are hashable and compare by identity.
    """

    name: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: object) -> Placeholder:
        self = super().__new__(cls)
        self.args = args
        self.state = None
        self.items = []
        return self

    def __repr__(self) -> str:
        return f"<placeholder for {self.name}>"

    def __call__(self, *args: object) -> Placeholder:
        return type(self)(self, *args)

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, value: object) -> None:
        self.items.append(value)

    add = append

    def extend(self, values: list) -> None:
        self.items.extend(values)


class PlainDict(dict):
    """Stands for `collections.OrderedDict`; attributes set on it (a state dict's `_metadata`) are dropped.

    Python 2 made it of a list of pairs, which is emptied: a list that the file names often is copied once.
    """

    def __init__(self, *pairs: list) -> None:
        for key, value in pairs[0] if pairs else ():
            if not isinstance(key, str):
                raise pickle.UnpicklingError(f"a dictionary has a key of type {type(key).__name__}; expected text")
            self[key] = value
        if pairs:
            pairs[0].clear()

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True, eq=False)
class _Function(Sealed):
    """A function of this module that a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *args: object) -> Any:
        return self.function(*args)


# The functions that a pickle may call; it may give anything for their parameters.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any = None) -> TensorRef:
    if not isinstance(storage, StorageRef) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("a tensor is not described by a storage, a size and a stride")
    dtype = _checked_dtype(storage.dtype if dtype is None else dtype)
    # No message repeats a value from the file: the text of lists that hold each other can be endless.
    if len(size) > MAX_DIMENSIONS or len(size) != len(stride):
        raise pickle.UnpicklingError(f"a tensor has {len(size)} dimensions and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has an impossible offset, size or stride")
    tensor = TensorRef(storage, dtype, offset, tuple(size), tuple(stride))
    # More elements than the storage holds (an expanded tensor) would let a small file ask for any amount of memory.
    needed = max(offset + tensor.span, math.prod(size)) if tensor.span else 0
    if needed * dtype.itemsize > storage.nbytes or math.prod(max(n, 1) for n in size) >= 2**63:
        raise pickle.UnpicklingError(
            f"a tensor of size {tuple(size)} and stride {tuple(stride)} at {offset} does not fit "
            f"in its storage {storage.key!r} of {storage.nbytes} bytes"
        )
    return tensor


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRef:
    return _tensor_v3(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRef:
    if metadata:
        raise pickle.UnpicklingError("a tensor is a conjugate or negative view, which is not supported")
    return _tensor(storage, offset, size, stride, dtype)


def _checked_dtype(dtype: Any) -> torch.dtype:
    if dtype in PLAIN_DTYPES:
        return dtype
    name = dtype.name if isinstance(dtype, _PlaceholderType) else type(dtype).__name__
    known = ", ".join(str(plain).removeprefix("torch.") for plain in PLAIN_DTYPES)
    raise pickle.UnpicklingError(f"a tensor is stored as {name}; expected one of {known}")


def _first(data: object, *rest: object) -> object:
    """A parameter is its tensor, a TorchScript list its list, a torch.Size its tuple: the type, hooks and state beside
    it are dropped."""
    return data


STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}
# Whose numbers can be read as they stand. Of the others torch crashes, or knows too little: quantised, packed bits.
PLAIN_DTYPES = dict.fromkeys(STORAGE_DTYPES.values())
PLAIN_DTYPES |= dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64))

# Everything a file may name and get; the rest becomes a placeholder.
GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): PlainDict,
    ("torch", "Size"): _Function(_first),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Function(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_first),
    **{("torch.jit._pickle", f"build_{kind}list"): _Function(_first) for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _Function(_first),
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in PLAIN_DTYPES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")  # the encoding is for text written by Python 2
        self.storages: dict[str, StorageRef] = {}
        self.placeholders: dict[tuple[str, str], _PlaceholderType] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in GLOBALS:
            return GLOBALS[module, name]
        if (module, name) not in self.placeholders:
            if len(self.placeholders) == MAX_PLACEHOLDERS:
                raise pickle.UnpicklingError(f"more than {MAX_PLACEHOLDERS} different classes are named")
            members = {"name": f"{module}.{name}"}
            self.placeholders[module, name] = _PlaceholderType("Placeholder", (Placeholder,), members)
        return self.placeholders[module, name]

    def persistent_load(self, pid: object) -> object:
        match pid:
            case ("module", Placeholder() | type() as container, *_):
                return container  # pre-zip files put a module's source beside its class
            case ("storage", torch.dtype() | _PlaceholderType() as dtype, str() as key, _, int() as numel, *view):
                dtype = _checked_dtype(dtype)
                root = self.storages.setdefault(key, StorageRef(key, dtype, 0, numel * dtype.itemsize))
            case _:
                raise pickle.UnpicklingError("a persistent id does not describe a storage")
        match view:
            case [] | [None]:
                offset, size = 0, numel
            case [(_, int() as offset, int() as size)]:  # pre-zip: a view of a storage, in elements
                pass
            case _:
                raise pickle.UnpicklingError(f"unknown view of storage {key!r}")
        ref = StorageRef(key, dtype, offset * dtype.itemsize, size * dtype.itemsize)
        if min(numel, offset, size) < 0 or ref.offset + ref.nbytes > root.nbytes:
            raise pickle.UnpicklingError(f"the range {offset} + {size} is outside storage {key!r}")
        return ref


_REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "STRING", "NEXT_BUFFER", "READONLY_BUFFER"}
_REFUSED |= {"LONG", "LONG4"}  # numbers of any length
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
# Which of the items that an opcode takes are hashed; the first is the container, where there is one.
_KEYS = {"SETITEM": slice(1, None, 2), "SETITEMS": slice(1, None, 2), "DICT": slice(0, None, 2)}
_KEYS |= {"ADDITEMS": slice(1, None), "FROZENSET": slice(0, None)}
_MARK = object()
_TEXT = -1


def _check_opcodes(stream: BinaryIO) -> None:
    """Read one pickle's opcodes up to its STOP without running them; refuse what torch never writes or would do harm.

    The stack is followed only as far as the sizes of tuples and the kinds of keys need: an item is the mark, `_TEXT`,
    or the number of items nested in it if it is a tuple, 0 otherwise.
    """
    start, steps, other_keys = stream.tell(), 0, 0
    stack: list[Any] = []
    memo: dict[int, int] = {}
    arg: Any
    position: Any
    for opcode, arg, position in pickletools.genops(stream):
        name = opcode.name
        steps += 1
        if steps > MAX_STEPS:
            raise pickle.UnpicklingError(f"it has more than {MAX_STEPS:,} steps")
        if name in _REFUSED:
            raise pickle.UnpicklingError(f"the opcode {name} at byte {position} is refused")
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if arg > position - start:  # the unpickler allocates up to the highest index
                raise pickle.UnpicklingError(f"the memo index {arg} at byte {position} is out of range")
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(_MARK)
        elif not opcode.stack_before:
            stack += [_TEXT if name in _TEXTS else 0] * len(opcode.stack_after)
        else:
            taken = []
            for item in reversed(opcode.stack_before):
                if item is pickletools.stackslice:
                    while stack[-1] is not _MARK:
                        taken.append(stack.pop())
                else:
                    taken.append(stack.pop())
            size = 0
            items = [item for item in reversed(taken) if item is not _MARK]
            sizes = [max(item, 0) for item in items]
            steps += sum(sizes)
            if name in _TUPLES:
                size = len(sizes) + sum(sizes)
                if size > MAX_TUPLE_ITEMS:
                    raise pickle.UnpicklingError(f"a tuple nests more than {MAX_TUPLE_ITEMS} items")
            if name in _KEYS:
                other_keys += sum(1 + item for item in items[_KEYS[name]])  # 0 for a text
                if other_keys > MAX_OTHER_KEYS:
                    raise pickle.UnpicklingError(f"more than {MAX_OTHER_KEYS:,} keys are not text")
            stack.extend(size for _ in opcode.stack_after)


def read_pickle(stream: BinaryIO) -> tuple[Any, dict[str, StorageRef]]:
    """Rebuild the pickle that begins at the stream's position, and leave the stream at its end.

    Returns the object, with tensors as `TensorRef` and unknown globals as `Placeholder`, and the whole storages that
    it names by key. Raises `pickle.UnpicklingError` for whatever is not a sound pickle.
    """
    start = stream.tell()
    try:
        _check_opcodes(stream)
        end = stream.tell()
        stream.seek(start)
        unpickler = _Unpickler(stream.read(end - start))
        return unpickler.load(), unpickler.storages
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way, from IndexError to OverflowError
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
