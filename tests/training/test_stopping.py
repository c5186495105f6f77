"""What a run leaves where a signal stops it, and what --resume does with it."""

import os
import random
import signal
import subprocess
import time

import pytest
import torch
import toy_run
from toy_run import assert_same_run, same

from pbe.cli.train import main
from pbe.training.module import PaintByExampleTraining

LONG = ("trainer.max_steps=100000", "checkpoint.every_n_steps=100000", "data.workers=2")


def wait_for(process, path, lines):
    while not path.exists() or len(path.read_bytes().splitlines()) < lines:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def signalled_after_three_steps(monkeypatch, signum):
    """Sends this process a signal at the end of a training's third step."""
    step = PaintByExampleTraining.optimizer_step

    def signalled(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if self.global_step == 2:  # Lightning counts it afterwards
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(PaintByExampleTraining, "optimizer_step", signalled)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl+C"])
def test_a_stopped_run_is_no_success(toy, monkeypatch, capsys, signum):
    """Who queues runs must see that it did not come to its end."""
    run = toy.parent / f"no_success_{signum}"
    signalled_after_three_steps(monkeypatch, signum)
    assert main([str(toy), f"run={run}"]) == 128 + signum
    assert f"{signum.name} after step 3, which is saved; --resume" in capsys.readouterr().err
    assert toy_run.checkpoint_steps(run) == [3]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl+C"])
def test_a_signal_to_the_whole_group_saves_the_last_step_first(toy, signum):
    """As timeout, systemd, SLURM and a terminal send it: to the data workers too."""
    run = toy.parent / f"stopped_by_{signum}"
    process = toy_run.start(toy, f"run={run}", *LONG, start_new_session=True)
    wait_for(process, run / "metrics.jsonl", 3)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    lines = [line for line in output.splitlines() if "stopped" in line or "worker" in line or "Traceback" in line]
    (line,) = lines
    (checkpoint,) = (run / "checkpoints").glob("step-*.ckpt")
    step = int(checkpoint.stem.removeprefix("step-"))
    assert f"{signal.Signals(signum).name} after step {step}, which is saved; --resume" in line
    # it goes on from there, and is the run that nothing stopped
    settings = (f"trainer.max_steps={step + 2}", "checkpoint.every_n_steps=100000", "data.workers=2")
    toy_run.run(toy, f"run={run}", *settings, "--resume")
    toy_run.run(toy, f"run={run}_whole", *settings)
    last, expected = (toy_run.checkpoint(path, step + 2) for path in (run, toy.parent / f"{run.name}_whole"))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "data_position"):
        assert same(last[name], expected[name]), name


@pytest.mark.slow
def test_ten_kills_at_random_moments(toy):
    """Two data workers, `kill -9`, and each time --resume: at the end the run that nothing interrupted."""
    settings = ("trainer.max_steps=60", "checkpoint.every_n_steps=2", "checkpoint.keep=2", "data.workers=2")
    whole, run = toy.parent / "whole", toy.parent / "killed"
    toy_run.run(toy, f"run={whole}", *settings)
    log, rng = run / "metrics.jsonl", random.Random(0)
    reached = []
    for _ in range(10):
        process = toy_run.start(toy, f"run={run}", *settings, "--resume")
        # the log may still have lines of steps that are taken again: then the kill comes early
        further = (reached or [0])[-1] + rng.randint(1, 5)
        while not log.exists() or log.read_bytes().count(b'"lr"') < further:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        process.stdout.close()
        reached.append((toy_run.checkpoint_steps(run) or [0])[-1])
        assert reached[-1] < 60, "it came to its end before ten kills"
    print("steps reached:", reached)
    assert len(set(reached)) > 3
    toy_run.run(toy, f"run={run}", *settings, "--resume")
    assert_same_run(run, whole, 60)


@pytest.fixture(scope="module")
def finished(toy):
    run = toy.parent / "finished"
    settings = ("trainer.max_steps=8", "checkpoint.every_n_steps=4", "trainer.val_check_interval=2")
    toy_run.run(toy, f"run={run}", *settings, "checkpoint.keep=9")
    return run


@pytest.mark.slow
def test_the_best_is_kept_beside_the_newest(finished, toy):
    """With `--resume PATH` the run goes on from a chosen one; later ones are put aside."""
    losses = toy_run.metrics(finished, "val/loss")
    best = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == min(losses, key=losses.__getitem__)


