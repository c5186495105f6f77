"""Write pictures of training examples at every stage: `python tools/show_data.py --help`."""

import sys

from pbe.cli.show_data import main

if __name__ == "__main__":
    sys.exit(main())
