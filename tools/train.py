"""Train Paint by Example, or the autoencoder of a small one: `python tools/train.py --help`."""

import sys

from pbe.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
