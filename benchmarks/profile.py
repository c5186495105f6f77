"""Where the time of a prediction and of decoding goes: convolutions, linear layers, attention, norms, and the rest.

    python -m benchmarks profile --ckpt full.ckpt --diffusers full --dtype float16 --batch 16

Each kind's speed is its products counted, over its time; beside it stands what share of the machine's measured matrix
products that is. Systems take turns, as in `edit`. A compiled network has no layers left to time.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.arguments import DEFAULTS, DTYPES, add_task_arguments, parse, task_of
from benchmarks.edit import Worker, form_of
from benchmarks.edit_worker import Task
from benchmarks.kinds import KINDS, count_flops
from benchmarks.report import about, markdown, write_json

PARTS = {"unet": "UNet call", "decode": "VAE decode"}
QUICK = {"systems": ["pbe", "diffusers"], "resolution": 128, "steps": 2}


def measure(task: Task, systems: Sequence[str], pairs: int) -> Iterator[dict]:
    """The seconds of each kind, a round of all systems after the other: the run so far after each."""
    diffusers = task.diffusers if any(name.startswith("diffusers") for name in systems) else None
    flops = count_flops(task.ckpt, task.resolution, task.batch, diffusers)
    result: dict[str, dict[str, list]] = {name: {part: [] for part in PARTS} for name in systems}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = [
            stack.enter_context(closing(Worker(name, task, Path(folder, str(i))))) for i, name in enumerate(systems)
        ]
        peak = workers[0].ask("matmul")["TFLOP/s"]
        for i in range(pairs + 1):
            for part in PARTS:
                for worker in workers:
                    seconds = worker.ask(f"profile {part}")
                    if i:  # the first warms up
                        result[worker.name][part].append(seconds)
            if i:
                yield {"task": asdict(task), "TFLOP/s of matmul": peak, "TFLOP": flops, "systems": result}


def tables(content: dict) -> str:
    """The Markdown of a run's JSON, a table for each part."""
    run = content["run"]
    task = run["task"]
    title = (
        f"{task['dtype']}, batch {task['batch']}, {task['resolution']}², {content['device']}; "
        f"matrix products reach {run['TFLOP/s of matmul']:.3g} TFLOP/s"
    )
    return "\n\n".join([title, *(table(run, part) for part in PARTS)])


def table(run: dict, part: str) -> str:
    """Median seconds, their share, and the speed with its share of the matrix products' peak."""
    cells: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "all")}
    for name, system in run["systems"].items():
        seconds = {kind: statistics.median(one[kind] for one in system[part]) for kind in KINDS}
        flops = run["TFLOP"][part][form_of(name)]
        flops = {**flops, "all": sum(flops.values())}
        seconds["all"] = sum(seconds.values())
        for kind, values in cells.items():
            share = seconds[kind] / seconds["all"]
            values.append(f"{seconds[kind]:.3g} s, {share:.0%}")
            speed = flops.get(kind, 0) / seconds[kind] if seconds[kind] else 0
            values.append(f"{speed:.3g} ({speed / run['TFLOP/s of matmul']:.0%})" if kind in flops else "")
    columns = [column for name in run["systems"] for column in (name, "TFLOP/s (of peak)")]
    return f"{PARTS[part]}\n\n" + markdown(columns, [[kind, *values] for kind, values in cells.items()])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmark.py profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(p)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    p.add_argument("--batch", type=int, default=1, help="default 1")
    p.add_argument("--pairs", type=int, default=3, help="rounds of all systems in turns (default 3)")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints a table for each part; returns the exit code."""
    p = parser()
    args = parse(p, argv, QUICK, {device: {"systems": ["pbe", "diffusers"]} for device in DEFAULTS})
    if compiled := [name for name in args.systems if name.endswith("compiled")]:
        p.error(f"{compiled[0]!r} has no layers left to time; choose systems that are not compiled")
    try:
        with ExitStack() as stack:
            task = replace(task_of(args, stack), dtype=args.dtype, batch=args.batch)
            content = about("profile", argv, args.device)
            for run in measure(task, args.systems, args.pairs):
                content["run"] = run
                write_json(args.out, content)  # after each round, so that a run that is cut short leaves what it has
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tables(content))
    return 0
