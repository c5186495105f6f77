"""How fast an edit is, and how much memory it takes: this library against diffusers on the same weights and noise.

    python tools/benchmark.py edit --ckpt full.ckpt --diffusers full --dtype float32 bfloat16 --steps 3

Every system is a process of its own that waits while the others work; they take turns, so that a busy spell of the
machine meets all of them, and ratios are taken pair by pair.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from pbe.benchmarks import edit_worker
from pbe.benchmarks.edit_worker import SYSTEMS, Task
from pbe.benchmarks.load import versions

MEASURED = ("unet", "decode", "edit")


class Worker:
    """A system's process; `ask` it for one thing at a time."""

    def __init__(self, name: str, task: Task, folder: Path):
        folder.mkdir(exist_ok=True)
        self.name, self.folder = name, folder
        with open(folder / "stderr.txt", "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                edit_worker.command(name, task, folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.started = self.answer()

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
    """All numbers of one task: `starts` processes of each system by themselves, then `pairs` rounds of all in turns."""
    result = {name: {"starts": [], **{what: [] for what in MEASURED}} for name in systems}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folders = {name: Path(folder, str(i)) for i, name in enumerate(systems)}
        for _ in range(starts):
            for name in systems:
                with closing(Worker(name, task, folders[name])) as worker:
                    worker.ask("edit")
                    result[name]["starts"].append(worker.started | worker.ask("memory"))
        workers = [stack.enter_context(closing(Worker(name, task, folders[name]))) for name in systems]
        peak = workers[0].ask("matmul")["TFLOP/s"]
        for what in MEASURED:
            for i in range(pairs + 1):
                for worker in workers:
                    seconds = worker.ask(what)["seconds"]
                    if i:  # the first warms up
                        result[worker.name][what].append(seconds)
        for worker in workers:
            result[worker.name]["differences"] = {
                what: difference(workers[0].folder, worker.folder, what) for what in MEASURED
            }
    return {"task": vars(task), "TFLOP/s of matmul": peak, "TFLOP": flops(task), "systems": result}


def difference(first: Path, second: Path, what: str) -> float:
    """The largest difference of two systems' outputs, as a share of the first's largest value."""
    a, b = (torch.load(folder / f"{what}.pt") for folder in (first, second))
    return ((a - b).abs().max() / a.abs().max()).item()


@torch.no_grad()
def flops(task: Task) -> dict[str, float]:
    """TFLOP of one UNet call with both halves of guidance: the ordinary network's, and the prepared one's."""
    from pbe.acceleration import prepare_for_inference
    from pbe.checkpoints.loading import build, open_source
    from pbe.checkpoints.meta import build_on_meta
    from pbe.models.paint_by_example import PaintByExample

    model = build_on_meta(PaintByExample, build(open_source(task.ckpt)).config)
    side = task.resolution // model.config.vae.downsampling
    unet_in = torch.empty(task.batch, 9, side, side, device="meta")
    t = torch.empty(task.batch, device="meta")
    context = torch.empty(2 * task.batch, 1, model.config.unet.context_dim, device="meta")
    prepared = prepare_for_inference(model).unet
    shifts, folded = prepared.shifts(t, torch.float32), prepared.folded(context)
    calls = {
        "ordinary": lambda: model.unet(torch.cat([unet_in] * 2), torch.cat([t] * 2), context),
        "prepared": lambda: prepared.predict(unet_in, shifts, folded),
    }
    counts = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops() / 1e12
    return counts


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def table(result: dict) -> str:
    """Medians with their range, and against the first system: the median of the pairs' ratios."""
    systems = result["systems"]
    first = next(iter(systems))
    task = result["task"]
    title = (
        f"{task['dtype']}, batch {task['batch']}, {task['resolution']}², {task['steps']} steps, {task['device']}"
        f"{', compiled' if task['compile'] else ''}; matmul {result['TFLOP/s of matmul']:.3g} TFLOP/s, "
        f"a UNet call {result['TFLOP']['ordinary']:.3g} TFLOP, prepared {result['TFLOP']['prepared']:.3g}"
    )
    rows: dict[str, list[str]] = {}
    for what, label in zip(MEASURED, ("UNet call s", "VAE decode s", "edit s"), strict=True):
        rows[label] = [spread(one[what]) for one in systems.values()]
        rows[f"{label}, times {first}"] = [
            spread([a / b for a, b in zip(one[what], systems[first][what], strict=True)]) for one in systems.values()
        ]
        rows[f"{what}: largest difference"] = [f"{one['differences'][what]:.1e}" for one in systems.values()]
    rows["MFU of a UNet call"] = [
        f"{result['TFLOP']['ordinary'] / statistics.median(one['unet']) / result['TFLOP/s of matmul']:.0%}"
        for one in systems.values()
    ]
    for key in systems[first]["starts"][0]:
        rows[key] = [spread([start[key] for start in one["starts"]]) for one in systems.values()]
    lines = [title, "", "| | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints a table for each precision and batch size; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="the weights as a file that this library reads")
    p.add_argument("--diffusers", required=True, help="the same weights as a diffusers folder; diffusers is in .[test]")
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["pbe", "diffusers"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    p.add_argument("--batch", nargs="+", type=int, default=[1])
    p.add_argument("--resolution", type=int, default=512, help="side in pixels, a multiple of 64 (default 512)")
    p.add_argument("--steps", type=int, default=50, help="PLMS steps of an edit (default 50); a few tell as much")
    p.add_argument("--guidance", type=float, default=5.0)
    p.add_argument("--pairs", type=int, default=3, help="rounds of all systems in turns (default 3)")
    p.add_argument("--starts", type=int, default=1, help="fresh processes of each system (default 1)")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks of all systems")
    p.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = p.parse_args(argv)
    if args.resolution % 64 or args.resolution < 64:
        p.error(f"--resolution must be a positive multiple of 64, as diffusers' pipeline needs, got {args.resolution}")
    for name in ("steps", "pairs", "starts"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")

    results = []
    for dtype in args.dtype:
        for batch in args.batch:
            task = Task(
                ckpt=args.ckpt,
                diffusers=args.diffusers,
                device=args.device,
                dtype=dtype,
                batch=batch,
                resolution=args.resolution,
                steps=args.steps,
                guidance=args.guidance,
                compile=args.compile,
            )
            results.append(measure(task, args.systems, args.pairs, args.starts))
            print(table(results[-1]), end="\n\n", flush=True)
            if args.out:  # after each, so that a long run that is cut short leaves what it has
                about = {"versions": versions(), "threads": torch.get_num_threads(), "runs": results}
                args.out.write_text(json.dumps(about, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
