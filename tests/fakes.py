"""Edits that tests put in the place of real ones."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from pbe.editing.together import sampled


def at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as an edit that has nothing sampled."""

    @wraps(function)
    def begin(*args: Any, **keywords: Any) -> Iterator[Any]:
        yield from ()
        return function(*args, **keywords)

    return sampled(begin)
