"""`pbe edit` as its users call it: what it writes, what it says, and how it refuses."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import at_once
from PIL import Image

import pbe
import pbe.cli
from pbe.batch.provenance import read_provenance
from pbe.cli import edit as edit_command
from pbe.cli.checkpoint import main as checkpoint
from pbe.cli.comparison import parse_seeds, runs
from pbe.cli.edit import main
from pbe.editing.loading import limit_threads
from pbe.sampling import StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
BOX = (20, 16, 60, 48)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A photo of 100x80, its mask, two exemplars, in the working directory."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    mask = Image.new("L", (100, 80))
    mask.paste(255, BOX)
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "dog.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(folder, tiny_checkpoint):
    """Calls the command with the usual flags; a flag given as None is left out, True stands without a value."""

    def call(**changes) -> int:
        usual = {"image": "photo.png", "mask": "mask.png", "exemplar": "dog.png", "out": "out.png"}
        usual = {} if "batch" in changes else usual
        flags = {**usual, "ckpt": str(tiny_checkpoint), "device": "cpu", "steps": "4", "quiet": True, **changes}
        argv = []
        for name, value in flags.items():
            if value is not None:
                argv.append("--" + name.replace("_", "-"))
                argv += [] if value is True else value if isinstance(value, list) else [str(value)]
        return main(argv)

    return call


@pytest.fixture
def edits(monkeypatch) -> list[dict]:
    """Replaces `edit`: notes its settings, takes the steps, and fills the mask with a gray made of the seed."""
    calls = []

    def edit(model, image, mask, exemplar, **settings):
        calls.append(settings)
        for _ in range(math.ceil(settings["num_images"] / settings["batch_size"])):
            for i in range(settings["steps"]):
                step = StepInfo(i, settings["steps"], 0, torch.zeros(1), torch.zeros(1))
                settings["callback"](step)
                if settings["preview"]:
                    settings["preview"]([Image.new("RGB", (8, 4), (i, 0, 0))] * settings["num_images"], step)
        results = []
        for i in range(settings["num_images"]):
            result = image.picture.source.copy()
            result.paste((20 * (settings["seed"] + i),) * 3, mask=Image.fromarray(image.repaint))
            results.append(result)
        return results

    monkeypatch.setattr("pbe.editing.edit.edit", at_once(edit))
    return calls


def gray_inside(path: Path) -> int:
    with Image.open(path) as image:
        return image.getpixel((30, 30))[0]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"photo.png", "mask.png", "dog.png", "cat.png"}


@pytest.fixture
def distilled_checkpoint(tiny_checkpoint, tmp_path):
    path, content = tmp_path / "student.ckpt", torch.load(tiny_checkpoint)
    content["pbe"] |= {"distilled": {"sampler": "tcd", "steps": 2, "guidance": 1.0}}
    torch.save(content, path)
    return str(path)


# --- the whole way, with a small model --------------------------------------------------------------------


def test_edit_keeps_the_photo_outside_the_mask(cli, folder):
    assert cli() == 0
    before, after = (np.asarray(Image.open(folder / name)) for name in ("photo.png", "out.png"))
    inside = np.zeros((80, 100), dtype=bool)
    inside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    assert (before[~inside] == after[~inside]).all()
    assert (before[inside] != after[inside]).any(axis=-1).mean() > 0.9


@pytest.mark.slow
def test_results_of_a_distilled_model_hold_what_was_used(cli, folder, distilled_checkpoint, capsys):
    (folder / "rows.csv").write_text(
        "image,mask,exemplar,out,steps\nphoto.png,mask.png,dog.png,a.png,\nphoto.png,mask.png,dog.png,b.png,3\n"
    )
    assert cli(ckpt=distilled_checkpoint, steps=None) == 0
    assert capsys.readouterr().err == ""
    assert cli(batch="rows.csv", ckpt=distilled_checkpoint, steps=None) == 0
    assert "warning: the model was distilled for sampler='tcd', steps=2" in capsys.readouterr().err
    for name, steps in (("out.png", 2), ("a.png", 2), ("b.png", 3)):
        stored = read_provenance(folder / name)
        used = [stored[setting] for setting in ("sampler", "steps", "guidance", "spacing", "eta")]
        assert used == ["tcd", steps, 1.0, "lcm", 0.3]
    assert cli(batch="rows.csv", ckpt=distilled_checkpoint, steps=None) == 0
    assert "2 rows: 0 done, 2 done before" in capsys.readouterr().out


@pytest.fixture
def adapters(folder):
    """style.pt, and the same as lcm.pt, which says that it distils."""
    name = "lora_unet_mid_block_resnets_0_conv1"
    factors = {"lora_down": torch.ones(1, 64, 3, 3), "lora_up": torch.ones(64, 1, 1, 1)}
    torch.save({f"{name}.{part}.weight": x for part, x in factors.items()}, folder / "style.pt")
    content = torch.load(folder / "style.pt") | {"pbe": {"distilled": {"sampler": "lcm", "steps": 2, "guidance": 1.0}}}
    torch.save({"state_dict": torch.load(folder / "style.pt"), **content}, folder / "lcm.pt")


@pytest.mark.slow
@pytest.mark.usefixtures("adapters")
def test_results_of_adapters_hold_which_and_how_strong(cli, folder, tiny_checkpoint, capsys):
    assert cli(out="plain.png", steps="2") == cli(out="style.png", steps="2", adapter="style.pt:-0.5") == 0
    assert "adapters" not in read_provenance(folder / "plain.png")
    crc32 = read_provenance(folder / "style.png")["adapters"][0]["crc32"]
    assert read_provenance(folder / "style.png")["adapters"] == [{"file": "style.pt", "crc32": crc32, "strength": -0.5}]
    assert (folder / "plain.png").read_bytes() != (folder / "style.png").read_bytes()

    (folder / "rows.csv").write_text("image,mask,exemplar,out\nphoto.png,mask.png,dog.png,a.png\n")
    both = {"batch": "rows.csv", "adapter": ["style.pt", "--adapter", "lcm.pt:0.2"], "steps": None}
    assert cli(**both) == cli(**both) == 0
    assert "1 done, 0 done before" in (out := capsys.readouterr().out)
    assert "0 done, 1 done before" in out
    stored = read_provenance(folder / "a.png")
    assert [(one["file"], one["strength"]) for one in stored["adapters"]] == [("style.pt", 1.0), ("lcm.pt", 0.2)]
    assert (stored["sampler"], stored["steps"]) == ("lcm", 2)
    assert cli(adapter="none.pt") == 2
    assert "none.pt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("adapters")
def test_rows_with_adapters_of_their_own(cli, folder, monkeypatch, capsys):
    torch.save({"lora_unet_conv_out.lora_down.weight": torch.ones(1, 1)}, folder / "misfit.pt")
    columns = ["", "style.pt", "", "lcm.pt:0.5;style.pt:-0.25", "style.pt", "none.pt", "misfit.pt", "style.pt:x"]
    rows = [f"photo.png,mask.png,dog.png,{i}.png,{adapters}" for i, adapters in enumerate(columns)]
    (folder / "rows.csv").write_text("\n".join(["image,mask,exemplar,out,adapters", *rows]))
    loaded, load = [], edit_command.load_for
    monkeypatch.setattr("pbe.cli.edit.load_for", lambda *asked: (loaded.extend(asked[1:]), load(*asked))[1])
    assert cli(batch="rows.csv", adapter="style.pt:2", steps="2") == 1
    out, err = capsys.readouterr()
    assert "8 rows: 5 done, 0 done before, 3 failed" in out
    assert "line 7 failed: there is no checkpoint none.pt" in err
    assert "line 8 failed: misfit.pt" in err
    assert "line 9 failed: there is no checkpoint style.pt:x" in err
    given = {"flag": [("style.pt", 2.0)], "own": [("style.pt", 1.0)], "two": [("lcm.pt", 0.5), ("style.pt", -0.25)]}
    named = [[(str(path), strength) for path, strength in asked] for asked in loaded]
    assert named == [*given.values(), [("misfit.pt", 1.0)]]  # each once, though rows take turns
    stored = [read_provenance(folder / f"{i}.png") for i in range(5)]
    found = [[(one["file"], one["strength"]) for one in each["adapters"]] for each in stored]
    assert found == [given[name] for name in ("flag", "own", "flag", "two", "own")]
    assert [each["sampler"] for each in stored] == ["plms", "plms", "plms", "lcm", "plms"]
    pictures = [(folder / f"{i}.png").read_bytes() for i in range(5)]
    assert cli(out="again.png", adapter="style.pt", steps="2") == 0
    assert np.array_equal(*(np.asarray(Image.open(folder / name)) for name in ("1.png", "again.png")))
    assert len(set(pictures)) == 3
    loaded.clear()
    assert cli(batch="rows.csv", adapter="style.pt:2", steps="2") == 1
    assert "5 done before" in capsys.readouterr().out
    assert len(loaded) == 1  # by the row that fails


@pytest.mark.slow
def test_another_autoencoder_and_the_choice_of_weights_are_used_and_noted(cli, folder, tiny_checkpoint, capsys):
    prefix = "first_stage_model."
    state = torch.load(tiny_checkpoint)["state_dict"]
    vae = {name.removeprefix(prefix): 0.9 * x for name, x in state.items() if name.startswith(prefix)}
    torch.save(vae, folder / "vae.pt")
    assert checkpoint(["set-vae", str(tiny_checkpoint), "vae.pt", "--out", "other.ckpt"]) == 0
    assert cli() == cli(out="beside.png", vae="vae.pt") == cli(out="inside.png", ckpt="other.ckpt") == 0
    pixels = {name: Image.open(folder / f"{name}.png").tobytes() for name in ("out", "beside", "inside")}
    assert pixels["beside"] == pixels["inside"] != pixels["out"]
    assert len(read_provenance(folder / "beside.png")["vae_crc32"]) == 8
    assert {"vae_crc32", "weights"}.isdisjoint(read_provenance(folder / "out.png"))

    (folder / "rows.csv").write_text("image,mask,exemplar,out\nphoto.png,mask.png,dog.png,a.png\n")
    for flags, status in (({"vae": "vae.pt"}, "1 done"), ({"vae": "vae.pt"}, "0 done"), ({"weights": "raw"}, "1 done")):
        assert cli(batch="rows.csv", **flags) == 0
        assert f"1 row: {status}" in capsys.readouterr().out
    assert cli(weights="ema") == 2
    assert "holds no averaged copies" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resolution", "device", "chosen", "threads"),
    [(64, "cpu", None, 1), (128, "cpu", None, 1), (256, "cpu", None, 2), (64, "cuda", None, 2), (64, "cpu", "2", 2)],
)
def test_small_models_take_one_thread_of_a_cpu(resolution, device, chosen, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    torch.set_num_threads(2)
    limit_threads(SimpleNamespace(config=SimpleNamespace(resolution=resolution), device=torch.device(device)))
    assert torch.get_num_threads() == threads


def test_a_hole_in_the_photo_is_repainted_once_for_all(cli, folder, capsys):
    pixels = np.dstack([np.asarray(Image.open(folder / "photo.png")), np.full((80, 100), 255, np.uint8)])
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2], 3] = 0
    Image.fromarray(pixels).save(folder / "cut.png")
    assert cli(image="cut.png", mask=None, num_images=2, grid=True) == 0
    error = capsys.readouterr().err
    assert error.count("warning: no mask is given: the transparent part of the image, 16.0% of it, is repainted") == 1
    for name in ("out-321.png", "out-322.png"):
        assert (np.asarray(Image.open(folder / name))[..., 3] == 255).all()
    assert cli(image="photo.png", mask=None) == 2
    assert "error: nothing to repaint: give one of mask, box, polygon and select, or extend" in capsys.readouterr().err


def test_control_by_flags_and_by_rows(cli, folder, capsys):
    """Settings and negative exemplars give the same by flags, by a row and in Python, and are in the picture."""
    columns = {
        "strength": "0.5",
        "grow": "3",
        "smooth": "2",
        "extend": "left,20,top,10",
        "negative": "cat.png",
        "negative_mask": "cat_mask.png",
        "fit_mask": True,
    }
    Image.new("L", (15, 10), "white").save(folder / "cat_mask.png")
    assert cli(**columns) == 0
    row = {"image": "photo.png", "mask": "mask.png", "exemplar": "dog.png", "out": "row.png", **columns}
    (folder / "rows.jsonl").write_text(json.dumps(row))
    assert cli(batch="rows.jsonl") == 0
    assert cli(batch="rows.jsonl") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 row: 0 done, 1 done before, 0 failed"
    pictures = [np.asarray(Image.open(folder / name)) for name in ("out.png", "row.png")]
    assert pictures[0].shape == (90, 120, 3)
    assert np.array_equal(*pictures)
    stored = read_provenance(folder / "row.png")
    expected = {"strength": 0.5, "grow": 3, "extend": [["left", 20], ["top", 10]], "negative": ["cat.png"]}
    assert stored.items() >= expected.items()
    assert {"cat.png", "cat_mask.png"} <= set(stored["inputs_crc32"])


def test_a_row_may_have_no_mask(cli, folder, capsys):
    rows = 'image,mask,exemplar,out,extend\nphoto.png,,dog.png,a.png,"right,16"\nphoto.png,,dog.png,b.png,\n'
    (folder / "rows.csv").write_text(rows)
    assert cli(batch="rows.csv") == 1
    assert Image.open(folder / "a.png").size == (116, 80)
    assert "line 3 failed: nothing to repaint: give one of mask, box, polygon and select" in capsys.readouterr().err


def test_several_results_are_those_of_their_seeds(cli, folder):
    assert cli(num_images=3, seed=5, batch_size=2) == 0
    assert names(folder) == {"out-5.png", "out-6.png", "out-7.png"}
    assert cli(seed=6, out="alone.png") == 0
    a, b = (np.asarray(Image.open(folder / name)).astype(int) for name in ("out-6.png", "alone.png"))
    assert abs(a - b).max() <= 1  # sums may be ordered differently in a batch
    other = np.asarray(Image.open(folder / "out-5.png")).astype(int)
    assert abs(a - other).max() > 1


@pytest.mark.slow
def test_batch_from_a_file(cli, folder, capsys):
    (folder / "rows.csv").write_text(
        "image,mask,box,exemplar,seed,out\n"
        "photo.png,mask.png,,dog.png,1,a.png\n"
        "none.png,mask.png,,dog.png,2,b.png\n"
        "photo.png,,\"20,16,60,48\",dog.png;cat.png,3,c.png\n"
    )  # fmt: skip
    assert cli(batch="rows.csv") == 1
    output = capsys.readouterr()
    assert output.out == "3 rows: 2 done, 0 done before, 1 failed\n"
    assert output.err.count("\n") == 1
    assert output.err.startswith("line 3 failed: ")
    assert names(folder) == {"rows.csv", "a.png", "c.png"}
    first = (folder / "a.png").read_bytes()

    (folder / "rows.csv").write_text(
        "seed,out,image,mask,exemplar\n3,d.png,photo.png,mask.png,dog.png\n1,a.png,photo.png,mask.png,dog.png\n"
    )
    assert cli(batch="rows.csv") == 0
    assert capsys.readouterr().out == "2 rows: 1 done, 1 done before, 0 failed\n"
    assert cli(batch="rows.csv", redo=True) == 0
    assert (folder / "a.png").read_bytes() == first  # whatever its place and its neighbours


def test_batch_of_bad_rows_needs_no_model(cli, folder, capsys):
    (folder / "rows.jsonl").write_text("{}")
    assert cli(batch="rows.jsonl") == 1
    output = capsys.readouterr()
    assert output.out == "1 row: 0 done, 0 done before, 1 failed\n"
    assert output.err == "line 1 failed: image and exemplar and out missing\n"


def test_finished_batch_loads_no_model(cli, folder, capsys, monkeypatch):
    (folder / "rows.csv").write_text("image,mask,exemplar,out\nphoto.png,mask.png,dog.png,a.png\n")
    assert cli(batch="rows.csv") == 0
    monkeypatch.delattr("pbe.checkpoints.loading.load_model")
    assert cli(batch="rows.csv") == 0
    assert capsys.readouterr().out.splitlines()[1] == "1 row: 0 done, 1 done before, 0 failed"


# --- what the flags do ------------------------------------------------------------------------------------


def test_flags_reach_edit(cli, edits):
    flags = {
        "sampler": "ddim",
        "eta": 0.5,
        "spacing": "trailing",
        "guidance": 3,
        "guidance_interval": "100,800",
        "seed": 9,
        "window": "0,0,64,64",
        "split_mask": True,
    }
    more = {
        "no_composite": True,
        "seam": "feather",
        "feather": 4,
        "margin": 0.2,
        "resolution": 128,
        "reuse": 2,
        "decoder": "tiny",
        "strength": 0.5,
        "detail": 0.5,
        "fit_mask": True,
        "no_invert": True,
        "extend": "left,8,top,16",
        "fill_holes": True,
        "smooth": 3,
        "grow": -2,
        "batch_size": 3,
        "num_images": 2,
    }
    assert cli(**flags, **more, exemplar=["dog.png", "cat.png"], exemplar_weights="1,3") == 0
    (settings,) = edits
    del settings["callback"]
    assert settings == {
        "preview": None,
        "exemplar_weights": (1, 3),
        "negative": None,
        "negative_weights": None,
        "steps": 4,
        "guidance": 3,
        "guidance_interval": (100, 800),
        "sampler": "ddim",
        "eta": 0.5,
        "spacing": "trailing",
        "seed": 9,
        "num_images": 2,
        "batch_size": 3,
        "window": (0, 0, 64, 64),
        "split_mask": True,
        "composite": False,
        "seam": "feather",
        "feather": 4,
        "margin": 0.2,
        "resolution": 128,
        "reuse": 2,
        "decoder": "tiny",
        "strength": 0.5,
        "detail": 0.5,
        "fit_mask": True,
        "invert": False,
        "extend": (("left", 8), ("top", 16)),
        "fill_holes": True,
        "smooth": 3,
        "grow": -2,
        "placement": "fill",
    }


def test_regions_by_flags(cli, folder, capsys):
    regions = ["--region", "0,0,20,20", "cat.png", "--region", "80,2 95,2 95,20", "dog.png"]
    assert cli(region=regions[1:], steps="1") == 0
    before, after = (np.asarray(Image.open(folder / name)) for name in ("photo.png", "out.png"))
    changed = (before != after).any(axis=2)
    assert [changed[:20, :20].any(), changed[2:20, 80:95].any(), changed[30:40, 30:40].any()] == [True] * 3
    assert not changed[:16, 21:80].any()
    stored = read_provenance(folder / "out.png")
    assert stored.items() >= {"mask": "mask.png", "box_2": [0, 0, 20, 20], "exemplar_3": ["dog.png"]}.items()
    assert stored["inputs_crc32"].keys() == {"photo.png", "mask.png", "dog.png", "cat.png"}
    assert cli(mask=None, exemplar=None, region=regions[1:], out="two.png", steps="1", grid=True) == 0
    assert read_provenance(next(folder.glob("two-*.png")))["box"] == [0, 0, 20, 20]
    assert cli(region=[*regions[1:], *regions * 4]) == 2
    assert "more than 9 regions" in capsys.readouterr().err
    assert cli(batch="rows.csv", region=regions[1:]) == 2
    assert "--region cannot be given with --batch" in capsys.readouterr().err


def test_settings_are_in_the_picture(cli, edits, folder, tiny_checkpoint):
    assert cli(seed=9, guidance=2.5, reuse=3) == 0
    settings = read_provenance(folder / "out.png")
    expected = {"seed": 9, "guidance": 2.5, "reuse": 3, "steps": 4, "sampler": "plms", "size": [100, 80]}
    expected |= {"image": "photo.png", "exemplar": ["dog.png"], "checkpoint": tiny_checkpoint.name}
    expected |= {"pbe": pbe.__version__, "dtype": "float32"}
    assert settings.items() >= expected.items()
    assert "guidance 2.5" in Image.open(folder / "out.png").text["Description"]


@pytest.mark.parametrize("out", ["new/", "there"])
def test_results_in_a_folder_are_called_after_the_photo(cli, edits, folder, out):
    (folder / "there").mkdir()
    assert cli(out=out, seed=3, num_images=2) == 0
    assert {path.name for path in (folder / out).iterdir()} == {"photo-3.png", "photo-4.png"}
    assert [gray_inside(folder / out / f"photo-{seed}.png") for seed in (3, 4)] == [60, 80]


def test_grid(cli, edits, folder):
    assert cli(grid=True, seed=3, exemplar=["dog.png", "cat.png"]) == 0
    assert names(folder) == {"out.png", "out-3.png"}
    with Image.open(folder / "out.png") as grid:
        assert grid.width > 5 * 200  # source, masked, two exemplars, a result: each at least 2/3 of 320 wide
        pixels = np.asarray(grid)
    for colour in ((255, 0, 0), (0, 0, 255), (128, 128, 128), (60, 60, 60)):  # exemplars, mask, result
        assert (pixels == colour).all(axis=-1).sum() > 1000


def test_photos_may_be_larger_than_pillow_s_bound(cli, edits, folder, capsys, monkeypatch):
    """The bound's error and its warning at half as many pixels; a batch knows its large results again."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of 8000
    (folder / "rows.csv").write_text("image,mask,exemplar,out\nphoto.png,mask.png,dog.png,a.png\n")
    assert cli(batch="rows.csv") == 0
    assert cli(batch="rows.csv") == 0
    output = capsys.readouterr()
    assert "1 done before" in output.out
    assert output.err == ""
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_grid_does_not_replace_an_input(cli, edits, folder, capsys):
    (folder / "mask.png").rename(folder / "photo-grid.png")
    before = (folder / "photo-grid.png").read_bytes()
    assert cli(mask="photo-grid.png", out="./", grid=True) == 2
    assert "photo-grid.png is also an input" in capsys.readouterr().err
    assert (folder / "photo-grid.png").read_bytes() == before
    assert edits == []


