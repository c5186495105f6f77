import builtins
import gc
import io
import json
import mmap
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import rest_slow
from torch import nn

from pbe.checkpoints.formats.lazy_tensors import MappedFile
from pbe.checkpoints.formats.opening import CheckpointError, open_checkpoint, read_state_dict
from pbe.checkpoints.formats.pickles import Placeholder, TensorRef, read_pickle

ZIP, LEGACY = True, False


def save(value: object, path: Path, is_zip: bool = ZIP) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    return path


def various_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return {
        "float32": base,
        "shared": base[2:5],
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "float16": torch.randn(3, generator=generator).half(),
        "bfloat16": torch.randn(5, generator=generator).bfloat16(),
        "float64": torch.randn(2, 2, generator=generator).double(),
        "int64": torch.arange(77).expand(1, -1),
        "uint8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "complex64": torch.randn(4, generator=generator, dtype=torch.complex64),
        "scalar": torch.tensor(0.5),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(2, generator=generator)),
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name


# ---- formats


@pytest.mark.parametrize("is_zip", [ZIP, LEGACY])
@pytest.mark.parametrize("nested", [True, False])
def test_torch_files_equal_torch_load(tmp_path: Path, is_zip: bool, nested: bool) -> None:
    tensors = various_tensors()
    path = save({"state_dict": tensors, "epoch": 3} if nested else OrderedDict(tensors), tmp_path / "x.ckpt", is_zip)
    expected = torch.load(path, weights_only=False)
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == ("PyTorch zip checkpoint" if is_zip else "pre-zip PyTorch checkpoint")
    assert checkpoint.extras == ({"epoch": 3} if nested else {})
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.tensor(name).stride() == tensor.stride() or not tensor.numel()
    assert_same(read_state_dict(path), expected["state_dict"] if nested else expected)


def test_zip_tensors_share_memory_as_saved(tmp_path: Path) -> None:
    state = read_state_dict(save(various_tensors(), tmp_path / "x.pt"))
    state["float32"][2, 0] = 100.0
    assert state["shared"][0, 0] == state["transposed"][0, 2] == 100.0


def test_storage_types_of_every_plain_dtype(tmp_path: Path) -> None:
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64 uint16 float8_e5m2"
    tensors = {name: torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in names.split()}
    state = read_state_dict(save(tensors, tmp_path / "x.pt"))
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_state_dict_of_a_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for is_zip in (ZIP, LEGACY):  # the OrderedDict carries the attribute `_metadata`
        assert_same(read_state_dict(save(module.state_dict(), tmp_path / "x.pt", is_zip)), module.state_dict())


