"""How fast an edit is, and how much memory it takes: this library against diffusers on the same weights and noise.

    python -m benchmarks edit --ckpt full.ckpt --diffusers full --out edit.json
    python -m benchmarks edit --quick

Every system is a process of its own that waits while the others work; they take turns, so that a busy spell of the
machine meets all of them, and ratios are taken pair by pair. A machine without a GPU does less unless it is told more.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import DTYPES, add_model_flags, check_editing, check_models, make_parser, weights
from benchmarks.edit_worker import SYSTEMS, Task
from benchmarks.kinds import count_flops
from benchmarks.report import markdown, spread, times
from benchmarks.worker import Worker

MEASURED = {"unet": "UNet call s", "decode": "VAE decode s", "edit": "edit s"}
SMALL_CARD = [name for name in SYSTEMS if name.endswith("small card")]
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "systems": [name for name in SYSTEMS if name != "pbe, model kept"],
        "dtype": ["float16"],
        "batch": [1, 4, 16],
        "resolution": 512,
        "steps": 50,
    },
    "cpu": {
        "systems": ["pbe", "diffusers", "diffusers, best"],
        "dtype": ["float32", "bfloat16"],
        "batch": [1],
        "resolution": 512,
        "steps": 2,
    },
}
QUICK: dict[str, Any] = {
    "systems": ["pbe", "diffusers"],
    "dtype": ["float32"],
    "batch": [1],
    "resolution": 128,
    "steps": 2,
}


def add_editing_flags(p: argparse.ArgumentParser) -> None:
    """The flags of all sections that run systems of `edit_worker`."""
    add_model_flags(p, SYSTEMS, "PLMS steps of an edit (default: 50 on a GPU, else 2, which tell as much)")
    p.add_argument("--guidance", type=float, default=5.0, help="default 5")


def parser() -> argparse.ArgumentParser:
    p = make_parser("edit", __doc__)
    add_editing_flags(p)
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float16 on a GPU, else float32 and bfloat16")
    p.add_argument("--batch", nargs="+", type=int, help="default: 1 4 16 on a GPU, else 1")
    p.add_argument("--starts", type=int, default=1, help="fresh processes of each system (default 1)")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_models(p, args, DEFAULTS, QUICK)
    check_editing(p, args, SMALL_CARD)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One run per precision and batch size: those so far after each."""
    runs = []
    with weights(args) as files:
        for dtype, batch in product(args.dtype, args.batch):
            task = Task(*files, args.device, dtype, batch, args.resolution, args.steps, args.guidance)
            runs.append(measure_task(task, args.systems, args.pairs, args.starts))
            yield {"runs": runs}


def measure_task(task: Task, systems: Sequence[str], pairs: int, starts: int) -> dict[str, Any]:
    """All numbers of one task: `starts` processes of each system, then `pairs` rounds of all in turns by the last."""
    result: dict[str, dict[str, Any]] = {name: {"starts": [], **{what: [] for what in MEASURED}} for name in systems}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folders = {name: Path(folder, str(i)) for i, name in enumerate(systems)}

        def start(name: str) -> Worker:
            worker = Worker(name, task, folders[name])
            worker.ask("edit")
            result[name]["starts"].append(worker.started | worker.ask("memory"))
            return worker

        for _ in range(starts - 1):
            for name in systems:
                start(name).close()
        workers = [stack.enter_context(closing(start(name))) for name in systems]
        peak = workers[0].ask("matmul")["TFLOP/s"]
        for what in MEASURED:
            for i in range(pairs + 1):
                for worker in workers:
                    seconds = worker.ask(what)["seconds"]
                    if i:  # the first warms up
                        result[worker.name][what].append(seconds)
        for worker in workers:
            outputs = {what: (workers[0].folder / f"{what}.pt", worker.folder / f"{what}.pt") for what in MEASURED}
            result[worker.name]["differences"] = {what: difference(*files) for what, files in outputs.items()}
    return {"task": asdict(task), "TFLOP/s of matmul": peak, "TFLOP": flops_of(task, systems), "systems": result}


def flops_of(task: Task, systems: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """`count_flops` of what the systems compute."""
    diffusers = task.diffusers if any(form_of(name) == "diffusers" for name in systems) else None
    return count_flops(task.ckpt, task.resolution, task.batch, diffusers)


def form_of(system: str) -> str:
    """Which of `count_flops`'s forms a system computes."""
    return "diffusers" if system.startswith("diffusers") else "prepared"


def difference(first: Path, second: Path) -> dict[str, float]:
    """The largest and the mean difference of two outputs, as shares of the first's largest value."""
    a, b = (torch.load(file) for file in (first, second))
    gap = (a - b).abs() / a.abs().max()
    return {"largest": gap.max().item(), "mean": gap.mean().item()}


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def tables(content: dict[str, Any]) -> str:
    """A table for each precision and batch size."""
    return "\n\n".join(table(run, content["device"]) for run in content["runs"])


def title(run: dict[str, Any], device: str, steps: str = "") -> str:
    """What a table is about, and the speed that its shares are of."""
    task = run["task"]
    return (
        f"{task['dtype']}, batch {task['batch']}, {task['resolution']}²{steps}, {device}; "
        f"matrix products reach {run['TFLOP/s of matmul']:.3g} TFLOP/s"
    )


def table(run: dict[str, Any], device: str) -> str:
    """Medians with their range; how many times longer than this library's systems, the median of the pairs."""
    systems = run["systems"]
    first = next(iter(systems))
    # a compiled system is compared with a compiled one
    references = [name for name in systems if name in (first, "pbe, compiled")]
    rows = []
    for what, label in MEASURED.items():
        values = {name: one[what] for name, one in systems.items()}
        rows.append([label, *map(spread, values.values())])
        for reference in references:
            rows.append([f"{label.removesuffix(' s')}, times {reference}", *times(values, reference).values()])
        gaps = {name: one["differences"][what] for name, one in systems.items()}
        cells = {name: f"{gap['largest']:.1e} ({gap['mean']:.1e})" for name, gap in gaps.items()}
        rows.append([f"{what}: largest (mean) difference", *(cells | {first: ""}).values()])
    unet = {form: sum(kinds.values()) for form, kinds in run["TFLOP"]["unet"].items()}
    rows.append(["TFLOP of a UNet call", *(f"{unet[form_of(name)]:.3g}" for name in systems)])
    # of the network's own arithmetic, whatever a system saves of it
    shares = [unet["ordinary"] / statistics.median(one["unet"]) / run["TFLOP/s of matmul"] for one in systems.values()]
    rows.append(["MFU of a UNet call", *(f"{share:.0%}" for share in shares)])
    for key in systems[first]["starts"][0]:
        values = {name: [start[key] for start in one["starts"]] for name, one in systems.items()}
        rows.append([key, *map(spread, values.values())])
        reference_median = statistics.median(values[first])
        relative = [f"{statistics.median(one) / reference_median:.3g}" for one in values.values()]
        rows.append([f"{key.removesuffix(' s').replace(' GiB', '')}, times {first}", *relative])
    steps = f", {run['task']['steps']} steps"
    return f"{title(run, device, steps)}\n\n{markdown(systems, rows)}"
