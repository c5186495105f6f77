"""How long loading a checkpoint takes and how much memory: this library against diffusers on the same weights.

    python -m benchmarks load --ckpt full.ckpt full.safetensors --diffusers full

Every measurement is a process of its own; systems take turns, so that a busy spell of the machine meets all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.arguments import check_counts, check_out
from benchmarks.report import about, markdown, spread, write_json

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


def load(ckpt: Sequence[str], diffusers: str | None, repeats: int) -> Iterator[dict[str, list]]:
    """The numbers of each run, by system and precision: those so far after each round."""
    systems = {f"pbe, {Path(path).suffix or 'folder'}": (PBE, path) for path in ckpt}
    if diffusers:
        systems["diffusers, folder"] = (DIFFUSERS, diffusers)
    results: dict[str, list] = {}
    for _ in range(repeats):
        for dtype in ("float32", "bfloat16"):
            for name, (template, path) in systems.items():
                results.setdefault(f"{name}, to {dtype}", []).append(
                    measure(template.format(path=str(Path(path).resolve()), dtype=dtype))
                )
        yield results


def tables(content: dict) -> str:
    """The Markdown of a run's JSON: medians, and the range of the times."""
    results = content["results"]
    columns = list(next(iter(results.values()))[0])
    rows = []
    for name, runs in results.items():
        values = {column: [run[column] for run in runs] for column in columns}
        rows.append([name])
        for column, numbers in values.items():
            rows[-1].append(spread(numbers) if "seconds" in column else f"{statistics.median(numbers):.2f}")
    return markdown(columns, rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmark.py load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ckpt", nargs="+", required=True, help="the weights as files that this library reads")
    p.add_argument("--diffusers", help="the same weights as a diffusers folder")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out", type=Path, help="write the numbers as JSON")
    return p


def main(argv: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    for path in (*args.ckpt, *([args.diffusers] if args.diffusers else [])):
        if not Path(path).exists():
            p.error(f"{path}: there is no such file")
    if args.diffusers and find_spec("diffusers") is None:
        p.error("--diffusers needs diffusers: pip install -e '.[bench]'")
    check_counts(p, args)
    check_out(p, args.out)

    content = about("load", argv)
    try:
        for results in load(args.ckpt, args.diffusers, args.repeats):
            content["results"] = results
            write_json(args.out, content)  # after each round, so that a run that is cut short leaves what it has
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(tables(content))
    return 0
