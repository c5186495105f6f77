"""What an edit costs: its evaluations of the network, and its seconds, by setting and beside diffusers and OpenVINO.

    python -m benchmarks cost --ckpt full.ckpt --diffusers full --minutes 20 --out cost.json
    python -m benchmarks cost --quick

First the seconds of each edit are computed: from its calls of the network, counted, by the time of one of each kind,
and the rest of it, measured. Then whole edits are made, the shortest first, as many as --minutes allow, or all of them.
One system follows the other: full-size ones are more than memory holds together.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any

from benchmarks import edit
from benchmarks.arguments import DTYPES, add_model_flags, check_editing, check_models, make_parser, weights
from benchmarks.budget import Budget
from benchmarks.edit_worker import Task
from benchmarks.report import markdown, median_of, ratios, spread
from benchmarks.worker import Worker, workers

FEW = {"sampler": "dpm_solver", "spacing": "trailing", "steps": 20}
DISTILLED = {"sampler": "lcm", "spacing": "lcm", "steps": 4, "guidance": 1.0}
# by name the system, and the fields of EditSettings that differ from --steps PLMS steps at --guidance; the first is
# what the others are compared with
EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusers: PLMS": ("diffusers", {}),
    "diffusers, best: DPM-Solver++ 20": ("diffusers, best", FEW),
    "OpenVINO: DPM-Solver++ 20": ("openvino", FEW),
    "PLMS": ("pbe", {}),
    "PLMS, interval 200 to 800": ("pbe", {"guidance_interval": (200, 800)}),
    "PLMS, reuse 3": ("pbe", {"reuse": 3}),
    "DPM-Solver++ 20": ("pbe", FEW),
    "DPM-Solver++ 20, interval 200 to 800": ("pbe", FEW | {"guidance_interval": (200, 800)}),
    "DPM-Solver++ 20, reuse 3": ("pbe", FEW | {"reuse": 3}),
    "distilled, 4 steps": ("pbe", DISTILLED),
    "distilled, 4 steps, tiny decoder": ("pbe", DISTILLED | {"decoder": "tiny"}),
}
SYSTEMS = [*dict.fromkeys(system for system, _ in EDITS.values())]
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"systems": [name for name in SYSTEMS if name != "openvino"], "dtype": ["float16"]},
    "cpu": {"systems": SYSTEMS, "dtype": ["float32", "bfloat16"]},
}
QUICK: dict[str, Any] = {"dtype": ["float32"], "resolution": 128}


def parser() -> argparse.ArgumentParser:
    p = make_parser("cost", __doc__)
    add_model_flags(p, SYSTEMS, "of PLMS (default 50)")
    p.set_defaults(steps=50, pairs=1)
    p.add_argument("--guidance", type=float, default=5.0, help="default 5")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float16 on a GPU, else float32 and bfloat16")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_models(p, args, {kind: values | {"resolution": 512} for kind, values in DEFAULTS.items()}, QUICK)
    check_editing(p, args, edit.SMALL_CARD)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each precision the numbers of each edit, computed and whole: those so far after each."""
    yield {"runs": []}
    with weights(args) as files:
        tasks = [Task(*files, args.device, name, 1, args.resolution, args.steps, args.guidance) for name in args.dtype]
        runs: list[dict[str, Any]] = [{"task": asdict(task), "starts": {}, "edits": {}} for task in tasks]
        for (task, run), system in product(zip(tasks, runs, strict=True), args.systems):
            if not args.budget.fits(f"{system}, {task.dtype}"):
                continue
            with workers(task, [system]) as (worker,):
                for _ in compute(worker, task, run, args.pairs, args.budget):
                    yield {"runs": runs}
                for _ in make(worker, task, run, args.budget) if args.minutes is None else ():
                    yield {"runs": runs}
        for task, run in zip(tasks, runs, strict=True) if args.minutes else ():
            shortest = {system: min(seconds(run, system).values(), default=0.0) for system in run["starts"]}
            for system in sorted(shortest, key=shortest.__getitem__):
                if args.budget.fits(f"whole edits of {system}, {task.dtype}", run["starts"][system] + shortest[system]):
                    with workers(task, [system]) as (worker,):
                        for _ in make(worker, task, run, args.budget):
                            yield {"runs": runs}


def compute(worker: Worker, task: Task, run: dict[str, Any], pairs: int, budget: Budget) -> Iterator[None]:
    """Adds what each edit of a system would take, in `pairs` rounds of all of them."""
    run["starts"][worker.name] = worker.started["start to first prediction s"]
    for _ in budget.rounds(pairs, f"edits of {worker.name}, {task.dtype}"):
        for name in (name for name, (system, _) in EDITS.items() if system == worker.name):
            numbers = worker.ask(question(task, name, whole=False))
            run["edits"].setdefault(name, {"computed": [], "whole": []})["computed"].append(numbers)
            yield


def make(worker: Worker, task: Task, run: dict[str, Any], budget: Budget) -> Iterator[None]:
    """Adds the seconds of a system's edits from one of each, the shortest first."""
    assert worker.started
    expected = seconds(run, worker.name)
    for name in sorted(expected, key=expected.__getitem__):
        if budget.fits(f"the whole edit of {name}, {task.dtype}", expected[name]):
            run["edits"][name]["whole"].append(worker.ask(question(task, name, whole=True)))
            yield


def question(task: Task, name: str, whole: bool) -> str:
    """What a worker is asked for an edit's numbers."""
    settings = {"steps": task.steps, "guidance": task.guidance} | EDITS[name][1]
    return f"cost {json.dumps({'settings': settings, 'whole': whole})}"


def seconds(run: dict[str, Any], system: str) -> dict[str, float]:
    """What each edit of a system takes by computation, the median of its rounds."""
    computed = {name: one["computed"] for name, one in run["edits"].items() if EDITS[name][0] == system}
    return {name: statistics.median(numbers["seconds"] for numbers in one) for name, one in computed.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The table


def tables(content: dict[str, Any]) -> str:
    """A table for each precision."""
    return "\n\n".join(table(run, content["device"]) for run in content["runs"] if run["edits"])


def table(run: dict[str, Any], device: str) -> str:
    """An edit's seconds by computation and from a whole one, and how many of it the first edit takes, which is computed
    too where there is no whole one."""
    task, reference = run["task"], next(iter(run["edits"]))
    rows = []
    for name, one in run["edits"].items():
        first = one["computed"][0]
        calls = [[numbers["calls"][i][1] for numbers in one["computed"]] for i in range(len(first["calls"]))]
        counts = (count for count, _ in first["calls"])
        rows.append([name, str(first["evaluations"])])
        rows[-1].append(" + ".join(f"{n} × {spread(call)}" for n, call in zip(counts, calls, strict=True)))
        rows[-1].append(spread([numbers["rest"] for numbers in one["computed"]]))
        for how in ("computed", "whole"):
            of = run["edits"][reference]
            values, theirs = ([n["seconds"] for n in found] for found in (one[how], of[how] or of["computed"]))
            rows[-1] += [spread(values), median_of(ratios(theirs, values), ".3g")]
    title = f"{task['dtype']}, {task['resolution']}², PLMS with {task['steps']} steps, {device}"
    starts = ", ".join(f"{name} {start:.3g} s" for name, start in run["starts"].items())
    share = f"{reference}, times this"
    columns = ["evaluations", "calls of the network s", "the rest s", "computed s", share, "whole edit s", share]
    return f"{title}; start to first prediction: {starts}\n\n{markdown(columns, rows)}"
