"""Any file under 1 MB is read or refused within 10 seconds and 1 GB, in one line."""

import json
import os
import pickle
import socket
import struct
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

pytest.importorskip("hypothesis")

from fuzz.pickled import a_state, a_tensor, text, torch_zip
from fuzz.running import bounded
from marks import rest_slow

from pbe.checkpoints.adapters import add_adapters
from pbe.checkpoints.formats.opening import CheckpointError, open_checkpoint
from pbe.checkpoints.infer_config import Hints, pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.cli.checkpoint import main
from pbe.evaluation.quality_score import convert_mixture, load_mixture
from pbe.models.paint_by_example import PaintByExample


def zeros(config: object = TINY) -> dict[str, bytes]:
    """The opcodes of a whole small model whose numbers are all in one storage."""
    sizes, numel = shapes(config), largest(config)
    return {name: a_tensor(tuple(shape), numel=numel) for name, shape in sizes.items()}


@cache
def shapes(config: object) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: x.shape for name, x in PaintByExample(config).state_dict().items()}


def largest(config: object = TINY) -> int:
    return max(shape.numel() for shape in shapes(config).values())


def refused(path: Path, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What `pbe checkpoint` says of a file that it does not take: one line, short, that names the file."""
    with bounded():
        assert main([*(arguments or ("inspect",)), str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert path.name in line
    assert len(line) < 3000
    return line


COLLIDING = b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") for k in range(60_000))
DOUBLING = b"]q\x00" + b"0](h\x00h\x00eq\x00" * 60  # a list of 2^60 leaves


@cache
def programs() -> dict[str, bytes]:
    """Pickles that ask for more than their size, around one sound tensor."""
    w = {"w": a_tensor((2, 2))}
    many = b"(" + b"N" * 9_999 + b"tq\x01"
    keys = b"".join(COLLIDING[i : i + 13] + b"N" for i in range(0, len(COLLIDING), 13))
    colliding_items = b"".join(COLLIDING[i : i + 13] for i in range(0, len(COLLIDING), 13))
    pairs = b"](" + b"".join(text(str(i)) + b"N\x86" for i in range(20_000)) + b"eq\x02"
    return {
        "empty lists": b"](" + b"]" * 16_000_000 + b"e",
        "colliding keys": a_state(w, text("x") + b"}(" + keys + b"u"),
        "colliding keys, one by one": a_state(w, text("x") + b"}" + keys.replace(b"N\x8a", b"Ns\x8a") + b"s"),
        "colliding set": a_state(w, text("x") + b"\x8f(" + colliding_items + b"\x90"),
        "colliding frozenset": a_state(w, text("x") + b"(" + colliding_items[: 13 * 9_000] + b"\x91" * 1),
        "set of a list": a_state(w, text("x") + b"cbuiltins\nset\n](" + colliding_items + b"e\x85R"),
        "tuple keys": a_state(w, text("x") + many + b"0}(" + b"h\x01N" * 200_000 + b"u"),
        "copied arguments": a_state(w, text("x") + many + b"0cx\ny\nq\x02" + b"0](" + b"h\x02h\x01R" * 200_000 + b"e"),
        "copied dictionary": a_state(
            w, text("x") + pairs + b"0](" + b"ccollections\nOrderedDict\nh\x02\x85R" * 30_000 + b"e"
        ),
        "dimensions": a_state({"w": a_tensor((1,) * 3_000)}),
        "doubling": a_state(w, text("pbe") + b"}(" + text("x") + DOUBLING + b"u"),
        "doubling, deep": a_state(w, text("pbe") + b"}(" + text("x") + DOUBLING + DOUBLING[3:] * 14 + b"u"),
        "a list that holds itself": a_state(w, text("pbe") + b"}(" + text("x") + b"]q\x01h\x01au"),
        "deep": a_state(w, text("pbe") + b"}(" + text("x") + b"]" * 90_000 + b"a" * 89_999 + b"u"),
        "dots": a_state({"." * 400_000: a_tensor((2, 2))}),
        "many tensors": a_state({str(i): a_tensor((1,)) for i in range(12_000)}),
    }


@pytest.mark.parametrize("name", rest_slow(programs(), fast=6))
def test_small_pickles_are_refused(tmp_path, capsys, name):
    refused(torch_zip(tmp_path / "x.ckpt", programs()[name]), capsys)


@pytest.mark.parametrize("key", ["epoch", "global_step"])
def test_what_was_not_checked_is_not_printed(tmp_path, capsys, key):
    program = a_state(zeros(), text(key) + DOUBLING)
    path = torch_zip(tmp_path / "x.ckpt", program, {"0": bytes(4 * largest())})
    with bounded():
        assert main(["inspect", str(path)]) == 0
        assert main(["slim", str(path), "--out", str(tmp_path / "slim.ckpt")]) == 0
        assert main(["diff", str(path), str(tmp_path / "slim.ckpt")]) == 0
    assert key not in capsys.readouterr().out


def test_compressed_storages(tmp_path, capsys):
    """84 MB of zeros, and 4 MB that each of many tensors would inflate."""
    one = a_state({"w": a_tensor((20 << 20,), numel=20 << 20)})
    assert "its tensors need 83,886,080" in refused(
        torch_zip(tmp_path / "one.ckpt", one, {"0": bytes(80 << 20)}), capsys
    )
    many = a_state({f"w{i}": a_tensor((1 << 20,), numel=1 << 20) for i in range(3_000)})
    assert "its tensors need" in refused(torch_zip(tmp_path / "many.ckpt", many, {"0": bytes(4 << 20)}), capsys)


@pytest.mark.slow
def test_combinations_of_levels_and_blocks(tmp_path, capsys):
    names = [f"first_stage_model.encoder.down.{i}.block.0.conv1.weight" for i in range(900)]
    names += [f"first_stage_model.encoder.down.0.block.{i}.conv1.weight" for i in range(900)]
    path = torch_zip(
        tmp_path / "x.ckpt", a_state({**zeros(), **{n: a_tensor((1,)) for n in names}}), {"0": bytes(4 * largest())}
    )
    assert "at most 64" in refused(path, capsys)
    names = [f"cond_stage_model.mapper.resblocks.{i}.ln_1.weight" for i in range(3_000)]
    path = torch_zip(
        tmp_path / "x.ckpt", a_state({**zeros(), **{n: a_tensor((1,)) for n in names}}), {"0": bytes(4 * largest())}
    )
    assert "resblocks" in refused(path, capsys)


@pytest.mark.parametrize(
    "dtype", ["quint8", "qint8", "qint32", "quint4x2", "bits8", "bits16", "int4", "uint2", "float4_e2m1fn_x2"]
)
def test_dtypes_of_other_kinds(tmp_path, capsys, dtype):
    storage = b"(" + text("storage") + b"ctorch.storage\nUntypedStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v3\n("
        + storage
        + b"K\x00K\x04\x85K\x01\x85\x89N"
        + f"ctorch\n{dtype}\ntR".encode()
    )
    path = torch_zip(tmp_path / "x.ckpt", a_state({"w": tensor}))
    assert f"torch.{dtype}; expected one of" in refused(path, capsys)
    refused(path, capsys, "diff", str(path))
    typed = torch_zip(tmp_path / "y.ckpt", a_state({"w": a_tensor((2,), dtype="QUInt8Storage")}))
    assert "torch.QUInt8Storage; expected one of" in refused(typed, capsys)


def safetensors_file(path: Path, header: dict, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


@pytest.mark.parametrize("shape", [[2**62, 0], [0, 2**62], [2**62, 2**62, 0], [1] * 100_000, [2**70, 0]])
def test_safetensors_of_impossible_shapes(tmp_path, capsys, shape):
    pytest.importorskip("safetensors")
    nbytes = 4 if 0 not in shape else 0
    names = list(PaintByExample(TINY).state_dict())
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name in names[:300] if not nbytes}
    header = header or {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    refused(safetensors_file(tmp_path / "x.safetensors", header, bytes(nbytes)), capsys)


def test_models_of_empty_tensors(tmp_path, capsys):
    tensors = {name: a_tensor((2**40, 0)) for name in PaintByExample(TINY).state_dict()}
    path = torch_zip(tmp_path / "x.ckpt", a_state(tensors))
    assert "no numbers in" in refused(path, capsys)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 10**6},
        {"rank": "16"},
        {"rank": [1]},
        {"alpha": "x"},
        {"targets": [r"((a+)+)+\.", "(" * 5_000]},
        {"targets": 5},
        {"rank": 2, "targets": [r"(.*.*)*\.attn1x"]},
    ],
)
def test_adapters_that_ask_for_too_much(tmp_path, settings):
    state = {
        "model.diffusion_model.x.lora_down": torch.zeros(2, 4),
        "model.diffusion_model.x.lora_up": torch.zeros(4, 2),
    }
    torch.save({"state_dict": state, "pbe": {"lora": settings}}, tmp_path / "adapter.ckpt")
    model = PaintByExample(TINY)
    with bounded(), pytest.raises(CheckpointError, match=r"adapter\.ckpt"):
        add_adapters(model, tmp_path / "adapter.ckpt")
    assert model.state_dict().keys() == PaintByExample(TINY).state_dict().keys()


@pytest.mark.parametrize("value", [None, [], "text", 3, [[1]], {"a": 1}, 10**30, True, [1] * 1000])
@pytest.mark.parametrize(
    "place",
    [
        ("unet", "attention_head_dim"),
        ("unet", "sample_size"),
        ("vae", "block_out_channels"),
        ("vae", "scaling_factor"),
        ("image_encoder", "hidden_act"),
        ("image_encoder", "num_attention_heads"),
        ("", "vision_config"),
        ("", "text_config"),
    ],
)
def test_configs_of_any_types(place, value):
    with suppress(CheckpointError):
        Hints.from_configs({place[0]: {place[1]: value}})


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_not_a_file(tmp_path, capsys, monkeypatch, kind):
    path = tmp_path / "x.ckpt"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            monkeypatch.chdir(tmp_path)  # the name of a socket is short
            server.bind("x.ckpt")
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    for command in (["inspect"], ["diff", str(path)], ["merge-adapter", str(path), "--out", str(tmp_path / "y.ckpt")]):
        refused(path, capsys, *command)
    for function in (load_mixture, convert_mixture):
        with pytest.raises(FileNotFoundError, match=r"x\.ckpt"):
            function(path)


def test_mixtures_of_any_size(tmp_path):
    K = 30_000
    arrays = {"weights": np.ones(K) / K, "means": np.zeros((K, 1)), "precisions_cholesky": np.ones((K, 1, 1))}
    np.savez_compressed(tmp_path / "many.npz", features="", **arrays)
    with bounded(), pytest.raises(ValueError, match=r"many\.npz .*30,000 Gaussians; expected at most 1,000"):
        load_mixture(tmp_path / "many.npz")
    np.savez_compressed(tmp_path / "zeros.npz", features="", weights=np.zeros(16 << 20))
    with bounded(), pytest.raises(ValueError, match=r"zeros\.npz .*inflates to"):
        load_mixture(tmp_path / "zeros.npz")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "diag", "spherical"])
def test_mixtures_whose_covariances_are_short(tmp_path, kind):
    mixture = pytest.importorskip("sklearn.mixture").GaussianMixture(covariance_type=kind)
    C = 300 if kind == "tied" else 30_000
    K = 900 if kind == "tied" else 1
    mixture.weights_, mixture.means_ = np.ones(K) / K, np.zeros((K, C), np.float32 if kind == "tied" else np.float64)
    mixture.precisions_cholesky_ = {"tied": np.eye(C), "diag": np.ones((K, C)), "spherical": np.ones(K)}[kind]
    (tmp_path / "gmm").write_bytes(pickle.dumps(mixture))
    with bounded(), pytest.raises(ValueError, match=r"covariances of .* features are too large"):
        convert_mixture(tmp_path / "gmm")


def test_names_reach_the_terminal_escaped(tmp_path, capsys):
    state = {"evil\x1b]0;title\x07\nname\u202e": torch.ones(2), "half\udc80": torch.ones(1)}
    torch.save(state, tmp_path / "x.ckpt")
    line = refused(tmp_path / "x.ckpt", capsys)
    assert r"evil\x1b]0;title\x07\nname\u202e" in line
    assert r"half\udc80" in line


def test_entries_reach_the_terminal_escaped(tmp_path, capsys):
    entry = {**pbe_entry(TINY), "trained_on": "\x1b[2Jmanifest \r"}
    torch.save({"state_dict": seeded_state(TINY, 0), "pbe": entry}, tmp_path / "x.ckpt")
    assert main(["inspect", str(tmp_path / "x.ckpt")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2Jmanifest" in out


def test_sound_files_are_read_as_before(tmp_path):
    """Compressed, with integer keys of an optimizer, a frozenset and a torch.Size among the extras."""
    extras = {"sizes": torch.Size([2, 3]), "tuples": {(1, 2): frozenset({1, 2})}, "pbe": {"lists": [1, (2.0, None)]}}
    value = {"state_dict": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {i: [i] for i in range(3_000)}, **extras}
    torch.save(value, tmp_path / "x.ckpt", pickle_protocol=4)
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as old,
        zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for name in ("x.ckpt", "y.ckpt"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert torch.equal(checkpoint.tensor("w"), value["state_dict"]["w"])
        assert checkpoint.extras["sizes"] == (2, 3)
        assert checkpoint.extras["tuples"] == extras["tuples"]
        assert checkpoint.entry == {"lists": [1, (2.0, None)]}
        assert len(checkpoint.extras["optimizer"]) == 3_000
