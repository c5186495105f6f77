"""Two processes that share in the parameters (FSDP2) train as one with all of them, and their checkpoints are whole."""

import pytest
import torch
import toy_run

import pbe
from pbe.cli.train import main

SHARDED = ("trainer.devices=2", "trainer.strategy=fsdp2", "data.batch_size=2")
SETTINGS = ("trainer.val_check_interval=1", "training.ema_decay=null", "trainer.gradient_clip_val=1.0")


@pytest.fixture(scope="module")
def start(toy):
    return (*SETTINGS, f"model.init={toy_run.write_model(toy.parent)}", "model.size=null", "model.vae=null")


@pytest.fixture(scope="module")
def sharded(toy, start):
    """One step of two processes."""
    run = toy.parent / "sharded"
    process = toy_run.start(toy, f"run={run}", *start, *SHARDED, "trainer.max_steps=1")
    assert "MEMBER: 2/2" in toy_run.finish(process)
    return run


@pytest.fixture(scope="module")
def one(toy, start):
    """Two steps of one process with the same batches."""
    run = toy.parent / "one"
    settings = ("data.batch_size=4", "trainer.max_steps=2", "checkpoint.every_n_steps=1")
    toy_run.run(toy, f"run={run}", *start, *settings)
    return run


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    whole = sum(x.square().sum() for x in one.values()).sqrt()
    gap = sum((x - other[name]).square().sum() for name, x in one.items()).sqrt()
    assert gap < tolerance * whole


@pytest.mark.slow
def test_a_sharded_step_is_one_of_whole_parameters(sharded, one):
    a, b = toy_run.checkpoint(one, 1), toy_run.checkpoint(sharded, 1)
    assert_close(a["state_dict"], b["state_dict"], 1e-5)
    states = [checkpoint["optimizer_states"][0] for checkpoint in (a, b)]
    assert [group["params"] for group in states[0]["param_groups"]] == [g["params"] for g in states[1]["param_groups"]]
    moments = [{i: entry["exp_avg"] for i, entry in state["state"].items()} for state in states]
    assert {i: x.shape for i, x in moments[0].items()} == {i: x.shape for i, x in moments[1].items()}
    assert_close(*moments, 1e-4)
    for name, tolerance in (("train/loss", 1e-6), ("val/loss", 1e-4)):
        losses = [toy_run.metrics(run, name)[1] for run in (one, sharded)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance), name


@pytest.mark.slow
def test_its_checkpoint_loads(sharded):
    path = sharded / "checkpoints" / "step-00000001.ckpt"
    model, saved = pbe.load_model(path, "cpu"), toy_run.checkpoint(sharded, 1)["state_dict"]
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("data.batch_size=4",), SHARDED], ids=["whole again", "sharded again"])
def test_it_goes_on(toy, start, sharded, one, settings, request):
    run = toy.parent / request.node.callspec.id.replace(" ", "_")
    (run / "checkpoints").mkdir(parents=True)
    name = "step-00000001.ckpt"
    (run / "checkpoints" / name).write_bytes((sharded / "checkpoints" / name).read_bytes())
    more = (toy, f"run={run}", *start, *settings, "trainer.max_steps=2", "--resume")
    if settings == SHARDED:
        toy_run.finish(toy_run.start(*more))
    else:
        toy_run.run(*more)
    a, b = toy_run.checkpoint(one, 2), toy_run.checkpoint(run, 2)
    assert_close(a["state_dict"], b["state_dict"], 1e-4)
    steps = [checkpoint["optimizer_states"][0]["state"][0]["step"].item() for checkpoint in (a, b)]
    assert steps == [2, 2]
    assert toy_run.metrics(run, "train/loss")[2] == pytest.approx(toy_run.metrics(one, "train/loss")[2], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["samples.every_n_steps=9"], "trainer.strategy=fsdp2 is for training a UNet, with samples.every_n_steps=null"),
    ],
)
def test_what_cannot_be_sharded(toy, start, settings, message, capsys):
    assert main([str(toy), *start, *SHARDED, f"run={toy.parent / 'refused'}", *settings]) == 2
    assert message in capsys.readouterr().err
