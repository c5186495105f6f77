"""Does a small model paint by example? `python -m examples.demo_model measure …` and `grid …`; `--help` says more."""

import sys

from examples.demo_model.command import main

if __name__ == "__main__":
    sys.exit(main())
