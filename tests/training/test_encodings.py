"""Encodings kept in files: training with them is training without, to the rounding of 16 bits."""

import shutil

import numpy as np
import pytest
import torch
import toy_run

from pbe.cli.train import main
from pbe.data.datamodule import ExampleDataModule
from pbe.models.paint_by_example import latent_mask
from pbe.training import encodings
from pbe.training.config import load_config
from pbe.training.initialization import loaded_vae

END = 10  # two epochs of 5 steps
SETTINGS = (f"trainer.max_steps={END}", "checkpoint.every_n_steps=5", "training.noise_draws=2")


@pytest.fixture(scope="module")
def kept(toy):
    """A folder of encodings that a run has made, in files of 4 records."""
    run, folder = toy.parent / "kept", toy.parent / "encodings"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encodings, "RECORDS_PER_FILE", 4)
        toy_run.run(toy, f"run={run}", *SETTINGS, f"encodings.folder={folder}", "encodings.crops=2")
    return folder


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(encodings, "RECORDS_PER_FILE", 4)


def test_same_training(toy, whole, kept):
    losses, expected = (toy_run.metrics(run, "train/loss") for run in (toy.parent / "kept", whole))
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses != expected  # they are rounded
    val = toy_run.metrics(toy.parent / "kept", "val/loss")
    assert val == pytest.approx(toy_run.metrics(whole, "val/loss"), rel=2e-3)
    assert len(sorted(kept.glob("*.npy"))) == 2 * 3  # 10 records that are trained on


def test_crops_come_again_with_other_draws(toy, kept):
    config = load_config([str(toy)])
    data = ExampleDataModule(config.data)
    data.setup("fit")
    vae = loaded_vae(config.model.vae)
    examples = {}
    dataset = encodings.EncodedDataset(data.train, kept, crops=2)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        data.train.set_epoch(epoch)
        examples[epoch] = dataset[5]
        assert examples[epoch].seed == data.train[5].seed
    for a, b in ((0, 2), (1, 3)):
        assert torch.equal(examples[a].posteriors, examples[b].posteriors)
        assert torch.equal(examples[a].exemplar, examples[b].exemplar)
    assert not torch.equal(examples[0].posteriors, examples[1].posteriors)
    data.train.set_epoch(1)
    example = data.train[5]
    posterior = vae.encode(example.masked_image[None])
    assert torch.allclose(examples[1].posteriors[1, 0], posterior.mean[0], rtol=1e-3, atol=1e-5)
    assert torch.allclose(examples[1].posteriors[1, 1], posterior.std[0], rtol=1e-3, atol=1e-5)
    assert torch.allclose(examples[1].mask, latent_mask(example.mask[None], vae.config.downsampling)[0], atol=1e-3)


@pytest.mark.slow
def test_making_goes_on(toy, kept, tmp_path):
    folder = tmp_path / "encodings"
    shutil.copytree(kept, folder)
    lost = folder / "epoch-0001-part-0001.npy"
    before = np.load(lost)
    lost.unlink()
    others = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    toy_run.run(toy, f"run={tmp_path / 'run'}", *SETTINGS, f"encodings.folder={folder}", "encodings.crops=2")
    assert np.load(lost).tobytes() == before.tobytes()
    assert {path: path.stat().st_mtime_ns for path in others} == others


@pytest.mark.slow
def test_resumed_with_them(toy, kept, tmp_path):
    run = tmp_path / "run"
    with_them = (f"run={run}", f"encodings.folder={kept}", "encodings.crops=2", *SETTINGS)
    toy_run.run(toy, *with_them, "trainer.max_steps=5")
    toy_run.run(toy, *with_them, "--resume")
    toy_run.assert_same_run(run, toy.parent / "kept", END)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ("data.recipe.coverage=[0.3,0.4]", "recipe"),
        ("data.seed=1", "seed"),
        ("training.frozen=bfloat16", "autoencoder"),
    ],
)
def test_folder_of_something_else(toy, kept, tmp_path, capsys, changed, what):
    assert main([str(toy), f"run={tmp_path}", f"encodings.folder={kept}", changed]) == 2
    assert f"{kept} has encodings for another {what}" in capsys.readouterr().err


def test_distillation_with_them(toy, kept, tmp_path):
    model = toy_run.write_model(toy.parent)
    settings = (
        "task=distill",
        f"model.init={model}",
        "model.vae=null",
        "model.size=null",
        "training.train=[unet]",
        "trainer.max_steps=2",
    )
    toy_run.run(toy, f"run={tmp_path}", *settings, f"encodings.folder={tmp_path / 'encodings'}", "encodings.crops=1")
    assert len(toy_run.metrics(tmp_path, "train/loss")) == 2


def test_autoencoder_has_none():
    with pytest.raises(ValueError, match="encodings"):
        load_config(["task=vae", "encodings.folder=x"])


def test_examples_are_made_in_full_precision(toy, tmp_path):
    """Recolouring does not know half precision; only the autoencoder computes in it."""
    settings = ("trainer.precision=bf16-mixed", "data.recipe.recolor=1.0", "trainer.max_steps=1")
    toy_run.run(toy, f"run={tmp_path / 'run'}", *settings, f"encodings.folder={tmp_path / 'kept'}", "encodings.crops=1")
    config = load_config([str(toy), *settings])
    data = ExampleDataModule(config.data)
    data.setup("fit")
    kept = encodings.EncodedDataset(data.train, tmp_path / "kept", crops=1)
    assert torch.equal(kept[0].exemplar, data.train[0].exemplar.half().float())
