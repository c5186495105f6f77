"""How fast a training step is and what it takes, against the same step with diffusers' modules on the same weights.

    python -m benchmarks train --ckpt full.ckpt --diffusers full --out train.json
    python -m benchmarks train --ckpt full.ckpt --limit-gib 24 48 --out fits.json
    python -m benchmarks train --quick

A step is: encode image, masked image and exemplar, add noise, predict, go backwards, clip, AdamW, average. Every system
is a process of its own; on a CPU they take turns, so that a busy spell of the machine meets all of them, and ratios are
taken pair by pair. A GPU has no room for all of them, and takes one after the other. With --limit-gib it finds the
largest batch that fits so much of a GPU's memory instead.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_worker
from benchmarks.arguments import DTYPES, check_counts, check_out, check_weights, seeded_weights
from benchmarks.edit import Worker
from benchmarks.report import about, markdown, ratios, spread, write_json
from benchmarks.train_worker import SYSTEMS, Task

# of the first loss: other orders of sums, and in half precision other places where values are rounded
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
MAX_BATCH = 1024
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"dtype": ["bfloat16"], "batch": [4, 16, 32], "resolution": 512, "steps": 10},
    "cpu": {"dtype": ["float32", "bfloat16"], "batch": [1], "resolution": 512, "steps": 1},
}
QUICK = {"dtype": ["float32"], "batch": [2], "resolution": 64, "steps": 1}


class TrainWorker(Worker):
    """A process of `train_worker`."""

    def command(self, task: Task) -> list[str]:
        return train_worker.command(self.name, task)


def measure(task: Task, systems: Sequence[str], pairs: int) -> dict:
    """Seconds, losses and peaks of all systems after `pairs` rounds of `task.steps` steps, or why there are none: an
    `error`, where a GPU's memory does not suffice.

    Raises `RuntimeError` where the losses of the first step differ by more than TOLERANCE: it is not the same step.
    """
    result: dict[str, dict] = {}
    for group in [systems] if task.device == "cpu" else [[name] for name in systems]:
        try:
            result |= measure_in_turns(task, group, pairs)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            result |= {name: {"error": "out of memory"} for name in group}
    losses = {name: one["loss"] for name, one in result.items() if "error" not in one}
    first = next(iter(losses), None)
    for name, loss in losses.items():
        if not abs(loss / losses[first] - 1) <= TOLERANCE[task.dtype]:
            raise RuntimeError(f"the first loss of {name!r} is {loss}, that of {first!r} {losses[first]}")
    return {"task": asdict(task), "systems": result}


def measure_in_turns(task: Task, systems: Sequence[str], pairs: int) -> dict[str, dict]:
    """What `measure` finds of systems that are there all at once."""
    result = {name: {"seconds": [], "processor seconds": []} for name in systems}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = [
            stack.enter_context(closing(TrainWorker(name, task, Path(folder, str(i)))))
            for i, name in enumerate(systems)
        ]
        for i in range(pairs + 1):
            for worker in workers:
                answer = worker.ask("steps")
                if i:  # the first warms up, from the weights that all begin with
                    for key in ("seconds", "processor seconds"):
                        result[worker.name][key].append(answer[key])
                else:
                    result[worker.name]["loss"] = answer["loss"]
        for worker in workers:
            result[worker.name]["memory"] = worker.ask("memory")
    return result


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
    with tempfile.TemporaryDirectory() as folder:
        try:
            with closing(TrainWorker(name, task, Path(folder, "worker"))) as worker:
                return largest_batch(lambda size: bool(worker.ask(f"fits {size}")["fits"]))
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            return 0


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def tables(content: dict) -> str:
    """The Markdown of a run's JSON."""
    fits: dict[str, list[dict]] = {}
    for run in content["fits"]:
        fits.setdefault(run["task"]["dtype"], []).append(run)
    parts = [table(run, content["device"]) for run in content["runs"]]
    parts += [table_of_fits(runs, content["device"]) for runs in fits.values()]
    return "\n\n".join(parts)