def test_seeds_and_scales_make_a_table(cli, edits, folder):
    assert cli(seeds="1..2,7", sweep_guidance="1,2.5") == 0
    expected = {f"out-guidance{scale}-{seed}.png" for scale in ("1", "2.5") for seed in (1, 2, 7)}
    assert names(folder) == {"out.png", *expected}
    assert [(call["guidance"], call["seed"], call["num_images"]) for call in edits] == [
        (1, 1, 2), (1, 7, 1), (2.5, 1, 2), (2.5, 7, 1)
    ]  # fmt: skip
    assert gray_inside(folder / "out-guidance2.5-7.png") == 140
    assert read_provenance(folder / "out-guidance2.5-7.png")["guidance"] == 2.5
    with Image.open(folder / "out.png") as grid:
        assert grid.height > 3 * 320


def test_table_lists_scales_down_and_seeds_across(cli, edits, folder):
    assert cli(seeds="4,6", sweep_guidance="1,3", out="grids/") == 0
    pixels = np.asarray(Image.open(folder / "grids" / "photo-grid.png")).astype(int)
    found = []
    for seed in (4, 6):
        rows, columns = np.nonzero((abs(pixels - 20 * seed) <= 1).all(axis=-1))
        blocks = [columns[rows < rows.mean()].mean(), columns[rows > rows.mean()].mean()]
        assert abs(blocks[0] - blocks[1]) < 10  # the same column for both scales
        found.append(np.mean(blocks))
    assert found[1] - found[0] > 300


