"""JSON of strangers: whatever it holds, reading and showing it ends in a value or a ValueError."""

from __future__ import annotations

import json
import reprlib
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError where it is not JSON, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 4
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: Any) -> str:
    """A value as Python writes it, for a message: cut where it is long or deep."""
    return _SHORT.repr(value)
