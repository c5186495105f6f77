"""The benchmark's sections on the smallest model: what they measure, their tables, and what they refuse."""

import io
import json
from argparse import Namespace
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import TINY
from torch import nn

from benchmarks import all as everything
from benchmarks import (
    cost,
    data,
    edit,
    index_worker,
    load,
    peers,
    plot,
    profile,
    scaling,
    sections,
    table,
    worker,
)
from benchmarks.__main__ import COMMANDS
from benchmarks.arguments import weights
from benchmarks.budget import Budget
from benchmarks.calls import Calls
from benchmarks.edit_worker import SYSTEMS, Task, answer, timed
from benchmarks.kinds import KINDS, count_flops, flops_by_kind, kind_of, seconds_by_kind
from benchmarks.report import about, markdown, ratios, spread, times, write_json
from benchmarks.sections import run
from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import seeded_state
from pbe.cli import checkpoint
from pbe.editing.settings import EditSettings

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:steps=2 begins at")  # a picture's quality is no matter here


def make_task(ckpt, diffusers="", **changes):
    settings = {"device": "cpu", "dtype": "float32", "batch": 1, "resolution": 64, "steps": 2, "guidance": 5.0}
    return Task(str(ckpt), str(diffusers), **(settings | changes))


class WorkerHere:
    """`Worker` without a process of its own."""

    def __init__(self, name, task, folder):
        folder.mkdir(exist_ok=True)
        self.name, self.folder, self.system = name, folder, SYSTEMS[name](task)
        self.started = {"load s": 1.0, "start to first prediction s": 2.0}

    @torch.no_grad()
    def ask(self, what):
        return answer(self.system, what, self.folder)

    def close(self):
        self.system = None


@pytest.fixture
def without_processes(monkeypatch):
    for module in (edit, scaling, worker):
        monkeypatch.setattr(module, "Worker", WorkerHere)
    monkeypatch.setattr("benchmarks.edit_worker.matmul_peak", lambda device, dtype: 1.0)  # takes seconds


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A model as small as can be and still be diffusers': that has a mapper block for each five of CLIP's layers."""
    vision = replace(TINY.exemplar.vision, num_layers=4)
    config = replace(TINY, exemplar=replace(TINY.exemplar, vision=vision))
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.ckpt"
    torch.save({"state_dict": seeded_state(config, 0), "pbe": pbe_entry(config)}, path)
    return path


@pytest.fixture(scope="module")
def tiny_folder(tiny_checkpoint):
    """The same model as a diffusers folder."""
    pytest.importorskip("diffusers")
    folder = tiny_checkpoint.parent / "tiny"
    assert checkpoint.main(["convert", str(tiny_checkpoint), "--out", str(folder)]) == 0
    return folder


# --- editing ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("without_processes")
def test_both_systems_make_the_same_picture(tiny_checkpoint, tiny_folder, tmp_path, capsys):
    """The JSON holds what was measured, and the table printed is the JSON's."""
    out = tmp_path / "numbers.json"
    weights = ["--ckpt", str(tiny_checkpoint), "--diffusers", str(tiny_folder)]
    command = [*weights, "--resolution", "64", "--pairs", "1", "--systems", "pbe", "diffusers", "--dtype", "float32"]
    assert run("edit", [*command, "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["command"].startswith(f"python -m benchmarks edit --ckpt {tiny_checkpoint}")
    assert content["finished"]
    (numbers,) = content["runs"]
    assert list(numbers["systems"]) == ["pbe", "diffusers"]
    for what in edit.MEASURED:
        # float32 by other orders of sums, through 3 predictions: 1e-3 of the largest value is the goal for a picture
        assert numbers["systems"]["diffusers"]["differences"][what]["largest"] < 1e-3
        assert all(one[what][0] > 0 for one in numbers["systems"].values())
    assert numbers["systems"]["diffusers"]["starts"][0]["start to first prediction s"] == 2
    assert edit.tables(content) in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_answers(tiny_checkpoint, tmp_path, monkeypatch):
    """Whoever asks sees its times and its peak, and gets its output in a file; it ends when nobody asks any more."""
    monkeypatch.chdir(tmp_path)  # from where this package is found all the same
    with closing(worker.Worker("pbe", make_task(tiny_checkpoint), tmp_path / "worker")) as process:
        *phases, whole = process.started.values()
        assert all(phase > 0 for phase in phases)
        assert sum(phases) == pytest.approx(whole)
        assert process.ask("decode")["seconds"] > 0
        assert process.ask("memory")["peak RSS GiB"] > 0.01
    assert torch.load(process.folder / "decode.pt").shape == (1, 3, 64, 64)
    assert process.process.returncode == 0


@pytest.mark.parametrize("name", ["pbe", "diffusers, best"])
def test_systems_run_in_half_precision(name, tiny_checkpoint, tiny_folder):
    """float16 too, which a CPU may only emulate, and more than one picture."""
    with torch.no_grad():
        system = SYSTEMS[name](make_task(tiny_checkpoint, tiny_folder, dtype="float16", batch=2))
        seconds, noise = timed(system, "unet")
        picture = timed(system, "edit")[1]
    assert seconds > 0
    assert noise.shape == (4, 4, 16, 16)  # both contexts of both pictures
    assert noise.dtype == torch.float32
    assert picture.shape == (2, 3, 64, 64)
    assert picture.isfinite().all()


def test_a_small_card_s_networks_visit_it(tiny_checkpoint, monkeypatch):
    """The same numbers, and what is needed is there for each call and gone after it."""
    from pbe.acceleration import offloading

    visits = []

    @contextmanager
    def on_device(module, device):
        visits.append((type(module).__name__, device.type))
        yield

    monkeypatch.setattr(offloading, "on_device", on_device)
    with torch.no_grad():
        plain = SYSTEMS["pbe, not prepared"](make_task(tiny_checkpoint))
        system = SYSTEMS["pbe, small card"](make_task(tiny_checkpoint))
        visits.clear()
        for what in ("unet", "decode"):
            # another layout of the weights is another order of sums
            torch.testing.assert_close(getattr(system, what)(), getattr(plain, what)(), rtol=1e-4, atol=1e-4)
    unet, vae = (type(network).__name__ for network in system.networks.values())
    assert visits == [(unet, "cpu"), (vae, "cpu")]


@pytest.mark.slow
def test_a_network_converted_for_openvino():
    """It computes the same, and the weights of the network that it was made from are given up."""
    pytest.importorskip("openvino")
    network, x = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU()), torch.randn(2, 4, 8, 8)
    expected = network(x).detach()
    converted = peers.converted(network, (x,), "float32")
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)
    assert network[0].weight.is_meta


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_another_runtime_computes_the_same(name, package, tiny_checkpoint, tiny_folder):
    pytest.importorskip(package)
    with torch.no_grad():
        ours, theirs = (SYSTEMS[one](make_task(tiny_checkpoint, tiny_folder)) for one in ("pbe", name))
        for what in edit.MEASURED:
            expected, got = (timed(system, what)[1] for system in (ours, theirs))
            assert (got - expected).abs().max() < 1e-3 * expected.abs().max(), what


