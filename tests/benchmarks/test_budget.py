"""What a run may take, and what is left of one that is stopped."""

import json
import os
import signal
import sys
from contextlib import closing

import pytest

from benchmarks import __main__, budget, load, worker
from benchmarks.budget import Budget
from benchmarks.edit_worker import Task
from benchmarks.sections import STOPPED, run


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    return now


def test_rounds_that_fit_by_the_last_one_s_time(clock, capsys):
    limit = Budget(1.0)
    done = []
    for i in limit.rounds(5, "unet"):
        done.append(i)
        clock[0] += 25.0  # the third would end after 75 s of 60
    assert done == [0, 1]
    assert limit.left_out == ["unet, 3 of 5 rounds: about 25 s are needed, 10 s are left"]
    assert "left out: unet, 3 of 5 rounds" in capsys.readouterr().err
    assert not [*limit.rounds(1, "edit", seconds=11.0)]  # known before it is tried
    assert [*limit.rounds(1, "decode", seconds=9.0)] == [0]
    clock[0] += 20.0
    assert not limit.fits("anything")
    assert limit.left_out[1:] == [
        "edit, 1 of 1 rounds: about 11 s are needed, 10 s are left",
        "anything: 0 s are left",
    ]


def test_without_minutes_everything_fits():
    limit = Budget()
    assert [*limit.rounds(3, "edit", seconds=1e9)] == [0, 1, 2]
    assert not limit.left_out


def test_what_is_left_out_is_said_and_written(tmp_path, monkeypatch, capsys):
    """And the run is not finished: `all` does it again."""

    def measure(args):
        yield {"results": {"pbe, .ckpt, to float32": [{"seconds": 3.0}]}}
        assert not args.budget.fits("the second round", 1e9)

    monkeypatch.setattr(load, "measure", measure)
    (tmp_path / "a.ckpt").touch()
    out = tmp_path / "load.json"
    assert run("load", ["--ckpt", str(tmp_path / "a.ckpt"), "--minutes", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert not content["finished"]
    assert content["left out"] == ["the second round: about 1e+09 s are needed, 60 s are left"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2] == "| pbe, .ckpt, to float32 | 3 |"
    assert printed[-1] == f"left out: {content['left out'][0]}"


def test_a_time_limit_s_signal_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    def measure(args):
        yield {"results": {"pbe, .ckpt, to float32": [{"seconds": 3.0}]}}
        os.kill(os.getpid(), signal.SIGTERM)
        yield {}

    monkeypatch.setattr(load, "measure", measure)
    (tmp_path / "a.ckpt").touch()
    out = tmp_path / "load.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "load", "--ckpt", str(tmp_path / "a.ckpt"), "--out", str(out)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert __main__.main() == STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads(out.read_text())["results"]
    captured = capsys.readouterr()
    assert "| pbe, .ckpt, to float32 | 3 |" in captured.out
    assert "stopped" in captured.err


def test_a_process_that_is_not_waited_for_is_ended(tmp_path, monkeypatch, capsys):
    """It starts while others do, each answer is a line of progress, and a call that takes minutes is not waited for."""
    program = "import time; print('{\"load s\": 2.5}', flush=True); input(); time.sleep(600)"
    monkeypatch.setattr(worker, "module_command", lambda module, *arguments: [sys.executable, "-c", program])
    task = Task("a.ckpt", "", "cpu", "float32", 4, 512, 2, 5.0)
    with closing(worker.Worker("pbe", task, tmp_path / "worker")) as process:
        assert process.started == {"load s": 2.5}
        assert "pbe, float32, batch 4, 512²: started: load s 2.5\n" in capsys.readouterr().err
        monkeypatch.setattr(process, "answer", lambda what: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            process.ask("edit")
    assert process.process.returncode == -signal.SIGTERM