@pytest.mark.slow
def test_resume_from_a_chosen_checkpoint(finished, toy):
    expected = toy_run.checkpoint(finished, 8)
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    chosen = finished / "checkpoints" / "step-00000004.ckpt"
    settings = ("trainer.max_steps=8", "checkpoint.every_n_steps=4", "trainer.val_check_interval=2")
    toy_run.run("--resume", chosen, toy, f"run={finished}", *settings, "checkpoint.keep=9")
    assert (finished / "checkpoints" / "step-00000008.ckpt.old").exists()
    assert same(toy_run.checkpoint(finished, 8)["optimizer_states"], expected["optimizer_states"])
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.slow
def test_minutes_between_checkpoints(toy):
    run = toy.parent / "minutes"
    settings = ("trainer.max_steps=3", "checkpoint.every_n_steps=100", "checkpoint.every_n_minutes=0.0001")
    toy_run.run(toy, f"run={run}", *settings, "checkpoint.keep=9")
    steps = toy_run.checkpoint_steps(run)
    assert steps[-1] == 3
    assert len(steps) > 1


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """The variables by which Lightning knows SLURM, and a `scontrol` that writes down what it is asked."""
    for name, value in {"NTASKS": 1, "JOB_NAME": "train", "JOB_ID": 42, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "asked"


@pytest.mark.slow
def test_slurm_s_requeue(toy, slurm, monkeypatch):
    run = toy.parent / "requeued"
    signalled_after_three_steps(monkeypatch, signal.SIGUSR1)
    assert main([str(toy), f"run={run}", "data.workers=2"]) == 128 + signal.SIGUSR1
    assert slurm.read_text() == "requeue 42\n"
    assert toy_run.checkpoint_steps(run) == [3]


@pytest.mark.slow
def test_lightning_s_own_requeue_checkpoint_is_the_newest_and_is_not_restored_unasked(toy, slurm, capsys):
    run = toy.parent / "hpc"
    settings = (toy, f"run={run}", "checkpoint.every_n_steps=2", "checkpoint.keep=9")
    toy_run.run(*settings, "trainer.max_steps=4")
    (run / "checkpoints" / "step-00000004.ckpt").rename(run / "hpc_ckpt_1.ckpt")
    assert main([*map(str, settings), "trainer.max_steps=4"]) == 2
    assert "hpc_ckpt_1.ckpt: --resume continues it" in capsys.readouterr().err
    toy_run.run(*settings, "trainer.max_steps=5", "--resume")
    assert sorted(toy_run.metrics(run, "train/loss")) == [1, 2, 3, 4, 5]
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == {"step-00000002.ckpt", "step-00000005.ckpt"}


@pytest.mark.slow
def test_the_log_has_no_noise(toy):
    process = toy_run.start(
        toy, f"run={toy.parent / 'quiet'}", "trainer.max_steps=3", "trainer.enable_progress_bar=true"
    )
    output = toy_run.finish(process)
    assert "3/3" in output
    for noise in ("weights_only", "Tip:", "deprecated", "Epoch"):
        assert noise not in output


@pytest.mark.slow
def test_the_same_manifest_in_another_order(toy, tmp_path, capsys):
    settings = (str(toy), f"run={tmp_path / 'run'}", f"data.source.images={toy.parent / 'images'}")
    head, *rows = (toy.parent / "boxes.csv").read_text().splitlines()
    (tmp_path / "boxes.csv").write_text("\n".join([head, *rows]))
    more = (*settings, f"data.source.path={tmp_path / 'boxes.csv'}", "--resume")
    toy_run.run(*more, "trainer.max_steps=2")
    toy_run.run(*more, "trainer.max_steps=3")
    (tmp_path / "boxes.csv").write_text("\n".join([head, *rows[::-1]]))
    assert main([*more, "trainer.max_steps=4"]) == 2
    assert "in another order" in capsys.readouterr().err


@pytest.mark.slow
def test_counts_of_skipped_pictures_go_on(toy, tmp_path):
    """Each picture that cannot be used is counted once in an epoch, in one run as in two."""
    for name in ("boxes.csv", "images"):
        subprocess.run(["cp", "-r", toy.parent / name, tmp_path], check=True)
    (tmp_path / "images" / "5.png").write_bytes(b"no picture")
    settings = (toy, f"data.source.path={tmp_path / 'boxes.csv'}", "checkpoint.every_n_steps=5")
    toy_run.run(*settings, f"run={tmp_path / 'whole'}", "trainer.max_steps=10")
    toy_run.run(*settings, f"run={tmp_path / 'parts'}", "trainer.max_steps=5")
    toy_run.run(*settings, f"run={tmp_path / 'parts'}", "trainer.max_steps=10", "--resume")
    name = "data/skipped_train_unreadable"
    assert toy_run.metrics(tmp_path / "parts", name) == toy_run.metrics(tmp_path / "whole", name) != {}


@pytest.mark.slow
def test_a_signal_within_a_validation(toy, monkeypatch):
    """Here in the middle of an accumulation: the last step is saved, and the validation is made again."""
    settings = ("trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=3")
    whole, run = toy.parent / "validated", toy.parent / "stopped_within"
    toy_run.run(toy, f"run={whole}", *settings)
    step = PaintByExampleTraining.validation_step

    def stopped(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(PaintByExampleTraining, "validation_step", stopped)
        assert main([str(toy), f"run={run}", *settings]) == 128 + signal.SIGTERM
    assert toy_run.checkpoint_steps(run) == [1]
    assert toy_run.metrics(run, "val/loss") == {}
    toy_run.run(toy, f"run={run}", *settings, "--resume")
    assert_same_run(run, whole, 5)
