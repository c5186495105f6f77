"""Where the time of a prediction and of decoding goes: convolutions, linear layers, attention, norms, and the rest.

    python -m benchmarks profile --ckpt full.ckpt --diffusers full --dtype float16 --batch 16

Each kind's speed is its products counted, over its time; beside it stands what share of the machine's measured matrix
products that is. Systems take turns, as in `edit` on a CPU. A compiled network has no layers left to time.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from benchmarks import edit
from benchmarks.arguments import DTYPES, ON_CPU, check_editing, check_models, make_parser, weights
from benchmarks.edit_worker import Task
from benchmarks.kinds import KINDS
from benchmarks.report import markdown
from benchmarks.worker import workers

PARTS = {"unet": "UNet call", "decode": "VAE decode"}
DEFAULTS = {kind: values | {"systems": ["pbe", "diffusers"]} for kind, values in edit.DEFAULTS.items()}
QUICK = {"systems": ["pbe", "diffusers"], "resolution": 128, "steps": 2}


def parser() -> argparse.ArgumentParser:
    p = make_parser("profile", __doc__)
    edit.add_editing_flags(p)
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32")
    p.add_argument("--batch", type=int, default=1, help="default 1")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_models(p, args, DEFAULTS, QUICK)
    check_editing(p, args, edit.SMALL_CARD)
    if compiled := [name for name in args.systems if "compiled" in name or name in ON_CPU]:
        p.error(f"{compiled[0]!r} has no layers left to time; choose systems that are not compiled")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The seconds of each kind, a round of all systems after the other: the run so far after each figure."""
    with weights(args) as files:
        task = Task(*files, args.device, args.dtype, args.batch, args.resolution, args.steps, args.guidance)
        flops = edit.flops_of(task, args.systems)
        result: dict[str, dict[str, list]] = {name: {part: [] for part in PARTS} for name in args.systems}
        with workers(task, args.systems) as running:
            peak = running[0].ask("matmul")["TFLOP/s"]
            run = {"task": asdict(task), "TFLOP/s of matmul": peak, "TFLOP": flops, "systems": result}
            for _ in args.budget.rounds(args.pairs, "profile"):
                for part in PARTS:
                    for worker in running:
                        result[worker.name][part].append(worker.ask(f"profile {part}"))
                        yield {"run": run}


def tables(content: dict[str, Any]) -> str:
    """A table for each part."""
    run = content["run"]
    return "\n\n".join([edit.title(run, content["device"]), *(table(run, part) for part in PARTS)])


def table(run: dict[str, Any], part: str) -> str:
    """Median seconds, their share, and the speed with its share of the matrix products' peak."""
    cells: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "all")}
    systems = {name: one for name, one in run["systems"].items() if one[part]}  # what was reached
    for name, system in systems.items():
        seconds = {kind: statistics.median(one[kind] for one in system[part]) for kind in KINDS}
        flops = run["TFLOP"][part][edit.form_of(name)]
        flops = {**flops, "all": sum(flops.values())}
        seconds["all"] = sum(seconds.values())
        for kind, values in cells.items():
            share = seconds[kind] / seconds["all"]
            values.append(f"{seconds[kind]:.3g} s, {share:.0%}")
            speed = flops.get(kind, 0) / seconds[kind] if seconds[kind] else 0
            values.append(f"{speed:.3g} ({speed / run['TFLOP/s of matmul']:.0%})" if kind in flops else "")
    columns = [column for name in systems for column in (name, "TFLOP/s (of peak)")]
    return f"{PARTS[part]}\n\n" + markdown(columns, [[kind, *values] for kind, values in cells.items()])
