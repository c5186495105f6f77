"""Measurements side by side: `tools/benchmark.py edit …`, `load …` and `data …`; `--help` after the section's name."""

import sys
from importlib import import_module

SECTIONS = ("edit", "load", "data")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SECTIONS:
        print(f"usage: benchmark.py {{{','.join(SECTIONS)}}} [arguments]", file=sys.stderr)
        return 2
    return import_module(f"pbe.benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
