"""Measurements side by side: `python -m benchmarks SECTION …`; `--help` after the section tells what it takes."""

import sys
from importlib import import_module

SECTIONS = ("all", "edit", "train", "profile", "scaling", "load", "data", "table", "plot")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SECTIONS:
        print(f"usage: benchmark.py {{{','.join(SECTIONS)}}} [arguments]", file=sys.stderr)
        return 2
    return import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
