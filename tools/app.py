"""Serve a page on which photos are edited by hand: `python tools/app.py --help`."""

import sys

from pbe.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