def test_openvino_is_left_out_where_it_is_not_installed(tiny_checkpoint, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.arguments.find_spec", lambda name: None if name == "openvino" else find_spec(name))
    command = ["--ckpt", str(tiny_checkpoint), "--diffusers", str(tiny_folder), "--device", "cpu"]
    assert sections.parse("edit", [*command, "--systems", "pbe", "openvino"]).systems == ["pbe"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "'openvino' is left out: it is not installed (pip install -e '.[bench]')"
    with pytest.raises(SystemExit):
        sections.parse("edit", [*command, "--systems", "openvino"])


def edit_run():
    """Numbers by hand: every second value of diffusers is 3 and then 4 times as long."""
    pbe = {"unet": [1.0, 2.0, 4.0], "decode": [1.0, 1.0, 1.0], "edit": [10.0, 10.0, 10.0]}
    theirs = {"unet": [3.0, 8.0, 12.0], "decode": [2.0, 2.0, 2.0], "edit": [10.0, 20.0, 40.0]}
    compiled = {"unet": [0.5, 0.5, 0.5], "decode": [1.0, 1.0, 1.0], "edit": [5.0, 5.0, 5.0]}
    same = {what: {"largest": 0.5, "mean": 0.25} for what in edit.MEASURED}
    systems = {
        name: times | {"differences": same, "starts": [{"load s": load, "peak RSS GiB": load}]}
        for name, times, load in (("pbe", pbe, 2.0), ("pbe, compiled", compiled, 4.0), ("diffusers", theirs, 5.0))
    }
    forms = {"ordinary": {"convolutions": 3.0, "attention": 1.0}, "prepared": {"attention": 2.0}}
    task = {"dtype": "float16", "batch": 4, "resolution": 512, "steps": 50}
    flops = {"unet": forms | {"diffusers": {"attention": 6.0}}, "decode": {}}
    return {"task": task, "TFLOP/s of matmul": 4.0, "TFLOP": flops, "systems": systems}


def rows_of(text):
    """The cells of a Markdown table by the name of the row."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in lines}


def test_table_of_edits_compares_pair_by_pair():
    text = edit.table(edit_run(), "a GPU")
    assert text.startswith("float16, batch 4, 512², 50 steps, a GPU; matrix products reach 4 TFLOP/s")
    rows = rows_of(text)
    assert rows["UNet call s"] == ["2 (1 to 4)", "0.5 (0.5 to 0.5)", "8 (3 to 12)"]
    # of the pairs 3/1, 8/2, 12/4; the medians' ratio would be 4
    assert rows["UNet call, times pbe"] == ["1", "0.25 (0.125 to 0.5)", "3 (3 to 4)"]
    assert rows["UNet call, times pbe, compiled"] == ["4 (2 to 8)", "1", "16 (6 to 24)"]
    assert rows["edit, times pbe"] == ["1", "0.5 (0.5 to 0.5)", "2 (1 to 4)"]
    assert rows["TFLOP of a UNet call"] == ["2", "2", "6"]
    # 4 TFLOP in the median 2, 0.5 and 8 seconds, of 4 TFLOP/s, whatever a system leaves out
    assert rows["MFU of a UNet call"] == ["50%", "200%", "12%"]
    assert rows["load, times pbe"] == ["1", "2", "2.5"]
    assert rows["peak RSS, times pbe"] == ["1", "2", "2.5"]
    assert "5.0e-01 (2.5e-01)" in rows["decode: largest (mean) difference"]


# --- what an edit costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pbe", "diffusers"])
def test_an_edit_s_calls_are_counted_without_being_made(name, tiny_checkpoint, tiny_folder):
    """PLMS' first step calls twice, and outside an interval a call has one context."""
    settings = {"sampler": "plms", "steps": 10, "guidance": 5.0}
    settings |= {"guidance_interval": (200, 800)} if name == "pbe" else {}
    with torch.no_grad():
        system = SYSTEMS[name](make_task(tiny_checkpoint, tiny_folder, batch=2))
        computed = answer(system, f"cost {json.dumps({'settings': settings, 'whole': False})}", None)
        whole = answer(system, f"cost {json.dumps({'settings': settings, 'whole': True})}", None)
        assert timed(system, "unet")[0] > 0  # the network is its own again
    assert whole["seconds"] > 0
    assert computed["evaluations"] == (17 if name == "pbe" else 22)
    assert [count for count, _ in computed["calls"]] == ([5, 6] if name == "pbe" else [11])
    calls = sum(count * seconds for count, seconds in computed["calls"])
    assert computed["seconds"] == pytest.approx(calls + computed["rest"])
    assert computed["rest"] > 0


def test_calls_are_timed_by_kind(monkeypatch):
    """One of each shape, a new one after a call that warms up; a method of the instance's own comes back."""
    clock = [0.0]
    monkeypatch.setattr("benchmarks.calls.time.perf_counter", lambda: clock[0])

    class Network(nn.Module):
        def predict(self, x):
            clock[0] += len(x)
            return x + 1

    network, x, warm = Network(), torch.zeros(2, 3), set()
    network.deep = lambda x, y=None: (network.predict(x), y)
    own = network.deep

    def sample():
        for _ in range(5):
            assert torch.equal(network.predict(x), x + 1)
        network.predict(x[:1])
        clock[0] += 0.5

    numbers = Calls(network, ("predict", "deep", "absent"), warm, CPU).run(sample, batch=1)
    assert "predict" not in vars(network)
    assert network.deep is own
    # 5 of 2 s and 1 of 1 s, where 2 + 2 and 1 + 1 were spent
    assert numbers == {"seconds": 11.5, "evaluations": 11, "calls": [[5, 2.0], [1, 1.0]], "rest": 0.5}
    assert len(warm) == 2
    clock[0] = 0.0
    assert Calls(network, ("predict",), warm, CPU).run(sample, batch=2)["evaluations"] == 5
    assert clock == [3.5]  # once each


@pytest.mark.usefixtures("without_processes")
def test_cost(tiny_checkpoint, tiny_folder, tmp_path, monkeypatch, capsys):
    """Each edit is computed before any is made; which ones --minutes is not enough for is said."""
    edits = {
        "diffusers: PLMS": ("diffusers", {}),
        "DPM-Solver++ 4": ("pbe", {"sampler": "dpm_solver", "spacing": "trailing", "steps": 4}),
    }
    monkeypatch.setattr(cost, "EDITS", edits)
    out = tmp_path / "cost.json"
    command = ["--ckpt", str(tiny_checkpoint), "--diffusers", str(tiny_folder), "--resolution", "64", "--steps", "10"]
    command += ["--device", "cpu", "--dtype", "float32", "--systems", "diffusers", "pbe", "--out", str(out)]
    assert run("cost", command) == 0
    content = table.read(out)
    assert content["finished"]
    assert cost.tables(content) in capsys.readouterr().out
    (measured,) = content["runs"]
    evaluations = {name: one["computed"][0]["evaluations"] for name, one in measured["edits"].items()}
    assert evaluations == {"diffusers: PLMS": 22, "DPM-Solver++ 4": 8}
    assert all(one["whole"][0]["seconds"] > 0 for one in measured["edits"].values())

    asked = []
    monkeypatch.setattr(WorkerHere, "ask", lambda worker, what: asked.append(what) or numbers(what))

    def numbers(what):
        steps = json.loads(what.removeprefix("cost "))["settings"]["steps"]
        return {"seconds": 20.0 * steps, "evaluations": 2 * steps, "calls": [[steps, 19.0]], "rest": float(steps)}

    assert run("cost", [*command, "--minutes", "2"]) == 0
    assert [json.loads(what.removeprefix("cost "))["whole"] for what in asked] == [False, False, True]
    content = table.read(out)
    assert [one.partition(":")[0] for one in content["left out"]] == ["whole edits of diffusers, float32"]
    rows = rows_of(cost.tables(content))
    assert rows["diffusers: PLMS"] == ["20", "10 × 19", "10", "200", "1"]
    assert rows["DPM-Solver++ 4"] == ["8", "4 × 19", "4", "80", "2.5", "80", "2.5"]


def test_every_edit_of_the_table_has_settings_that_are_known():
    for system, settings in cost.EDITS.values():
        assert system in SYSTEMS
        EditSettings(**settings)


# --- where arithmetic and time go -------------------------------------------------------------------------------------


def test_arithmetic_by_kind():
    """2 products a multiply-add of each output element."""
    conv, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 11)
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(4, 7)
    q = torch.zeros(2, 1, 6, 16)

    def call():
        conv(x), linear(y), q @ q.transpose(2, 3)

    expected = {
        "convolutions": 2 * (2 * 5 * 8 * 8) * 3 * 9,
        "linear layers": 2 * 4 * 7 * 11,
        "attention": 2 * 2 * 6 * 6 * 16,
    }
    assert flops_by_kind(call) == pytest.approx({kind: flops / 1e12 for kind, flops in expected.items()}, rel=1e-12)


@pytest.mark.slow
def test_arithmetic_that_is_saved(tiny_checkpoint, tiny_folder):
    """The prepared network's products are fewer, by what is shared, folded and summed, whatever the batch."""
    one, three = (count_flops(str(tiny_checkpoint), 64, batch, str(tiny_folder)) for batch in (1, 3))
    total = {part: {form: sum(kinds.values()) for form, kinds in forms.items()} for part, forms in one.items()}
    assert 0.5 < total["unet"]["prepared"] / total["unet"]["ordinary"] < 0.95
    assert 0.5 < total["decode"]["prepared"] / total["decode"]["ordinary"] < 0.95
    for part in total:
        # theirs embeds one timestep for all samples, and pads nothing
        assert total[part]["diffusers"] == pytest.approx(total[part]["ordinary"], rel=0.01)
        for form, count in total[part].items():
            assert sum(three[part][form].values()) == pytest.approx(3 * count, rel=0.01)


def test_time_is_divided_among_the_innermost_layers(monkeypatch):
    """With a clock that counts its readings; what an attention computes beside its projections is attention."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.SiLU())

        def forward(self, x):
            return self.to_out(self.to_q(x).softmax(-1))

    network = nn.Sequential(nn.LayerNorm(4), Attention(), nn.SiLU())
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.kinds.time.perf_counter", lambda: next(clock))
    seconds = seconds_by_kind(network, lambda: network(torch.zeros(2, 4)), CPU)
    # rest | norm | rest | attention | to_q | attention | to_out | attention | rest: one tick each
    assert seconds == {"convolutions": 0, "linear layers": 2, "attention": 3, "norms": 1, "rest": 3}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_layers_of_all_systems_are_known(tiny_checkpoint, tiny_folder):
    """Each kind is found in each system's network, the packed layers of a model given up too."""
    for name in ("pbe", "pbe, model kept", "diffusers"):
        system = SYSTEMS[name](make_task(tiny_checkpoint, tiny_folder))
        assert {kind_of(module) for module in system.networks["unet"].modules()} == set(KINDS), name


@pytest.mark.slow
@pytest.mark.usefixtures("without_processes")
def test_profile(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "profile.json"
    command = ["--ckpt", str(tiny_checkpoint), "--systems", "pbe", "--resolution", "64", "--pairs", "1"]
    assert run("profile", [*command, "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert profile.tables(content) in capsys.readouterr().out
    (seconds,) = content["run"]["systems"]["pbe"]["unet"]
    assert set(seconds) == set(KINDS)
    assert all(seconds[kind] > 0 for kind in KINDS)


def test_table_of_a_profile():
    run = {
        "TFLOP/s of matmul": 4.0,
        "TFLOP": {"unet": {"prepared": {"convolutions": 6.0, "linear layers": 1.0}}},
        "systems": {"pbe": {"unet": [dict(zip(KINDS, (3.0, 1.0, 0.0, 0.5, 0.5), strict=True))]}},
    }
    rows = rows_of(profile.table(run, "unet"))
    assert rows["convolutions"] == ["3 s, 60%", "2 (50%)"]
    assert rows["norms"][0] == "0.5 s, 10%"
    assert rows["all"] == ["5 s, 100%", "1.4 (35%)"]


# --- how time and memory grow -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("without_processes")
def test_scaling(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    def run_here(module, *arguments):
        """The index's process without a process."""
        assert module == index_worker.__name__
        monkeypatch.setattr("sys.argv", [module, *arguments])
        printed = io.StringIO()
        with redirect_stdout(printed):
            index_worker.main()
        return json.loads(printed.getvalue())

    monkeypatch.setattr(scaling, "run_once", run_here)
    out = tmp_path / "scaling.json"
    command = ["--ckpt", str(tiny_checkpoint), "--resolution", "64", "--pairs", "1", "--rows", "20"]
    points = ["--batches", "1", "2", "--resolutions", "64"]
    assert run("scaling", [*command, *points, "--device", "cpu", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert scaling.tables(content) in capsys.readouterr().out
    assert [point["task"]["batch"] for point in content["batch"]] == [1, 2]
    assert [point["task"]["resolution"] for point in content["resolution"]] == [64]
    (index,) = content["index"]
    assert index["read"][0]["seconds a visit"] > 0
    assert all(index[what][0]["seconds"] > 0 for what in scaling.INDEX)


class CutShort(Exception):
    """Stands for the end of the time."""


@pytest.mark.slow
@pytest.mark.usefixtures("without_processes")
def test_what_is_measured_outlasts_what_cuts_a_run_short(tiny_checkpoint, tmp_path, monkeypatch):
    """Every figure that was made before, of each section."""

    def cut(*_):
        raise CutShort

    out, weights = tmp_path / "run.json", ["--ckpt", str(tiny_checkpoint)]
    task = [*weights, "--systems", "pbe", "--resolution", "64", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(scaling, "measure_index", cut)
    with pytest.raises(CutShort):
        run("scaling", [*task, "--steps", "2", "--pairs", "1", "--batches", "2", "--resolutions"])
    content = table.read(out)
    assert [len(content[axis]) for axis in ("batch", "resolution", "index")] == [1, 0, 0]
    assert table.document(content).count("batch 2") == 1

    asked, ask = [], WorkerHere.ask

    def counting(worker, what):
        asked.append(what)
        return cut() if asked.count(last) == 2 else ask(worker, what)

    monkeypatch.setattr(WorkerHere, "ask", counting)
    last = "profile decode"
    with pytest.raises(CutShort):
        run("profile", [*task, "--pairs", "5"])
    assert [len(seconds) for seconds in table.read(out)["run"]["systems"]["pbe"].values()] == [2, 1]
    assert "VAE decode" in table.document(table.read(out))

    asked.clear()
    last = "decode"
    with pytest.raises(CutShort):
        run("edit", [*task, "--dtype", "float32", "--pairs", "2"])
    content = table.read(out)
    assert [len(content["runs"][0]["systems"]["pbe"][what]) for what in edit.MEASURED] == [2, 1, 0]
    rows = rows_of(table.document(content))
    assert rows["edit s"] == []
    assert len(rows["UNet calls a second"]) == 1

    asked.clear()
    with pytest.raises(CutShort):
        run("scaling", [*task, "--steps", "2", "--pairs", "2", "--batches", "2", "--resolutions"])
    content = table.read(out)
    assert [len(content["batch"][0]["systems"]["pbe"][what]) for what in edit.MEASURED] == [2, 1, 0]
    assert len(rows_of(table.document(content))["batch 2"]) == 4  # seconds of a call and a decode, and their growth

    rounds = iter([{"seconds": 1.0, "GiB": 2.0}] * 3)  # each of two precisions
    monkeypatch.setattr(load, "run_once", lambda *_: next(rounds, None) or cut())
    with pytest.raises(CutShort):
        run("load", [*weights, "--repeats", "2", "--out", str(out)])
    content = table.read(out)
    assert [len(numbers) for numbers in content["results"].values()] == [2, 1]
    assert not content["finished"]


def test_what_is_measured_is_shown_when_a_run_is_stopped(tiny_checkpoint, monkeypatch, capsys):
    def measure(args):
        yield {"results": {"pbe, .ckpt, to float32": [{"seconds": 3.0}]}}
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "measure", measure)
    assert run("load", ["--ckpt", str(tiny_checkpoint)]) == 130
    assert "| pbe, .ckpt, to float32 | 3 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("without_processes")
def test_the_last_start_s_process_takes_the_rounds(tiny_checkpoint, monkeypatch):
    """So that no system loads more often than it is asked to start; the earlier ones end before the rounds."""
    made = []

    class Counted(WorkerHere):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(edit, "Worker", Counted)
    systems = ["pbe", "pbe, model kept"]
    args = Namespace(systems=systems, pairs=1, starts=2, budget=Budget(), together=False)
    *_, numbers = edit.measure_task(make_task(tiny_checkpoint), args)
    assert [worker.name for worker in made] == ["pbe", "pbe, model kept"] * 2
    assert all(worker.system is None for worker in made)
    assert [len(one["starts"]) for one in numbers["systems"].values()] == [2, 2]
    assert [len(one["edit"]) for one in numbers["systems"].values()] == [1, 1]


def scaling_content():
    """By hand: two rounds of two points, the second twice and four times as slow; the third did not fit."""
    measured = [
        dict.fromkeys(edit.MEASURED, seconds) | {"memory": {"peak RSS GiB": gib}}
        for seconds, gib in (([1.0, 3.0], 2.0), ([2.0, 12.0], 7.0))
    ]
    measured.append({"error": "out of memory"})
    task = {"batch": 1, "resolution": 64, "dtype": "float16", "steps": 2}
    content = {"section": "scaling", "device": "a CPU"}
    for axis, values in (("batch", (1, 2, 4)), ("resolution", (64, 128, 256))):
        points = zip(values, measured, strict=True)
        content[axis] = [{"task": task | {axis: value}, "systems": {"pbe": one}} for value, one in points]
    numbers = [{"seconds": 1.0, "GiB": 0.5, "seconds a visit": 2e-6}]
    content["index"] = [{"rows": rows, **dict.fromkeys(scaling.INDEX, numbers)} for rows in (1000, 2000)]
    return content


def test_table_of_growth_compares_within_a_round():
    rows = rows_of(scaling.growth(scaling_content(), "batch", "pbe"))
    assert rows["batch 1"][:2] == ["2 (1 to 3)", "1.00"]
    assert rows["batch 2"][:2] == ["7 (2 to 12)", "3.00"]  # of 2/1 and 12/3
    assert rows["batch 2"][-1] == "7.00"
    assert rows["batch 4"][0] == "out of memory"
    assert rows_of(scaling.tables(scaling_content()))["2,000 rows"][-1] == "2"


def test_only_a_full_gpu_is_no_failure(monkeypatch):
    """A process that ends for it is left out of the turns; what else ends one is an error."""

    class Failing:
        def __init__(self, name, task, folder):
            self.batch = task.batch
            if self.batch == 3:
                raise RuntimeError(reason)

        def ask(self, what):
            if what == "edit" and self.batch == 2:
                raise RuntimeError(reason)
            return {"seconds": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(scaling, "Worker", Failing)
    tasks = [make_task("a", batch=batch) for batch in (1, 2, 3)]
    reason = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
    *_, points = scaling.measure_edits(tasks, ["pbe"], 2, Budget())
    one, two, three = (point["systems"]["pbe"] for point in points)
    assert one == {"unet": [1, 1], "decode": [1, 1], "edit": [1, 1], "memory": {"seconds": 1}}
    assert two["error"] == three["error"] == "out of memory"
    reason = "no such file"
    with pytest.raises(RuntimeError, match="no such file"):
        list(scaling.measure_edits(tasks, ["pbe"], 2, Budget()))


def test_curves(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image

    file, out = tmp_path / "scaling.json", tmp_path / "scaling.png"
    file.write_text(json.dumps(about("scaling", []) | scaling_content()))
    assert plot.main([str(file), "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert len(image.getcolors(1 << 20)) > 10  # curves, not an empty page
    # an axis a file, as `all` has them; one axis; none
    content, names = scaling_content(), ("index", "batch", "resolution")
    files = [tmp_path / f"{name}.json" for name in names]
    for one, axis in zip(files, names, strict=True):
        one.write_text(json.dumps(about("scaling", []) | content | {name: [] for name in names if name != axis}))
    drawn = tmp_path / "drawn.png"
    assert plot.main([*map(str, files), "--out", str(drawn)]) == 0
    assert drawn.read_bytes() == out.read_bytes()
    assert plot.main([str(files[1]), "--out", str(drawn)]) == 0
    assert 3 * Image.open(drawn).width == Image.open(out).width
    file.write_text(json.dumps(about("scaling", []) | {name: [] for name in names}))
    assert plot.main([str(file), "--out", str(out)]) == 2
    assert f"{file} has no points yet" in capsys.readouterr().err
    file.write_text(json.dumps(about("edit", []) | {"runs": []}))
    assert plot.main([str(file), "--out", str(out)]) == 2
    assert "only 'scaling' has curves" in capsys.readouterr().err


# --- loading and data -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loading_is_measured_in_a_process_of_its_own(tiny_checkpoint):
    numbers = worker.run_once("benchmarks.load_worker", "pbe", str(tiny_checkpoint), "bfloat16")
    weights = sum(tensor.numel() for tensor in torch.load(tiny_checkpoint)["state_dict"].values())
    assert numbers["weights GiB"] == pytest.approx(2 * weights / 2**30)
    assert 0 < numbers["seconds"] <= numbers["seconds until every weight was read"]
    with pytest.raises(RuntimeError, match=r"load_worker pbe nowhere\.ckpt float32 ended with 1:[\s\S]*nowhere\.ckpt"):
        worker.run_once("benchmarks.load_worker", "pbe", "nowhere.ckpt", "float32")


def test_tables_of_loading_and_data():
    runs = [{"seconds": seconds, "peak GiB": 0.5} for seconds in (1.0, 2.0, 4.0)]
    rows = rows_of(load.tables({"results": {"pbe, .ckpt, to float32": runs}}))
    assert rows["pbe, .ckpt, to float32"] == ["2 (1 to 4)", "0.50"]
    timing = {"photos": 3, "plain": 10.0, "ours": 40.0, "speedup": 3.9}
    assert rows_of(data.tables({"recipes": {"256 px": timing}}))["256 px"] == ["3", "10.0", "40.0", "3.90"]


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_gives_commands_that_the_sections_take(device, quick, monkeypatch, tmp_path):
    gpu = type("Properties", (), {"total_memory": 50 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    commands = everything.sections(device, (tmp_path / "a.ckpt", tmp_path / "a"), quick)
    parsers = {name: section.parser() for name, section in sections.SECTIONS.items() if name != "data"}
    parsed = {name: parsers[name.partition("-")[0]].parse_args(command) for name, command in commands.items()}
    assert {name.partition("-")[0] for name in parsed} == set(parsers)
    for axis in ("batches", "resolutions", "rows"):  # each is a run of its own
        given = {other: getattr(parsed[f"scaling-{axis}"], other) for other in ("batches", "resolutions", "rows")}
        assert given.pop(axis) != []
        assert list(given.values()) == [[], []]
    if device == "cuda":
        fits = {name: parsed[name].limit_gib for name in parsed if name.startswith("train-fits")}
        assert fits == {"train-fits-24": [24], "train-fits-48": [48]}  # 80 GiB are more than there is
        gpu.total_memory = 16 * 2**30
        commands = everything.sections(device, (tmp_path / "a.ckpt", tmp_path / "a"), quick)
        assert not [name for name in commands if name.startswith("train-fits")]
        edits = [parsed[name] for name in parsed if name.startswith("edit")]
        assert {batch for one in edits for batch in one.batch} == {1, 4, 16}
        assert {name for one in edits for name in one.systems} == {*SYSTEMS} - {*edit.NOT_ON_CUDA}
        assert all(len(one.batch) == len(one.dtype) == 1 for one in edits)  # more would be lost at once
    else:
        assert parsed["train"].quick  # several full-size systems in training at once are more than memory holds


def test_all_goes_on_where_it_was_cut_short(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    ran = []

    class Section:
        tables = staticmethod(lambda content: "the numbers")

    def run(name, argv):
        ran.append(argv[0])
        if argv[0] == "fails":
            return 3
        with open(argv[-1], "w") as file:
            json.dump(about(argv[0], argv) | scaling_content() | {"finished": argv[0] != "cut"}, file)
        return 0

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # which is set otherwise
    monkeypatch.setattr(everything, "seeded_weights", lambda size, folder: (folder, folder))
    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(table, "SECTIONS", {"scaling": Section})
    monkeypatch.setattr(everything, "sections", lambda *_: {"edit": ["fails"], "scaling": ["first"]})
    monkeypatch.setattr(everything, "find_spec", lambda name: name != "matplotlib" or None)
    assert everything.main(["--out", str(tmp_path), "--device", "cpu"]) == 3
    assert not (tmp_path / "edit.json").exists()
    assert "edit failed" in capsys.readouterr().err
    assert (tmp_path / "tables.md").read_text().count("the numbers") == 1  # of what there is
    monkeypatch.setattr(everything, "sections", lambda *_: {"edit": ["second"], "scaling": ["first"]})
    assert everything.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert ran == ["fails", "first", "second"]
    assert (tmp_path / "tables.md").read_text().count("the numbers") == 2
    assert "no curves" in capsys.readouterr().err


def test_table_names_the_command_and_refuses_other_files(tmp_path, capsys):
    file = tmp_path / "edit.json"
    content = about("edit", ["--systems", "pbe, compiled"]) | {"runs": [edit_run()]}
    file.write_text(json.dumps(content))
    assert table.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert edit.tables(content) in out
    assert "`python -m benchmarks edit --systems 'pbe, compiled'`" in out
    for text, reason in (("{", "is not JSON"), ('{"versions": {}}', "'section' is None"), ("[]", "'section' is None")):
        file.write_text(text)
        assert table.main([str(file)]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("section, lacking", [("edit", "runs"), ("scaling", "index, batch, resolution")])
def test_a_run_without_its_numbers_is_refused_in_one_line(section, lacking, tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(about(section, [])))
    commands = [(table, [str(file)])]
    commands += [(plot, [str(file), "--out", str(tmp_path / "curves.png")])] if section == "scaling" else []
    for command, arguments in commands:
        assert command.main(arguments) == 2
        assert capsys.readouterr().err == f"error: {file} is not a whole run of '{section}': it lacks {lacking}\n"


def test_numbers_are_replaced_only_by_whole_ones(tmp_path):
    file = tmp_path / "made" / "run.json"
    write_json(file, {"runs": [1]})
    with pytest.raises(TypeError):
        write_json(file, {"runs": {1, 2}})
    assert json.loads(file.read_text()) == {"runs": [1]}
    assert [*file.parent.iterdir()] == [file]


def test_numbers_in_words():
    assert spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert spread([0.12345]) == "0.123"
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert times({"a": [1.0, 3.0], "b": [2.0, 9.0]}, "a") == {"a": "1", "b": "2.5 (2 to 3)"}
    assert markdown(["a", "b"], [["x", "1", "2"]]) == "|  | a | b |\n| --- | --- | --- |\n| x | 1 | 2 |"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section, arguments, reason",
    [
        ("edit", [], "give --ckpt, or --quick"),
        ("edit", ["--quick", "--ckpt", "CKPT"], "not both"),
        ("edit", ["--ckpt", "nowhere.ckpt", "--systems", "pbe"], "nowhere.ckpt: there is no such file"),
        ("edit", ["--ckpt", "CKPT", "--systems", "diffusers"], "'diffusers' needs --diffusers"),
        ("edit", ["--ckpt", "CKPT", "--systems", "pbe", "--resolution", "100"], "--resolution must be"),
        ("edit", ["--ckpt", "CKPT", "--systems", "pbe", "--pairs", "0"], "--pairs must be at least 1"),
        ("edit", ["--ckpt", "CKPT", "--systems", "pbe", "--batch", "1", "0"], "--batch must be at least 1"),
        ("edit", ["--ckpt", "CKPT", "--device", "tpu"], "--device must be cpu or cuda"),
        ("edit", ["--quick", "--systems", "diffusers, small card"], "needs --device cuda"),
        ("profile", ["--ckpt", "CKPT", "--systems", "pbe, compiled"], "no layers left to time"),
        ("scaling", ["--ckpt", "CKPT", "--resolutions", "64", "70"], "--resolution must be"),
        ("scaling", ["--ckpt", "CKPT", "--rows", "0"], "--rows must be at least 1"),
        ("scaling", ["--ckpt", "CKPT", "--batches", "--resolutions", "--rows"], "all without a number"),
        ("edit", ["--ckpt", "CKPT", "--systems", "pbe", "--steps", "1001"], "--steps must be at most 1000, got 1001"),
        ("edit", ["--ckpt", "CKPT", "--systems", "pbe", "--guidance", "nan"], "--guidance must be 0 or more, got nan"),
        ("edit", ["--ckpt", "CKPT", "--systems", "pbe", "--out", "/"], "--out / is a folder"),
        ("scaling", ["--ckpt", "CKPT", "--out", "CKPT/x.json"], "x.json cannot be written: "),
        ("train", ["--ckpt", "CKPT", "--out", "CKPT/x.json"], "x.json cannot be written: "),
        ("load", ["--ckpt", "nowhere.ckpt"], "nowhere.ckpt: there is no such file"),
        ("load", ["--ckpt", "CKPT", "--repeats", "0"], "--repeats must be at least 1"),
        ("load", ["--ckpt", "CKPT", "--out", "CKPT/x.json"], "x.json cannot be written: "),
        ("load", ["--ckpt", "CKPT", "--minutes", "0"], "--minutes must be above 0, got 0"),
        ("profile", ["--quick", "--systems", "openvino"], "no layers left to time"),
        ("data", ["boxes.csv", "--pairs", "0"], "--pairs must be at least 1"),
        ("data", ["boxes.csv", "--out", "/"], "--out / is a folder"),
        ("all", ["--out", "CKPT"], "cannot be made: "),
        ("all", ["--out", "x", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_arguments_give_one_clear_line(section, arguments, reason, tiny_checkpoint, capsys):
    arguments = [argument.replace("CKPT", str(tiny_checkpoint)) for argument in arguments]
    device = [] if "--device" in arguments or section in ("load", "data") else ["--device", "cpu"]
    with pytest.raises(SystemExit):
        COMMANDS[section]([*arguments, *device])
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_what_ends_a_process_is_told(tmp_path, capsys):
    """A file that is no checkpoint, found out by the process that reads it."""
    file = tmp_path / "text.ckpt"
    file.write_text("nothing")
    points = ["--batches", "1", "--resolutions", "--rows"]
    assert run("scaling", ["--ckpt", str(file), "--systems", "pbe", "--device", "cpu", *points]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the process of 'pbe' ended with 1")
    assert str(file) in err


def test_weights_of_a_quick_run_are_made_and_left_behind_nowhere(monkeypatch, tmp_path):
    made = []

    def seeded_weights(size, folder):
        made.append(folder)
        return folder / "a.ckpt", folder / "a"

    monkeypatch.setattr("benchmarks.arguments.seeded_weights", seeded_weights)
    args = sections.parse("edit", ["--quick", "--device", "cpu", "--systems", "pbe"])
    with weights(args) as files:
        assert made[0].is_dir()
    assert not made[0].exists()
    assert files == (str(made[0] / "a.ckpt"), str(made[0] / "a"))
    assert (args.resolution, args.steps, args.dtype) == (128, 2, ["float32"])


def test_without_a_folder_of_diffusers_this_library_alone_is_measured(tiny_checkpoint):
    args = sections.parse("edit", ["--ckpt", str(tiny_checkpoint), "--device", "cpu"])
    assert args.systems == ["pbe"]
