"""Exported networks compute and edit as the model that they are from; folders that are not whole are refused."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import TINY
from marks import rest_slow
from PIL import Image

import pbe
from pbe.acceleration import prepare_for_inference
from pbe.baselines import WeightFiles
from pbe.baselines.paint_by_example import PaintByExampleSystem
from pbe.batch.provenance import read_provenance
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.loading import load_model
from pbe.checkpoints.seeding import seeded_state
from pbe.cli import main
from pbe.editing.loading import dtype_for, load_editor
from pbe.export import export_model, load_exported, writing
from pbe.models.clip import CLIPVisionConfig
from pbe.models.exemplar import ExemplarConfig
from pbe.models.paint_by_example import Distilled, PaintByExample
from pbe.models.vae import VAEConfig

pytest.importorskip("onnxruntime", reason="the extra export")
pytest.importorskip("onnxscript", reason="the extra export")

# tracing takes its time for each layer
SMALL = replace(
    TINY,
    unet=replace(TINY.unet, attention_levels=()),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    exemplar=ExemplarConfig(
        vision=CLIPVisionConfig(width=64, num_layers=1, num_heads=2, patch_size=14, image_size=28, mlp_width=128),
        mapper_layers=1,
    ),
    distilled=Distilled("lcm", 4, 1.0),
)
pytestmark = pytest.mark.filterwarnings("ignore:the model was distilled")
RUNTIMES = (pytest.param("onnx", marks=pytest.mark.slow), "torch-export")
ORDINARY = {"sampler": "plms", "spacing": "leading", "steps": 4, "guidance": 5.0}


def small(config=SMALL):
    model = PaintByExample(config)
    model.load_state_dict(seeded_state(config, 0))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    torch.save({"state_dict": seeded_state(SMALL, 0), "pbe": pbe_entry(SMALL)}, path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "cpu", "float32")


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """What the command writes for a runtime, once it is asked for, of the same traces."""
    base, traces, trace = tmp_path_factory.mktemp("exported"), {}, writing.trace

    def traced_once(network, config):
        key = tuple(network.inputs)
        if key not in traces:
            traces[key] = trace(network, config)
        return traces[key]

    @cache
    def folder(to):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "trace", traced_once)
            assert main(["export", str(checkpoint), "--to", to, "--out", str(base / to)]) == 0
        return base / to

    return folder


@pytest.fixture(scope="module")
def exported(folders):
    return cache(lambda to: load_exported(folders(to), "cpu"))


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(height, width, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


EXEMPLAR, OTHER = (Image.fromarray((noise(40, 30, seed) * 255).astype(np.uint8)) for seed in (1, 2))


def differences(model, other, *, exemplar=EXEMPLAR, size=(60, 44), **settings):
    """The largest difference of each result of two models, of [0, 1]."""
    image, settings = noise(*reversed(size)), {**ORDINARY, "composite": False, **settings}
    results = (pbe.edit(one, image, (10, 10, 30, 30), exemplar, **settings) for one in (model, other))
    return [float(np.abs(a - b).max()) for a, b in zip(*results, strict=True)]


# --- parity -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(8, 6), (17, 11)])
@pytest.mark.parametrize("to", RUNTIMES)
def test_each_network_computes_the_same(model, exported, to, size, batch):
    other, f = exported(to), SMALL.vae.downsampling
    unet_in, t, context = draw(batch, 9, *size), torch.arange(batch) * 331, draw(batch, 1, 64, seed=1)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(other.unet(unet_in, t, context), model.unet(unet_in, t, context), **close)
    torch.testing.assert_close(other.vae.decode(unet_in[:, :4]), model.vae.decode(unet_in[:, :4]), **close)
    image = draw(batch, 3, f * size[0], f * size[1] - 1).clamp(-1, 1)  # a side that is padded
    torch.testing.assert_close(tuple(other.vae.encode(image)), tuple(model.vae.encode(image)), **close)
    exemplar = draw(batch, 3, 28, 28)
    torch.testing.assert_close(other.encode_exemplar(exemplar), model.encode_exemplar(exemplar), **close)
    assert torch.equal(other.null_context, model.null_context)


@pytest.mark.parametrize(
    "settings",
    rest_slow(
        [
            {},
            {"size": (90, 44), "window": "full", "resolution": 72, "num_images": 3},
            {"guidance": 1.0, "sampler": "dpm_solver", "spacing": "trailing"},
            {"guidance_interval": (200, 700), "exemplar": [EXEMPLAR, OTHER], "exemplar_weights": [1, 3]},
            {"guidance": 0.0, "num_images": 3, "batch_size": 2},
        ]
    ),
)
@pytest.mark.parametrize("to", RUNTIMES)
def test_an_edit_is_the_same(model, exported, to, settings):
    assert max(differences(model, exported(to), **settings)) < 1e-3


@pytest.mark.slow
def test_one_that_sees_the_exemplar_in_the_hole_edits_the_same(tmp_path):
    model = small(replace(SMALL, collage=True, distilled=None))
    export_model(model, tmp_path / "folder", "torch-export")
    other = load_exported(tmp_path / "folder", "cpu")
    assert other.config == model.config
    assert max(differences(model, other)) < 1e-3


def test_an_edit_begins_with_what_the_model_was_distilled_for(model, exported):
    assert exported("torch-export").config == model.config
    steps = []
    image = noise(44, 60)
    pbe.edit(
        exported("torch-export"), image, (10, 10, 30, 30), EXEMPLAR, callback=lambda step: steps.append(step.steps)
    )
    assert steps == [4] * 4


def test_previews(model, exported):
    shown = []
    for one in (model, exported("torch-export")):
        preview = lambda pictures, _: shown.append(np.asarray(pictures[0], dtype=int))  # noqa: E731
        pbe.edit(one, noise(44, 60), (10, 10, 30, 30), EXEMPLAR, preview=preview, preview_every=5)
    ours, theirs = shown
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.slow
def test_a_context_of_several_tokens(tmp_path):
    config = replace(SMALL, exemplar=replace(SMALL.exemplar, tokens="all"))
    model = small(config)
    export_model(model, tmp_path / "out", "torch-export")
    assert max(differences(model, load_exported(tmp_path / "out", "cpu"))) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("to", RUNTIMES)
def test_the_model_in_the_box(tmp_path, to):
    model = load_model("demo", "cpu", "float32")
    export_model(model, tmp_path / "out", to)
    other = load_exported(tmp_path / "out", "cpu")
    settings = {"sampler": "dpm_solver", "spacing": "trailing", "steps": 20, "guidance": 3.0}
    assert max(differences(model, other, **settings)) < 1e-3
    assert max(differences(model, other, size=(150, 100), window="full", num_images=3, **settings)) < 1e-3


# --- commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", RUNTIMES)
def test_the_folder_explains_itself(folders, checkpoint, to):
    about = json.loads((folders(to) / "export.json").read_text())
    assert about["source"]["checkpoint"] == "small.ckpt"
    assert about["config"]["vae"]["latent_scale"] == SMALL.vae.latent_scale
    assert about["pbe"] == json.loads(json.dumps(pbe_entry(SMALL)))
    readme = (folders(to) / "README.md").read_text()
    for words in (
        "(batch, 9, height, width)",
        "(batch, 3, 2*height, 2*width)",
        "0 to 999",
        "2B",
        "cells of 2x2 pixels, 3",
    ):
        assert words in readme
    here = str(checkpoint.parents[2]).encode()
    assert not any(path.stat().st_size and here in path.read_bytes() for path in folders(to).iterdir())
    assert not any(b"site-packages" in path.read_bytes() for path in folders(to).iterdir())


@pytest.mark.slow
def test_dimensions_have_names(folders):
    import onnxruntime

    session = onnxruntime.InferenceSession(folders("onnx") / "vae_encoder.onnx")
    assert [(one.name, one.shape) for one in (*session.get_inputs(), *session.get_outputs())] == [
        ("image", ["batch", 3, "2*height", "2*width"]),
        ("mean", ["batch", 4, "height", "width"]),
        ("std", ["batch", 4, "height", "width"]),
    ]


@pytest.mark.slow
def test_the_command_edits_with_the_folder(folders, checkpoint, tmp_path, monkeypatch):
    """In the folder's own precision, whatever the processor likes best; the result says with which weights."""
    monkeypatch.setattr("pbe.checkpoints.loading.has_native_bfloat16", lambda: True)
    Image.fromarray((noise(44, 60) * 255).astype(np.uint8)).save(tmp_path / "photo.png")
    EXEMPLAR.save(tmp_path / "exemplar.png")
    pictures = {}
    for name, path, extra in (("ours", checkpoint, ["--dtype", "float32"]), ("exported", folders("torch-export"), [])):
        files = {"image": "photo.png", "exemplar": "exemplar.png", "out": f"{name}.png"}
        flags = [text for flag, file in files.items() for text in (f"--{flag}", str(tmp_path / file))]
        assert main(["edit", *flags, "--box", "10,10,30,30", "--ckpt", str(path), "--quiet", *extra]) == 0
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert np.abs(pictures["ours"] - pictures["exported"]).max() <= 1
    ours, exported = (read_provenance(tmp_path / f"{name}.png") for name in pictures)
    assert exported["dtype"] == "float32"
    assert exported["sampler"] == "lcm"
    assert exported["checkpoint"] == "torch-export"
    assert exported["checkpoint_crc32"] != ours["checkpoint_crc32"]


