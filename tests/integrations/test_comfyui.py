"""The nodes for ComfyUI by its contract, without it: types, inputs, shapes, batches, cancelling, and the workflows."""

import importlib.util
import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

import pbe
from integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host, nodes
from pbe.checkpoints.seeding import seeded_state
from pbe.editing.settings import QUICK, SETTINGS, EditSettings, setting_docs
from pbe.images.pillow import PictureWarning
from pbe.models.paint_by_example import Distilled, PaintByExample
from pbe.sampling import SAMPLERS

PACK = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
FAST = {"steps": 4, "guidance": 2.0, "seed": 5}
# What the workflows use of ComfyUI's own nodes: inputs, and types of outputs.
COMFYUI = {
    "LoadImage": ({"image": "COMBO"}, ("IMAGE", "MASK")),
    "LoadImageMask": ({"image": "COMBO", "channel": "COMBO"}, ("MASK",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return nodes.load_model(str(tiny_checkpoint))[0]


@pytest.fixture(autouse=True)
def _as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


def pictures(number, height=48, width=60, seed=0):
    return torch.rand(number, height, width, 3, generator=torch.Generator().manual_seed(seed))


def masks(*tops, height=48, width=60):
    found = torch.zeros(len(tops), height, width)
    for mask, top in zip(found, tops, strict=True):
        mask[top : top + 14, 20:36] = 1
    return found


IMAGE, MASK, EXEMPLAR, OTHER = pictures(1), masks(16), pictures(1, 30, 20, 1), pictures(1, 30, 20, 2)


def edited(model, image, mask, exemplar, **options):
    """What `pbe.edit` makes of the first of each batch."""
    (result,) = pbe.edit(model, image[0].numpy(), mask[0].numpy(), exemplar, **{**vars(QUICK), **FAST, **options})
    return torch.from_numpy(result)


# ----------------------------------------------------------------------------------------------------------------------
# What ComfyUI reads


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_is_declared_as_it_is_called(name):
    cls = NODE_CLASS_MAPPINGS[name]
    inputs = cls.INPUT_TYPES()
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("Paint by Example: ")
    assert cls.DESCRIPTION
    assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) > 0
    json.dumps(inputs, allow_nan=False)
    for kind, options in (*inputs["required"].values(), *inputs["optional"].values()):
        assert options["tooltip"][-1] in ".)"
        if isinstance(kind, list):
            assert "default" not in options or options["default"] in kind
        if kind in ("INT", "FLOAT"):
            number = int if kind == "INT" else float
            assert all(type(options[bound]) is number for bound in ("default", "min"))
            assert options["min"] <= options["default"] <= options.get("max", np.inf)


def test_the_settings_are_those_of_the_library():
    inputs = NODE_CLASS_MAPPINGS["PbeEdit"].INPUT_TYPES()["optional"]
    assert set(SETTINGS) < set(inputs)
    assert EditSettings.from_texts({name: inputs[name][1]["default"] for name in SETTINGS}) == QUICK
    assert all(inputs[name][1]["tooltip"].startswith(text) for name, text in setting_docs().items())
    assert inputs["sampler"][0] == list(SAMPLERS)
    assert inputs["seed"][1].items() >= {"min": 0, "max": 2**64 - 1, "control_after_generate": True}.items()
    assert inputs["strength"][1].items() >= {"min": 0.001, "max": 1.0}.items()
    assert {name for name in SETTINGS if "advanced" not in inputs[name][1]} == set(nodes.FIRST)


@pytest.mark.parametrize("bound", ["min", "max"])
def test_what_a_widget_allows_the_library_takes(bound):
    for name, (_, options) in NODE_CLASS_MAPPINGS["PbeEdit"].INPUT_TYPES()["optional"].items():
        if bound in options:
            beside = {"sampler": "ddim"} if name == "eta" else {}
            assert getattr(EditSettings(**{name: options[bound], **beside}), name) == options[bound]


def test_the_pack_loads_as_comfyui_loads_it(monkeypatch):
    """By the path of its folder, as a module of an odd name."""
    name = str(PACK).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == NODE_CLASS_MAPPINGS.keys()


def test_the_pack_has_the_library_s_version():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["version"] == pbe.__version__
    assert {"PublisherId", "DisplayName", "Icon"} <= set(project["tool"]["comfy"])


# ----------------------------------------------------------------------------------------------------------------------
# Edits


def test_an_edit_is_the_library_s(model):
    (result,) = nodes.edit(model, IMAGE, MASK, EXEMPLAR, **FAST)
    assert result.shape == IMAGE.shape
    assert result.dtype == torch.float32
    assert torch.equal(result[0], edited(model, IMAGE, MASK, EXEMPLAR[0].numpy()))
    outside = MASK == 0
    assert torch.equal(result[outside], IMAGE[outside])
    assert not torch.equal(result, IMAGE)


def test_texts_of_widgets_are_read(model):
    (result,) = nodes.edit(
        model, IMAGE, MASK, EXEMPLAR, window="4,0,52,48", feather="", guidance_interval="0,500", **FAST
    )
    options = {"window": (4, 0, 52, 48), "guidance_interval": (0, 500)}
    assert torch.equal(result[0], edited(model, IMAGE, MASK, EXEMPLAR[0].numpy(), **options))


def test_a_distilled_model_s_own_settings_hold_where_a_prompt_is_silent():
    with torch.inference_mode(False):
        student = PaintByExample(replace(TINY, distilled=Distilled("lcm", steps=2, guidance=1.0)))
        student.load_state_dict(seeded_state(TINY, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = nodes.edit(student.eval(), IMAGE, MASK, EXEMPLAR)
    assert not torch.equal(result, IMAGE)
    with pytest.warns(PictureWarning, match="distilled for sampler='lcm', steps=2, guidance=1.0"):
        nodes.edit(student, IMAGE, MASK, EXEMPLAR, **FAST)


@pytest.mark.slow
def test_a_batch_is_edited_one_by_one(model):
    images = pictures(2)
    (result,) = nodes.edit(model, images, MASK, EXEMPLAR, **FAST)
    each = [edited(model, images[i:], MASK, EXEMPLAR[0].numpy(), seed=5 + i) for i in range(2)]
    assert torch.equal(result, torch.stack(each))
    (result,) = nodes.edit(model, IMAGE, masks(10, 20), torch.cat([EXEMPLAR, OTHER]), **FAST)
    assert torch.equal(result[1], edited(model, IMAGE, masks(20), OTHER[0].numpy(), seed=6))


def test_batches_of_different_lengths_are_refused(model):
    with pytest.raises(ValueError, match="got 3 of image, 2 of mask"):
        nodes.edit(model, pictures(3), masks(10, 20), EXEMPLAR, **FAST)


def test_an_empty_mask_is_explained(model):
    empty = torch.zeros(1, 64, 64)  # of ComfyUI's loader, for a picture without alpha
    with pytest.raises(ValueError, match=r"the mask is empty \(64x64\): draw one"):
        nodes.edit(model, IMAGE, empty, EXEMPLAR, **FAST)
    with pytest.raises(ValueError, match=r"the exemplar's mask is empty \(64x64\): draw one"):
        nodes.edit(model, IMAGE, MASK, EXEMPLAR, exemplar_mask=empty, **FAST)
    with pytest.raises(ValueError, match=r"the mask is empty \(64x64\): draw one"):
        nodes.crop_window(IMAGE, empty)
    (result,) = nodes.edit(model, IMAGE, empty, EXEMPLAR, extend="left,20", **FAST)
    assert result.shape == (1, 48, 80, 3)
    assert torch.equal(result[:, :, 20:], IMAGE)


def test_a_mask_of_another_size_is_resized_on_request_alone(model):
    larger = masks(32, height=96, width=120)
    with pytest.raises(ValueError, match="mask is 120x96, but the picture it belongs to is 60x48"):
        nodes.edit(model, IMAGE, larger, EXEMPLAR, **FAST)
    (result,) = nodes.edit(model, IMAGE, larger, EXEMPLAR, fit_mask=True, **FAST)
    assert not torch.equal(result, IMAGE)


def test_exemplars_are_mixed(model):
    shown = masks(4, height=30, width=40)
    (first,) = nodes.exemplar(EXEMPLAR, 3.0)
    (mixed,) = nodes.exemplar(pictures(1, 30, 40, 3), 1.0, shown, first)
    (result,) = nodes.edit(model, IMAGE, MASK, mixed, negative=OTHER, **FAST)
    expected = edited(
        model,
        IMAGE,
        MASK,
        [EXEMPLAR[0].numpy(), pictures(1, 30, 40, 3)[0].numpy()],
        exemplar_mask=[None, shown[0].numpy()],
        exemplar_weights=[3, 1],
        negative=OTHER[0].numpy(),
    )
    assert torch.equal(result[0], expected)
    with pytest.raises(ValueError, match="those of mixed exemplars go to their own nodes"):
        nodes.edit(model, IMAGE, MASK, mixed, exemplar_mask=shown, **FAST)


# ----------------------------------------------------------------------------------------------------------------------
# Windows and masks


def test_a_window_that_nobody_edits_changes_nothing():
    images = pictures(2)
    cut, mask, window = nodes.crop_window(images, MASK)
    assert cut.shape == (2, window.box.height, window.box.width, 3)
    assert mask.shape == cut.shape[:3]
    assert mask.sum() == 2 * MASK.sum()
    (result,) = nodes.stitch_window(window, cut)
    assert torch.allclose(result, images, atol=1e-6)


def test_a_batch_has_one_window():
    cut, mask, window = nodes.crop_window(IMAGE, masks(6, 28), window="auto", margin=0.0)
    assert cut.shape[:3] == mask.shape == (2, window.box.height, window.box.width)
    assert window.box.height >= 36
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("scale", [1, 2])
def test_a_window_edited_elsewhere_is_put_back(scale):
    """At any size; only the mask changes, and with the seam the result meets the photo's colours."""
    gray = torch.full_like(IMAGE, 0.5)
    cut, _, window = nodes.crop_window(gray, MASK)
    size = scale * cut.shape[1], scale * cut.shape[2]
    other = torch.full((1, *size, 3), 0.7)  # as a model that errs by 0.2 everywhere
    (result,) = nodes.stitch_window(window, other)
    assert (result - gray)[MASK == 1].abs().mean() < 0.005  # enlarged, the border's pixels reach a little into the mask
    (result,) = nodes.stitch_window(window, other, seam="feather", feather="0")
    assert torch.allclose(result[MASK == 1], torch.tensor(0.7), atol=1e-5)
    assert torch.equal(result[MASK == 0], gray[MASK == 0])


def test_a_window_edited_by_example_is_as_an_edit(model):
    cut, mask, window = nodes.crop_window(IMAGE, MASK)
    (inner,) = nodes.edit(model, cut, mask, EXEMPLAR, window="full", composite=False, **FAST)
    (result,) = nodes.stitch_window(window, inner)
    (whole,) = nodes.edit(model, IMAGE, MASK, EXEMPLAR, window=",".join(map(str, window.box)), **FAST)
    assert torch.equal(result[MASK == 0], IMAGE[MASK == 0])
    assert (result - whole).abs().mean() < 0.1 * (IMAGE - whole).abs().mean()


def test_an_object_is_selected():
    pytest.importorskip("cv2")
    picture = torch.full((2, 60, 80, 3), 0.9)
    picture[:, 15:45, 20:60] = torch.tensor([0.8, 0.1, 0.1])
    (mask,) = nodes.select_object(picture, 40, 30)
    assert mask.shape == (2, 60, 80)
    assert mask[:, 20:40, 25:55].min() == 1
    assert mask[:, :10].max() == 0


# ----------------------------------------------------------------------------------------------------------------------
# In ComfyUI


class Interrupted(Exception):
    """In the place of ComfyUI's."""


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """What the nodes use of ComfyUI: `told` is what it was told, and it interrupts when it was told that often."""
    fake = SimpleNamespace(told=[], patience=10**6, folders={"loras": [tmp_path / "loras"], "pbe": [tmp_path / "pbe"]})

    def throw_exception_if_processing_interrupted():
        if len(fake.told) >= fake.patience:
            raise Interrupted

    def get_filename_list(folder):
        paths = [path for root in fake.folders[folder] for path in root.rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(fake.folders[folder][0])) for path in paths)

    management = SimpleNamespace(
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
        get_torch_device=lambda: torch.device("cpu"),
        should_use_fp16=lambda device: False,
        should_use_bf16=lambda device: False,
        minimum_inference_memory=lambda: 1000,
        free_memory=lambda size, device: fake.__dict__.update(freed=size),
    )
    paths = SimpleNamespace(
        get_filename_list=get_filename_list,
        get_folder_paths=lambda folder: [str(root) for root in fake.folders[folder]],
        supported_pt_extensions={".ckpt", ".safetensors"},
    )
    bar = SimpleNamespace(update_absolute=lambda *told: fake.told.append(told))
    monkeypatch.setattr(host, "model_management", management)
    monkeypatch.setattr(host, "folder_paths", paths)
    monkeypatch.setattr(host, "ProgressBar", lambda total: bar)
    return fake


def test_progress_is_told_with_previews(model, comfyui):
    (result,) = nodes.edit(model, pictures(2), MASK, EXEMPLAR, **FAST)
    assert [told[:2] for told in comfyui.told] == [(i, 8) for i in range(1, 9)]
    assert all(kind == "JPEG" and picture.mode == "RGB" for _, _, (kind, picture, _) in comfyui.told)
    assert torch.equal(result[0], edited(model, pictures(2), MASK, EXEMPLAR[0].numpy()))


def test_separate_parts_count_on(model, comfyui):
    nodes.edit(model, IMAGE, torch.maximum(masks(0), masks(34)), EXEMPLAR, split_mask=True, **FAST)
    assert [told[0] for told in comfyui.told] == list(range(1, 9))
    assert comfyui.told[-1][1] == 8


def test_an_interruption_ends_the_edit_at_its_next_step(model, comfyui):
    comfyui.patience = 2
    with pytest.raises(Interrupted):
        nodes.edit(model, pictures(2), MASK, EXEMPLAR, **FAST)
    assert len(comfyui.told) == 2


def test_models_come_from_comfyui_s_folders(comfyui, tmp_path, tiny_checkpoint):
    for name in ("sub/note.txt", "diffusers/model_index.json", "diffusers/unet/model.safetensors"):
        (tmp_path / "pbe" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pbe" / name).touch()
    (tmp_path / "pbe/sub/tiny.ckpt").symlink_to(tiny_checkpoint)
    required = NODE_CLASS_MAPPINGS["PbeLoadModel"].INPUT_TYPES()["required"]
    assert required["model"][0] == ["demo", "diffusers", os.path.join("sub", "tiny.ckpt")]
    (loaded,) = nodes.load_model("sub/tiny.ckpt")
    assert loaded.device.type == "cpu"
    assert loaded.dtype == torch.float32
    assert comfyui.freed == tiny_checkpoint.stat().st_size + 1000
    with pytest.raises(FileNotFoundError, match=r"there is no gone\.ckpt in"):
        nodes.load_model("gone.ckpt")


def test_adapters_are_chained(comfyui, tmp_path, tiny_checkpoint, monkeypatch):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.safetensors").touch()
    asked = {}
    monkeypatch.setattr(nodes, "load_editor", lambda *given, **options: asked.update(options))
    chain = nodes.adapter("a.safetensors", -0.5, nodes.adapter("a.safetensors")[0])[0]
    nodes.load_model("demo", adapters=chain)
    file = tmp_path / "loras" / "a.safetensors"
    assert asked["adapters"] == [(file, 1.0), (file, -0.5)]


# ----------------------------------------------------------------------------------------------------------------------
# The workflows


def inputs_of(name):
    """The kinds of a node's inputs, in order."""
    if name in COMFYUI:
        return COMFYUI[name][0]
    found = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {
        key: "COMBO" if isinstance(kind, list) else kind
        for key, (kind, _) in (found["required"] | found["optional"]).items()
    }


def outputs_of(name):
    return COMFYUI[name][1] if name in COMFYUI else NODE_CLASS_MAPPINGS[name].RETURN_TYPES


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_what_is_there(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    by_id = {found["id"]: found for found in workflow["nodes"]}
    for found in workflow["nodes"]:
        kinds = inputs_of(found["type"])
        named = {one["name"]: one for one in found["inputs"] if one["type"] != "IMAGEUPLOAD"}
        assert set(named) <= set(kinds)
        assert [kind["type"] for kind in found["outputs"]] == list(outputs_of(found["type"]))
        if found["type"].startswith("Pbe"):
            widgets = [name for name in kinds if "widget" in named[name]]
            values = list(found["widgets_values"])
            if "seed" in widgets:
                assert values.pop(widgets.index("seed") + 1) == "fixed"  # what happens to it after a run
            given = dict(zip(widgets, values, strict=True))
            settings = {name: value for name, value in given.items() if name in SETTINGS}
            EditSettings.from_texts(settings)
            required = NODE_CLASS_MAPPINGS[found["type"]].INPUT_TYPES()["required"]
            assert all(named[name]["link"] or name in given for name in required)
    for _, source, output, target, slot, kind in workflow["links"]:
        taken = inputs_of(by_id[target]["type"])[by_id[target]["inputs"][slot]["name"]]
        assert kind == taken
        assert outputs_of(by_id[source]["type"])[output] in taken.split(",")


def test_the_workflows_use_each_kind_of_node():
    used = {found["type"] for path in WORKFLOWS for found in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    assert len(WORKFLOWS) == 2
    assert {"PbeLoadModel", "PbeEdit", "PbeExemplar", "PbeCropWindow", "PbeStitchWindow"} <= used
