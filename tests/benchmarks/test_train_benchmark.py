"""The training benchmark: what it compares is the same step, and what it searches it finds."""

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import TINY

from benchmarks import table, train, worker
from benchmarks.budget import Budget
from benchmarks.sections import parse, run
from benchmarks.train import largest_batch, tables
from benchmarks.train_worker import SYSTEMS, Task, answer, fits, make_batch
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.cli import checkpoint


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    """A step of a tiny model whose weights are a diffusers folder too."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("weights")
    # diffusers' exemplar encoder has (CLIP layers + 1) // 5 mapper blocks
    vision = replace(TINY.exemplar.vision, num_layers=4)
    config = replace(TINY, exemplar=replace(TINY.exemplar, vision=vision))
    torch.save({"state_dict": seeded_state(config, 0), "pbe": pbe_entry(config)}, folder / "tiny.ckpt")
    assert checkpoint.main(["convert", str(folder / "tiny.ckpt"), "--out", str(folder / "tiny")]) == 0
    ckpt, diffusers = str(folder / "tiny.ckpt"), str(folder / "tiny")
    return Task(ckpt, diffusers, "cpu", "float32", 2, 64, 1, ema=True, compile=False)


def two_losses(name: str, task: Task) -> list[float]:
    """Of a system's first two steps, at a learning rate that shows."""
    system = SYSTEMS[name](task)
    for group in system.optimizer.param_groups:
        group["lr"] = 1e-3
    batch = system.batch(task.batch)
    return [system.step(batch).item() for _ in range(2)]


@pytest.fixture(scope="module")
def reference(task) -> list[float]:
    return two_losses("pbe", task)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "pbe"])
def test_systems_take_the_same_step(task, reference, name):
    """The same loss at first, and one that falls as much where the same parameters train."""
    if name.startswith("diffusers"):
        pytest.importorskip("diffusers")
        pytest.importorskip("transformers")
    first, second = two_losses(name, task)
    assert first == pytest.approx(reference[0], rel=train.TOLERANCE["float32"])
    assert second < first
    if "adapters" not in name:
        # AdamW's first step is the gradient's sign, which rounding turns where the gradient is nearly zero
        assert second == pytest.approx(reference[1], rel=1e-3)


class SameProcess:
    """A worker that needs no process of its own."""

    def __init__(self, name: str, task: Task, folder: Path):
        self.name, self.system = name, SYSTEMS[name](task)

    def ask(self, what: str) -> dict[str, float]:
        return answer(self.system, what)

    def close(self) -> None: ...


def measured(task, systems, pairs):
    """A run of them, whole."""
    result = {}
    for _ in train.measure_task(task, result, systems, pairs, Budget()):
        pass
    return {"task": asdict(task), "systems": result}


