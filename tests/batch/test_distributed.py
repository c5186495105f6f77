"""Batches over several processes: every row exactly once, with a real pair of processes on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from fakes import at_once
from PIL import Image

from pbe.acceleration import offloading
from pbe.batch.distributed import DividedWork, divide, predict, row_runner, share_of
from pbe.batch.job import Job
from pbe.batch.provenance import Weights, read_provenance
from pbe.batch.run import Outcome, run_row
from pbe.cli.edit import main
from pbe.editing.loading import load_editor
from pbe.editing.settings import EditSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("num_jobs", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_hold_every_job_once_and_have_one_length(num_jobs, world_size):
    shares = [share_of(num_jobs, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share if i < num_jobs) == list(range(num_jobs))
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) >= 1


def test_one_device_by_name_is_not_several():
    with pytest.raises(ValueError, match="device='cuda:1' cannot be several devices"):
        divide(0, row_runner([], Path("model.ckpt")), device="cuda:1", devices=2)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="device='cuda' is not there: torch sees 0 of type cuda"):
        divide(0, row_runner([], Path("model.ckpt")), device="cuda", devices=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match="devices=2, but torch sees 1 of type cuda here"):
            divide(0, row_runner([], Path("model.ckpt")), device=device, devices=2)


def test_share_goes_on_after_an_error(rows, monkeypatch):
    def edit(model, image, *args, seed, **settings):
        if seed == 1:
            raise RuntimeError("unforeseen")
        return [image.picture.source]

    monkeypatch.setattr("pbe.editing.edit.edit", at_once(edit))
    jobs = [Job.from_row(json.loads(text), rows.parent, line) for line, text in enumerate(rows.open(), start=1)]
    run = partial(run_row, SimpleNamespace, weights=Weights("model.ckpt", "0123abcd", "float32"))
    share = DividedWork(len(jobs), lambda device: None)
    share.work = lambda index: run(jobs[index])
    for index in (1, 3, 5):  # of the second of two processes; the last one is no job
        share.predict_step(index, index)
    assert share.results == {1: Outcome(2, "failed", "RuntimeError: unforeseen"), 3: Outcome(4, "done")}


@pytest.fixture
def rows(tmp_path) -> Path:
    """Five rows, of which the third has no photo."""
    Image.linear_gradient("L").resize((48, 40)).convert("RGB").save(tmp_path / "photo.png")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "dog.png")
    row = {"image": "photo.png", "box": [10, 10, 34, 34], "exemplar": "dog.png"}
    table = [{**row, "seed": i, "out": f"{i}.png"} for i in range(5)]
    table[2]["image"] = "none.png"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, table)))
    return path


def flags(rows: Path, checkpoint: Path) -> list[str]:
    settings = "--device cpu --dtype float32 --steps 4 --quiet"
    return ["--batch", str(rows), "--ckpt", str(checkpoint), *settings.split()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_run_every_row_once(rows, tiny_checkpoint, capsys):
    folder = rows.parent
    # a program of its own, since Lightning starts it again for the second process
    command = [sys.executable, str(ROOT / "tools" / "inference.py"), *flags(rows, tiny_checkpoint)]
    command += ["--devices", "2", "--low-memory"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert two.returncode == 1, two.stderr  # one row failed
    assert two.stdout == "5 rows: 4 done, 0 done before, 1 failed\n"
    (line,) = two.stderr.splitlines()
    assert line.startswith("line 3 failed: ")
    assert "none.png" in line
    pictures = {path.name: path.read_bytes() for path in folder.glob("?.png")}
    assert sorted(pictures) == ["0.png", "1.png", "3.png", "4.png"]
    assert [read_provenance(folder / name)["seed"] for name in sorted(pictures)] == [0, 1, 3, 4]

    # one process knows its work, and gives the same pictures
    assert main(flags(rows, tiny_checkpoint)) == 1
    assert capsys.readouterr().out == "5 rows: 0 done, 4 done before, 1 failed\n"
    assert main([*flags(rows, tiny_checkpoint), "--redo"]) == 1
    assert capsys.readouterr().out == "5 rows: 4 done, 0 done before, 1 failed\n"
    for name, before in pictures.items():
        assert (folder / name).read_bytes() == before


@pytest.mark.usefixtures("one_thread")
def test_networks_visit_the_device_under_lightning_too(rows, tiny_checkpoint, monkeypatch):
    visits = []

    def copied(tensor, device):  # in place of a second device
        visits.append(tensor.data_ptr())
        return tensor.clone()

    monkeypatch.setattr(offloading, "copied", copied)
    jobs = [Job.from_row(json.loads(text), rows.parent, line) for line, text in enumerate(rows.open(), start=1)][:1]
    jobs = [replace(job, settings=EditSettings(steps=4)) for job in jobs]
    work = DividedWork(1, row_runner(jobs, tiny_checkpoint, "float32", low_memory=True))
    with patch.dict(os.environ):  # where Lightning leaves that this process is one of several, which others would await
        assert predict(work, "cpu", devices=1, num_nodes=1, progress=False)
    assert work.results == {0: Outcome(1, "done")}
    assert visits
    assert not list(work.parameters())  # they would be on the device from the start


@pytest.mark.usefixtures("one_thread")
def test_rows_are_edited_with_their_own_adapters(rows, tiny_checkpoint, monkeypatch):
    factors = {"lora_down": torch.ones(1, 64, 3, 3), "lora_up": torch.ones(64, 1, 1, 1)}
    name = "lora_unet_mid_block_resnets_0_conv1"
    torch.save({f"{name}.{part}.weight": x for part, x in factors.items()}, rows.parent / "style.pt")
    seen = []
    monkeypatch.setattr(
        "pbe.editing.edit.edit", at_once(lambda model, image, *_, **__: [seen.append(model), image.picture.source][1:])
    )
    job = Job.from_row({**json.loads(rows.open().readline()), "out": "0.png"}, rows.parent)
    jobs = [
        replace(job, out=f"{i}.png", adapters=own) for i, own in enumerate([None, ("style.pt:2",), ("style.pt:2",)])
    ]
    run = row_runner(jobs, tiny_checkpoint, "float32")(torch.device("cpu"))
    assert [run(i) for i in range(3)] == [Outcome(0, "done")] * 3
    assert seen[0] is not seen[1] is seen[2]
    stored = [read_provenance(rows.parent / f"{i}.png").get("adapters", []) for i in range(3)]
    assert [[(one["file"], one["strength"]) for one in each] for each in stored] == [[], *[[("style.pt", 2.0)]] * 2]


@pytest.mark.usefixtures("one_thread")
def test_each_process_compiles(rows, tiny_checkpoint, monkeypatch):
    asked = []

    def load(checkpoint, device, dtype, low_memory, compile, adapters, *_):
        asked.append((str(device), dtype, low_memory, compile, adapters))
        return load_editor(checkpoint, device, dtype)

    monkeypatch.setattr("pbe.batch.distributed.load_editor", load)
    set_up = row_runner([], tiny_checkpoint, "float32", compile="regions", adapters=[("a.pt", 0.5)])
    with pytest.raises(FileNotFoundError, match=r"a\.pt"):  # its name and checksum are in the results
        divide(0, set_up, "cpu", progress=False)
    assert asked == [("cpu", "float32", False, "regions", (("a.pt", 0.5),))]
