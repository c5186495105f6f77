"""Fuzzing of checkpoints: whatever a file holds, it is a checkpoint or one of two kinds of error.

    python -m tests.fuzz.checkpoints --seconds 600

Sound files of every format are changed at random: bytes and spans of the file; in zip archives the members themselves
(so that the archive stays sound around a damaged pickle), by opcodes of pickles as well as by bytes; in safetensors the
header's JSON.
"""

import io
import json
import struct
import sys
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st

from pbe.checkpoints.formats.opening import Checkpoint, open_checkpoint
from pbe.checkpoints.loading import recognise
from pbe.checkpoints.surgery import describe
from tests.fuzz.running import changed, main

# Pieces of pickles: opcodes with short arguments, and globals that a reader gives a meaning.
OPCODES = [bytes([code]) for code in b"0123()]}.NQRabdelopstu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
OPCODES += [
    b"h\x00",
    b"h\x01",
    b"q\x00",
    b"q\x01",
    b"K\x00",
    b"K\x01",
    b"M\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"X\x01\x00\x00\x00a",
]
OPCODES += [b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G\x7f\xf8" + bytes(6), b"\x8b\x04\x00\x00\x00\xff\xff\xff\x7f"]
GLOBALS = ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter"]
GLOBALS += ["collections OrderedDict", "torch FloatStorage", "torch quint8", "torch Size", "builtins set", "os system"]
OPCODES += [b"c" + name.replace(" ", "\n").encode() + b"\n" for name in GLOBALS]
VALUES = [None, True, -1, 0, 2**62, 10**30, 1.5, "", "F32", "F4", [], [0], [2**62, 0], [[]], {}, {"a": None}, "\x1b[2J"]


@cache
def seeds() -> list[bytes]:
    """Sound files: zip and pre-zip pickles, nested and flat, and safetensors."""
    tensors = {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(2).half(), "empty": torch.empty(0, 4)}
    entry = {"unet_heads": 2, "lora": {"rank": 2, "targets": ["a"]}}
    lightning = {"state_dict": tensors, "epoch": 1, "pbe": entry, "optimizer_states": [{"state": {0: {"step": 1}}}]}
    files = []
    for value in (tensors, lightning):
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(value, stream, _use_new_zipfile_serialization=zipped)
            files.append(stream.getvalue())
    header = {
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "__metadata__": {"pbe": json.dumps(entry)},
    }
    files.append(safetensors(header, bytes(24)))
    return files


def safetensors(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_zip(draw: st.DrawFn, data: bytes) -> bytes:
    """The members of an archive changed, and perhaps compressed, in an archive that is sound itself."""
    stream = io.BytesIO()
    compression = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") or draw(st.integers(0, 9)) == 0:
                content = changed(draw, content, OPCODES)
            if draw(st.integers(0, 19)):
                new.writestr(name, content)
    return stream.getvalue()


def mutate_json(draw: st.DrawFn, value: object) -> object:
    """A JSON value with some of its parts replaced, removed or renamed."""
    if draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(VALUES))
    if isinstance(value, dict):
        names = st.sampled_from([*value, "pbe", "\x1b", "a" * 600])
        return {
            draw(names) if draw(st.integers(0, 9)) == 0 else name: mutate_json(draw, x) for name, x in value.items()
        }
    return [mutate_json(draw, x) for x in value] if isinstance(value, list) else value


@st.composite
def files(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from(seeds()))
    whole = draw(st.integers(0, 3)) == 0
    if data.startswith(b"PK") and not whole:
        return mutate_zip(draw, data)
    if data[8:9] == b"{" and not whole:
        length = struct.unpack("<Q", data[:8])[0]
        return safetensors(mutate_json(draw, json.loads(data[8 : 8 + length])), data[8 + length :])
    return changed(draw, data, OPCODES)


def check(data: object, folder: Path) -> Checkpoint | ValueError | OSError:
    """The checkpoint in a file that is opened, read and described as the commands do, or why it was refused.

    Whatever else the library raises breaks the rule.
    """
    assert isinstance(data, bytes)
    path = folder / "fuzzed.ckpt"
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names():
            checkpoint.tensor(name)
    except (ValueError, OSError) as error:
        return error
    with suppress(ValueError):  # few files are still a model
        str(describe(recognise(checkpoint)))
    return checkpoint


if __name__ == "__main__":
    sys.exit(main(__doc__, files(), check))