@pytest.mark.slow
def test_measured_in_turns(task, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(worker, "Worker", SameProcess)
    numbers = measured(task, ["pbe", "pbe, plain"], pairs=2)
    plain = numbers["systems"]["pbe, plain"]
    assert len(plain["seconds"]) == len(plain["processor seconds"]) == 2
    assert plain["loss"] == pytest.approx(numbers["systems"]["pbe"]["loss"], rel=train.TOLERANCE["float32"])
    text = tables({"runs": [numbers], "fits": [], "device": "a CPU"})
    assert "float32, batch 2, 64², averages, a CPU" in text
    assert "| seconds, times pbe | 1 |" in text

    # a loss that is another's is no comparison
    out = tmp_path / "train.json"
    arguments = ["--ckpt", task.ckpt, "--device", "cpu", "--systems", "pbe", "--resolution", "64", "--out", str(out)]
    arguments += ["--pairs", "1", "--dtype", "float32", "--batch", "1"]
    assert run("train", arguments) == 0
    assert table.read(out)["runs"][0]["task"]["batch"] == 1
    assert "| processor seconds a step |" in capsys.readouterr().out
    monkeypatch.setitem(train.TOLERANCE, "float32", -1.0)
    assert run("train", arguments) == 1
    assert "error: the first loss of 'pbe' is" in capsys.readouterr().err


def test_a_gpu_has_room_for_one_system_at_a_time_and_not_for_all(task, monkeypatch):
    """What finds no room is a cell of the table, and the others are measured."""
    there, most = [], []

    class Worker:
        """A process on a GPU that has no room for "pbe, plain"."""

        def __init__(self, name: str, task: Task, folder: Path):
            self.name = name
            there.append(name)
            most.append(len(there))

        def ask(self, what: str) -> dict[str, float]:
            if self.name == "pbe, plain":
                raise RuntimeError("the process ended with 1: torch.OutOfMemoryError: CUDA out of memory.")
            if what == "memory":
                return {"peak GPU GiB": 20.0}
            seconds = {"pbe": 2.0, "diffusers": 3.0}[self.name]
            return {"seconds": seconds, "processor seconds": 1.0, "loss": 0.5}

        def close(self) -> None:
            there.remove(self.name)

    monkeypatch.setattr(worker, "Worker", Worker)
    on_gpu = replace(task, device="cuda")
    numbers = measured(on_gpu, ["pbe, plain", "pbe", "diffusers"], pairs=2)
    assert most == [1, 1, 1]
    assert not there
    text = tables({"runs": [numbers], "fits": [], "device": "a GPU"})
    assert "| pictures a second | out of memory | 1 (1 to 1) | 0.667 (0.667 to 0.667) |" in text
    assert "| seconds, times pbe |  | 1 | 1.5 (1.5 to 1.5) |" in text
    numbers = measured(on_gpu, ["pbe, plain"], pairs=2)
    assert "| pictures a second | out of memory |" in tables({"runs": [numbers], "fits": [], "device": "a GPU"})


@pytest.mark.slow
def test_process_answers_and_tells_why_it_failed(task, tmp_path):
    with closing(worker.Worker("pbe", task, tmp_path / "worker")) as process:
        assert process.started["load s"] > 0
        assert process.ask("steps")["loss"] > 0
        with pytest.raises(RuntimeError, match=r"process of 'pbe' ended with 1:[\s\S]*AssertionError: swim"):
            process.ask("swim")


@pytest.mark.parametrize("most", [0, 1, 5, 8, 13, 16])
def test_largest_batch(most):
    asked = []
    assert largest_batch(lambda n: asked.append(n) or n <= most, highest=16) == most
    assert len(asked) == len(set(asked)) <= 9
    assert max(asked) <= 16


@pytest.mark.slow
def test_room_is_what_a_step_finds_beside_the_optimiser_s_state(task, monkeypatch):
    system = SYSTEMS["pbe"](task)
    assert answer(system, "fits 1") == {"fits": True}
    assert system.num_steps == 2
    assert answer(system, "fits 2") == {"fits": True}
    assert system.num_steps == 3  # the state is there

    def out_of_memory(batch):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(system, "loss", out_of_memory)
    assert not fits(system, 1)


def test_what_does_not_load_fits_no_batch(task, monkeypatch):
    def failing(name, task, folder):
        raise RuntimeError("the process ended with 1: torch.OutOfMemoryError: CUDA out of memory.")

    monkeypatch.setattr(train, "Worker", failing)
    assert train.measure_fits(task, "pbe") == 0


def test_table_of_what_fits():
    """Also of a run that was cut short in its second column."""
    task = {"dtype": "bfloat16", "resolution": 512, "ema": False}
    sizes = ((24.0, {"pbe": 0, "pbe, plain": 3}), (48.0, {"pbe": 12}))
    runs = [{"task": task | {"limit_gib": limit}, "largest batch": size} for limit, size in sizes]
    text = tables({"runs": [], "fits": runs, "device": "a GPU"})
    assert "|  | 24 GiB | 48 GiB |" in text
    assert "| pbe | none | 12 |" in text
    assert "| pbe, plain | 3 |  |" in text


def test_batch_is_the_same_for_all():
    a, b = (make_batch(2, 64, TINY.vae.downsampling, 28) for _ in range(2))
    assert torch.equal(a.example.image, b.example.image)
    assert a.draws.noise.shape == (2, 4, 16, 16)
    assert torch.equal(a.example.masked_image, a.example.image * a.example.mask)
    assert 0 < a.example.mask.mean() < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --ckpt, or --quick"),
        (["--quick", "--resolution", "100"], "multiple of 64, got 100"),
        (["--quick", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["--quick", "--limit-gib", "24"], "needs --device cuda"),
        (["--ckpt", "none.ckpt", "--systems", "pbe"], "none.ckpt: there is no such file"),
        (["--ckpt", "none.ckpt", "--systems", "diffusers"], "needs --diffusers"),
    ],
)
def test_arguments_that_cannot_be(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse("train", ["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err
