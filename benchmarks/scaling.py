"""How an edit's time and memory grow with the batch and the resolution, and a data set's with its rows.

    python -m benchmarks scaling --ckpt full.ckpt --dtype float16 --out scaling.json
    python -m benchmarks plot scaling.json --out scaling.png

Every point is a process, whose peak memory is its own. All points of a curve take turns, so that their ratios suffer
less from what else the machine does. Index and manifest are measured on Linux alone.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import edit, index_worker
from benchmarks.arguments import DTYPES, check_editing, check_models, make_parser, weights
from benchmarks.budget import Budget
from benchmarks.edit import MEASURED
from benchmarks.edit_worker import Task
from benchmarks.report import markdown, median_of, ratios, spread
from benchmarks.worker import Worker, run_once, unless_full

AXES = {"batch": "batch {}", "resolution": "{}²"}
INDEX = {"write": "index the CSV", "read": "open the index", "manifest": "open a manifest"}
ROWS = [10**3, 10**4, 10**5, 10**6]
POINTS = {
    "cuda": {"batches": [1, 2, 4, 8, 16], "resolutions": [512, 768, 1024, 1536, 2048]},
    "cpu": {"batches": [1, 2, 4], "resolutions": [256, 512, 768]},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {
        "systems": ["pbe"],
        "rows": ROWS,
        **points,
        **{key: edit.DEFAULTS[kind][key] for key in ("resolution", "steps")},
    }
    for kind, points in POINTS.items()
}
QUICK: dict[str, Any] = {
    "systems": ["pbe"],
    "resolution": 64,
    "steps": 2,
    "batches": [1, 2],
    "resolutions": [64, 128],
    "rows": [1000, 2000],
}


def parser() -> argparse.ArgumentParser:
    p = make_parser("scaling", __doc__)
    edit.add_editing_flags(p)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    for name, what in (("batches", "pictures at once"), ("resolutions", "sides in pixels, with batch 1")):
        default = f"default {POINTS['cuda'][name]} on a GPU, else {POINTS['cpu'][name]}"
        p.add_argument(f"--{name}", nargs="*", type=int, help=f"{what}; {default}; without a number: none")
    p.add_argument("--rows", nargs="*", type=int, help=f"of the index and the manifest; default {ROWS}; likewise")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_models(p, args, DEFAULTS, QUICK)
    check_editing(p, args, edit.SMALL_CARD)
    if not (args.batches or args.resolutions or args.rows):
        p.error("--batches, --resolutions and --rows are all without a number: give one of them some")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The points of each axis, then those of the rows: those so far after each figure."""
    content: dict[str, Any] = {"index": [], "batch": [], "resolution": []}
    with weights(args) as files:
        task = Task(*files, args.device, args.dtype, 1, args.resolution, args.steps, args.guidance)
        for axis, values in (("batch", args.batches), ("resolution", args.resolutions)):
            if not (values and args.budget.fits(axis)):
                continue
            tasks = [replace(task, **{axis: n}) for n in values]
            for content[axis] in measure_edits(tasks, args.systems, args.pairs, args.budget):
                yield content
    for content["index"] in measure_index(args.rows, args.pairs, args.budget):
        yield content


def measure_edits(
    tasks: Sequence[Task], systems: Sequence[str], rounds: int, budget: Budget
) -> Iterator[list[dict[str, Any]]]:
    """For each task and system the seconds of each thing and its peaks, or why there are none: `error`."""
    points: list[dict[str, Any]] = [{"task": asdict(task), "systems": {}} for task in tasks]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running: list[tuple[Worker, dict[str, Any]]] = []
        for task, point in zip(tasks, points, strict=True):
            for name in systems:
                worker = unless_full(partial(Worker, name, task, Path(folder, str(len(running)))))
                if worker is None:
                    point["systems"][name] = {"error": "out of memory"}
                    continue
                point["systems"][name] = {what: [] for what in MEASURED}
                running.append((stack.enter_context(closing(worker)), point["systems"][name]))
        for what in (*MEASURED, "memory"):
            for _ in budget.rounds(rounds, what) if what in MEASURED else range(1):
                for worker, measured in running:
                    if "error" in measured:
                        continue
                    answer = unless_full(partial(worker.ask, what))
                    if answer is None:
                        measured["error"] = "out of memory"
                    elif what == "memory":
                        measured["memory"] = answer
                    else:
                        measured[what].append(answer["seconds"])
                    yield points


def measure_index(rows: Sequence[int], rounds: int, budget: Budget) -> Iterator[list[dict[str, Any]]]:
    """For each number of rows and each of INDEX the numbers of each round."""
    points: list[dict[str, Any]] = [{"rows": count, **{what: [] for what in INDEX}} for count in rows]
    with tempfile.TemporaryDirectory() as folder:
        for count in rows:
            Path(folder, str(count)).mkdir()
            index_worker.write_tables(count, Path(folder, str(count)))
        for _ in budget.rounds(rounds if rows else 0, "index and manifest"):
            for point in points:
                for what in INDEX:
                    numbers = run_once(index_worker.__name__, what, str(Path(folder, str(point["rows"]))))
                    point[what].append(numbers)
                    yield points


# ----------------------------------------------------------------------------------------------------------------------
# The tables


def tables(content: dict[str, Any]) -> str:
    """Growth with the batch, the resolution and the rows, or what there is of them."""
    parts = [growth(content, axis, name) for axis in AXES if content[axis] for name in content[axis][0]["systems"]]
    if not content["index"]:
        return "\n\n".join(parts)
    columns = [column for what in INDEX.values() for column in (f"{what}: s", "GiB")]
    rows = []
    for point in content["index"]:
        cells = []
        for what in INDEX:
            cells.append(spread([one["seconds"] for one in point[what]]))
            cells.append(median_of([one["GiB"] for one in point[what]], ".3f"))
        visits = median_of([1e6 * one["seconds a visit"] for one in point["read"]], ".0f")
        rows.append([f"{point['rows']:,} rows", *cells, visits])
    return "\n\n".join([*parts, markdown([*columns, "µs a picture"], rows)])


def growth(content: dict[str, Any], axis: str, system: str) -> str:
    """One system's table along an axis: seconds, times the first point's (pair by pair), and peak memory."""
    points = content[axis]
    task, first = points[0]["task"], points[0]["systems"][system]
    other = next(name for name in AXES if name != axis)
    rows = []
    for point in points:
        measured = point["systems"].get(system, {"error": ""})  # not reached
        rows.append([AXES[axis].format(point["task"][axis])])
        if "error" in measured:
            rows[-1] += [measured["error"], *[""] * 2 * len(MEASURED)]
            continue
        for what in MEASURED:
            growth = "" if "error" in first else median_of(ratios(measured[what], first[what]), ".2f")
            rows[-1] += [spread(measured[what]), growth]
        rows[-1].append(f"{peak(measured):.2f}" if "memory" in measured else "")
    columns = [column for label in MEASURED.values() for column in (label, "times the first")]
    fixed = AXES[other].format(task[other])
    title = f"{system}, {task['dtype']}, {fixed}, {task['steps']} steps, {content['device']}"
    return f"{title}\n\n" + markdown([*columns, "peak GiB"], rows)


def peak(measured: dict[str, Any]) -> float:
    """The peak in GiB that counts: a GPU's, where there is one."""
    memory = measured["memory"]
    return memory["peak GPU GiB"] if "peak GPU GiB" in memory else memory["peak RSS GiB"]