def table(run: dict, device: str) -> str:
    """Medians with their range, and how many times longer than the first system that found room, the median of the
    pairs."""
    systems, task = run["systems"], run["task"]
    measured = {name: one for name, one in systems.items() if "error" not in one}
    average, compiled = (
        f", {name}" if task[key] else "" for key, name in (("ema", "averages"), ("compile", "compiled"))
    )
    title = f"{task['dtype']}, batch {task['batch']}, {task['resolution']}²{average}{compiled}, {device}"
    speeds = {name: [task["batch"] / seconds for seconds in one["seconds"]] for name, one in measured.items()}
    rows = {"pictures a second": {name: one["error"] for name, one in systems.items() if "error" in one}}
    rows["pictures a second"] |= {name: spread(one) for name, one in speeds.items()}
    if measured:
        first, reference = next(iter(measured.items()))
        for key in ("seconds", "processor seconds"):
            times = {name: spread(ratios(one[key], reference[key])) for name, one in measured.items()}
            rows[f"{key} a step"] = {name: spread(one[key]) for name, one in measured.items()}
            rows[f"{key}, times {first}"] = times | {first: "1"}
        rows["loss of the first step"] = {name: f"{one['loss']:.6f}" for name, one in measured.items()}
        for key in reference["memory"]:
            rows[key] = {name: f"{one['memory'][key]:.2f}" for name, one in measured.items()}
    cells = [[label, *(row.get(name, "") for name in systems)] for label, row in rows.items()]
    return f"{title}\n\n{markdown(systems, cells)}"


def table_of_fits(runs: Sequence[dict], device: str) -> str:
    """The largest batches, a column for each limit."""
    task = runs[0]["task"]
    title = f"largest batch, {task['dtype']}, {task['resolution']}²{', averages' if task['ema'] else ''}, {device}"
    sizes = [{name: str(size or "none") for name, size in run["largest batch"].items()} for run in runs]
    rows = [[name, *(one.get(name, "") for one in sizes)] for name in sizes[0]]  # a run cut short lacks some
    return f"{title}\n\n" + markdown([f"{run['task']['limit_gib']:g} GiB" for run in runs], rows)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmark.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ckpt", help="the weights as a file that this library reads")
    p.add_argument("--diffusers", help="the same weights as a diffusers folder; diffusers is in the extra bench")
    names = ", ".join(map(repr, SYSTEMS))
    p.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, metavar="NAME", help=f"of {names} (default: the whole model)"
    )
    p.add_argument("--device", choices=DEFAULTS, default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bfloat16, on a CPU float32 too")
    p.add_argument("--batch", nargs="+", type=int, help="default: 4 16 32 on a GPU, else 1")
    p.add_argument("--resolution", type=int, help="side in pixels, a multiple of 64 (default 512)")
    p.add_argument("--steps", type=int, help="optimiser steps a turn (default: 10 on a GPU, else 1)")
    p.add_argument("--pairs", type=int, default=3, help="rounds of all systems in turns (default 3)")
    p.add_argument("--ema", action="store_true", help="keep a moving average of what trains, adapters excepted")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet of all systems")
    p.add_argument("--limit-gib", nargs="+", type=float, help="find the largest batch in so much of the GPU's memory")
    p.add_argument("--quick", action="store_true", help="small seeded weights and few steps: a minute on a CPU")
    p.add_argument("--out", type=Path, help="write the numbers as JSON; `benchmark.py table` reads it")
    return p


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked; those not given are --quick's or the device's."""
    p = parser()
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    for name, value in (DEFAULTS[args.device] | (QUICK if args.quick else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.systems is None:
        theirs = bool(args.diffusers or args.quick)
        args.systems = [name for name in SYSTEMS if "adapters" not in name and (theirs or "diffusers" not in name)]
    check_weights(p, args)
    if args.resolution % 64 or args.resolution < 64:
        p.error(f"--resolution must be a positive multiple of 64, got {args.resolution}")
    check_counts(p, args)
    check_out(p, args.out)
    if args.limit_gib:
        if args.device != "cuda":
            p.error("--limit-gib limits a GPU's memory: it needs --device cuda")
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        for limit in args.limit_gib:
            if not 0 < limit <= total:
                p.error(f"--limit-gib {limit:g}: this GPU has {total:.1f} GiB")
    return args


def main(argv: Sequence[str]) -> int:
    """Prints a table for each precision and batch size, or one of what fits; returns the exit code."""
    args = parse(argv)
    content: dict[str, Any] = {**about("train", argv, args.device), "runs": [], "fits": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            ckpt, diffusers = args.ckpt, args.diffusers or ""
            if args.quick:
                ckpt, diffusers = map(str, seeded_weights("small", Path(folder)))
            base = Task(ckpt, diffusers, args.device, "", 0, args.resolution, args.steps, args.ema, args.compile)
            for dtype in args.dtype:
                for limit in args.limit_gib or []:
                    task, sizes = replace(base, dtype=dtype, limit_gib=limit), {}
                    content["fits"].append({"task": asdict(task), "largest batch": sizes})
                    for name in args.systems:
                        sizes[name] = measure_fits(task, name)
                        write_json(args.out, content)  # after each, so that a run that is cut short leaves what it has
                for batch in [] if args.limit_gib else args.batch:
                    content["runs"].append(measure(replace(base, dtype=dtype, batch=batch), args.systems, args.pairs))
                    write_json(args.out, content)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tables(content))
    return 0
