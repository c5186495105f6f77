"""Look into checkpoints and change them: `python tools/checkpoint.py --help`."""

import sys

from pbe.cli.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
