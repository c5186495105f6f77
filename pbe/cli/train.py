"""`pbe train`: train Paint by Example, or the autoencoder of a small one, as a YAML file says."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser

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
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Trains; returns the exit code."""
    args = parser(prog).parse_intermixed_args(separate(sys.argv[1:] if argv is None else argv))
    from pbe.training.callbacks.stopping import Terminated
    from pbe.training.config import load_config
    from pbe.training.run import train

    try:
        skipped = train(load_config(args.settings), args.resume if isinstance(args.resume, bool) else Path(args.resume))
    except Terminated as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    if skipped:
        counts = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in skipped.items())
        print(f"pictures that could not be used and were replaced by others: {counts}")
    return 0


def separate(argv: list[str]) -> list[str]:
    """The arguments with `--resume` moved to the end where a setting, not a checkpoint, follows it."""
    at = argv.index("--resume") if "--resume" in argv else len(argv)
    follows = argv[at + 1 : at + 2]
    if follows and re.search(r"^[\w.]+=|\.ya?ml$", follows[0]):
        return [*argv[:at], *argv[at + 1 :], "--resume"]
    return argv
