"""A run that was killed and resumed is, bit for bit, the run that was not."""

import json
import os
import signal
import time

import pytest
import torch
import toy_run
from marks import rest_slow
from toy_run import assert_same_run, same

from pbe.training.callbacks.checkpoints import list_checkpoints, step_of

# 10 pictures in batches of 2: epochs of 5 steps, and a validation, of one timestep, after every fourth. Checkpoints at
# every second step come both within epochs and, at the 10th, at the end of one; the kill may come at any step between.
END = 12
ONE_TIMESTEP = "training.val_timesteps=[499]"
SETTINGS = (f"trainer.max_steps={END}", "checkpoint.every_n_steps=2", "checkpoint.keep=20", ONE_TIMESTEP)


def test_uninterrupted(whole):
    losses = toy_run.metrics(whole, "train/loss")
    assert list(losses) == list(range(1, END + 1))
    assert len(set(losses.values())) == END


@pytest.mark.slow
def test_killed_and_resumed(toy, whole):
    run = toy.parent / "killed"
    process = toy_run.start(toy, f"run={run}", *SETTINGS)
    log = run / "metrics.jsonl"
    while not (log.exists() and len(log.read_bytes().splitlines()) > 4):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert END not in toy_run.checkpoint_steps(run), "the kill came too late to test anything"

    toy_run.run(toy, f"run={run}", *SETTINGS, "--resume")
    assert_same_run(run, whole, END)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", rest_slow([6, 8, 10]), ids=["within an epoch", "before a validation", "at an epoch's end"]
)
def test_resumed_from(toy, whole, step):
    """As if it had been killed after this checkpoint, while the next one was being written."""
    run = toy.parent / f"from{step}"
    (run / "checkpoints").mkdir(parents=True)
    name = f"step-{step:08}.ckpt"
    (run / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    (run / "checkpoints" / f".step-{step + 2:08}.ckpt.1.part").write_bytes(b"half a checkpoint")
    (run / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text() + f'{{"step": {END}, "cut')

    toy_run.run(toy, f"run={run}", *SETTINGS, "--resume")
    assert_same_run(run, whole, END)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "length",
    [["trainer.max_steps=7"], ["trainer.max_steps=5"], ["trainer.max_steps=-1", "trainer.max_epochs=1"]],
    ids=["within an epoch", "at an epoch's end", "by epochs"],
)
def test_finished_and_made_longer(toy, whole, length, request):
    run = toy.parent / request.node.callspec.id.replace(" ", "_")
    toy_run.run(toy, f"run={run}", *SETTINGS, *length)
    toy_run.run(toy, f"run={run}", *SETTINGS, "--resume")
    assert_same_run(run, whole, END)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.accumulate_grad_batches=2"],  # of 5 batches an epoch: its last step has one
        ["trainer.log_every_n_steps=3"],  # the checkpoint lies between two lines of the log
        ["training={train: [], lora: {rank: 2}, ema_decay: null}"],
        ["data.workers=2"],
        ["task=distill", "training.train=[unet]"],  # the averaged student of a teacher that is not saved
        ["task=distill", "training={train: [], lora: {rank: 2}, ema_decay: null}"],
        ["training={train: [], lora: {rank: 2, targets: all, dora: true, rslora: true}}"],
    ],
    ids=["accumulation", "log window", "adapters", "workers", "distilled UNet", "distilled adapters", "all adapters"],
)
def test_resumed_runs_of_other_kinds(toy, settings, request):
    kind = request.node.callspec.id.replace(" ", "_")
    settings = [*SETTINGS, "trainer.max_steps=6", *settings]
    if "adapters" in kind or "distill" in kind:
        settings = [*settings, f"model={{init: {toy_run.write_model(toy.parent)}, size: null, vae: null}}"]
    whole, run = toy.parent / f"{kind}_whole", toy.parent / f"{kind}_parts"
    toy_run.run(toy, f"run={whole}", *settings)
    (run / "checkpoints").mkdir(parents=True)
    name = "step-00000004.ckpt"  # of the first epoch's last step but one; with accumulation, of the second's
    (run / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    (run / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    toy_run.run(toy, f"run={run}", *settings, "--resume")
    assert_same_run(run, whole, 6)


@pytest.mark.slow
def test_gradient_checkpointing_may_change(toy, whole):
    """It trades memory for time, and one's card may be another when a run goes on."""
    run = toy.parent / "checkpointed"
    toy_run.run(toy, f"run={run}", *SETTINGS, "trainer.max_steps=7")
    toy_run.run(toy, f"run={run}", *SETTINGS, "training.gradient_checkpointing=true", "--resume")
    assert toy_run.checkpoint(run, END)["pbe"]["config"]["training"]["gradient_checkpointing"] is True
    assert_same_run(run, whole, END)


@pytest.mark.slow
def test_resumed_autoencoder(toy):
    settings = [
        "task=vae",
        "size={channels: 32, channel_mult: [1, 1], num_res_blocks: 1, latent_scale: 1.0}",
        "optimizer={lr: 0.003, warmup_steps: 0}",
        f"data={{val_size: 2, batch_size: 2, workers: 0, source: {{path: {toy}}}}}".replace("toy.yaml", "boxes.csv"),
        "data.recipe={resolution: 32, exemplar_size: 16}",
        "checkpoint.every_n_steps=2",
        "trainer={accelerator: cpu, log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false}",
    ]
    whole, parts = toy.parent / "vae_whole", toy.parent / "vae_parts"
    toy_run.run(*settings, f"run={whole}", "trainer.max_steps=6")
    toy_run.run(*settings, f"run={parts}", "trainer.max_steps=4")
    toy_run.run(*settings, f"run={parts}", "trainer.max_steps=6", "--resume")
    assert toy_run.metrics(parts, "train/l1") == toy_run.metrics(whole, "train/l1")
    for name in ("state_dict", "optimizer_states"):
        assert same(toy_run.checkpoint(parts, 6)[name], toy_run.checkpoint(whole, 6)[name]), name
    scale = toy_run.checkpoint(whole, 6)["pbe"]["latent_scale"]
    assert toy_run.checkpoint(parts, 6)["pbe"]["latent_scale"] == scale


BY_EPOCHS = ("trainer.max_steps=-1", "trainer.max_epochs=2")
VALIDATED_EACH_EPOCH = ("trainer.val_check_interval=1.0", "trainer.check_val_every_n_epoch=1")
# Runs of two epochs of 5 batches, and the step to resume from that was wrong once, or is next to an epoch's end.
KINDS = {
    "steps": (("trainer.max_steps=10",), None),
    "steps with workers": (("trainer.max_steps=10", "data.workers=2"), 5),
    "epochs": ((*BY_EPOCHS, *VALIDATED_EACH_EPOCH), None),
    "epochs with workers": ((*BY_EPOCHS, *VALIDATED_EACH_EPOCH, "data.workers=2"), 5),
    "accumulation": (
        ("trainer.max_steps=6", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3"),
        1,
    ),
    "accumulation with workers": ((*BY_EPOCHS, "trainer.accumulate_grad_batches=2", "data.workers=2"), 3),
    "limited": (("trainer.max_steps=6", "trainer.limit_train_batches=3"), None),
    "limited with workers": ((*BY_EPOCHS, "trainer.limit_train_batches=3", "data.workers=2"), 3),
}


def log_of(run):
    """All that is logged, but for what the machine decides."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: x for k, x in line.items() if k not in ("pictures_per_second", "peak_memory_gib")} for line in lines]


def resume_from(toy, whole, step, settings):
    """Resumes from one checkpoint of a whole run in another folder: the same end and the same lines, none twice."""
    run = whole.with_name(f"{whole.name}_from_{step}")
    (run / "checkpoints").mkdir(parents=True)
    name = f"step-{step:08}.ckpt"
    (run / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    # killed before a validation after this step, or long after it
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < step or '"lr"' in line]
    (run / "metrics.jsonl").write_text("".join(kept if step % 2 else lines))
    toy_run.run(toy, f"run={run}", *settings, "--resume")
    last = list_checkpoints(whole / "checkpoints")[-1].name
    one, other = (torch.load(folder / "checkpoints" / last, weights_only=True) for folder in (run, whole))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "data_position"):
        assert same(one[name], other[name]), name
    assert log_of(run) == log_of(whole)


def whole_run(toy, kind, settings, every):
    whole = toy.parent / kind.replace(" ", "_")
    settings = (*settings, f"checkpoint.every_n_steps={every}", "checkpoint.keep=99", ONE_TIMESTEP)
    toy_run.run(toy, f"run={whole}", *settings)
    return whole, settings


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind, (_, step) in KINDS.items() if step])
def test_resumed_at_an_epoch_s_end(toy, kind):
    settings, step = KINDS[kind]
    whole, settings = whole_run(toy, kind, settings, every=step)
    resume_from(toy, whole, step, settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_from_every_step_of_two_epochs(toy, kind):
    whole, settings = whole_run(toy, f"all {kind}", KINDS[kind][0], every=1)
    for path in list_checkpoints(whole / "checkpoints")[:-1]:
        resume_from(toy, whole, step_of(path), settings)
