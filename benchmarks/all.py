"""Every section at full size on seeded weights, one JSON each, and all tables in one Markdown file.

    python -m benchmarks all --out runs/benchmarks

On a GPU: editing in float16 at batch 1, 4 and 16, compiled at 1 and 16, and in bfloat16 and float32 at batch 1; where
the time of a prediction goes; how time and memory grow; training, and what fits cards of 24, 48 and 80 GiB. On a CPU
less of it, with fewer steps, and training with a small model. A run that fails does not stop the others. What is whole
already is kept, with what was compiled: the same command goes on where it was cut short. So the start of a compiled
system may be one with a cache.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import plot, table
from benchmarks.arguments import need_diffusers, seeded_weights
from benchmarks.budget import Budget
from benchmarks.sections import STOPPED, run

EAGER = ["pbe", "diffusers", "diffusers, best"]
COMPILED = ["pbe, compiled", "diffusers", "diffusers, compiled"]
SMALL_CARD = ["pbe, small card", "diffusers, small card"]
TRAINED = ["pbe", "pbe, checkpointed", "diffusers", "diffusers, checkpointed"]
RECIPES = [
    "pbe, plain",
    "pbe",
    "pbe, 1 level checkpointed",
    "pbe, checkpointed",
    "pbe, adapters",
    "pbe, adapters, checkpointed",
]
LIMITS_GIB = (24, 48, 80)
FEW_POINTS = {"batches": ["1", "2"], "resolutions": ["64", "128"], "rows": ["1000", "10000"]}


def sections(device: str, weights: tuple[Path, Path], quick: bool) -> dict[str, list[str]]:
    """The command line of each run, by the name of its JSON: the section's name, and what tells runs of it apart.

    A run that is cut short is done again, so there are many short ones, and what tells most comes first.
    """
    ckpt, diffusers = map(str, weights)
    ours = ["--ckpt", ckpt, "--device", device]
    ours += ["--resolution", "128", "--steps", "2", "--pairs", "1"] if quick else []
    both = [*ours, "--diffusers", diffusers]
    runs = {}

    def edit(name: str, dtype: str, batch: int, systems: Sequence[str]) -> None:
        runs[f"edit-{name}"] = [*both, "--dtype", dtype, "--batch", str(batch), "--systems", *systems]

    def growth(dtype: str, *settings: str) -> None:
        for axis, few in FEW_POINTS.items():
            others = [f"--{other}" for other in FEW_POINTS if other != axis]  # without points
            points = [f"--{axis}", *few] if quick else []
            runs[f"scaling-{axis}"] = [*ours, *settings, "--dtype", dtype, *others, *points]

    if device == "cpu":
        for dtype in ("bfloat16", "float32"):
            edit(dtype, dtype, 1, EAGER)
            edit(f"{dtype}-openvino", dtype, 1, ["pbe", "openvino"])  # four are more than memory holds
        runs["profile"] = [*both, "--dtype", "bfloat16"]
        # full-size systems that take turns are all in memory, 16 GiB or more each
        small = ["--quick", "--resolution", "128", "--batch", "4"]
        runs["train"] = ["--device", device, *small, "--dtype", "float32", "bfloat16", "--systems", *TRAINED]
        growth("bfloat16")
    else:
        edit("1", "float16", 1, [*EAGER, "pbe, plain upsampling"])
        edit("1-compiled", "float16", 1, COMPILED)
        edit("16", "float16", 16, EAGER)
        for batch in ("1", "16"):
            runs[f"profile-{batch}"] = [*both, "--dtype", "float16", "--batch", batch]
        for batch in ("4", "16", "32"):
            steps = [] if quick else ["--steps", "5"]
            runs[f"train-{batch}"] = [*both, *steps, "--batch", batch, "--systems", *TRAINED]
        edit("4", "float16", 4, EAGER)
        edit("1-small-card", "float16", 1, SMALL_CARD)
        for dtype in ("bfloat16", "float32"):
            edit(f"1-{dtype}", dtype, 1, EAGER)
        edit("16-compiled", "float16", 16, COMPILED)
        growth("float16", *([] if quick else ["--steps", "10"]))
        room = torch.cuda.get_device_properties(device).total_memory / 2**30
        for limit in LIMITS_GIB:
            if limit < room:
                runs[f"train-fits-{limit}"] = [*ours, "--limit-gib", str(limit), "--systems", *RECIPES]
    runs["load"] = ["--ckpt", ckpt, "--diffusers", diffusers]
    runs["cost"] = both
    return runs


def main(argv: Sequence[str]) -> int:
    """Does the runs one after the other; returns the first exit code that is not 0."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="the folder of the results; the weights are made in it too")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--minutes", type=float, help="start no run later, and leave out of the last what takes longer")
    p.add_argument("--quick", action="store_true", help="small weights and few steps: to see that everything runs")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    need_diffusers(p, "all")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"--out {args.out} cannot be made: {error.strerror}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.out / "compiled").resolve()))
    weights = seeded_weights("small" if args.quick else "full", args.out)
    files, failed, budget = [], 0, Budget(args.minutes)
    for name, command in sections(args.device, weights, args.quick).items():
        file = args.out / f"{name}.json"
        if file.exists() and table.read(file)["finished"]:
            print(f"{file}: there already", flush=True)
        elif budget.fits(name):
            left = ["--minutes", f"{budget.left / 60:.2f}"] if args.minutes else []
            if code := run(name.partition("-")[0], [*command, *left, "--out", str(file)]):
                print(f"{name} failed", file=sys.stderr)
                failed = failed or code
        files += [file] if file.exists() else []  # what was measured until it failed, too
        tables = "\n".join(table.document(table.read(file)) for file in files)
        (args.out / "tables.md").write_text(tables, encoding="utf-8")
        if failed == STOPPED:
            return failed
    print(f"{args.out / 'tables.md'}: all tables")
    grown = [str(file) for file in files if file.name.startswith("scaling")]
    if grown and find_spec("matplotlib") is None:
        print("no curves: plotting needs the extra plot: pip install -e '.[plot]'", file=sys.stderr)
    elif grown:
        failed = plot.main([*grown, "--out", str(args.out / "scaling.png")]) or failed
    return failed
