"""The settings of an edit, read from the texts of a command line or a batch file, or from JSON's values.

Each reader raises `ValueError` for what it cannot read. Only the standard library is imported.
"""

import math
import re
from collections.abc import Callable
from typing import Any

Corners = tuple[float, float, float, float]


def parse_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def parse_texts(value: Any) -> tuple[str, ...]:
    parts = value.split(";") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError(f"{value!r} is not a list of file names (in one text: separated by ';')")
    return tuple(part.strip() for part in parts)


def parse_int(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value):
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # by way of a float, large seeds would change
    number = parse_float(value)
    if not number.is_integer() or abs(number) >= 2**53:
        raise ValueError(f"{value!r} is not a whole number (large ones are written without point and exponent)")
    return int(number)


def parse_float(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a number")
    return number


def parse_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    word = str(value).lower()
    if word not in words:
        raise ValueError(f"{value!r} is neither true nor false")
    return words[word]


def parse_numbers(value: Any) -> tuple[float, ...]:
    """Numbers of a text, separated by commas, semicolons or blanks, or of a list, nested or not."""
    if isinstance(value, str):
        return tuple(parse_float(part) for part in re.split(r"[,;\s]+", value.strip()))
    if isinstance(value, list):
        return tuple(number for part in value for number in parse_numbers(part))
    return (parse_float(value),)


def parse_box(value: Any) -> Corners:
    numbers = parse_numbers(value)
    if len(numbers) != 4:
        raise ValueError(f"{value!r} is not a box x0,y0,x1,y1")
    return numbers


def parse_polygon(value: Any) -> tuple[tuple[float, float], ...]:
    numbers = parse_numbers(value)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"{value!r} is not a polygon of three or more points: x,y x,y x,y")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def parse_interval(value: Any) -> tuple[int, int]:
    numbers = parse_numbers(value)
    if len(numbers) != 2:
        raise ValueError(f"{value!r} is not an interval of timesteps LOW,HIGH")
    return parse_int(numbers[0]), parse_int(numbers[1])


def parse_window(value: Any) -> str | Corners:
    if value in ("auto", "full"):
        return value
    try:
        return tuple(parse_int(number) for number in parse_box(value))
    except ValueError:
        raise ValueError(f"{value!r} is not auto, full or x0,y0,x1,y1 in whole pixels") from None


def parse_regions(value: Any) -> str:
    if value not in ("together", "each"):
        raise ValueError(f"{value!r} is not one of together, each")
    return value


COLUMNS: dict[str, Callable[[Any], Any]] = {
    "image": parse_text,
    "mask": parse_text,
    "box": parse_box,
    "polygon": parse_polygon,
    "reference": parse_texts,
    "reference_mask": parse_texts,
    "reference_weights": parse_numbers,
    "out": parse_text,
    "sampler": parse_text,
    "eta": parse_float,
    "spacing": parse_text,
    "steps": parse_int,
    "scale": parse_float,
    "guidance_interval": parse_interval,
    "seed": parse_int,
    "window": parse_window,
    "regions": parse_regions,
    "raw": parse_bool,
    "seam": parse_text,
    "feather": parse_int,
    "margin": parse_float,
    "resolution": parse_int,
}


def parse(name: str, value: Any) -> Any:
    """The value of a column from text or JSON; ValueError that names the column where it cannot be read."""
    try:
        return COLUMNS[name](value.strip() if isinstance(value, str) else value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
