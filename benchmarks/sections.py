"""The sections, and how each is run: its arguments, its measurements with the JSON that grows by them, its tables."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from benchmarks import data, edit, load, profile, scaling, train
from benchmarks.arguments import check_common
from benchmarks.report import about, write_json


class Section(Protocol):
    """A module that measures."""

    def parser(self) -> argparse.ArgumentParser: ...

    def check(self, p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Fills in the defaults, and ends the program with one line if something cannot be."""

    def measure(self, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
        """All that is measured so far, after each measurement; RuntimeError, ValueError or OSError where one fails."""

    def tables(self, content: dict[str, Any]) -> str:
        """The Markdown of a run's JSON, also of one that was cut short."""


SECTIONS: dict[str, Section] = {
    "edit": edit,
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

    The JSON is written after each measurement, so that a run that is cut short leaves what it has: `finished` tells.
    """
    args = parse(name, argv)
    content = about(name, argv, getattr(args, "device", "cpu"))
    measured, code = False, 0
    try:
        for part in SECTIONS[name].measure(args):
            content |= part
            measured = True
            write_json(args.out, content)
        content["finished"] = True
        write_json(args.out, content)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    if measured:
        print(SECTIONS[name].tables(content), flush=True)
    return code
