"""What is seen of a run: one's own edits, loggers by name, patience, and what --dry-run prints."""

import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_run
from PIL import Image

from pbe.cli.train import main
from pbe.training import dry_run
from pbe.training.callbacks import loggers
from pbe.training.callbacks.checkpoints import Checkpoints
from pbe.training.callbacks.samples import read_edits
from pbe.training.config import load_config
from pbe.training.optimizer import KINDS
from pbe.training.run import make_module
from tests.training import test_memory
from tests.training import test_module as test_training

# --- one's own edits ------------------------------------------------------------------------------------------


@pytest.fixture
def triples(tmp_path):
    """Two photos with a mask and an exemplar, of other sizes than the model's."""
    rng = np.random.default_rng(1)
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "mask", "box", "exemplar", "out", "guidance"])
        for i, (width, height) in enumerate([(90, 60), (50, 70)]):
            photo = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            mask[20:40, 15:35] = 255
            for name, pixels in (("photo", photo), ("mask", mask), ("exemplar", photo[:30, :30])):
                Image.fromarray(pixels).save(tmp_path / f"{name}{i}.png")
            where = [f"mask{i}.png", ""] if i else ["", "15,20,35,40"]
            rows.writerow([f"photo{i}.png", *where, f"exemplar{i}.png", f"out{i}.png", "3"])
    return tmp_path / "mine.csv"


@pytest.mark.slow
def test_own_edits_have_grids_of_their_own(toy, triples):
    run, plain = toy.parent / "edits", toy.parent / "no_edits"
    settings = ("trainer.max_steps=2", "samples.every_n_steps=2", "samples.edit={steps: 2}", "training.frozen=bfloat16")
    toy_run.run(toy, f"run={run}", *settings, f"samples.edits={triples}")
    toy_run.run(toy, f"run={plain}", *settings)
    names = [path.name for path in sorted((run / "samples").iterdir())]
    assert names == ["edits-00000002.png", "step-00000002.png"]
    grids = [np.asarray(Image.open(folder / "samples" / names[1])) for folder in (run, plain)]
    assert np.array_equal(*grids)
    grid = np.asarray(Image.open(run / "samples" / names[0]).convert("RGB")).astype(int)
    assert grid.shape[0] > 2 * 128  # two rows
    assert grid.std() > 10


def test_own_edits_need_no_validation(toy, triples):
    run = toy.parent / "edits_alone"
    settings = ("data.val_size=0", "trainer.max_steps=1", "samples.every_n_steps=1", "samples.edit={steps: 2}")
    toy_run.run(toy, f"run={run}", *settings, f"samples.edits={triples}")
    assert [path.name for path in (run / "samples").iterdir()] == ["edits-00000001.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image,exemplar,box\nphoto0.png,lost.png,"1,1,9,9"', "line 2: .*lost.png"),
        ("image,exemplar,box\nphoto0.png,exemplar0.png,", "line 2: nothing to repaint"),
        ('image,exemplar,box\nphoto0.png,exemplar0.png; exemplar1.png,"1,1,9,9"', "line 2: a sample has one exemplar"),
        ("image,exemplars,box\n", "unknown column 'exemplars'"),
        ("image,exemplar,box\n", "mine.csv has no rows"),
    ],
)
def test_own_edits_that_cannot_be(triples, text, message):
    triples.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_edits(triples)


# --- loggers --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_logger_by_name(toy):
    run = toy.parent / "csv"
    settings = ("trainer.max_steps=2", "log=csv", "trainer.limit_val_batches=0")
    toy_run.run(toy, f"run={run}", *settings)
    toy_run.run(toy, f"run={run}", *settings, "trainer.max_steps=3", "--resume")
    rows = [list(csv.DictReader(path.open())) for path in sorted(run.glob("csv/*/metrics.csv"))]
    assert [[int(row["step"]) for row in part] for part in rows] == [[1, 2], [3]]
    losses = toy_run.metrics(run, "train/loss")
    assert [float(row["train/loss"]) for part in rows for row in part] == pytest.approx(list(losses.values()))
    assert not (run / "tensorboard").exists()


