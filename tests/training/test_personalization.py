"""`pbe personalize`: what it makes of a folder of pictures, the run, its result, and one line where it cannot be."""

import json

import numpy as np
import pytest
import torch
import toy_run
from PIL import Image

import pbe
from pbe.checkpoints.adapters import read_adapter
from pbe.cli import main
from pbe.data.manifest import Manifest
from pbe.training.personalization import pictures_of, run_settings, write_object

pytest.importorskip("safetensors")


def picture(number, side=80):
    """A square of two colours somewhere before a plain ground, and its mask."""
    photo, mask = np.full((side, side + 10, 3), 40 * number, np.uint8), np.zeros((side, side + 10), bool)
    y, x = 10 + 3 * number, 20 - 4 * number
    mask[y : y + 40, x : x + 36] = True
    photo[mask] = (200, 30, 30)
    photo[y : y + 40, x : x + 18] = (30, 30, 200)
    return Image.fromarray(photo), mask


def fill(folder, count=3, with_masks=True):
    (folder / "bag").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number in range(count):
        photo, mask = picture(number)
        photo.save(folder / "bag" / f"{number}.png")
        if with_masks:
            Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def model(toy):
    return toy_run.write_model(toy.parent)


@pytest.fixture
def bag(tmp_path):
    return fill(tmp_path)


def personalize(model, bag, *arguments, out="bag.safetensors", pictures="bag"):
    paths = ["--pictures", bag / pictures, "--masks", bag / "masks", "--run", bag / "run", "--out", bag / out]
    quick = ["data.workers=0", "log=none", "trainer.accelerator=cpu", "samples.edit.steps=1"]
    return main(["personalize", *map(str, [model, *paths, *quick, *arguments])])


# --- the pictures ---------------------------------------------------------------------------------------------


