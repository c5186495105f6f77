"""Turn OpenImages' CSV of boxes into the index that training reads: `python tools/index_boxes.py --help`."""

import sys

from pbe.cli.index_boxes import main

if __name__ == "__main__":
    sys.exit(main())
