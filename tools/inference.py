"""Repaint the masked part of a photo, or of a batch of photos: `python tools/inference.py --help`."""

import sys

from pbe.cli.edit import main

if __name__ == "__main__":
    sys.exit(main())
