"""Every section at full size on seeded weights, one JSON each, and all tables in one Markdown file.

    python tools/benchmark.py all --out runs/benchmarks

On a GPU: editing in float16 with every system at batch 1, 4 and 16, and in bfloat16 and float32 at batch 1; where the
time of a prediction goes; how time and memory grow; training, and what fits cards of 24, 48 and 80 GiB. Elsewhere the
same with fewer steps. A section that fails keeps none of the others back. What is there already is kept: a run that was
cut short goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from pbe.benchmarks import plot, table
from pbe.benchmarks.arguments import seeded_weights

EAGER = ["pbe", "diffusers", "diffusers, best"]
LIMITS_GIB = (24, 48, 80)
RECIPES = [
    "pbe, plain",
    "pbe",
    "pbe, 1 level checkpointed",
    "pbe, checkpointed",
    "pbe, adapters",
    "pbe, adapters, checkpointed",
]


def sections(device: str, weights: tuple[Path, Path], quick: bool) -> dict[str, list[str]]:
    """The command line of each run, by the name of its JSON: the section's name, and what tells runs of it apart."""
    ckpt, diffusers = map(str, weights)
    task = ["--ckpt", ckpt, "--diffusers", diffusers, "--device", device]
    small = ["--resolution", "128", "--steps", "2", "--pairs", "1"] if quick else []
    half, other = ("float16", ["bfloat16", "float32"]) if device.startswith("cuda") else ("bfloat16", ["float32"])
    growth = ["--batches", "1", "2", "--resolutions", "64", "128", "--rows", "1000", "10000"] if quick else []
    runs = {
        "load": ["--ckpt", ckpt, "--diffusers", diffusers],
        f"edit-{half}": [*task, *small, "--dtype", half],
        "edit": [*task, *small, "--dtype", *other, "--batch", "1", "--systems", *EAGER],
        "profile": [*task, *small, "--dtype", half],
        "scaling": [*task, *small, *growth, "--dtype", half],
    }
    runs["train"] = [*task, *small]
    if device.startswith("cuda"):
        runs["profile-16"] = [*task, *small, "--dtype", half, "--batch", "16"]
        room = torch.cuda.get_device_properties(device).total_memory / 2**30
        limits = [str(limit) for limit in LIMITS_GIB if limit < room]
        fits = ["--ckpt", ckpt, "--device", device, *small, "--systems", *RECIPES]
        if limits:
            runs["train-fits"] = [*fits, "--limit-gib", *limits]
    return runs


def main(argv: Sequence[str]) -> int:
    """Runs the sections one after the other; returns the first exit code that is not 0."""
    p = argparse.ArgumentParser(
        prog="benchmark.py all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="the folder of the results; the weights are made in it too")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="small weights and few steps: to see that everything runs")
    args = p.parse_args(argv)
    if find_spec("diffusers") is None:
        p.error("this compares with diffusers: pip install -e '.[bench]'")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out {args.out} is no folder that can be made: {error.strerror}")
    weights = seeded_weights("small" if args.quick else "full", args.out)
    files, failed = [], 0
    for name, command in sections(args.device, weights, args.quick).items():
        files.append(args.out / f"{name}.json")
        if files[-1].exists():
            print(f"{files[-1]}: there already", flush=True)
            continue
        part = files[-1].with_suffix(".part")
        if code := import_module(f"pbe.benchmarks.{name.partition('-')[0]}").main([*command, "--out", str(part)]):
            print(f"{name} failed", file=sys.stderr)
            failed = failed or code
        else:
            part.rename(files[-1])
    if failed:
        return failed
    (args.out / "tables.md").write_text("\n".join(table.document(table.read(file)) for file in files), encoding="utf-8")
    print(f"{args.out / 'tables.md'}: all tables")
    if find_spec("matplotlib") is None:
        print("no curves: plotting needs the extra plot: pip install -e '.[plot]'", file=sys.stderr)
        return 0
    return plot.main([str(args.out / "scaling.json"), "--out", str(args.out / "scaling.png")])
