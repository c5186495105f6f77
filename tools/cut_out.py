"""Draw masks around the objects of a manifest from their boxes: `python tools/cut_out.py --help`."""

import sys

from pbe.cli.cut_out import main

if __name__ == "__main__":
    sys.exit(main())
