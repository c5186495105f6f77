"""How fast a training step is and what it takes, against the same step with diffusers' modules on the same weights.

    python -m benchmarks train --ckpt full.ckpt --diffusers full --out train.json
    python -m benchmarks train --ckpt full.ckpt --limit-gib 24 48 --out fits.json
    python -m benchmarks train --quick

A step is: encode image, masked image and exemplar, add noise, predict, go backwards, clip, AdamW, average. Every system
is a process of its own; on a CPU they take turns, so that a busy spell of the machine meets all of them, and ratios are
taken pair by pair. A GPU has no room for all of them, and takes one after the other. With --limit-gib it finds the
largest batch that fits into a part of a GPU's memory instead.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import DTYPES, add_model_flags, check_models, make_parser, weights
from benchmarks.budget import Budget
from benchmarks.report import markdown, spread, times
from benchmarks.train_worker import SYSTEMS, Task
from benchmarks.worker import Worker, is_full, unless_full, workers

# of the first loss: other orders of sums, and in half precision other places where values are rounded
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
MAX_BATCH = 1024
WHOLE = [name for name in SYSTEMS if "adapters" not in name]  # of systems, those that train the whole model
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"systems": WHOLE, "dtype": ["bfloat16"], "batch": [4, 16, 32], "resolution": 512, "steps": 10},
    "cpu": {"systems": WHOLE, "dtype": ["float32", "bfloat16"], "batch": [1], "resolution": 512, "steps": 1},
}
QUICK: dict[str, Any] = {"dtype": ["float32"], "batch": [2], "resolution": 64, "steps": 1}


def parser() -> argparse.ArgumentParser:
    p = make_parser("train", __doc__)
    add_model_flags(p, SYSTEMS, "optimiser steps a turn (default: 10 on a GPU, else 1)")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16, on a CPU float32 too")
    p.add_argument("--batch", nargs="+", type=int, help="default: 4 16 32 on a GPU, else 1")
    p.add_argument("--ema", action="store_true", help="keep a moving average of what trains, adapters excepted")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet of all systems")
    p.add_argument(
        "--limit-gib", nargs="+", type=float, default=[], help="find the largest batch in this much of a GPU's memory"
    )
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_models(p, args, DEFAULTS, QUICK)
    if args.limit_gib and args.device == "cpu":
        p.error("--limit-gib limits a GPU's memory: it needs --device cuda")
    for limit in args.limit_gib:
        total = torch.cuda.get_device_properties(args.device).total_memory / 2**30
        if not 0 < limit <= total:
            p.error(f"--limit-gib {limit:g}: this GPU has {total:.1f} GiB")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One run per precision and batch size, or with limits the largest batches: those so far after each figure."""
    content: dict[str, Any] = {"runs": [], "fits": []}
    yield content
    with weights(args) as files:
        base = Task(*files, args.device, "", 0, args.resolution, args.steps, args.ema, args.compile)
        for dtype, limit in product(args.dtype, args.limit_gib):
            task = replace(base, dtype=dtype, limit_gib=limit)
            sizes: dict[str, int] = {}
            content["fits"].append({"task": asdict(task), "largest batch": sizes})
            for name, _ in zip(args.systems, args.budget.rounds(len(args.systems), "largest batches"), strict=False):
                sizes[name] = measure_fits(task, name)
                yield content
        for dtype, batch in product(args.dtype, [] if args.limit_gib else args.batch):
            task = replace(base, dtype=dtype, batch=batch)
            result: dict[str, dict[str, Any]] = {}
            content["runs"].append({"task": asdict(task), "systems": result})
            for _ in measure_task(task, result, args.systems, args.pairs, args.budget):
                yield content


def measure_task(
    task: Task, result: dict[str, dict[str, Any]], systems: Sequence[str], pairs: int, budget: Budget
) -> Iterator[None]:
    """Fills in seconds, losses and peaks of all systems, after each, by `pairs` rounds of `task.steps` steps, or why
    there are none: an `error`, where a GPU's memory is not enough.

    Raises `RuntimeError` where the losses of the first step differ by more than TOLERANCE: it is not the same step.
    """
    for group in [systems] if task.device == "cpu" else [[name] for name in systems]:
        if not budget.fits(f"{', '.join(group)}, batch {task.batch}, {task.dtype}"):
            continue
        try:
            yield from measure_in_turns(task, result, group, pairs, budget)
        except RuntimeError as error:
            if not is_full(error):
                raise
            result |= {name: {"error": "out of memory"} for name in group}
            yield
    losses = {name: one["loss"] for name, one in result.items() if "loss" in one}
    for name, loss in losses.items():
        first, expected = next(iter(losses.items()))
        if not abs(loss / expected - 1) <= TOLERANCE[task.dtype]:
            raise RuntimeError(f"the first loss of {name!r} is {loss}, that of {first!r} {expected}")


