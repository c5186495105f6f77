"""How long loading a checkpoint takes and how much memory: this library against diffusers on the same weights.

    python -m benchmarks load --ckpt full.ckpt full.safetensors --diffusers full

Every measurement is a process of its own; systems take turns, so that a busy spell of the machine meets all of them.
Measured on Linux.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import check_files, make_parser, need_diffusers
from benchmarks.report import markdown, spread
from benchmarks.worker import Numbers, run_once


def parser() -> argparse.ArgumentParser:
    p = make_parser("load", __doc__)
    p.add_argument("--ckpt", nargs="+", required=True, help="the weights as files that this library reads")
    p.add_argument("--diffusers", help="the same weights as a diffusers folder")
    p.add_argument("--repeats", type=int, default=3, help="rounds of all systems in turns (default 3)")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_files(p, [*args.ckpt, *filter(None, [args.diffusers])])
    if args.diffusers:
        need_diffusers(p, "--diffusers")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The numbers of each run, by system and precision: those so far after each."""
    systems = {f"pbe, {Path(path).suffix or 'folder'}": ("pbe", path) for path in args.ckpt}
    if args.diffusers:
        systems["diffusers, folder"] = ("diffusers", args.diffusers)
    results: dict[str, list[Numbers]] = {}
    for _ in args.budget.rounds(args.repeats, "load"):
        for dtype in ("float32", "bfloat16"):
            for name, (system, path) in systems.items():
                numbers = run_once("benchmarks.load_worker", system, path, dtype)
                results.setdefault(f"{name}, to {dtype}", []).append(numbers)
                yield {"results": results}


def tables(content: dict[str, Any]) -> str:
    """Medians, and the range of the times."""
    results = content["results"]
    columns = list(next(iter(results.values()))[0])
    rows = []
    for name, runs in results.items():
        rows.append([name])
        for column in columns:
            numbers = [run[column] for run in runs]
            rows[-1].append(spread(numbers) if "seconds" in column else f"{statistics.median(numbers):.2f}")
    return markdown(columns, rows)