@pytest.mark.parametrize(
    "text, seeds", [("1..4", [1, 2, 3, 4]), ("1,5,9", [1, 5, 9]), ("7", [7]), ("1..3,3,2,9", [1, 2, 3, 9])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


def test_runs_are_consecutive_seeds():
    assert runs([1, 2, 3, 7, 6, 5, 8]) == [(1, 3), (7, 1), (6, 1), (5, 1), (8, 1)]


def test_progress_is_on_stderr_and_ends_full(cli, edits, capsys):
    assert cli(quiet=None, num_images=5, batch_size=2, steps=5) == 0
    output = capsys.readouterr()
    assert output.out == ""
    assert "15/15" in output.err  # three batches of five steps
    assert cli() == 0
    assert capsys.readouterr().err == ""


def test_preview_is_rewritten_at_each_step(cli, edits, folder, monkeypatch):
    seen = []
    monkeypatch.setattr("pbe.images.saving.save_picture", lambda image, path, *_: seen.append((image.copy(), path)))
    assert cli(preview="so_far.png", num_images="2") == 0
    previews = [image for image, path in seen if path == Path("so_far.png")]
    assert previews[0].size == (100, 80)  # before the first step, the photo
    assert [image.size for image in previews[1:]] == [(16, 4)] * 4
    assert [image.getpixel((15, 3))[0] for image in previews[1:]] == [0, 1, 2, 3]


def test_jpeg_says_that_it_changes_pixels(cli, edits, folder, capsys):
    assert cli(out="out.jpg") == 0
    assert capsys.readouterr().err.startswith("note: JPEG changes all pixels")
    assert read_provenance(folder / "out.jpg")["seed"] == 321


def test_warnings_are_one_line(cli, edits, folder, capsys):
    Image.linear_gradient("L").resize((100, 80)).save(folder / "gray.png")
    assert cli(mask="gray.png") == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: ")
    assert error.count("\n") == 1


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": "none.png"}, "none.png"),
        ({"mask": "none.png"}, "error: mask none.png: there is no such file"),
        ({"mask": "dog.png"}, "error: mask dog.png is "),
        ({"out": "photo.png/out.png"}, "cannot write photo.png/out.png: photo.png is a file, not a folder"),
        ({"image": "loop.png"}, "image loop.png: there is no such file"),
        ({"exemplar": "none.png"}, "none.png"),
        ({"ckpt": "none.ckpt"}, "none.ckpt"),
        ({"ckpt": "photo.png"}, "photo.png"),
        ({"ckpt": None}, "--ckpt"),
        ({"mask": None, "box": "10,10,200,20"}, "outside"),
        ({"mask": None, "box": "10,10"}, "box must be a box x0,y0,x1,y1, got '10,10'"),
        ({"mask": "dog.png"}, "20x30"),
        ({"mask": None}, "one of mask, box, polygon and select"),
        ({"box": "1,2,3,4"}, "got mask and box"),
        ({"image": None, "mask": None, "exemplar": None, "out": None}, "image and exemplar and out missing"),
        ({"sampler": "heun"}, "sampler must be 'ddim', 'plms'"),
        ({"steps": "0"}, "steps must be a whole number from 1 to 1000, got '0'"),
        ({"steps": "many"}, "steps must be a whole number from 1 to 1000, got 'many'"),
        ({"num_images": "0"}, "--num-images must be a whole number from 1 to 10000, got 0"),
        ({"num_images": "1000000000"}, "--num-images must be a whole number from 1 to 10000"),
        ({"batch_size": "0"}, "--batch-size must be a whole number from 1 to 10000, got 0"),
        ({"seeds": "1..1000000000"}, "the number of seeds in 1..1000000000"),
        ({"seeds": "1..5000", "sweep_guidance": "1,2,3"}, "the number of results must be"),
        ({"resolution": "1000000000"}, "resolution must be a whole number from 8 to 8192"),
        ({"feather": "10000000"}, "feather must be a whole number from 0 to 1000000"),
        ({"steps": ""}, "--steps is empty"),
        ({"image": " "}, "--image is empty"),
        ({"mask": ["mask.png", "--mask=photo.png"]}, "--mask is given twice; expected once ("),
        ({"negative": ["dog.png", "--negative", "cat.png"]}, "--negative is given twice; expected once, before all"),
        ({"device": "meta"}, "device='meta' holds no values"),
        ({"guidance": "-1"}, "guidance must be a number of at least 0, got '-1'"),
        ({"eta": "0.5"}, "eta=0.5 is for the samplers 'ddim' and 'tcd' alone, not for 'plms'"),
        ({"margin": "0.7"}, "margin must be"),
        ({"feather": "-1"}, "feather must be"),
        ({"resolution": "100"}, "resolution must be"),
        ({"resolution": "0"}, "resolution must be"),
        ({"sweep_guidance": "1,-3"}, "guidance must be a number of at least 0, got -3"),
        ({"seed": "-1"}, "seed must be a whole number from 0 to 18446744073709551615"),
        ({"seed": "18446744073709551615", "num_images": "2"}, "seed must be a whole number from 0 to"),
        ({"device": "abacus"}, "abacus"),
        ({"dtype": "float8"}, "float8"),
        ({"out": "out.gif"}, "choose one of .png"),
        ({"out": "out"}, "choose one of .png"),
        ({"out": "photo.png"}, "also an input"),
        ({"preview": "photo.png"}, "out photo.png is also an input"),
        ({"preview": "out.png"}, "--preview out.png is also a result"),
        ({"preview": "so_far.gif"}, "choose one of .png"),
        ({"tiny_decoder": "none.pth"}, "none.pth: there is no such checkpoint"),
        ({"out": "dog.png/out.png"}, "dog.png"),
        ({"seeds": "5..1"}, "the number of seeds in 5..1"),
        ({"seeds": "1..8", "seed": "3"}, "--seeds and --seed contradict"),
        ({"seeds": "1..8", "num_images": "3"}, "--seeds and --num-images contradict"),
        ({"sweep_guidance": "1,3", "guidance": "3"}, "--sweep-guidance and --guidance contradict"),
        ({"devices": "2"}, "need --batch"),
        ({"redo": True}, "need --batch"),
        ({"colour": "red"}, "--colour"),
        ({"reference": "dog.png"}, "--reference is now --exemplar"),
        ({"scale": "3"}, "--scale is now --guidance"),
        ({"raw": True}, "--raw is now --no-composite"),
        ({"batch": "none.csv"}, "none.csv"),
        ({"batch": "photo.png"}, "ends in .csv or .jsonl"),
        ({"batch": "rows.csv", "image": "photo.png", "grid": True}, "--image and --grid cannot be given with --batch"),
        ({"batch": "rows.csv", "preview": "so_far.png"}, "--preview cannot be given with --batch"),
        ({"batch": "rows.csv", "batch_size": "2"}, "--batch-size cannot be given with --batch"),
        ({"batch": "rows.csv", "num_images": "0"}, "--num-images cannot be given with --batch"),
        ({"negative_mask": "mask.png"}, "negative_mask has 1 values for 0 negatives"),
        ({"negative": "none.png"}, "none.png"),
        ({"strength": "0"}, "strength must be a number above 0 and at most 1, got '0'"),
        ({"extend": "up,3"}, "extend must be sides, each once, with 1 to 30000 pixels, such as left,200"),
        ({"grow": "-100"}, "with grow=-100 the mask is empty"),
        ({"batch": "rows.csv", "devices": "0"}, "at least 1"),
        ({"batch": "rows.csv", "steps": "many"}, "steps must be a whole number from 1 to 1000, got 'many'"),
        ({"batch": "rows.csv", "ckpt": "none.ckpt"}, "none.ckpt"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(cli, edits, folder, capsys, changes, message):
    (folder / "rows.csv").write_text("image,mask,exemplar,out\nphoto.png,mask.png,dog.png,a.png\n")
    (folder / "loop.png").symlink_to("loop.png")
    before = names(folder)
    try:
        code = cli(**changes)
    except SystemExit as end:  # argparse leaves so
        code = end.code
    output = capsys.readouterr()
    assert code == 2
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert names(folder) == before
    assert edits == []


def test_ctrl_c_ends_in_one_line_and_leaves_nothing(cli, folder, capsys, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("pbe.editing.edit.edit", at_once(interrupted))
    before = names(folder)
    assert cli() == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert names(folder) == before


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(cli, edits, folder, capsys):
    (folder / "locked").mkdir(mode=0o500)
    assert cli(out="locked/out.png") == 2
    assert "cannot write locked/out.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance": "-1"},
        {"eta": "0.5"},
        {"resolution": "100"},
        {"out": "out.gif"},
        {"low_memory": True, "compile": "whole"},
    ],
)
def test_what_needs_no_model_is_refused_without_one(cli, capsys, monkeypatch, changes):
    monkeypatch.delattr("pbe.checkpoints.loading.load_model")
    assert cli(**changes) == 2
    assert "load_model" not in capsys.readouterr().err


def test_batch_of_settings_out_of_range_needs_no_model(cli, folder, capsys, monkeypatch):
    monkeypatch.delattr("pbe.checkpoints.loading.load_model")
    (folder / "rows.csv").write_text("image,mask,exemplar,out,margin\nphoto.png,mask.png,dog.png,a.png,0.7\n")
    assert cli(batch="rows.csv") == 1
    output = capsys.readouterr()
    assert output.out == "1 row: 0 done, 0 done before, 1 failed\n"
    assert "margin must be" in output.err


@pytest.mark.slow
def test_batch_goes_on_after_memory_was_full(cli, folder, capsys, monkeypatch):
    def edit(model, image, *args, seed, **settings):
        if seed == 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return [image.picture.source]

    monkeypatch.setattr("pbe.editing.edit.edit", at_once(edit))
    row = "photo.png,mask.png,dog.png"
    (folder / "rows.csv").write_text(f"image,mask,exemplar,out,seed\n{row},a.png,1\n{row},b.png,2\n")
    assert cli(batch="rows.csv") == 1
    output = capsys.readouterr()
    assert output.out == "2 rows: 1 done, 0 done before, 1 failed\n"
    assert output.err.startswith("line 2 failed: the device's memory is full")
    assert names(folder) == {"rows.csv", "b.png"}
    assert cli(seed=1) == 2  # alone, it is one line as well
    assert capsys.readouterr().err.startswith("error: the device's memory is full")


def test_large_seed_is_kept(cli, edits, folder, monkeypatch):
    (folder / "rows.jsonl").write_text(
        '{"image": "photo.png", "mask": "mask.png", "exemplar": "dog.png", "out": "b.png", "seed": 9007199254740993}'
    )
    monkeypatch.setattr(
        "pbe.editing.edit.edit",
        at_once(lambda model, image, *_, **settings: edits.append(settings) or [image.picture.source]),
    )
    assert cli(seed=2**53 + 1, out="a.png") == 0
    assert cli(batch="rows.jsonl") == 0
    assert [call["seed"] for call in edits] == [2**53 + 1] * 2
    assert [read_provenance(folder / name)["seed"] for name in ("a.png", "b.png")] == [2**53 + 1] * 2


def test_batch_with_another_checkpoint_of_the_same_name_is_done_again(cli, edits, folder, tiny_checkpoint, capsys):
    (folder / "rows.csv").write_text("image,mask,exemplar,out\nphoto.png,mask.png,dog.png,a.png\n")
    state = torch.load(tiny_checkpoint)
    for place in ("one", "two"):
        (folder / place).mkdir()
        torch.save(state, folder / place / "model.ckpt")
        state["state_dict"]["model.diffusion_model.out.2.bias"] += 1
    times = (folder / "one" / "model.ckpt").stat()
    os.utime(folder / "two" / "model.ckpt", ns=(times.st_atime_ns, times.st_mtime_ns))
    sizes = {(folder / place / "model.ckpt").stat().st_size for place in ("one", "two")}
    assert len(sizes) == 1
    for place, line in (("one", "1 done, 0"), ("one", "0 done, 1"), ("two", "1 done, 0"), ("two", "0 done, 1")):
        assert cli(batch="rows.csv", ckpt=f"{place}/model.ckpt") == 0
        assert capsys.readouterr().out == f"1 row: {line} done before, 0 failed\n"


def test_other_model_is_refused(cli, edits, capsys, monkeypatch):
    monkeypatch.setattr("pbe.checkpoints.loading.load_model", lambda *_, **__: torch.nn.Linear(1, 1))
    assert cli() == 2
    assert "holds Linear, editing needs Paint by Example" in capsys.readouterr().err


def test_programming_errors_keep_their_traceback(cli, monkeypatch):
    def edit(*args, **settings):
        raise TypeError("a bug")

    monkeypatch.setattr("pbe.editing.edit.edit", at_once(edit))
    with pytest.raises(TypeError, match="a bug"):
        cli()


# --- the command pbe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pbe.cli.COMMANDS)
def test_subcommands_have_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        pbe.cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: pbe {name}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        pbe.cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"pbe {pbe.__version__}\n"


@pytest.mark.parametrize("argv, message", [([], "COMMAND"), (["paint"], "'paint'")])
def test_unknown_subcommand(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        pbe.cli.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_subcommand_gets_its_flags(folder, edits, tiny_checkpoint):
    argv = ["edit", "--image", "photo.png", "--mask", "mask.png", "--exemplar", "dog.png", "--out", "out.png"]
    assert pbe.cli.main([*argv, "--ckpt", str(tiny_checkpoint), "--device", "cpu", "--quiet"]) == 0
    assert (folder / "out.png").exists()


@pytest.mark.parametrize(
    "command", [["tools/inference.py", "--help"], ["-c", "import pbe.cli; pbe.cli.main(['edit', '--help'])"]]
)
def test_help_loads_nothing_heavy(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert run.stdout.startswith("usage: ")
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "numpy", "PIL", "lightning", "tqdm", "omegaconf"})


def test_lazy_names_of_the_package():
    assert {"edit", "load_model", "PaintByExample", "__version__"} <= set(dir(pbe))
    assert pbe.PaintByExample.__name__ == "PaintByExample"
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        pbe.paint  # noqa: B018