def measure_in_turns(
    task: Task, result: dict[str, dict[str, Any]], systems: Sequence[str], pairs: int, budget: Budget
) -> Iterator[None]:
    """What `measure_task` finds of systems that are there all at once."""
    result |= {name: {"seconds": [], "processor seconds": []} for name in systems}
    with workers(task, systems) as running:
        for i in budget.rounds(pairs + 1, f"steps of {', '.join(systems)}"):
            for worker in running:
                answer = worker.ask("steps")
                if i:  # the first warms up, from the weights that all begin with
                    for key in ("seconds", "processor seconds"):
                        result[worker.name][key].append(answer[key])
                else:
                    result[worker.name]["loss"] = answer["loss"]
                yield
        for worker in running:
            result[worker.name]["memory"] = worker.ask("memory")
            yield


def largest_batch(fits: Callable[[int], bool], highest: int = MAX_BATCH) -> int:
    """The largest number up to `highest` that fits, where all below one that fits do too; 0 if none does."""
    low, high = 0, 1  # low fits
    while high <= highest and fits(high):
        low, high = high, 2 * high
    high = min(high, highest + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_fits(task: Task, name: str) -> int:
    """The largest batch of a system under the task's limit; 0 where not even the weights fit."""

    def search(folder: Path) -> int:
        with closing(Worker(name, task, folder)) as worker:
            return largest_batch(lambda size: bool(worker.ask(f"fits {size}")["fits"]))

    with tempfile.TemporaryDirectory() as folder:
        return unless_full(partial(search, Path(folder, "worker"))) or 0


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def tables(content: dict[str, Any]) -> str:
    """One table per run, and one of what fits per precision."""
    fits: dict[str, list[dict]] = {}
    for run in content["fits"]:
        fits.setdefault(run["task"]["dtype"], []).append(run)
    parts = [table(run, content["device"]) for run in content["runs"]]
    parts += [table_of_fits(runs, content["device"]) for runs in fits.values()]
    return "\n\n".join(parts)


def table(run: dict[str, Any], device: str) -> str:
    """Medians with their range, and how many times longer than the first system that found room, the median of the
    pairs."""
    systems, task = run["systems"], run["task"]
    measured = {name: one for name, one in systems.items() if one.get("seconds")}
    average, compiled = (
        f", {name}" if task[key] else "" for key, name in (("ema", "averages"), ("compile", "compiled"))
    )
    title = f"{task['dtype']}, batch {task['batch']}, {task['resolution']}²{average}{compiled}, {device}"
    speeds = {name: [task["batch"] / seconds for seconds in one["seconds"]] for name, one in measured.items()}
    rows = {"pictures a second": {name: one["error"] for name, one in systems.items() if "error" in one}}
    rows["pictures a second"] |= {name: spread(one) for name, one in speeds.items()}
    if measured:
        first = next(iter(measured))
        for key in ("seconds", "processor seconds"):
            values = {name: one[key] for name, one in measured.items()}
            rows[f"{key} a step"] = {name: spread(one) for name, one in values.items()}
            rows[f"{key}, times {first}"] = times(values, first)
        rows["loss of the first step"] = {name: f"{one['loss']:.6f}" for name, one in measured.items()}
        peaks = {name: one["memory"] for name, one in measured.items() if "memory" in one}
        for key in dict.fromkeys(key for one in peaks.values() for key in one):
            rows[key] = {name: f"{one[key]:.2f}" for name, one in peaks.items()}
    cells = [[label, *(row.get(name, "") for name in systems)] for label, row in rows.items()]
    return f"{title}\n\n{markdown(systems, cells)}"


def table_of_fits(runs: Sequence[dict[str, Any]], device: str) -> str:
    """The largest batches, a column for each limit."""
    task = runs[0]["task"]
    title = f"largest batch, {task['dtype']}, {task['resolution']}²{', averages' if task['ema'] else ''}, {device}"
    sizes = [{name: str(size or "none") for name, size in run["largest batch"].items()} for run in runs]
    rows = [[name, *(one.get(name, "") for one in sizes)] for name in sizes[0]]  # a run cut short lacks some
    return f"{title}\n\n" + markdown([f"{run['task']['limit_gib']:g} GiB" for run in runs], rows)
