"""`pbe train`: train Paint by Example, or the autoencoder of a small one, as a YAML file says."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser

if TYPE_CHECKING:
    from pbe.training.config import Run

SHOWN = 16  # examples of the first batch

EPILOG = """\
examples:
  %(prog)s configs/paint_by_example.yaml trainer.devices=8 trainer.num_nodes=8 trainer.strategy=ddp
  %(prog)s configs/finetune.yaml model.init=model.ckpt data.source.path=mine.csv run=runs/mine
  %(prog)s configs/finetune.yaml model.init=model.ckpt data.source.path=mine.csv run=runs/mine --resume

A run's folder gets config.yaml, metrics.jsonl, samples/ and checkpoints/step-….ckpt, which `pbe edit` takes.
"""


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("settings", nargs="+", metavar="SETTING", help="YAML files and overrides key=value; later ones win")
    p.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="PATH",
        help="continue from the run's newest checkpoint, if it has one, or from this one",
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="do not train: print sizes, what trains and about how much memory it takes, and draw the first batch",
    )
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Trains; returns the exit code."""
    args = parser(prog).parse_intermixed_args(separate(sys.argv[1:] if argv is None else argv))
    from pbe.training.config import load_config

    config = load_config(args.settings)
    if args.dry_run:
        return show(config)
    return run(config, args.resume if isinstance(args.resume, bool) else Path(args.resume))


def run(config: Run, resume: bool | Path) -> int:
    """Trains, and prints what was left out; returns the exit code."""
    from pbe.training.callbacks.stopping import Terminated
    from pbe.training.run import train

    try:
        skipped = train(config, resume)
    except Terminated as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    if skipped:
        counts = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in skipped.items())
        print(f"pictures that could not be used and were replaced by others: {counts}")
    return 0


def show(config: Run) -> int:
    """Prints what the run would be, and draws its first batch, in this process, into its folder."""
    from pbe.cli.show_data import sheet
    from pbe.images.saving import save_picture
    from pbe.training.run import dry_run

    lines, data = dry_run(config)
    print(*lines, sep="\n")
    order = data.train_dataloader().sampler
    assert data.train is not None
    picture = Path(config.run) / "first_batch.png"
    first = itertools.islice(order, min(config.data.batch_size, SHOWN))
    save_picture(sheet([data.train.stages(i) for i in first]), picture)
    print(f"first batch: {picture}")
    return 0


def separate(argv: list[str]) -> list[str]:
    """The arguments with `--resume` moved to the end where a setting, not a checkpoint, follows it."""
    at = argv.index("--resume") if "--resume" in argv else len(argv)
    follows = argv[at + 1 : at + 2]
    if follows and re.search(r"^[\w.]+=|\.ya?ml$", follows[0]):
        return [*argv[:at], *argv[at + 1 :], "--resume"]
    return argv
