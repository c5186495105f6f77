"""Optimisers behind one name: each is the one of its package, trains, and goes on to the bit; parts have their own."""

import sys

import pytest
import torch
import toy_run
from torch import nn
from toy_run import assert_same_run

import pbe
from pbe.cli.train import main
from pbe.training.config import load_config
from pbe.training.optimizer import KINDS, OptimizerConfig, averaged, build_optimizer, parameter_groups

SETTINGS = {
    "adamw": "name: adamw, lr: 1e-3",
    "adamw8bit": "name: adamw8bit, lr: 1e-3",
    "schedulefree": "name: schedulefree, lr: 1e-3",
    "prodigy": "name: prodigy, lr: 1",
}
END = 7
RUN = (f"trainer.max_steps={END}", "checkpoint.every_n_steps=2", "checkpoint.keep=9", "training.ema_decay=null")


def need(name):
    pytest.importorskip(KINDS[name].package.partition(".")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SETTINGS)[1:])
def test_stopped_and_resumed(toy, name):
    """Where the run that nothing stopped saves and validates at other steps."""
    need(name)
    settings = (*RUN, f"optimizer={{{SETTINGS[name]}, warmup_steps: 4, parts: {{clip: {{weight_decay: 0.5}}}}}}")
    whole, parts = toy.parent / f"{name}_whole", toy.parent / f"{name}_parts"
    toy_run.run(toy, f"run={whole}", *settings)
    toy_run.run(toy, f"run={parts}", *settings, "trainer.max_steps=5")
    toy_run.run(toy, f"run={parts}", *settings, "--resume")
    assert_same_run(parts, whole, END)
    state = toy_run.checkpoint(whole, END)["optimizer_states"][0]["state"]
    assert all(float(entry.get("step", END)) == END for entry in state.values())
    losses = list(toy_run.metrics(whole, "train/loss").values())
    assert len(set(losses)) == END


@pytest.mark.slow
def test_schedule_free_saves_what_it_validates(toy):
    need("schedulefree")
    run = toy.parent / "saved"
    settings = (*RUN, f"optimizer={{{SETTINGS['schedulefree']}, warmup_steps: 0}}", "trainer.max_steps=4")
    toy_run.run(toy, f"run={run}", *settings)
    saved = toy_run.checkpoint(run, 4)
    name = "proj_out.bias"
    trained = saved["training_weights"]
    number = list(trained).index("model." + name)
    z = saved["optimizer_states"][0]["state"][number]["z"]
    # gradients are taken at y = 0.1 z + 0.9 x, of which x is what the file is for
    torch.testing.assert_close(saved["state_dict"][name], (trained["model." + name] - 0.1 * z) / 0.9)
    assert not torch.equal(saved["state_dict"][name], trained["model." + name])
    loaded = pbe.load_model(run / "checkpoints" / "step-00000004.ckpt", "cpu")
    assert torch.equal(loaded.proj_out.bias, saved["state_dict"][name])


def test_the_average_s_place_is_given_back_to_the_bit():
    need("schedulefree")
    layer = nn.Linear(7, 5)
    optimizer = build_optimizer([{"params": layer.parameters()}], OptimizerConfig("schedulefree", lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(1, 7)).square().sum().backward()
        optimizer.step()
    before = layer.weight.detach().clone()
    z = optimizer.state[layer.weight]["z"]
    with averaged(optimizer):
        torch.testing.assert_close(layer.weight.data, (before - 0.1 * z) / 0.9)
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)
    assert optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("name", KINDS)
def test_each_descends(name):
    need(name)
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)  # as large as bitsandbytes keeps in 8 bits
    config = OptimizerConfig(name, lr=1.0 if name == "prodigy" else 1e-2, warmup_steps=0)
    optimizer = build_optimizer([{"params": layer.parameters()}], config)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = layer(torch.eye(64)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    if name == "adamw8bit":
        assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8


def test_parts_have_their_own_settings(toy):
    config = load_config([str(toy), "optimizer.parts={clip: {lr: 1e-6}, null_context: {weight_decay: 0}}"]).optimizer
    names = (
        "model.model.diffusion_model.a",
        "model.learnable_vector",
        "model.cond_stage_model.transformer.b",
        "frozen",
    )
    named = [(name, nn.Parameter(torch.zeros(1), requires_grad=name != "frozen")) for name in names]
    unet, null, clip, _ = (parameter for _, parameter in named)
    groups = parameter_groups(named, config)
    assert [group["params"] == [x] for group, x in zip(groups, (unet, clip, null), strict=True)] == [True] * 3
    optimizer = build_optimizer(groups, config)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (1e-3, 0.01),
        (1e-6, 0.01),
        (1e-3, 0),
    ]
    with pytest.raises(ValueError, match=r"optimizer\.parts\.clip: nothing of this part trains"):
        parameter_groups(named[:2], config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{name: sgd}", "optimizer.name"),
        ("{parts: {clipp: {lr: 1}}}", "optimizer.parts.clipp: the model has no such part; did you mean 'clip'?"),
        ("{parts: {clip: {lr: -1}}}", "optimizer.parts.clip.lr must be a number above 0, got -1"),
        ("{parts: {clip: {rate: 1}}}", "rate"),
        ("{name: prodigy}", "optimizer.lr is a factor of the rate that prodigy finds: set it to 1, got 0.001"),
        ("{name: prodigy, lr: 1, parts: {clip: {lr: 1}}}", "optimizer.parts.clip.lr: prodigy finds one learning rate"),
        ("{name: schedulefree, decay_steps: 9}", "optimizer.decay_steps=9: schedulefree needs no decay"),
        ("{name: schedulefree}", "training.ema_decay=0.9: optimizer.name=schedulefree averages itself"),
    ],
)
def test_settings_that_cannot_be(toy, settings, message, capsys):
    assert main([str(toy), f"optimizer={settings}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", list(KINDS)[1:])
def test_a_missing_package_is_named_before_anything_is_written(toy, name, monkeypatch, capsys):
    package = KINDS[name].package
    monkeypatch.setitem(sys.modules, package, None)
    run = toy.parent / f"missing_{name}"
    assert main([str(toy), f"run={run}", f"optimizer={{{SETTINGS[name]}}}", "training.ema_decay=null"]) == 2
    expected = f"optimizer.name={name} needs {package.partition('.')[0]}, the extra optim: pip install pbe[optim]"
    assert expected in capsys.readouterr().err
    assert not run.exists()
