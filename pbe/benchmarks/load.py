"""How long loading a checkpoint takes and how much memory: this library against diffusers on the same weights.

Every measurement is a process of its own; systems take turns, so that a busy spell of the machine meets all of them.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

# What each process runs: `load` is defined by the system, and `touch` reads every weight once.
LOAD_SCRIPT = """
import json, sys, time
from pathlib import Path

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(field))  # GiB

{prepare}
import torch
before = status("VmRSS:")
start = time.perf_counter()
modules = load()
loaded, peak = time.perf_counter() - start, status("VmHWM:")
total = sum(float(p.detach().flatten()[::512].float().sum()) for m in modules for p in m.parameters())
print(json.dumps({{
    "seconds": loaded,
    "seconds until every weight was read": time.perf_counter() - start,
    "peak GiB": peak,
    "peak GiB once every weight was read": status("VmHWM:"),
    "GiB before": before,
    "weights GiB": sum(p.numel() * p.element_size() for m in modules for p in m.parameters()) / 2**30,
}}))
"""

PBE = """
import pbe
pbe.load_model

def load():
    return [pbe.load_model({path!r}, device="cpu", dtype={dtype!r})]
"""

DIFFUSERS = """
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
try:
    from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
except ImportError:
    from diffusers.pipelines.paint_by_example.image_encoder import PaintByExampleImageEncoder

def load():
    parts = (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("image_encoder", PaintByExampleImageEncoder))
    dtype = getattr(torch, {dtype!r})
    return [part.from_pretrained(Path({path!r}) / name, torch_dtype=dtype) for name, part in parts]
"""


def measure(prepare: str) -> dict[str, float]:
    """Runs one system in a fresh process; returns the numbers it prints."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD_SCRIPT.format(prepare=prepare)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"a measured process failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def load(args: argparse.Namespace) -> dict:
    """The numbers of each run, by system and precision."""
    systems = {f"pbe, {Path(path).suffix or 'folder'}": (PBE, path) for path in args.ckpt}
    if args.diffusers:
        systems["diffusers, folder"] = (DIFFUSERS, args.diffusers)
    results: dict[str, list] = {}
    for _ in range(args.repeats):
        for dtype in ("float32", "bfloat16"):
            for name, (template, path) in systems.items():
                results.setdefault(f"{name}, to {dtype}", []).append(
                    measure(template.format(path=str(Path(path).resolve()), dtype=dtype))
                )
    return results


def table(results: dict[str, list]) -> str:
    """Medians, and the range of the times, as a Markdown table."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in results.items():
        cells = []
        for column in columns:
            values = sorted(run[column] for run in runs)
            spread = f" ({values[0]:.2f} to {values[-1]:.2f})" if "seconds" in column else ""
            cells.append(f"{statistics.median(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "processor": platform.machine()}
    for package in ("torch", "diffusers", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", nargs="+", required=True, help="the weights as files that this library reads")
    parser.add_argument("--diffusers", help="the same weights as a diffusers folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args(argv)

    results = load(args)
    if args.out:
        args.out.write_text(json.dumps({"versions": versions(), "results": results}, indent=2) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
