"""Show in figures and pictures whether a small model paints by example.

`measure` repaints held-out photos as objects of other held-out photos and writes figures.json, figures.md and grids of
what was measured. The grids show the photos: they belong where photos that may not be published belong.
`grid` shows edits of one's own pictures with consecutive seeds, none left out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from examples.demo_model.settings import FIELDS, add_flags, settings_of


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m examples.demo_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)

    measure = commands.add_parser("measure", help="the figures, on held-out photos")
    measure.add_argument("--held-out", type=Path, required=True, help="manifest of the photos to measure on")
    measure.add_argument("--train", type=Path, required=True, help="manifest of the photos that were trained on")
    measure.add_argument("--config", default="configs/demo/unet.yaml", help="whose data.recipe makes windows and masks")
    measure.add_argument("--out", type=Path, required=True, help="folder for the figures, tables and grids")
    measure.add_argument("--classifier", type=Path, help="file of the classifier, made where it does not exist")
    measure.add_argument("--vae", help="checkpoint whose encoder compares crops (default: that of --ckpt)")
    add_flags(measure, FIELDS)

    grid = commands.add_parser("grid", help="edits with consecutive seeds as one picture")
    grid.add_argument(
        "--edit",
        nargs=3,
        action="append",
        required=True,
        metavar=("IMAGE", "MASK", "EXEMPLAR"),
        help="three picture files, white = repaint; once for each row",
    )
    grid.add_argument("--out", type=Path, required=True, help="the picture to write")
    grid.add_argument("--count", type=int, default=16, help="results, with the seeds from --seed on (default 16)")
    grid.add_argument("--cell", type=int, default=128, help="height of a picture in the grid (default 128)")
    add_flags(grid, ["guidance", "steps", "sampler", "seed"])

    for command in (measure, grid):
        command.add_argument("--ckpt", type=Path, required=True)
        command.add_argument("--adapter", action="append", default=[], metavar="FILE", help="adapters to use it with")
        command.add_argument("--device", default="auto")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    from examples.demo_model import measuring, report

    try:
        if args.command == "grid":
            report.write_seed_grid(args, settings_of(args))
        else:
            measuring.measure(args, settings_of(args), shlex.join(["python", "-m", "examples.demo_model", *argv]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
