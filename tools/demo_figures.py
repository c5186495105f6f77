"""Does a small model paint by example? `python tools/demo_figures.py measure …` and `grid …`; `--help` after either."""

import sys

from pbe.evaluation.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
