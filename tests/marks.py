"""Which of a test's parameters run each time, and which with `pytest -m slow` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """Parameters of a test: the first `fast` as they are, the others marked slow; a tuple is several arguments."""
    values = list(values)
    slow = [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values[fast:]]
    return values[:fast] + slow