def written(pictures, masks=None):
    """The files of `write_object` as arrays, by name."""
    folder = pictures.parent / "object"
    list(write_object(pictures_of(pictures, masks), folder))
    return folder, {path.stem: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def test_masks_are_given_or_the_alpha(bag):
    photo, mask = picture(1)
    (bag / "masks" / "1.png").unlink()
    photo.putalpha(Image.fromarray(mask).convert("L"))
    photo.save(bag / "bag" / "1.png")
    _, files = written(bag / "bag", bag / "masks")
    for number in range(3):
        photo, mask = picture(number)
        assert np.array_equal(files[f"{number:02}_mask"] > 0, mask)
        assert np.array_equal(files[f"{number:02}"], np.asarray(photo))


def test_large_pictures_are_made_smaller_with_their_masks(tmp_path):
    photo, mask = picture(1, side=1200)
    fill(tmp_path, count=0)
    mask[:700, :700] = True
    for number in range(2):
        photo.save(tmp_path / "bag" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    _, files = written(tmp_path / "bag", tmp_path / "masks")
    assert files["01"].shape == (1016, 1024, 3)
    assert files["01_mask"].shape == (1016, 1024)
    assert (files["01_mask"] >= 128).mean() == pytest.approx(mask.mean(), abs=0.005)


def test_masks_are_found(tmp_path):
    pytest.importorskip("cv2")
    rng, folder = np.random.default_rng(0), tmp_path / "bag"
    folder.mkdir()
    for number in range(2):
        noise = rng.integers(0, 40, (80, 90, 3))
        pixels = (np.asarray(picture(number)[0]).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    _, files = written(folder)
    for number in range(2):
        found, mask = files[f"{number:02}_mask"] > 0, picture(number)[1]
        assert (found & mask).sum() / (found | mask).sum() > 0.95
    Image.new("RGB", (40, 40), (90, 90, 90)).save(folder / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: no whole object of at least 0\.5% .* into --masks as 1\.png"):
        written(folder)


def test_each_region_is_painted_as_each_picture_s_object(bag):
    folder, files = written(bag / "bag", bag / "masks")
    pairs, donors = (Manifest(folder / f"{name}.jsonl") for name in ("pairs", "donors"))
    records = [pairs[i] for i in range(len(pairs))]
    names = {(record.image.stem, record.exemplar.stem) for record in records}
    assert names == {(f"0{a}", f"0{b}_{kind}") for a in range(3) for b in range(3) for kind in ("crop", "cut_out")}
    assert files["01_cut_out"].shape == (40, 36, 3)
    assert files["01_crop"].shape == (60, 56, 3)  # 10 pixels more, as far as there are
    assert (files["01_crop"][0] == 40).all()
    assert np.array_equal(donors[2].masks[0].draw((80, 90)), picture(2)[1])


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_result_is_an_adapter_and_the_run_resumes(model, bag, capsys):
    assert personalize(model, bag, "--steps", "4", "--rank", "2", "checkpoint.every_n_steps=2") == 0
    run = bag / "run"
    assert "adapters of 3 pictures" in capsys.readouterr().out
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        f"edits-0000000{i}.png" for i in (1, 2, 3, 4)
    ]
    loaded = pbe.load_model(model, "cpu", torch.float32)
    found = read_adapter(bag / "bag.safetensors", loaded)
    assert {update.rank for update in found.updates.values()} == {2}
    assert found.metadata["pbe"]["base"]["checkpoint"] == "model.ckpt"
    photo, mask = picture(0)
    before = pbe.edit(loaded, photo, mask, picture(1)[0], steps=2)[0]
    adapted = pbe.edit(pbe.add_adapters(loaded, bag / "bag.safetensors"), photo, mask, picture(1)[0], steps=2)[0]
    assert np.asarray(before).tobytes() != np.asarray(adapted).tobytes()

    # a run that ended gives its result again; one with a later checkpoint gone goes on to the same
    assert (
        personalize(model, bag, "--steps", "4", "--rank", "2", "checkpoint.every_n_steps=2", out="again.safetensors")
        == 2
    )
    assert "--resume continues it" in capsys.readouterr().err
    arguments = ("--steps", "4", "--rank", "2", "--resume", "checkpoint.every_n_steps=2")
    assert personalize(model, bag, *arguments, out="again.safetensors") == 0
    assert (bag / "again.safetensors").read_bytes() == (bag / "bag.safetensors").read_bytes()


def test_ordinary_photos_get_the_object_too(toy, model, bag):
    prior = toy.parent / "boxes.csv"
    assert personalize(model, bag, "--prior", prior, "--steps", "1", "training.lora.targets=all-linear") == 0
    assert not (bag / "run" / "prior").exists()
    config = json.loads((bag / "run" / "personalize.yaml").read_text())
    assert config["data"]["sources"][1]["path"] == str(prior)
    assert config["data"]["recipe"]["transplant"] > 0
    assert config["data"]["donors"]["path"] == f"{bag}/run/object/donors.jsonl"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda bag: [path.unlink() for path in (bag / "bag").iterdir()],
            "at least 2 pictures of one object, better 3 to 10; it has 0",
        ),
        (
            lambda bag: [(bag / "bag" / f"{i}.png").unlink() for i in (0, 1)],
            "at least 2 pictures of one object, better 3 to 10; it has 1",
        ),
        (lambda bag: (bag / "bag" / "1.png").write_bytes(b"text"), "1.png"),
        (lambda bag: (bag / "masks" / "7.png").write_bytes(b""), "7.png is the mask of no picture"),
        (lambda bag: (bag / "bag.safetensors").write_bytes(b""), "bag.safetensors exists; --force replaces it"),
        (lambda bag: Image.new("L", (90, 80)).save(bag / "masks" / "1.png"), "masks/1.png is empty"),
        (lambda bag: Image.fromarray(np.eye(80, 90) > 2).save(bag / "masks" / "2.png"), "masks/2.png is empty"),
    ],
)
def test_wrong_pictures_are_one_line(model, bag, capsys, spoil, message):
    spoil(bag)
    assert personalize(model, bag) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (bag / "run" / "checkpoints").exists()


def test_wrong_arguments_are_one_line(toy, model, bag, capsys):
    assert personalize(model, bag, pictures="nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert not (bag / "run").exists()
    vae = toy.parent / "vae.ckpt"
    for arguments, message in (
        ((bag / "lost.ckpt",), "lost.ckpt"),
        ((vae,), "vae.ckpt"),
        ((model, "--steps", "0"), "--steps must be at least 1, got 0"),
        ((model, "--rank", "0"), "rank must be a whole number of at least 1, got 0"),
        ((model, "optimizer.rl=1"), "optimizer.rl"),
    ):
        assert personalize(arguments[0], bag, *arguments[1:]) == 2, arguments
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert personalize(model, bag, out="bag.ckpt") == 2
    assert "bag.ckpt: a file of adapters in diffusers names must end in .safetensors" in capsys.readouterr().err
    assert not (bag / "bag.safetensors").exists()


def test_settings_without_prior_use_own_results(tmp_path):
    settings = run_settings("demo", tmp_path, pbe.EditSettings(), steps=20, rank=3, seed=5, prior=None)
    assert settings["data"]["sources"][1]["path"] == f"{tmp_path}/prior/results.jsonl"
    assert settings["data"]["recipe"]["transplant"] == 0
    assert (settings["seed"], settings["data"]["seed"], settings["samples"]["edit"]["seed"]) == (5, 5, 5)
