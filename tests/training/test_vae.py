"""The terms that make an autoencoder sharp: who learns of which, runs that go on, and files that stay autoencoders."""

import pytest
import torch
import toy_run
from golden_file import noise

from pbe.checkpoints.loading import open_vae
from pbe.cli.train import main
from pbe.evaluation.surrogate import Surrogate, SurrogateConfig, save_surrogate
from pbe.models.discriminator import DiscriminatorConfig, PatchDiscriminator
from pbe.training.config import load_config
from pbe.training.initialization import read_vae, seeded
from pbe.training.run import make_module
from pbe.training.vae import adversarial_errors

TERMS = {"perceptual", "adversarial", "discriminator"}
ADVERSARIAL = "training.adversarial={weight: 0.5, start: 1, channels: 8, num_layers: 1}"
RATE = "optimizer.parts={discriminator: {lr: 0.01}}"


@pytest.fixture(scope="module")
def plain(toy):
    """The settings of an autoencoder's run without the terms."""
    return [
        "task=vae",
        f"init={toy.parent / 'vae.ckpt'}",
        "optimizer={lr: 0.003, warmup_steps: 0}",
        f"data={{val_size: 2, batch_size: 2, workers: 0, source: {{path: {toy.parent / 'boxes.csv'}}}}}",
        "data.recipe={resolution: 32, exemplar_size: 16}",
        "checkpoint.every_n_steps=2",
        "trainer={accelerator: cpu, log_every_n_steps: 1, max_steps: 4, val_check_interval: 4, gradient_clip_val: 0.1}",
        "trainer.enable_progress_bar=false",
        "trainer.enable_model_summary=false",
    ]


@pytest.fixture(scope="module")
def perceptual(toy):
    """The setting of a perceptual term."""
    network = seeded(Surrogate, SurrogateConfig(num_classes=2, width=8, num_levels=2), seed=1)
    save_surrogate(network, toy.parent / "judge.ckpt", ["a", "b"], {})
    return f"training.perceptual={{network: {toy.parent / 'judge.ckpt'}, weight: 0.5}}"


def test_each_network_learns_of_its_own_loss():
    discriminator = seeded(PatchDiscriminator, DiscriminatorConfig(channels=8, num_layers=2), seed=0)
    image, reconstruction = noise("x", 2, 3, 32, 32), noise("y", 2, 3, 32, 32).requires_grad_()
    errors = adversarial_errors(discriminator, reconstruction, image)
    real, fake = discriminator(image), discriminator(reconstruction)
    torch.testing.assert_close(errors["adversarial"], -fake.mean(dim=(1, 2, 3)))
    hinge = ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0)) / 2
    torch.testing.assert_close(errors["discriminator"], hinge.mean(dim=(1, 2, 3)))
    errors["adversarial"].mean().backward()
    assert reconstruction.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    reconstruction.grad = None
    errors["discriminator"].mean().backward()
    assert reconstruction.grad is None
    assert all(parameter.grad.abs().max() > 0 for parameter in discriminator.parameters())


@pytest.mark.parametrize("train", [pytest.param("all", marks=pytest.mark.slow), "decoder"])
def test_its_file_is_an_autoencoder_s_and_the_run_goes_on(toy, plain, perceptual, train):
    settings = [*plain, perceptual, ADVERSARIAL, f"training.train={train}", "trainer.accumulate_grad_batches=2"]
    if train == "all":
        settings += ["init=scratch", "size={channels: 32, channel_mult: [1, 1], num_res_blocks: 1, latent_scale: 1.0}"]
    whole, parts = toy.parent / f"{train}_whole", toy.parent / f"{train}_parts"
    toy_run.run(*settings, f"run={whole}")
    toy_run.run(*settings, f"run={parts}", "trainer.max_steps=2")
    start = toy_run.checkpoint(parts, 2)["discriminator"]
    moved = (toy.parent / "judge.ckpt").rename(toy.parent / "moved.ckpt")  # as files may be between two runs
    toy_run.run(*settings, f"run={parts}", f"training.perceptual.network={moved}", "--resume")
    moved.rename(toy.parent / "judge.ckpt")
    for name in ("state_dict", "discriminator", "optimizer_states", "lr_schedulers"):
        assert toy_run.same(toy_run.checkpoint(parts, 4)[name], toy_run.checkpoint(whole, 4)[name]), name
    assert not toy_run.same(start, toy_run.checkpoint(whole, 4)["discriminator"])
    for name in TERMS:
        assert toy_run.metrics(parts, f"train/{name}") == toy_run.metrics(whole, f"train/{name}") != {}
    path = whole / "checkpoints" / "step-00000004.ckpt"
    assert toy_run.checkpoint(whole, 4)["state_dict"].keys() == read_vae(path)[1].keys()
    if train == "decoder":
        (before, old), (after, new) = read_vae(toy.parent / "vae.ckpt"), read_vae(path)
        assert before == after
        assert all(torch.equal(x, new[name]) for name, x in old.items() if ".encoder." in name or ".quant_" in name)
    assert open_vae(path)


@pytest.mark.slow
def test_the_autoencoder_trains_as_without_until_the_start(toy, plain):
    """Though its gradients are clipped, the discriminator's weights in the same optimiser."""
    states = {}
    for start in (None, 2, 9):
        given = [ADVERSARIAL, f"training.adversarial.start={start}", RATE] if start else []
        run = toy.parent / f"start_{start}"
        toy_run.run(*plain, *given, f"run={run}")
        states[start] = [toy_run.checkpoint(run, step)["state_dict"] for step in (2, 4)]
    assert toy_run.same(states[9], states[None])
    assert toy_run.same(states[2][0], states[None][0])
    assert not toy_run.same(states[2][1], states[None][1])
    own = toy_run.checkpoint(toy.parent / "start_9", 4)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in own] == [0.003, 0.01]
    assert toy_run.metrics(toy.parent / "start_9", "val/discriminator")


def test_dry_run_names_what_trains(plain, perceptual, capsys, tmp_path):
    settings = [*plain, perceptual, ADVERSARIAL, f"run={tmp_path}"]
    assert main([*settings, "--dry-run"]) == 0
    vae = make_module(load_config(settings)).vae
    size = sum(p.numel() for p in vae.parameters())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"model: {size:,} parameters"
    assert f"vae {size:,}, discriminator " in lines[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.perceptual={weight: 1}", "training.perceptual.network"),
        ("training.perceptual={network: vae.ckpt}", "vae.ckpt does not fit AlexNet"),
        ("training.perceptual={network: none.ckpt}", "none.ckpt"),
        ("training.perceptual={network: judge.ckpt, weight: 0}", "training.perceptual.weight must be a number above 0"),
        ("training.adversarial={channels: 12}", "training.adversarial.channels must be a whole number of at least 8"),
        ("training.adversarial={num_layers: 6}", "data.recipe.resolution=32"),
        (RATE, "optimizer.parts.discriminator: nothing of this part trains"),
    ],
)
def test_settings_that_cannot_be(toy, plain, perceptual, tmp_path, capsys, monkeypatch, setting, message):
    monkeypatch.chdir(toy.parent)
    assert main([*plain, setting, f"run={tmp_path}", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_pictures_that_the_perceptual_network_cannot_halve(plain, perceptual, tmp_path, capsys):
    assert main([*plain, perceptual, f"run={tmp_path}", "data.recipe.resolution=30", "--dry-run"]) == 2
    assert "data.recipe.resolution=30" in capsys.readouterr().err
