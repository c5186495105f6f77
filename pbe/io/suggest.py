"""What an error message about an unknown name suggests in its place."""

import difflib
from collections.abc import Iterable


def closest(name: str, choices: Iterable[str], similarity: float = 0.6) -> str | None:
    """The choice most like `name`, whatever their case; None where none is at least this similar (0 to 1)."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=similarity)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", or "; choose one of a, b, c"."""
    choices = list(choices)
    close = closest(name, choices)
    return f"; did you mean {close!r}?" if close else f"; choose one of {', '.join(choices)}"