def test_tensorboard_is_the_default_where_it_is(tmp_path, monkeypatch):
    present = {"tensorboard": True}
    monkeypatch.setattr(loggers, "find_spec", present.get)
    monkeypatch.setattr(loggers, "TensorBoardLogger", lambda folder, **_: "tensorboard")
    assert loggers.make_loggers(None, tmp_path, {})[1:] == ["tensorboard"]
    assert loggers.make_loggers("none", tmp_path, {})[1:] == []
    present.clear()
    assert loggers.make_loggers(None, tmp_path, {})[1:] == []
    for name, extra in (("tensorboard", "log"), ("wandb", "wandb")):
        with pytest.raises(
            ImportError, match=rf"log={name} needs {name}, the extra {extra}: pip install pbe\[{extra}\]"
        ):
            loggers.make_loggers(name, tmp_path, {})


def test_wandb_gets_the_run_its_config_and_pictures(tmp_path, monkeypatch):
    made, shown = [], []

    class Wandb:
        def __init__(self, name, folder, **rest):
            made.append((name, folder, rest))

        def log_image(self, key, images, step):
            shown.append((key, len(images), step))

    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    monkeypatch.setattr(loggers, "WandbLogger", Wandb)
    for folder in (tmp_path / "a" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"):
        _, logger = loggers.make_loggers("wandb", folder, {"seed": 1})
    assert [name for name, *_ in made] == ["run"] * 3
    ids = [rest["id"] for *_, rest in made]
    assert ids[0] == ids[1] != ids[2]  # a run that goes on is the same one
    assert made[0][2]["config"] == {"seed": 1}
    assert made[0][2]["resume"] == "allow"
    loggers.log_picture(SimpleNamespace(loggers=[logger], global_step=7), "samples", Image.new("RGB", (2, 2)))
    assert shown == [("samples", 1, 7)]


# --- patience -------------------------------------------------------------------------------------------------


@pytest.fixture
def worse(monkeypatch):
    """Validation losses that rise after the first."""
    losses = {2: 1.0, 4: 0.5, 6: 0.75, 8: 0.75, 10: 0.75, 12: 0.75, 14: 0.75}
    kind = "pbe.training.module.PaintByExampleTraining.compared"
    monkeypatch.setattr(kind, lambda self, split: {f"{split}/loss": losses[self.global_step]})


@pytest.mark.slow
def test_patience_ends_a_run_with_a_checkpoint(toy, worse, capsys):
    run = toy.parent / "patient"
    settings = (
        "trainer.max_steps=14",
        "trainer.val_check_interval=2",
        "checkpoint.every_n_steps=5",
        "checkpoint.keep=9",
    )
    toy_run.run(toy, f"run={run}", *settings, "early_stopping=2")
    assert "stopped after step 8: val/loss was not below 0.5 in the last 2 validations" in capsys.readouterr().err
    assert toy_run.checkpoint_steps(run) == [5, 8]
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 4

    # from a checkpoint before the second of those validations, it ends at the same step
    again = toy.parent / "patient_again"
    (again / "checkpoints").mkdir(parents=True)
    (again / "checkpoints" / "step-00000005.ckpt").write_bytes(
        (run / "checkpoints" / "step-00000005.ckpt").read_bytes()
    )
    toy_run.run(toy, f"run={again}", *settings, "early_stopping=2", "--resume")
    assert toy_run.checkpoint_steps(again)[-1] == 8

    # from the best one, whose validation is made again, and from the last with more patience
    toy_run.run(toy, f"run={again}", *settings, "early_stopping=2", "--resume", run / "checkpoints" / "best.ckpt")
    assert toy_run.checkpoint_steps(again)[-1] == 8
    toy_run.run(toy, f"run={again}", *settings, "early_stopping=3", "--resume")
    assert toy_run.checkpoint_steps(again)[-1] == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["early_stopping=0"], "early_stopping must be a whole number of at least 1, got 0"),
        (["early_stopping=2", "data.val_size=0"], "early_stopping needs validation"),
        (["log=mlflow"], "log"),
    ],
)
def test_settings_that_cannot_be(toy, settings, message, capsys):
    assert main([str(toy), *settings]) == 2
    assert message in capsys.readouterr().err


