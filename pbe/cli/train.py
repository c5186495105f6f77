"""`pbe train`: train Paint by Example, or the autoencoder of a small one, as a YAML file says."""

from __future__ import annotations

import argparse
import re
import signal
import sys

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
    p.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint, if it has one")
    return p


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Trains; returns the exit code."""
    args = parser(prog).parse_intermixed_args(argv)  # settings may follow --resume
    from pbe.training.config import load_config
    from pbe.training.run import Terminated, train

    try:
        skipped = train(load_config(args.settings), args.resume)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        return 2
    except Terminated as stop:
        print(f"{stop}; --resume goes on from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGTERM
    if skipped:
        counts = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in skipped.items())
        print(f"pictures that could not be used and were replaced by others: {counts}")
    return 0


def message_of(error: Exception) -> str:
    """The message of an error; of one in a data worker, which holds the worker's traceback, its last line."""
    message = str(error)
    if re.match(r"Caught \w+ in DataLoader worker", message):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message
