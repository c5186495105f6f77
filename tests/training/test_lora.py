"""The files of adapters that training writes: others read them to the weights that its sample grids showed."""

import json
from dataclasses import asdict

import peft
import pytest
import torch
import toy_run
from marks import rest_slow
from others_adapters import assert_agree, make_model, make_unet, predict
from safetensors import safe_open

import pbe
from pbe.batch.provenance import crc_of
from pbe.checkpoints.adapter_writing import write_adapter
from pbe.checkpoints.adapters import read_adapter
from pbe.checkpoints.key_map import average_name
from pbe.cli.checkpoint import main
from pbe.models.lora import LoRAConfig
from pbe.models.paint_by_example import Distilled
from pbe.training import module as training_module
from pbe.training.distillation import ConsistencyDistillation, DistillationConfig
from pbe.training.module import PaintByExampleTraining, TrainingConfig
from pbe.training.optimizer import OptimizerConfig
from tests.models.test_lora import teach

CONFIGS = {
    "attention": LoRAConfig(rank=2, alpha=3.0),
    "all-linear": LoRAConfig(rank=4, alpha=3.0, targets="all-linear", rslora=True),
    "all": LoRAConfig(rank=4, alpha=3.0, targets="all", rslora=True, dora=True),
}
ABOUT = {"base": {"checkpoint": "model.ckpt", "crc32": "01234567"}, "trained_on": "private/things.csv"}


def save_trained(path, config, ema_decay=None, distil=False):
    """A checkpoint at `path`, and what lies beside it, of a module whose adapters have learnt something."""
    settings = TrainingConfig(train=[], lora=config, ema_decay=ema_decay), OptimizerConfig(), ABOUT
    make = ConsistencyDistillation if distil else PaintByExampleTraining
    module = make(make_model(), *([DistillationConfig()] if distil else []), *settings)
    teach(module.model)
    if module.model_ema:
        module.model_ema.update(1)  # between the start and what was learnt
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    module.write_beside(path)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("config", rest_slow(CONFIGS.values()), ids=CONFIGS)
def test_others_read_what_was_trained(tmp_path, config, ema_decay):
    module = save_trained(tmp_path / "a.ckpt", config, ema_decay)
    with module.averaged():
        expected = predict(module.model)
    for suffix in ("ckpt", "safetensors"):
        ours = predict(pbe.add_adapters(make_model(), tmp_path / f"a.{suffix}"))
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    by_diffusers = make_unet()
    by_diffusers.load_lora_adapter(tmp_path / "a.safetensors", prefix="unet")  # which sees no alpha
    model = pbe.add_adapters(make_model(), tmp_path / "a.safetensors")
    assert_agree(model, by_diffusers)
    adapter = read_adapter(tmp_path / "a.safetensors", make_model())
    write_adapter(adapter, tmp_path / "folder", "peft", model=make_model())
    assert_agree(model, peft.PeftModel.from_pretrained(make_unet(), tmp_path / "folder"))


def test_a_file_tells_where_it_belongs_and_nothing_private(tmp_path, capsys):
    save_trained(tmp_path / "a.ckpt", CONFIGS["attention"], distil=True)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        entry, text = json.loads(file.metadata()["pbe"]), str(file.metadata())
    assert entry["base"] == ABOUT["base"]
    assert Distilled(**entry["distilled"]) == Distilled("lcm", 4, 1.0)
    assert "private" not in text
    assert read_adapter(tmp_path / "a.safetensors", make_model()).distilled == Distilled("lcm", 4, 1.0)


def test_the_settings_are_kept_with_the_adapters(tmp_path):
    save_trained(tmp_path / "a.ckpt", CONFIGS["all"])
    entry = torch.load(tmp_path / "a.ckpt", weights_only=True)["pbe"]["lora"]
    assert entry == asdict(CONFIGS["all"])


def test_without_safetensors_checkpoints_alone_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(training_module, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="only checkpoints .* extra safetensors"):
        save_trained(tmp_path / "a.ckpt", CONFIGS["attention"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


FILES = ("ckpt", "safetensors")
LORA = "lora: {rank: 2, alpha: 3.0, targets: all, dora: true, rslora: true}"


@pytest.mark.slow
def test_a_file_lies_beside_each_checkpoint(toy, capsys):
    run, start = toy.parent / "run", toy_run.write_model(toy.parent)
    settings = [
        f"run={run}",
        f"model={{init: {start}, size: null, vae: null}}",
        f"training={{train: [], {LORA}, ema_decay: 0.9}}",
        "checkpoint={every_n_steps: 2, keep: 2}",
        "trainer={max_steps: 6, val_check_interval: 3}",
    ]
    toy_run.run(toy, *settings)
    checkpoints = run / "checkpoints"
    names = {"best", "step-00000004", "step-00000006"}
    assert {path.name for path in checkpoints.iterdir()} == {f"{name}.{x}" for name in names for x in FILES}

    last = checkpoints / "step-00000006"
    model = pbe.load_model(start, "cpu")
    saved, read = toy_run.checkpoint(run, 6), read_adapter(f"{last}.ckpt", model)
    assert saved["pbe"]["base"] == {"checkpoint": start.name, "crc32": crc_of(start)}
    for name, update in read.updates.items():
        assert torch.equal(update.factors["lora_up"], saved["state_dict"][average_name(f"{name}.lora_up")])
        assert not torch.equal(update.factors["lora_up"], saved["state_dict"][f"{name}.lora_up"])
    merged = {}
    for suffix in FILES:
        out = toy.parent / f"merged_{suffix}.ckpt"
        assert main(["merge-adapter", str(start), f"{last}.{suffix}", "--out", str(out)]) == 0
        merged[suffix] = pbe.load_model(out, "cpu")
    assert merged["ckpt"].config == merged["safetensors"].config
    with_adapter = pbe.load_model(start, "cpu", adapters=[f"{last}.safetensors"]).state_dict()
    for name, x in merged["ckpt"].state_dict().items():
        torch.testing.assert_close(merged["safetensors"].state_dict()[name], x, rtol=1e-5, atol=1e-6)
        assert torch.equal(with_adapter[name], merged["safetensors"].state_dict()[name])
    for suffix in FILES:
        assert main(["inspect", f"{last}.{suffix}", "--ckpt", str(start)]) == 0
        assert f"rank: 2 ({len(read.updates)})" in capsys.readouterr().out

    # an older one goes on: what came after is put aside
    toy_run.run(toy, *settings, "--resume", str(checkpoints / "step-00000004.ckpt"), "trainer.max_steps=5")
    assert {path.name for path in checkpoints.glob("*.old")} == {f"step-00000006.{x}.old" for x in FILES}
    assert (checkpoints / "step-00000005.safetensors").exists()
