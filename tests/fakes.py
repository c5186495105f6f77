"""What tests put in the place of real edits, and what they send to servers."""

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from pbe.editing.settings import EditSettings
from pbe.editing.together import sampled

SERVED = EditSettings(sampler="ddim", steps=4, guidance=3.0)  # what the servers of tests begin with


def at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as an edit that has nothing sampled."""

    @wraps(function)
    def begin(*args: Any, **keywords: Any) -> Iterator[Any]:
        yield from ()
        return function(*args, **keywords)

    return sampled(begin)


def sent(pictures: dict[str, Path], *names: str) -> list[tuple[str, tuple[str, bytes]]]:
    """Pictures as a form's files."""
    return [(name, (f"{name}.png", pictures[name].read_bytes())) for name in names or ("image", "mask", "exemplar")]


def instead(arguments: list[str], *given: str) -> list[str]:
    """A command's arguments with the given flags, in the place of the same flags with other values."""
    flags: dict[str, list[str]] = {}
    for text in arguments:
        name = text if text.startswith("--") else next(reversed(flags), "")
        flags.setdefault(name, []).append(text)
    kept = [text for name, texts in flags.items() if name not in given for text in texts]
    return [*kept, *given]
