"""Measurements beside diffusers: `python -m benchmarks SECTION …`; `--help` after the section says what it takes."""

import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks import all as everything
from benchmarks import plot, table
from benchmarks.sections import SECTIONS, run

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "all": everything.main,
    **{name: partial(run, name) for name in SECTIONS},
    "table": table.main,
    "plot": plot.main,
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m benchmarks {{{','.join(COMMANDS)}}} [arguments]", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit's end, as Ctrl+C: what there is is shown
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
