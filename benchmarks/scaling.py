"""How an edit's time and memory grow with the batch and the resolution, and a data set's with its rows.

    python -m benchmarks scaling --ckpt full.ckpt --dtype float16 --out scaling.json
    python -m benchmarks plot scaling.json --out scaling.png

Every point is a process, whose peak memory is its own. All points of a curve take turns, so that their ratios suffer
less from what else the machine does. Index and manifest are measured on Linux alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from benchmarks import index_worker
from benchmarks.arguments import DTYPES, add_task_arguments, parse, task_of
from benchmarks.edit import MEASURED, Worker
from benchmarks.edit_worker import Task
from benchmarks.report import about, markdown, ratios, spread, write_json

T = TypeVar("T")
AXES = {"batch": "batch {}", "resolution": "{}²"}
INDEX = {"write": "index the CSV", "read": "open the index", "manifest": "open a manifest"}
ROWS = [10**3, 10**4, 10**5, 10**6]
POINTS = {
    "cuda": {"batches": [1, 2, 4, 8, 16], "resolutions": [512, 768, 1024, 1536, 2048]},
    "cpu": {"batches": [1, 2, 4], "resolutions": [256, 512, 768]},
}
QUICK = {
    "systems": ["pbe"],
    "resolution": 64,
    "steps": 2,
    "batches": [1, 2],
    "resolutions": [64, 128],
    "rows": [1000, 2000],
}


def measure_edits(tasks: Sequence[Task], systems: Sequence[str], rounds: int) -> list[dict]:
    """For each task and system the seconds of each thing and its peaks, or why there are none: `error`."""
    points = [{"task": asdict(task), "systems": {}} for task in tasks]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        numbers, workers = [], []
        for task, point in zip(tasks, points, strict=True):
            for name in systems:
                point["systems"][name] = {what: [] for what in MEASURED}
                numbers.append(point["systems"][name])
                start = partial(Worker, name, task, Path(folder, str(len(workers))))
                worker = unless_full(start, numbers[-1])
                workers.append(worker and stack.enter_context(closing(worker)))
        for what in (*MEASURED, "memory"):
            for i in range(rounds + 1 if what in MEASURED else 1):
                for worker, measured in zip(workers, numbers, strict=True):
                    if "error" in measured:
                        continue
                    answer = unless_full(partial(worker.ask, what), measured)
                    if what == "memory":
                        measured["memory"] = answer
                    elif i and answer:  # the first round warms up
                        measured[what].append(answer["seconds"])
    return points


def unless_full(call: Callable[[], T], measured: dict) -> T | None:
    """What the call returns; None, with the `error` noted, where a GPU's memory does not suffice."""
    try:
        return call()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        measured["error"] = "out of memory"
        return None


def measure_index(rows: Sequence[int], rounds: int) -> list[dict]:
    """For each number of rows and each of INDEX the numbers of each round."""
    points = [{"rows": count, **{what: [] for what in INDEX}} for count in rows]
    with tempfile.TemporaryDirectory() as folder:
        for count in rows:
            Path(folder, str(count)).mkdir()
            index_worker.write_tables(count, Path(folder, str(count)))
        for _ in range(rounds):
            for point in points:
                for what in INDEX:
                    command = [sys.executable, "-m", index_worker.__name__, what, str(Path(folder, str(point["rows"])))]
                    run = subprocess.run(command, capture_output=True, text=True, check=False)
                    if run.returncode:
                        raise RuntimeError(f"a measured process failed:\n{run.stderr[-2000:]}")
                    point[what].append(json.loads(run.stdout))
    return points


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def tables(content: dict) -> str:
    """The Markdown of a run's JSON: growth with the batch, the resolution and the rows, or what there is of them."""
    parts = [growth(content, axis, name) for axis in AXES if content[axis] for name in content[axis][0]["systems"]]
    if not content["index"]:
        return "\n\n".join(parts)
    columns = [column for what in INDEX.values() for column in (f"{what}: s", "GiB")]
    rows = []
    for point in content["index"]:
        cells = []
        for what in INDEX:
            cells.append(spread([one["seconds"] for one in point[what]]))
            cells.append(f"{statistics.median(one['GiB'] for one in point[what]):.3f}")
        visits = statistics.median(one["seconds a visit"] for one in point["read"])
        rows.append([f"{point['rows']:,} rows", *cells, f"{1e6 * visits:.0f}"])
    return "\n\n".join([*parts, markdown([*columns, "µs a picture"], rows)])


def growth(content: dict, axis: str, system: str) -> str:
    """One system's table along an axis: seconds, times the first point's (pair by pair), and peak memory."""
    points = content[axis]
    task, first = points[0]["task"], points[0]["systems"][system]
    other = next(name for name in AXES if name != axis)
    rows = []
    for point in points:
        measured = point["systems"][system]
        rows.append([AXES[axis].format(point["task"][axis])])
        if "error" in measured:
            rows[-1] += [measured["error"], *[""] * 2 * len(MEASURED)]
            continue
        for what in MEASURED:
            growth = "" if "error" in first else f"{statistics.median(ratios(measured[what], first[what])):.2f}"
            rows[-1] += [spread(measured[what]), growth]
        rows[-1].append(f"{peak(measured):.2f}")
    columns = [column for label in MEASURED.values() for column in (label, "times the first")]
    fixed = AXES[other].format(task[other])
    title = f"{system}, {task['dtype']}, {fixed}, {task['steps']} steps, {content['device']}"
    return f"{title}\n\n" + markdown([*columns, "peak GiB"], rows)


def peak(measured: dict) -> float:
    """The peak in GiB that counts: a GPU's, where there is one."""
    memory = measured["memory"]
    return memory["peak GPU GiB"] if "peak GPU GiB" in memory else memory["peak RSS GiB"]


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmark.py scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(p)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    for name, what in (("batches", "pictures at once"), ("resolutions", "sides in pixels, with batch 1")):
        default = f"default {POINTS['cuda'][name]} on a GPU, else {POINTS['cpu'][name]}"
        p.add_argument(f"--{name}", nargs="*", type=int, help=f"{what}; {default}; without a number: none")
    p.add_argument("--rows", nargs="*", type=int, help=f"of the index and the manifest; default {ROWS}; likewise")
    p.add_argument("--pairs", type=int, default=3, help="rounds of all points in turn (default 3)")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints the tables; returns the exit code."""
    points = {kind: {"systems": ["pbe"], "rows": ROWS, **values} for kind, values in POINTS.items()}
    p = parser()
    args = parse(p, argv, QUICK, points)
    if not (args.batches or args.resolutions or args.rows):
        p.error("--batches, --resolutions and --rows are all without a number: give one of them some")
    content = {**about("scaling", argv, args.device), "index": [], "batch": [], "resolution": []}
    try:
        with ExitStack() as stack:
            task = replace(task_of(args, stack), dtype=args.dtype)
            for axis, values in (("batch", args.batches), ("resolution", args.resolutions)):
                content[axis] = measure_edits([replace(task, **{axis: n}) for n in values], args.systems, args.pairs)
                write_json(args.out, content)  # after each, so that a run that is cut short leaves what it has
            content["index"] = measure_index(args.rows, args.pairs)
            write_json(args.out, content)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tables(content))
    return 0
