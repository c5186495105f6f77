"""How every command ends where something is wrong."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")

# What the library raises for a user's files and values, and for a missing extra.
EXPECTED = (ValueError, OSError, MemoryError, ImportError)


def one_line_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Makes an expected error one line on stderr and the exit code 2, and Ctrl+C the shell's code for it, 130."""

    @wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except EXPECTED as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return command