@pytest.mark.slow
def test_the_system_of_evaluations(folders, exported):
    system = PaintByExampleSystem.load(WeightFiles(paint_by_example=folders("torch-export"), device="cpu"))
    assert system.settings.sampler == "lcm"
    assert type(system.model) is type(exported("torch-export"))
    with pytest.raises(ValueError, match="no adapters"):
        PaintByExampleSystem.load(WeightFiles(paint_by_example=folders("torch-export"), adapters=("a.safetensors",)))


# --- what is refused --------------------------------------------------------------------------------------


@pytest.fixture
def copy(folders, tmp_path):
    return lambda to: shutil.copytree(folders(to), tmp_path / to)


@pytest.mark.parametrize(
    ("to", "name"),
    [
        pytest.param("onnx", "unet.onnx", marks=pytest.mark.slow),
        pytest.param("onnx", "unet.onnx.data", marks=pytest.mark.slow),
        ("torch-export", "vae_decoder.pt2"),
    ],
)
def test_a_folder_that_is_not_whole(copy, to, name):
    folder = copy(to)
    contents = (folder / name).read_bytes()
    (folder / name).write_bytes(contents[:-7])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: it has [\d,]+ bytes, not [\d,]+$"):
        load_exported(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}, which its export.json lists$"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("to", "name"), [pytest.param("onnx", "unet.onnx", marks=pytest.mark.slow), ("torch-export", "unet.pt2")]
)
def test_a_file_of_other_bytes(copy, to, name):
    folder = copy(to)
    (folder / name).write_bytes(bytes(64) + (folder / name).read_bytes()[64:])
    with pytest.raises(CheckpointError, match=f"{name} is damaged: ") as caught:
        load_exported(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("runtime"),
        lambda about: about.update(runtime="tensorrt"),
        lambda about: about.update(null_context=[1.0, 2.0]),
        lambda about: about.update(files=3),
        lambda about: about["config"].update(unet={"width": 3}),
        lambda about: about["config"].update(vae=None),
        lambda about: about.update(config=[]),
    ],
)
def test_an_index_that_is_damaged(copy, change):
    folder = copy("torch-export")
    about = json.loads((folder / "export.json").read_text())
    change(about)
    (folder / "export.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        load_exported(folder)


@pytest.mark.slow
def test_a_folder_of_an_older_release(copy):
    """It opens without the sizes that newer ones have, which take their defaults."""
    folder = copy("torch-export")
    about = json.loads((folder / "export.json").read_text())
    del about["config"]["vae"]["latent_scale"]
    (folder / "export.json").write_text(json.dumps(about))
    assert load_exported(folder).config == SMALL


@pytest.mark.slow
def test_what_exported_networks_cannot_do(folders, exported, checkpoint, capsys):
    folder = folders("onnx")
    for options, words in (
        ({"dtype": "bfloat16"}, "computes in float32 alone, got dtype='bfloat16'"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"device": "cuda"}, "device='cuda' is not there: onnxruntime has .*CPUExecutionProvider"),
        ({"adapters": ["style.safetensors"]}, "take no adapters: .*when it is exported"),
        ({"low_memory": True, "compile": "regions"}, "take no low_memory, compile: "),
        ({"tiny_decoder": checkpoint}, "take no tiny_decoder: "),
    ):
        with pytest.raises(ValueError, match=words):
            load_editor(folder, **options)
    for settings, words in (({"reuse": 3}, "reuse=3"), ({"decoder": "tiny"}, "decoder='tiny'")):
        with pytest.raises(ValueError, match=words):
            differences(exported("onnx"), exported("onnx"), **settings)
    with pytest.raises(ValueError, match="at least 6x6 pixels, not 4x4"):
        exported("onnx").vae.encode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(CheckpointError, match="holds exported networks, which can only edit"):
        load_model(folder)
    with pytest.raises(
        CheckpointError, match=r"is a PyTorch zip checkpoint, which pbe\.load_model opens, not an exported folder"
    ):
        load_exported(checkpoint)
    with pytest.raises(FileNotFoundError):
        load_exported(folder / "nothing")
    assert dtype_for(checkpoint, "bfloat16", "cpu") == torch.bfloat16


def test_what_cannot_be_exported(model, checkpoint, folders, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown runtime 'tflite', choose one of onnx, torch-export"):
        export_model(model, tmp_path / "out", "tflite")
    with pytest.raises(ValueError, match="in float32 on the CPU, not in bfloat16 on cpu"):
        export_model(load_model(checkpoint, "cpu", "bfloat16"), tmp_path / "out")
    with pytest.raises(ValueError, match="only an ordinary Paint by Example"):
        export_model(prepare_for_inference(model), tmp_path / "out")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not an exported folder"):
        export_model(model, tmp_path, overwrite=True)
    assert main(["export", str(checkpoint), "--to", "torch-export", "--out", str(folders("torch-export"))]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    assert main(["export", str(checkpoint), "--to", "onnx", "--out", str(tmp_path / "out")]) == 2
    assert "needs onnx and onnxscript, the extra export: pip install pbe[export]" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
