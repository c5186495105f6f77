"""Score checkpoints and other systems on COCOEE and test sets like it: `python tools/evaluate.py --help`."""

import sys

from pbe.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
