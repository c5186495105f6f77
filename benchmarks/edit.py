"""How fast an edit is, and how much memory it takes: this library against diffusers on the same weights and noise.

    python -m benchmarks edit --ckpt full.ckpt --diffusers full --out edit.json
    python -m benchmarks edit --quick

Every system is a process of its own that waits while the others work; on a CPU they take turns, so that a busy spell of
the machine meets all of them, and ratios are taken pair by pair; on a GPU one follows the other, so that what is cut
off is whole systems, unless they start --together. A machine without a GPU does less unless it is told more.
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

from benchmarks.arguments import (
    DTYPES,
    ON_CPU,
    PEERS,
    add_model_flags,
    check_editing,
    check_models,
    make_parser,
    weights,
)
from benchmarks.edit_worker import SYSTEMS, Task
from benchmarks.kinds import count_flops
from benchmarks.report import markdown, spread, times
from benchmarks.worker import Worker

MEASURED = {"unet": "UNet call s", "decode": "VAE decode s", "edit": "edit s"}
# of no use there, or in the place of a better one
NOT_ON_CUDA = ("pbe, model kept", "pbe, not prepared", "diffusers, compiled without trials", *ON_CPU)
SMALL_CARD = [name for name in SYSTEMS if name.endswith("small card")]
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "systems": [name for name in SYSTEMS if name not in NOT_ON_CUDA],
        "dtype": ["float16"],
        "batch": [1, 4, 16],
        "resolution": 512,
        "steps": 50,
    },
    "cpu": {
        "systems": ["pbe", "diffusers", "diffusers, best", "openvino"],
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
    p.add_argument("--together", action="store_true", help="start all systems at once, where compiling takes minutes")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_models(p, args, DEFAULTS, QUICK)
    check_editing(p, args, SMALL_CARD)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One run per precision and batch size: those so far after each figure."""
    runs: list[dict[str, Any]] = []
    yield {"runs": runs}
    with weights(args) as files:
        for dtype, batch in product(args.dtype, args.batch):
            task, done = Task(*files, args.device, dtype, batch, args.resolution, args.steps, args.guidance), runs
            for run in measure_task(task, args):
                runs = [*done, run]
                yield {"runs": runs}


