"""The sections, and how each is run: its arguments, its measurements with the JSON that grows by them, its tables."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from benchmarks import cost, data, edit, load, profile, scaling, train
from benchmarks.arguments import check_common
from benchmarks.budget import Budget
from benchmarks.report import about, write_json

STOPPED = 130  # the exit code after Ctrl+C or SIGTERM


class Section(Protocol):
    """A module that measures."""

    def parser(self) -> argparse.ArgumentParser: ...

    def check(self, p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Fills in the defaults, and ends the program with one line if something cannot be."""

    def measure(self, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """All that is measured so far, after each figure and before the first, as `args.budget` allows; RuntimeError,
        ValueError or OSError where one fails."""

    def tables(self, content: dict[str, Any]) -> str:
        """The Markdown of a run's JSON, also of one that was cut short."""


SECTIONS: dict[str, Section] = {
    "edit": edit,
    "cost": cost,
    "train": train,
    "profile": profile,
    "scaling": scaling,
    "load": load,
    "data": data,
}


def parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """A section's arguments, checked and whole."""
    p = SECTIONS[name].parser()
    args = p.parse_args(argv)
    SECTIONS[name].check(p, args)
    check_common(p, args)
    return args


def run(name: str, argv: Sequence[str]) -> int:
    """Runs a section and prints its tables; returns the exit code.

    The JSON is written after each figure, so that a run that is cut short leaves what it has: `finished` tells, and
    `left out` what --minutes was not enough for.
    """
    args = parse(name, argv)
    args.budget = Budget(args.minutes)
    content = about(name, argv, getattr(args, "device", "cpu"))
    measured, code = False, 0
    try:
        for part in SECTIONS[name].measure(args):
            content |= part | {"left out": args.budget.left_out}
            measured = True
            write_json(args.out, content)
        content |= {"finished": not args.budget.left_out, "left out": args.budget.left_out}
        write_json(args.out, content)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped: what follows is what was measured until then", file=sys.stderr)
        code = STOPPED
    if measured:
        print(SECTIONS[name].tables(content), *content["left out"], sep="\nleft out: ", flush=True)
    return code
