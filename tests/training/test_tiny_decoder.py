"""Distilling a tiny decoder: it comes near the autoencoder's decoding, and its file is TAESD's."""

import pytest
import torch
import toy_run

import pbe
from pbe.cli.train import main
from pbe.models.tiny_autoencoder import TinyConfig, TinyDecoder
from pbe.training.config import load_config
from pbe.training.run import make_module


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings of a run of two steps."""
    folder = tmp_path_factory.mktemp("tiny_decoder")
    toy_run.write(folder)
    values = {
        "task": "tiny-decoder",
        "run": folder / "run",
        "vae": folder / "vae.ckpt",
        "training": "{channels: 8, num_blocks: 1}",
        "optimizer": "{lr: 0.005, warmup_steps: 0}",
        "data": f"{{val_size: 4, batch_size: 4, workers: 0, source: {{path: {folder / 'boxes.csv'}}}}}",
        "data.recipe": "{resolution: 32, exemplar_size: 16}",
        "trainer": "{accelerator: cpu, max_steps: 2, log_every_n_steps: 1, enable_progress_bar: false}",
    }
    return {name: str(value) for name, value in values.items()}


def written(settings, **changes):
    return [f"{name}={value}" for name, value in {**settings, **changes}.items()]


def checkpoint(settings, step):
    return f"{settings['run']}/checkpoints/step-{step:08}.ckpt"


@pytest.mark.slow
def test_it_learns_the_autoencoder_s_decoding(settings, tmp_path):
    settings = {**settings, "run": str(tmp_path / "run")}
    toy_run.run(*written(settings), "trainer.max_steps=40")
    l1 = toy_run.metrics(tmp_path / "run", "train/l1")
    assert l1[40] < 0.6 * l1[1]
    assert toy_run.metrics(tmp_path / "run", "val/gradient")
    decoder = pbe.load_model(checkpoint(settings, 40), "cpu")
    assert isinstance(decoder, TinyDecoder)
    # one doubling and four channels, as the autoencoder's latents have them
    assert decoder.config == TinyConfig(channels=8, latent_channels=4, num_resamplings=1, num_blocks=1)


@pytest.mark.slow
def test_the_autoencoder_stays_and_runs_go_on(settings):
    toy_run.run(*written(settings))
    vae = torch.load(settings["vae"], weights_only=True)["state_dict"]
    module = make_module(load_config(written(settings)))
    assert all(torch.equal(x, vae[f"first_stage_model.{name}"]) for name, x in module.vae.state_dict().items())
    assert {id(p) for p in module.parameters() if p.requires_grad} == {id(p) for p in module.decoder.parameters()}

    toy_run.run(*written(settings), "trainer.max_steps=4", "--resume")
    whole = {**settings, "run": settings["run"] + "_whole"}
    toy_run.run(*written(whole), "trainer.max_steps=4")
    states = [torch.load(checkpoint(run, 4), weights_only=True)["state_dict"] for run in (settings, whole)]
    assert toy_run.same(*states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": None}, "vae: "),
        ({"training": "{channels: 0}"}, "training.channels must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(settings, tmp_path, capsys, changes, message):
    given = {name: value for name, value in {**settings, "run": tmp_path / "run", **changes}.items() if value}
    assert main(written(given)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