# --- a dry run ------------------------------------------------------------------------------------------------


def test_dry_run_prints_and_draws_and_trains_nothing(toy, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoints, "write", None)
    run = toy.parent / "dry"
    assert main([str(toy), "--dry-run", f"run={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["model", "trains", "data", "memory", "first batch"]
    module = make_module(load_config([str(toy)]))
    clip = sum(p.numel() for n, p in module.named_parameters() if ".transformer." in n and p.requires_grad)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert f"trains: {trained:,} parameters: null_context 32, unet " in lines[1]
    assert f"clip {clip:,}" in lines[1]
    assert "10 records, 2 of validation, 2 in a batch" in lines[2]
    assert [path.name for path in run.iterdir()] == ["first_batch.png"]
    assert Image.open(run / "first_batch.png").height > 2 * 224


def test_dry_run_of_an_autoencoder(toy, capsys):
    size = "size={channels: 32, channel_mult: [1, 1], num_res_blocks: 1, latent_scale: 1.0}"
    data = f"data={{val_size: 2, batch_size: 2, workers: 0, source: {{path: {toy.parent / 'boxes.csv'}}}}}"
    recipe = "data.recipe={resolution: 32, exemplar_size: 16}"
    assert main(["task=vae", size, data, recipe, "--dry-run", f"run={toy.parent / 'dry_vae'}"]) == 0
    assert "parameters: vae " in capsys.readouterr().out


def test_dry_run_refuses_what_training_does(toy, capsys):
    assert main([str(toy), "--dry-run", "training.train=[unet]", "optimizer.parts={clip: {lr: 1}}"]) == 2
    assert "optimizer.parts.clip: nothing of this part trains" in capsys.readouterr().err


@pytest.mark.parametrize("levels", [False, 1, True])
def test_kept_bytes_are_those_that_a_step_keeps(levels, monkeypatch):
    """Of one picture more."""
    module = test_training.training(gradient_checkpointing=levels)
    sizes = []
    for count in (1, 2):
        monkeypatch.setattr(test_training, "example", lambda _=0, n=count, make=test_training.example: make(n))
        sizes.append(test_memory.kept_bytes(module))
        monkeypatch.undo()
    counted = dry_run.kept_bytes(module.model, test_training.example(1).image.shape[-1])
    assert counted == pytest.approx(sizes[1] - sizes[0], rel=0.05)  # which also keeps the encoder's


@pytest.mark.slow
def test_memory_follows_the_optimizer(toy):
    sizes = {}
    for name in KINDS:
        rate = {"prodigy": 1}.get(name, 1e-3)
        config = load_config([str(toy), f"optimizer={{name: {name}, lr: {rate}}}", "training.ema_decay=null"])
        module = make_module(config)
        line = dry_run.memory_line(config, module)
        sizes[name] = float(line.partition("optimizer ")[2].partition(",")[0])
        assert "averages" not in line
    assert sizes["adamw"] == sizes["schedulefree"] == pytest.approx(sizes["prodigy"] / 2, abs=0.011)


def test_everything_is_in_the_line_of_metrics_too(toy):
    """Whatever `log` says."""
    run = toy.parent / "none"
    toy_run.run(toy, f"run={run}", "trainer.max_steps=1", "log=none", "trainer.limit_val_batches=0")
    assert json.loads((run / "metrics.jsonl").read_text())["step"] == 1
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoints"]
    assert "wandb" not in sys.modules
