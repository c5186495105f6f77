"""How fast an edit is, and how much memory it takes: this library against diffusers on the same weights and noise.

    python -m benchmarks edit --ckpt full.ckpt --diffusers full --out edit.json
    python -m benchmarks edit --quick

Every system is a process of its own that waits while the others work; they take turns, so that a busy spell of the
machine meets all of them, and ratios are taken pair by pair. A machine without a GPU does less unless it is told more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import edit_worker
from benchmarks.arguments import DEFAULTS, DTYPES, add_task_arguments, parse, task_of
from benchmarks.edit_worker import Task
from benchmarks.kinds import count_flops
from benchmarks.report import about, markdown, ratios, spread, write_json

MEASURED = {"unet": "UNet call s", "decode": "VAE decode s", "edit": "edit s"}
QUICK: dict[str, Any] = {
    "systems": ["pbe", "diffusers"],
    "dtype": ["float32"],
    "batch": [1],
    "resolution": 128,
    "steps": 2,
}


class Worker:
    """A system's process; `ask` it for one thing at a time.

    What it compiles is kept in TORCHINDUCTOR_CACHE_DIR, or else in a folder beside its own, where the next process of
    the same run finds it.
    """

    def __init__(self, name: str, task: Task, folder: Path):
        folder.mkdir(exist_ok=True)
        self.name, self.folder = name, folder
        with open(folder / "stderr.txt", "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                self.command(task),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={"TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "compiled"), **os.environ},
            )
        self.started = self.answer()

    def command(self, task: Task) -> list[str]:
        return edit_worker.command(self.name, task, self.folder)

    def ask(self, what: str) -> dict[str, float]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code, errors = self.process.wait(), (self.folder / "stderr.txt").read_text(encoding="utf-8")
        raise RuntimeError(f"the process of {self.name!r} ended with {code}:\n{errors[-2000:]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def measure(task: Task, systems: Sequence[str], pairs: int, starts: int) -> dict:
    """All numbers of one task: `starts` processes of each system, then `pairs` rounds of all in turns by the last."""
    result = {name: {"starts": [], **{what: [] for what in MEASURED}} for name in systems}
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
    diffusers = task.diffusers if any(name.startswith("diffusers") for name in systems) else None
    flops = count_flops(task.ckpt, task.resolution, task.batch, diffusers)
    return {"task": asdict(task), "TFLOP/s of matmul": peak, "TFLOP": flops, "systems": result}


def difference(first: Path, second: Path) -> dict[str, float]:
    """The largest and the mean difference of two outputs, as shares of the first's largest value."""
    a, b = (torch.load(file) for file in (first, second))
    gap = (a - b).abs() / a.abs().max()
    return {"largest": gap.max().item(), "mean": gap.mean().item()}


# ----------------------------------------------------------------------------------------------------------------------
# The table


def tables(content: dict) -> str:
    """The Markdown of a run's JSON, a table for each precision and batch size."""
    return "\n\n".join(table(run, content["device"]) for run in content["runs"])


def table(run: dict, device: str) -> str:
    """Medians with their range; how many times longer than this library's systems, the median of the pairs."""
    systems, task = run["systems"], run["task"]
    first = next(iter(systems))
    # a compiled system is compared with a compiled one
    references = [name for name in systems if name in (first, "pbe, compiled")]
    title = (
        f"{task['dtype']}, batch {task['batch']}, {task['resolution']}², {task['steps']} steps, {device}; "
        f"matrix products reach {run['TFLOP/s of matmul']:.3g} TFLOP/s"
    )
    rows = []
    for what, label in MEASURED.items():
        rows.append([label, *(spread(one[what]) for one in systems.values())])
        for reference in references:
            times = {name: spread(ratios(one[what], systems[reference][what])) for name, one in systems.items()}
            rows.append([f"{label.removesuffix(' s')}, times {reference}", *(times | {reference: "1"}).values()])
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
        rows.append([key, *(spread(one) for one in values.values())])
        reference = statistics.median(values[first])
        times = [f"{statistics.median(one) / reference:.3g}" for one in values.values()]
        rows.append([f"{key.removesuffix(' s').replace(' GiB', '')}, times {first}", *times])
    return f"{title}\n\n{markdown(systems, rows)}"


def form_of(system: str) -> str:
    """Which of `count_flops`'s forms a system computes."""
    return "diffusers" if system.startswith("diffusers") else "prepared"


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmark.py edit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(p)
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float16 on a GPU, else float32 and bfloat16")
    p.add_argument("--batch", nargs="+", type=int, help="default: 1 4 16 on a GPU, else 1")
    p.add_argument("--pairs", type=int, default=3, help="rounds of all systems in turns (default 3)")
    p.add_argument("--starts", type=int, default=1, help="fresh processes of each system (default 1)")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints a table for each precision and batch size; returns the exit code."""
    args = parse(parser(), argv, QUICK, DEFAULTS)
    content = {**about("edit", argv, args.device), "runs": []}
    try:
        with ExitStack() as stack:
            base = task_of(args, stack)
            for dtype in args.dtype:
                for batch in args.batch:
                    run = measure(replace(base, dtype=dtype, batch=batch), args.systems, args.pairs, args.starts)
                    content["runs"].append(run)
                    print(table(run, content["device"]), end="\n\n", flush=True)
                    write_json(args.out, content)  # after each, so that a run that is cut short leaves what it has
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