def test_parameters_with_attributes(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "kept by _rebuild_parameter_with_state"
    assert torch.equal(read_state_dict(save({"w": parameter}, tmp_path / "x.pt"))["w"], torch.ones(2))


def test_legacy_view_of_a_storage(tmp_path: Path) -> None:
    """Very old files name a view's root storage and its range; torch no longer writes them, so one is made here."""
    values = torch.arange(10, dtype=torch.float32)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            if value == "view":
                return ("storage", torch.FloatStorage, "7", "cpu", 10, ("8", 4, 5))
            return None

    class Tensor:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor, ("view", 1, (2, 2), (2, 1))

    path = tmp_path / "x.pt"
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump({"w": Tensor()})
        pickle.dump(["7"], file, protocol=2)
        file.write(struct.pack("<q", 10) + values.numpy().tobytes())
    assert torch.equal(read_state_dict(path)["w"], values[5:9].view(2, 2))
    assert torch.equal(torch.load(path)["w"], values[5:9].view(2, 2))


def test_recompressed_zip(tmp_path: Path) -> None:
    path, again = save(various_tensors(), tmp_path / "x.pt"), tmp_path / "again.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(read_state_dict(again), various_tensors())


def test_zip64_and_extra_fields(tmp_path: Path) -> None:
    path, again = save(various_tensors(), tmp_path / "x.pt"), tmp_path / "again.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as member:
                member.write(old.read(name))
    assert_same(read_state_dict(again), various_tensors())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.in_proj_weight = nn.Parameter(torch.randn(6, 2).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.in_proj_weight.t()


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(4))
        self.proj = nn.Parameter(torch.randn(4, 2).half())
        self.resblocks = nn.Sequential(Attention(), Attention())
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resblocks(x @ self.proj)


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context_length = 77
        self.visual = Visual()
        self.register_buffer("input_resolution", torch.tensor(224))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def save_script(path: Path) -> dict[str, torch.Tensor]:
    module = Clip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the files remain
        torch.jit.script(module).save(str(path))
    return module.state_dict()


def test_torchscript_archive(tmp_path: Path) -> None:
    expected = save_script(tmp_path / "clip.pt")
    checkpoint = open_checkpoint(tmp_path / "clip.pt")
    assert checkpoint.kind == "TorchScript archive"
    state = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    context_length = state.pop("context_length")
    assert context_length.shape == ()
    assert context_length.dtype == checkpoint.dtype("context_length") == torch.int64
    assert context_length == 77
    assert_same(dict(sorted(state.items())), dict(sorted(expected.items())))


def test_safetensors_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {
        name: tensor.detach().contiguous().clone() for name, tensor in various_tensors().items() if name != "complex64"
    }
    metadata = {"format": "pt", "pbe": json.dumps({"heads": 8})}
    safetensors.save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.kind == "safetensors file"
    assert checkpoint.extras == {"format": "pt", "pbe": {"heads": 8}}
    assert {name: (checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()
    }
    state = read_state_dict(tmp_path / "x.safetensors")
    assert_same({name: state[name] for name in tensors}, tensors)
    safetensors.save_file(tensors, tmp_path / "y.safetensors", metadata={"pbe": "{heads"})
    with pytest.raises(CheckpointError, match=r"'pbe' of .*y\.safetensors is not valid JSON"):
        open_checkpoint(tmp_path / "y.safetensors")


def test_safetensors_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"extra safetensors: pip install safetensors"):
        open_checkpoint(tmp_path / "x.safetensors")


def make_diffusers_folder(folder: Path) -> dict[str, torch.Tensor]:
    index = {
        "_class_name": "PaintByExamplePipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": ["paint_by_example", "PaintByExampleImageEncoder"],
        "text_encoder": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    for component in ("unet", "vae", "image_encoder"):
        (folder / component).mkdir()
        (folder / component / "config.json").write_text(json.dumps({"name": component}))
    state = {f"layer.{i}": torch.full((2, 3), float(i)) for i in range(4)}
    first, second = {"layer.0": state["layer.0"]}, {k: v for k, v in state.items() if k != "layer.0"}
    save(first, folder / "unet" / "part-1.bin")
    save(second, folder / "unet" / "part-2.bin", LEGACY)
    weight_map = {"layer.0": "part-1.bin", **dict.fromkeys(second, "part-2.bin")}
    (folder / "unet" / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save(state, folder / "vae" / "diffusion_pytorch_model.bin")
    save(state, folder / "image_encoder" / "pytorch_model.bin")
    return {f"{c}.{name}": tensor for c in ("unet", "vae", "image_encoder") for name, tensor in state.items()}


def test_diffusers_folder(tmp_path: Path) -> None:
    expected = make_diffusers_folder(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.kind == "diffusers folder"
    assert checkpoint.extras["configs"]["vae"] == {"name": "vae"}
    assert "text_encoder" not in checkpoint.extras["configs"]
    assert_same(read_state_dict(tmp_path / "model"), expected)


def test_diffusers_folder_written_by_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("safetensors")
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(tmp_path / "vae", max_shard_size="100KB")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json").exists()
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    state = read_state_dict(tmp_path)
    expected = {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    assert_same(dict(sorted(state.items())), dict(sorted(expected.items())))


def test_model_folder_has_no_prefix(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.names()) == ["w"]
    assert checkpoint.extras == {"configs": {"": {"model_type": "clip"}}}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f / "vae"), "model lacks its parts vae, which model_index"),
        (lambda f: (f / "vae" / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "vae" / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "vae" / "config.json").write_text("[]"), "holds a list; expected a JSON object"),
        (lambda f: (f / "unet" / "part-2.bin").unlink(), "lacks the shard part-2.bin"),
        (lambda f: save({"other": torch.ones(1)}, f / "unet" / "part-1.bin"), "'layer.0' in part-1.bin, which does"),
        (lambda f: (f / "model_index.json").write_text("{}"), "lists none of unet"),
        (lambda f: (f / "model_index.json").unlink(), "neither model_index.json .* nor config.json"),
        (
            lambda f: (f / "unet" / "diffusion_pytorch_model.bin.index.json").write_text(
                '{"weight_map": {"layer.0": "../vae/diffusion_pytorch_model.bin"}}'
            ),
            "no `weight_map` from tensors to files beside it",
        ),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: object, message: str) -> None:
    make_diffusers_folder(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


# ---- Lightning


def lightning_checkpoint() -> dict:
    lightning = pytest.importorskip("lightning.pytorch")
    weights = various_tensors()
    return {
        "state_dict": weights,
        "epoch": 39,
        "global_step": 1234,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            lightning.callbacks.ModelCheckpoint: {
                "best_model_score": np.float64(0.25),
                "best_model_path": Path("last.ckpt"),
                "dtype": np.dtype("float32"),
                "array": np.arange(3),
            }
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1000, 1000)}}, "param_groups": [{"lr": 1e-5}]}],
        "lr_schedulers": [],
        "pbe": {"heads": 8},
    }


