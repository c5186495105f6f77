"""The arguments of the sections that run systems of `edit_worker`: their defaults, their checks, their weights."""

import argparse
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.edit_worker import SYSTEMS, Task
from pbe.cli import checkpoint

DTYPES = ("float32", "bfloat16", "float16")
SMALL_CARD = [name for name in SYSTEMS if name.endswith("small card")]
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "systems": [name for name in SYSTEMS if name != "pbe, model kept"],
        "dtype": ["float16"],
        "batch": [1, 4, 16],
        "resolution": 512,
        "steps": 50,
    },
    "cpu": {
        "systems": ["pbe", "diffusers", "diffusers, best"],
        "dtype": ["float32", "bfloat16"],
        "batch": [1],
        "resolution": 512,
        "steps": 2,
    },
}


def add_task_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments that all sections have which run systems of `edit_worker`."""
    p.add_argument("--ckpt", help="the weights as a file that this library reads")
    p.add_argument("--diffusers", help="the same weights as a diffusers folder; diffusers is in the extra bench")
    p.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="NAME", help=f"of {', '.join(map(repr, SYSTEMS))}")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--resolution", type=int, help="side in pixels, a multiple of 64 (default 512)")
    p.add_argument("--steps", type=int, help="PLMS steps of an edit (default: 50 on a GPU, else 2, which tell as much)")
    p.add_argument("--guidance", type=float, default=5.0, help="default 5")
    p.add_argument("--quick", action="store_true", help="small seeded weights and few steps: a minute on a CPU")
    p.add_argument("--out", type=Path, help="write the numbers as JSON; `benchmark.py table` reads it")


def parse(
    p: argparse.ArgumentParser, argv: Sequence[str], quick: dict[str, Any], section: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """The arguments, checked; those not given are `quick`'s with --quick, else the section's for the device, else
    those of DEFAULTS."""
    args = p.parse_args(argv)
    kind = args.device.partition(":")[0]
    if kind not in DEFAULTS:
        p.error(f"--device must be cpu or cuda, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    for name, value in (DEFAULTS[kind] | section[kind] | (quick if args.quick else {})).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    check_weights(p, args)
    if kind == "cpu" and (small := [name for name in args.systems if name in SMALL_CARD]):
        p.error(f"{small[0]!r} needs --device cuda: there is nothing to leave on a CPU")
    sides = [args.resolution, *getattr(args, "resolutions", [])]
    if wrong := [side for side in sides if side % 64 or side < 64]:
        p.error(f"--resolution must be a positive multiple of 64, as diffusers' pipeline needs, got {wrong[0]}")
    check_counts(p, args)
    if args.steps > 1000:
        p.error(f"--steps must be at most 1000, got {args.steps}")
    if not 0 <= args.guidance < math.inf:
        p.error(f"--guidance must be 0 or more, got {args.guidance:g}")
    check_out(p, args.out)
    return args


def check_weights(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if there are no weights for a system that is asked for."""
    if args.quick == bool(args.ckpt):
        p.error("give --ckpt, or --quick, which makes its own weights" + (", and not both" if args.quick else ""))
    theirs = [name for name in args.systems if name.startswith("diffusers")]
    if theirs and find_spec("diffusers") is None:
        p.error(f"{theirs[0]!r} needs diffusers: pip install -e '.[bench]', or --systems pbe")
    if theirs and not (args.diffusers or args.quick):
        p.error(f"{theirs[0]!r} needs --diffusers, or --systems without it")
    for path in (args.ckpt, args.diffusers):
        if path and not Path(path).exists():
            p.error(f"{path}: there is no such file")


def check_counts(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if a number of things is below 1."""
    for name in ("steps", "pairs", "starts", "batch", "batches", "rows", "repeats"):
        values = getattr(args, name, None)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                p.error(f"--{name} must be at least 1, got {value}")


def check_out(p: argparse.ArgumentParser, out: Path | None) -> None:
    """Makes the folder of the numbers; ends the program if they could not be written there hours later."""
    if out is None:
        return
    if out.is_dir():
        p.error(f"--out {out} is a folder; give a file name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        p.error(f"--out {out} cannot be written: {error.strerror}")


def task_of(args: argparse.Namespace, stack: ExitStack) -> Task:
    """What the arguments ask for, but for precision and batch; --quick's weights are there until the stack closes."""
    ckpt, diffusers = args.ckpt, args.diffusers or ""
    if args.quick:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ckpt, diffusers = map(str, seeded_weights("small", Path(folder)))
    return Task(ckpt, diffusers, args.device, "float32", 1, args.resolution, args.steps, args.guidance)


def seeded_weights(size: str, folder: Path) -> tuple[Path, Path]:
    """Random weights of a size that `checkpoint.py seed` knows, as a file and as a diffusers folder in `folder`."""
    ckpt, diffusers = folder / f"{size}.ckpt", folder / size
    for command in (["seed", "--size", size, "--out", ckpt], ["convert", ckpt, "--out", diffusers]):
        if not command[-1].exists() and checkpoint.main([str(argument) for argument in command]):
            raise RuntimeError(f"no seeded weights could be written to {folder}")
    return ckpt, diffusers
