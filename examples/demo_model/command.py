"""Show in figures and pictures whether a small model paints by example.

`measure` repaints held-out photos as objects of other held-out photos and writes figures.json, figures.md and grids of
what was measured. The grids show the photos: they belong where photos that may not be published belong.
`grid` shows edits of one's own pictures with consecutive seeds, none left out.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

from examples.demo_model.settings import Exemplars, Settings


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    measure = commands.add_parser("measure", help="the figures, on held-out photos")
    measure.add_argument("--ckpt", type=Path, required=True)
    measure.add_argument("--held-out", type=Path, required=True, help="manifest of the photos to measure on")
    measure.add_argument("--train", type=Path, required=True, help="manifest of the photos that were trained on")
    measure.add_argument("--config", default="configs/demo/unet.yaml", help="whose data.recipe makes windows and masks")
    measure.add_argument("--out", type=Path, required=True, help="folder for the figures, tables and grids")
    measure.add_argument("--classifier", type=Path, help="classifier.pt of an earlier run; without it one is trained")
    measure.add_argument("--classifier-epochs", type=int, default=10)
    measure.add_argument(
        "--exemplars",
        choices=get_args(Exemplars),
        default=Settings.exemplars,
        help="taken from any other photo, or from one of the photo's own kind (default any)",
    )
    measure.add_argument("--scales", type=float, nargs="+", default=Settings.scales, help="of the guidance figure")
    measure.add_argument("--sampler-steps", type=int, nargs="+", default=Settings.sampler_steps)
    for name, meaning in (
        ("cases", "photos of most figures"),
        ("gallery", "exemplars that retrieval chooses among"),
        ("seed-cases", "photos of the seeds figure"),
        ("seeds", "seeds, and exemplars, of each of those"),
        ("sampler-cases", "photos of the samplers figure"),
        ("reference-steps", "steps of DDIM that the samplers are compared with"),
        ("batch-size", "pictures sampled at once"),
    ):
        default = getattr(Settings, name.replace("-", "_"))
        measure.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")

    grid = commands.add_parser("grid", help="edits with consecutive seeds as one picture")
    grid.add_argument("--ckpt", type=Path, required=True)
    grid.add_argument(
        "--edit",
        nargs=3,
        action="append",
        required=True,
        metavar=("PHOTO", "MASK", "EXEMPLAR"),
        help="three picture files, white = repaint; once for each row",
    )
    grid.add_argument("--out", type=Path, required=True, help="the picture to write")
    grid.add_argument("--seeds", type=int, default=16, help="how many results, of seeds --seed onwards (default 16)")
    grid.add_argument("--cell", type=int, default=128, help="height of a picture in the grid (default 128)")

    for command in (measure, grid):
        command.add_argument("--device", default="auto")
        command.add_argument("--guidance", type=float, default=Settings.guidance)
        command.add_argument("--steps", type=int, default=Settings.steps)
        command.add_argument("--sampler", default=Settings.sampler)
        command.add_argument("--seed", type=int, default=Settings.seed)
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        if args.command == "grid":
            write_grid(args)
        else:
            write_figures(args, shlex.join(["python", "-m", "examples.demo_model", *argv]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_figures(args: argparse.Namespace, command_line: str) -> None:
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    from examples.demo_model.measuring import measure

    start = time.perf_counter()
    measure(
        args.ckpt,
        args.held_out,
        args.train,
        args.out,
        settings,
        config=args.config,
        device=args.device,
        classifier_file=args.classifier,
        classifier_epochs=args.classifier_epochs,
        command=command_line,
        say=lambda what: print(f"[{time.perf_counter() - start:4.0f} s] {what}", file=sys.stderr, flush=True),
    )


def write_grid(args: argparse.Namespace) -> None:
    from examples.demo_model.report import seed_grid
    from pbe.checkpoints.loading import load_model
    from pbe.images.saving import save_picture

    picture = seed_grid(
        load_model(args.ckpt, device=args.device, dtype="float32"),
        args.edit,
        seeds=args.seeds,
        seed=args.seed,
        guidance=args.guidance,
        steps=args.steps,
        sampler=args.sampler,
        cell=args.cell,
    )
    save_picture(picture, args.out)
    print(f"{args.out}: {len(args.edit)} edits, seeds {args.seed} to {args.seed + args.seeds - 1}")