@pytest.mark.parametrize("is_zip", [ZIP, LEGACY])
def test_lightning_checkpoint(tmp_path: Path, is_zip: bool) -> None:
    path = save(lightning_checkpoint(), tmp_path / "model.ckpt", is_zip)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    checkpoint = open_checkpoint(path)
    assert_same({name: checkpoint.tensor(name) for name in checkpoint.names()}, various_tensors())
    assert checkpoint.extras["global_step"] == 1234
    assert checkpoint.extras["pbe"] == {"heads": 8}
    ((callback, state),) = checkpoint.extras["callbacks"].items()
    assert isinstance(callback, type)
    assert issubclass(callback, Placeholder)
    assert repr(callback) == "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"
    assert all(isinstance(state[name], Placeholder) for name in ("best_model_score", "best_model_path", "array"))


def test_optimizer_states_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(lightning_checkpoint(), tmp_path / "model.ckpt")
    ranges = []

    def frombuffer(buffer: object, *, dtype: torch.dtype, count: int, offset: int = 0) -> torch.Tensor:
        ranges.append((offset, offset + count * dtype.itemsize))
        return original(buffer, dtype=dtype, count=count, offset=offset)

    original = torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", frombuffer)
    checkpoint = open_checkpoint(path)
    assert "optimizer_states" in checkpoint.extras
    assert ranges == []
    for name in checkpoint.names():
        checkpoint.tensor(name)
    exp_avg = checkpoint.extras["optimizer_states"][0]["state"][0]["exp_avg"]
    assert isinstance(exp_avg, TensorRef)
    assert exp_avg.shape == (1000, 1000)
    # All that was handed out together is smaller than that one tensor of 4 MB.
    assert sum(end - start for start, end in ranges) < 10_000


# ---- nothing is executed


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:
        """Lets the called function itself be something that pickles as a call."""


def attacks(target: Path) -> dict[str, Call]:
    code = f"open({str(target)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {target}"),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "open": Call(builtins.open, str(target), "w"),
        "subprocess": Call(subprocess.Popen, ["touch", str(target)]),
        "method": Call(Path.touch, target),
        "getattr, then its result": Call(Call(getattr, target, "touch")),
    }


def attack_bytes(name: str, target: Path) -> bytes:
    return pickle.dumps(attacks(target)[name], protocol=2)[2:-1]  # without PROTO and STOP: to go into another pickle


def armed(data: bytes, attack: bytes, at: int = 2) -> bytes:
    """The pickle `data` with the attack run first and its result thrown away."""
    return data[:at] + attack + b"0" + data[at:]