def measure_task(task: Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The numbers of one task, after each: of all systems in turns or, on a GPU, of one after the other."""
    result = {name: {"starts": [], "differences": {}, **{what: [] for what in MEASURED}} for name in args.systems}
    run: dict[str, Any] = {"task": asdict(task), "systems": result}
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder, str(i)) for i, name in enumerate(args.systems)}
        turns = task.device == "cpu" or args.together
        for group in [args.systems] if turns else [[name] for name in args.systems]:
            if args.budget.fits(f"{', '.join(group)}, batch {task.batch}, {task.dtype}"):
                for _ in measure_group(task, args, {name: folders[name] for name in group}, run):
                    yield run
                for name in group:
                    result[name]["differences"] = differences(folders[args.systems[0]], folders[name])
                yield run


def measure_group(
    task: Task, args: argparse.Namespace, folders: dict[str, Path], run: dict[str, Any]
) -> Iterator[None]:
    """Adds the numbers of `args.starts` processes of each system, then of `args.pairs` rounds of all by the last."""
    with ExitStack() as stack:
        for last in [*[False] * (args.starts - 1), True]:
            workers = (stack.enter_context(closing(Worker(name, task, folder))) for name, folder in folders.items())
            starting = iter([*workers]) if args.together else workers  # or each when the one before is there
            if "TFLOP" not in run:  # while they start
                run["TFLOP"] = flops_of(task, args.systems)
            running = []
            for worker in starting:
                run["systems"][worker.name]["starts"].append(worker.started)
                running.append(worker)
                yield
                if not last:
                    worker.close()
        if "TFLOP/s of matmul" not in run:
            run["TFLOP/s of matmul"] = running[0].ask("matmul")["TFLOP/s"]
        expected = 0.0  # seconds of an edit, from its parts
        for what in MEASURED:
            rounds = args.budget.rounds(args.pairs, f"{what} of {', '.join(folders)}", expected * (what == "edit"))
            for worker in (worker for _ in rounds for worker in running):
                run["systems"][worker.name][what].append(worker.ask(what)["seconds"])
                yield
            latest = sum(run["systems"][name][what][-1] for name in folders if run["systems"][name][what])
            expected += latest * (task.steps + 1 if what == "unet" else 1)
        for worker in running:
            run["systems"][worker.name]["starts"][-1] |= worker.ask("memory")
            yield


def flops_of(task: Task, systems: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """`count_flops` of what the systems compute."""
    diffusers = task.diffusers if any(form_of(name) == "diffusers" for name in systems) else None
    return count_flops(task.ckpt, task.resolution, task.batch, diffusers)


def form_of(system: str) -> str:
    """Which of `count_flops`'s forms a system computes."""
    if system.startswith(PEERS):
        return "diffusers"
    if system == "pbe, not prepared":
        return "ordinary"
    # what is exported has plain upsampling too
    return "plain upsampling" if system.endswith("plain upsampling") or system == "onnx" else "prepared"


def differences(first: Path, second: Path) -> dict[str, dict[str, float]]:
    """Of the outputs that both folders hold the largest and the mean difference, as shares of the first's largest."""
    gaps = {}
    for what in MEASURED:
        files = [folder / f"{what}.pt" for folder in (first, second)]
        if all(file.exists() for file in files):
            a, b = map(torch.load, files)
            gap = (a - b).abs() / a.abs().max()
            gaps[what] = {"largest": gap.max().item(), "mean": gap.mean().item()}
    return gaps


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def tables(content: dict[str, Any]) -> str:
    """A table for each precision and batch size."""
    return "\n\n".join(table(run, content["device"]) for run in content["runs"])


def title(run: dict[str, Any], device: str, steps: str = "") -> str:
    """What a table is about, and the speed that its shares are of."""
    task, peak = run["task"], run.get("TFLOP/s of matmul")
    what = f"{task['dtype']}, batch {task['batch']}, {task['resolution']}²{steps}, {device}"
    return f"{what}; matrix products reach {peak:.3g} TFLOP/s" if peak else what


def table(run: dict[str, Any], device: str) -> str:
    """Medians with their range; how many times longer than this library's systems, the median of the pairs."""
    systems, peak = run["systems"], run.get("TFLOP/s of matmul")
    first = next(iter(systems))
    # a compiled system is compared with a compiled one
    references = [name for name in systems if name in (first, "pbe, compiled")]
    rows = []
    for what, label in MEASURED.items():
        values = {name: one[what] for name, one in systems.items()}
        rows.append([label, *map(spread, values.values())])
        for reference in references:
            rows.append([f"{label.removesuffix(' s')}, times {reference}", *times(values, reference).values()])
        gaps = {name: one["differences"].get(what) for name, one in systems.items()}
        cells = {name: f"{gap['largest']:.1e} ({gap['mean']:.1e})" if gap else "" for name, gap in gaps.items()}
        rows.append([f"{what}: largest (mean) difference", *(cells | {first: ""}).values()])
    rows.append(
        ["UNet calls a second", *(spread([1 / seconds for seconds in one["unet"]]) for one in systems.values())]
    )
    unet = {form: sum(kinds.values()) for form, kinds in run["TFLOP"]["unet"].items()}
    rows.append(["TFLOP of a UNet call", *(f"{unet[form_of(name)]:.3g}" for name in systems)])
    # of the network's own arithmetic, whatever a system saves of it
    rows.append(["MFU of a UNet call"])
    for one in systems.values():
        whole = peak and one["unet"]
        rows[-1].append(f"{unet['ordinary'] / statistics.median(one['unet']) / peak:.0%}" if whole else "")
    for key in dict.fromkeys(key for one in systems.values() for start in one["starts"] for key in start):
        values = {name: [start[key] for start in one["starts"] if key in start] for name, one in systems.items()}
        medians = {name: statistics.median(one) if one else None for name, one in values.items()}
        rows.append([key, *map(spread, values.values())])
        relative = [f"{one / medians[first]:.3g}" if one and medians[first] else "" for one in medians.values()]
        rows.append([f"{key.removesuffix(' s').replace(' GiB', '')}, times {first}", *relative])
    steps = f", {run['task']['steps']} steps"
    return f"{title(run, device, steps)}\n\n{markdown(systems, rows)}"
