"""--resume with a checkpoint that is damaged, or not one of a training run, ends in one line that names it."""

import copy
import pickle

import pytest
import torch
import toy_run
from marks import rest_slow

from pbe.cli.train import main


@pytest.fixture(scope="module")
def path(toy):
    run = toy.parent / "run"
    toy_run.run(toy, f"run={run}", "trainer.max_steps=3", "checkpoint={every_n_steps: 3, best: false}")
    return run / "checkpoints" / "step-00000003.ckpt"


@pytest.fixture(scope="module")
def entries(path):
    return torch.load(path, weights_only=True)


class Foreign:
    def __reduce__(self):
        return (print, ("executed",))


def without(*names):
    def change(x):
        for name in names[:-1]:
            x = x[name]
        del x[names[-1]]

    return change


def put(value, *names):
    def change(x):
        for name in names[:-1]:
            x = x[name]
        x[names[-1]] = value

    return change


LOOP = ("loops", "fit_loop", "epoch_loop.batch_progress")
OPTIMIZER = ("optimizer_states", 0)
CHANGES = {
    "no pbe": (without("pbe"), "has no pbe"),
    "pbe is a list": (put([1], "pbe"), "has no pbe"),
    "no config": (without("pbe", "config"), "has no pbe.config"),
    "config is a text": (put("x", "pbe", "config"), "has no pbe.config"),
    "no optimizer": (without("optimizer_states"), "has no optimizer_states"),
    "no optimizers": (put([], "optimizer_states"), ""),
    "no moments": (put({}, *OPTIMIZER, "state"), "optimizer"),
    "no second moment": (without(*OPTIMIZER, "state", 0, "exp_avg_sq"), "exp_avg_sq"),
    "moments of another shape": (put(torch.zeros(3), *OPTIMIZER, "state", 0, "exp_avg"), "optimizer"),
    "other parameter groups": (put([], *OPTIMIZER, "param_groups"), ""),
    "no schedule": (without("lr_schedulers"), "has no lr_schedulers"),
    "schedule of texts": (put("x", "lr_schedulers", 0, "last_epoch"), "last_epoch"),
    "no position": (without("data_position"), "has no data_position"),
    "position outside": (put((0, 99), "data_position"), "99"),
    "position of texts": (put(("a", "b"), "data_position"), ""),
    "no loops": (without("loops"), "has no loops"),
    "no fit loop": (without("loops", "fit_loop"), "fit_loop"),
    "loops of texts": (put("x", *LOOP, "current", "ready"), "loops"),
    "no metrics": (without("metrics"), "has no metrics"),
    "metrics of texts": (put({"totals": {"loss": "x"}, "seconds": 1.0}, "metrics"), ""),
    "no weights": (without("state_dict"), "state_dict"),
    "no such weight": (without("state_dict", "proj_out.weight"), "proj_out.weight"),
    "weights of another shape": (put(torch.zeros(3), "state_dict", "proj_out.weight"), "proj_out.weight"),
    "a weight is a text": (put("x", "state_dict", "proj_out.weight"), "proj_out.weight"),
}


def refused(toy, path, capsys, expected):
    assert main([str(toy), f"run={path.parent.parent}", "trainer.max_steps=5", "--resume"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warn" not in line.lower()]
    (line,) = [line for line in lines if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert path.name in line
    assert expected in line
    assert len(line) < 600


def test_nothing_else_is_touched(toy, path, capsys):
    """Where the chosen checkpoint is damaged, the others and the log stay as they are."""
    run = path.parent.parent
    damaged = path.parent / "step-00000001.ckpt"
    damaged.write_bytes(path.read_bytes()[:5000])
    before = (run / "metrics.jsonl").read_bytes()
    assert main([str(toy), f"run={run}", "trainer.max_steps=5", "--resume", str(damaged)]) == 2
    assert "step-00000001.ckpt" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before
    assert path.exists()
    damaged.unlink()


@pytest.fixture
def at(path, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / path.name


@pytest.mark.parametrize(("change", "expected"), rest_slow(CHANGES.values(), fast=12), ids=CHANGES)
def test_entries_that_are_missing_or_wrong(toy, at, entries, change, expected, capsys):
    changed = copy.deepcopy(entries)
    change(changed)
    torch.save(changed, at)
    refused(toy, at, capsys, expected)


@pytest.mark.parametrize("content", ["empty", "zeros", "text", "half", "weights alone", "pickle", "a folder"])
def test_other_files(toy, at, path, entries, content, capsys):
    whole = path.read_bytes()
    if content == "a folder":
        at.mkdir()
    elif content == "weights alone":
        torch.save(entries["state_dict"], at)
    elif content == "pickle":
        torch.save({**entries, "metrics": Foreign()}, at, pickle_module=pickle)
    else:
        halves = {
            "empty": b"",
            "zeros": bytes(1000),
            "text": b"<html>not found</html>",
            "half": whole[: len(whole) // 2],
        }
        at.write_bytes(halves[content])
    refused(toy, at, capsys, "")
    assert "executed" not in capsys.readouterr().out


def test_a_chosen_checkpoint_that_is_not_there(toy, tmp_path, capsys):
    assert main([str(toy), f"run={tmp_path}", "--resume", str(tmp_path / "nothing.ckpt")]) == 2
    assert f"error: there is no checkpoint {tmp_path / 'nothing.ckpt'}" in capsys.readouterr().err