def rewrite_zip(path: Path, change: object) -> None:
    """Write the zip again with `change` applied to data.pkl."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


NAMES = list(attacks(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_the_attacks_do_work_on_plain_pickle(tmp_path: Path, name: str) -> None:
    target = tmp_path / "created"
    value = pickle.loads(b"\x80\x02" + attack_bytes(name, target) + b".")
    if isinstance(value, subprocess.Popen):
        value.wait()
    assert target.exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", rest_slow(["zip", "legacy", "script"]))
def test_nothing_is_executed(tmp_path: Path, name: str, kind: str) -> None:
    target, path = tmp_path / "created", tmp_path / "x.pt"
    attack = attack_bytes(name, target)
    if kind == "legacy":
        expected = various_tensors()
        data = save(expected, path, LEGACY).read_bytes()
        stream = io.BytesIO(data)
        for _ in range(3):
            pickle.load(stream)
        path.write_bytes(armed(data, attack, stream.tell() + 2))
    else:
        expected = various_tensors()
        if kind == "zip":
            save(expected, path)
        else:
            expected = save_script(path)
        rewrite_zip(path, lambda data: armed(data, attack))
    state = read_state_dict(path)
    gc.collect()
    assert not target.exists()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("is_zip", [ZIP, LEGACY])
def test_calls_among_the_extras_are_inert(tmp_path: Path, is_zip: bool) -> None:
    target = tmp_path / "created"
    value = {"state_dict": {"w": torch.ones(2)}, "callbacks": [Call(os.system, f"touch {target}")]}
    checkpoint = open_checkpoint(save(value, tmp_path / "x.ckpt", is_zip))
    (call,) = checkpoint.extras["callbacks"]
    assert repr(call) == f"<placeholder for {os.system.__module__}.system>"
    assert call.args == (f"touch {target}",)
    assert not target.exists()
    assert torch.equal(checkpoint.tensor("w"), torch.ones(2))


def test_placeholders_import_nothing(tmp_path: Path) -> None:
    module = tmp_path / "imported_by_a_pickle.py"
    module.write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        value, _ = read_pickle(io.BytesIO(b"\x80\x04\x8c\x14imported_by_a_pickle\x8c\x03a.b\x93."))
    finally:
        sys.path.remove(str(tmp_path))
    assert repr(value) == "imported_by_a_pickle.a.b"
    assert "imported_by_a_pickle" not in sys.modules


def test_every_placeholder_opcode() -> None:
    head = b"\x80\x04cos\nsystem\n"
    for body in (b")R", b")\x81", b")}\x92", b")R}b", b")RK\x01a", b")R(K\x01e", b")RK\x01K\x02s", b")R(K\x01\x90"):
        value, _ = read_pickle(io.BytesIO(head + body + b"."))
        assert isinstance(value, Placeholder)
        assert hash(value) is not None


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb",  # attributes on the library's function
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b",
        b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb",  # and on its classes
        b"ccollections\nOrderedDict\nN}X\x05\x00\x00\x00itemsK\x01s\x86b",
        b"cos\nsystem\nN}X\x04\x00\x00\x00nameK\x01s\x86b",
        b"ctorch\nSize\nN}X\x05\x00\x00\x00numelK\x01s\x86b",
    ],
)
def test_a_pickle_cannot_change_what_it_is_given(program: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(io.BytesIO(b"\x80\x02" + program + b"."))


@pytest.mark.parametrize(
    "program",
    [
        b"\x82\x01",  # EXT1
        b"\x83\x01\x00",
        b"(cos\nsystem\no",  # OBJ
        b"(ios\nsystem\n",  # INST
        b"]r\xff\xff\xff\x7f",  # a memo of 2^31 entries
        b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s",  # hashing this would overflow the C stack
        b"})" + b"2\x86" * 60 + b"K\x01s",  # and this would take 2^60 steps
        b"\x8b\xff\xff\xff\x7f",
        b"N(K\x01N\x86Q",
        b"",
    ],
)
def test_harmful_opcodes_are_refused(program: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(io.BytesIO(b"\x80\x02" + program + b"."))


def test_deep_and_self_containing_extras(tmp_path: Path) -> None:
    loop: list = []
    loop.append(loop)
    wide: list = []
    for _ in range(60):
        wide = [wide, wide]  # 2^60 leaves if anything walked it
    extras = {"state_dict": {"w": torch.ones(1)}, "loop": loop, "wide": wide}
    assert list(read_state_dict(save(extras, tmp_path / "x.pt"))) == ["w"]
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    value, _ = read_pickle(io.BytesIO(deep))
    assert isinstance(value, list)


# ---- wrong and damaged files


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "x.ckpt is empty; expected a PyTorch checkpoint"),
        (b"\n<!DOCTYPE html><html></html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer"),
        (b'{"error": "Repository not found"}', "is a JSON text"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "is a PNG picture"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "is a JPEG picture"),
        (b"a.ckpt" + bytes(251) + b"ustar\x0000" + bytes(300), "is a tar archive"),
        (b"\x1f\x8b\x08" + bytes(20), "is compressed with gzip"),
        (bytes(4096), "begins with zeros: 4,096 bytes"),
        (b"hello there", "is of an unknown kind: 11 bytes"),
        (pickle.dumps({"a": 1}), "is a Python pickle, but not one that torch.save wrote"),
        (b"PK\x03\x04" + bytes(50), "is cut short or damaged: 54 bytes .* zip directory"),
    ],
)
def test_wrong_files_say_what_they_are(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_missing_and_plain_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        open_checkpoint(tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        open_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.writestr("model.ckpt", b"")
    with pytest.raises(CheckpointError, match=r"plain zip archive without data.pkl \(it holds model.ckpt\)"):
        open_checkpoint(tmp_path / "plain.zip")
    with pytest.raises(KeyError, match="holds no tensor named 'v'"):
        open_checkpoint(save({"w": torch.ones(1)}, tmp_path / "x.pt")).tensor("v")


@pytest.mark.parametrize(
    "value, message",
    [
        ({"weights": {"w": torch.ones(1)}}, r"holds no tensors where .*'state_dict'.*\(found: weights\)"),
        ({"state_dict": {}}, "holds no tensors"),
        ([torch.ones(1)], "holds a list; expected a dict of named tensors"),
        (nn.Linear(1, 1), "holds <placeholder for torch.nn.modules.linear.Linear>; expected a dict"),
        ({3: torch.ones(1)}, "name of type int; expected text"),
        ({"w": torch.ones(1).expand(1000)}, "does not fit in its storage"),
    ],
)
@pytest.mark.parametrize("is_zip", [ZIP, LEGACY])
def test_files_without_named_tensors(tmp_path: Path, value: object, message: str, is_zip: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saving a whole module looks for its source
        save(value, tmp_path / "x.pt", is_zip)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pt")


def test_big_endian_files(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="b'big' byte order; expected little-endian"):
        open_checkpoint(path)


def test_storages_smaller_than_their_tensors(tmp_path: Path) -> None:
    path = save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:-1] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match="w needs 8 bytes of storage 0, which has 7"):
        open_checkpoint(path)


def make_file(kind: str, path: Path) -> bytes:
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file({"w": torch.ones(40), "v": torch.ones(3)}, path)
    elif kind == "script":
        save_script(path)
    else:
        save({"state_dict": {"w": torch.ones(40), "v": torch.ones(3)}, "epoch": 1}, path, kind == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["zip", "legacy", "script", "safetensors"])
def test_every_cut_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.ckpt"
    data = make_file(kind, path)
    for length in {*range(0, len(data), max(1, len(data) // 500)), *range(len(data) - 100, len(data))}:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.ckpt"):
            read_state_dict(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "script", "safetensors"])
@pytest.mark.parametrize("place", ["anywhere", "in the pickle"])
def test_damaged_bytes_give_an_error_or_tensors(tmp_path: Path, kind: str, place: str) -> None:
    rng = random.Random(f"{kind} {place}")
    path = tmp_path / "x.ckpt"
    data = make_file(kind, path)
    start, end = 0, len(data)
    if place == "in the pickle" and kind in ("zip", "script"):
        with zipfile.ZipFile(path) as archive:
            (content,) = (archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
        start = data.index(content)
        end = start + len(content)
    elif place == "in the pickle":
        end = len(data) - 43 * 4
    results = {"error": 0, "read": 0}
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(start, end)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
            results["read"] += 1
        except CheckpointError:
            results["error"] += 1
    assert results["error"] > 0, results


# ---- memory


def resident() -> int:
    """Resident bytes of this process."""
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("resident memory is read from /proc")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system cannot give pages back")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_release_bounds_resident_memory(tmp_path: Path, kind: str) -> None:
    count, numel = 40, 1 << 20
    tensors = {f"w{i}": torch.full((numel,), float(i)) for i in range(count)}
    path = tmp_path / "x.ckpt"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    else:
        save(tensors, path, kind == "zip")
    del tensors
    checkpoint = open_checkpoint(path)
    float(checkpoint.tensor("w0").sum())
    checkpoint.release("w0")
    before, peak = resident(), 0
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        assert tensor[-1] == tensor.sum() / numel == float(name[1:])
        del tensor
        checkpoint.release(name)
        peak = max(peak, resident() - before)
    # One tensor is 4 MB and the file 160: pages at the borders and the allocator account for the slack.
    assert peak < 24 << 20


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system cannot give pages back")
def test_release_discards_changes_and_the_tensor_stays_valid(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save({"w": torch.ones(1 << 16)}, tmp_path / "x.pt"))
    tensor = checkpoint.tensor("w")
    tensor.mul_(2)
    assert checkpoint.tensor("w").sum() == 2 << 16
    checkpoint.release("w")
    # Pages that the tensor does not fill alone are kept: at most one at each end, 1,024 numbers each.
    assert (tensor == 1).sum() >= (1 << 16) - 2048


@pytest.mark.parametrize("kind", ["zip", "legacy", "script", "safetensors"])
def test_changes_never_reach_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.ckpt"
    data = make_file(kind, path)
    for tensor in read_state_dict(path).values():
        tensor.zero_()
    gc.collect()
    assert path.read_bytes() == data


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    state = read_state_dict(save({"w": torch.arange(1000)}, tmp_path / "x.pt"))
    gc.collect()
    assert state["w"].sum() == 499500


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files and the kernel's limit on mappings")
def test_files_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.touch()
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        os.truncate(path, size)
    except OSError:
        pytest.skip("this file system has no sparse files of this size")
    assert MappedFile(path).size == size
