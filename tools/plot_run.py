"""Draw the curves of a training run: `python tools/plot_run.py --help`."""

import sys

from pbe.cli.plot_run import main

if __name__ == "__main__":
    sys.exit(main())
