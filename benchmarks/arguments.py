"""The flags that several sections have, their checks, and the weights that they measure with."""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.infer_config import pbe_entry
from pbe.checkpoints.seeding import CONFIGS, seeded_state
from pbe.checkpoints.writing import save_checkpoint, save_diffusers

DTYPES = ("float32", "bfloat16", "float16")
COUNTS = ("steps", "pairs", "starts", "batch", "batches", "rows", "repeats")
ON_CPU = {"openvino": ("openvino", "bench"), "onnx": ("onnxruntime", "export")}  # systems: their package and its extra
PEERS = ("diffusers", "openvino")  # how the names of systems begin that are not this library's


def make_parser(section: str, doc: str | None) -> argparse.ArgumentParser:
    """A section's parser, with the flag that all have."""
    p = argparse.ArgumentParser(
        prog=f"python -m benchmarks {section}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, help="write the numbers as JSON, each as it is measured; `table` reads it")
    p.add_argument("--minutes", type=float, help="leave out what takes longer, by the first call of it, and say so")
    return p


def add_model_flags(p: argparse.ArgumentParser, systems: Iterable[str], steps: str) -> None:
    """The flags of the sections that run systems; `steps` is the help of --steps."""
    names = ", ".join(map(repr, systems))
    p.add_argument("--ckpt", help="the weights as a file that this library reads")
    p.add_argument("--diffusers", help="the same weights as a diffusers folder; diffusers is in the extra bench")
    p.add_argument("--systems", nargs="+", choices=systems, metavar="NAME", help=f"of {names}")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--resolution", type=int, help="side in pixels, a multiple of 64 (default 512)")
    p.add_argument("--steps", type=int, help=steps)
    p.add_argument("--pairs", type=int, default=3, help="rounds of all systems in turns (default 3)")
    p.add_argument("--quick", action="store_true", help="small seeded weights and few steps: a minute on a CPU")


def check_models(
    p: argparse.ArgumentParser,
    args: argparse.Namespace,
    defaults: Mapping[str, Mapping[str, Any]],
    quick: Mapping[str, Any],
) -> None:
    """Gives what the user left out its default for the kind of device ("cuda" or "cpu"), or its value of --quick, and
    ends the program with one line if something cannot be. Without --diffusers no system needs it by default."""
    kind = args.device.partition(":")[0]
    if kind not in defaults:
        p.error(f"--device must be cpu or cuda, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        p.error(f"--device {args.device}: torch finds no CUDA device here")
    chosen = args.systems is not None
    for name, value in {**defaults[kind], **(quick if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not (chosen or args.diffusers or args.quick):
        args.systems = [name for name in args.systems if not name.startswith(PEERS)]
    for system, (package, extra) in ON_CPU.items():
        if system in args.systems and find_spec(package) is None:
            print(f"{system!r} is left out: it is not installed (pip install -e '.[{extra}]')", file=sys.stderr)
            args.systems = [name for name in args.systems if name != system] or p.error("no system is left")
    check_weights(p, args)
    sides = [args.resolution, *getattr(args, "resolutions", [])]
    if wrong := [side for side in sides if side % 64 or side < 64]:
        p.error(f"--resolution must be a positive multiple of 64, got {wrong[0]} (diffusers' pipeline needs it)")


def check_weights(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if there are no weights for a system."""
    if args.quick == bool(args.ckpt):
        p.error("give --ckpt, or --quick, which makes its own weights" + (", and not both" if args.quick else ""))
    theirs = [name for name in args.systems if name.startswith(PEERS)]
    if theirs and not (args.diffusers or args.quick):
        p.error(f"{theirs[0]!r} needs --diffusers, or --systems without it")
    if theirs:
        need_diffusers(p, repr(theirs[0]))
    check_files(p, filter(None, (args.ckpt, args.diffusers)))


def need_diffusers(p: argparse.ArgumentParser, who: str) -> None:
    if find_spec("diffusers") is None:
        p.error(f"{who} needs diffusers: pip install -e '.[bench]', or leave it out")


def check_files(p: argparse.ArgumentParser, files: Iterable[str]) -> None:
    for file in files:
        if not Path(file).exists():
            p.error(f"{file}: there is no such file")


def check_common(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if a count is below 1, --minutes not above 0, or --out could not be written hours later. Makes
    --out's folder."""
    for name in COUNTS:
        values = getattr(args, name, None)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                p.error(f"--{name} must be at least 1, got {value}")
    if args.minutes is not None and not args.minutes > 0:
        p.error(f"--minutes must be above 0, got {args.minutes:g}")
    if args.out is None:
        return
    if args.out.is_dir():
        p.error(f"--out {args.out} is a folder; give a file name")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out.parent).close()
    except OSError as error:
        p.error(f"--out {args.out} cannot be written: {error.strerror}")


def check_editing(p: argparse.ArgumentParser, args: argparse.Namespace, small_card: Sequence[str]) -> None:
    """Ends the program for --steps and --guidance that no edit has, and for what a system cannot run on."""
    if args.device != "cpu" and (found := [name for name in args.systems if name in ON_CPU]):
        p.error(f"{found[0]!r} is measured on the CPU: it needs --device cpu")
    if args.device == "cpu" and (small := [name for name in args.systems if name in small_card]):
        p.error(f"{small[0]!r} needs --device cuda: there is nothing to leave on a CPU")
    if args.steps > 1000:
        p.error(f"--steps must be at most 1000, got {args.steps}")
    if not 0 <= args.guidance < math.inf:
        p.error(f"--guidance must be 0 or more, got {args.guidance:g}")


@contextmanager
def weights(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The file and the diffusers folder ("" for none) that the arguments name; --quick's are there inside the block."""
    if not args.quick:
        yield args.ckpt, args.diffusers or ""
        return
    with tempfile.TemporaryDirectory() as folder:
        ckpt, diffusers = seeded_weights("small", Path(folder))
        yield str(ckpt), str(diffusers)


def seeded_weights(size: str, folder: Path) -> tuple[Path, Path]:
    """Random weights of a size of `pbe checkpoint seed`, as a file and as a diffusers folder in `folder`; what is there
    is kept."""
    ckpt, diffusers, config = folder / f"{size}.ckpt", folder / size, CONFIGS[size]
    if not (ckpt.exists() and diffusers.exists()):
        state = seeded_state(config, seed=0)
        save_checkpoint(state, ckpt, pbe_entry(config), overwrite=True)
        save_diffusers(state, config, diffusers, overwrite=True)
    return ckpt, diffusers
