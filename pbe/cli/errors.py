"""How every command ends where something is wrong."""

import re
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")

# What the library raises for a user's files and values, and for a missing extra.
EXPECTED = (ValueError, OSError, MemoryError, RecursionError, ImportError, FloatingPointError)

MAX_CHARACTERS = 2_000  # of a message or a printed value
# What moves a terminal's cursor or reverses its text, and what no encoding can write.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(value: object) -> str:
    """A value, which may come from a file, as one line for a terminal: control characters are escaped."""
    text = str(value)
    if re.match(r"Caught \w+ in DataLoader worker", text):  # the worker's whole traceback, and the error at its end
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}… ({len(text) - MAX_CHARACTERS:,} more characters)"
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Makes an expected error one line on stderr and the exit code 2, and Ctrl+C the shell's code for it, 130."""

    @wraps(main)
    def command(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except EXPECTED as error:
            print(f"error: {printable(error) or 'out of memory'}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return command
