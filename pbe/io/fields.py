"""Typed fields: checking values, reading them from texts or JSON, and finding their documentation.

A field's type annotation says all that is needed: `Annotated[int, Range(1, 1000)]` is a whole number from 1 to 1000.
Only the standard library is imported, since the command line reads its arguments before it loads anything heavy.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pbe.io.json_text import shown


@dataclass(frozen=True)
class Range:
    """The numbers from `low`, or above it, to `high`, or below it, and of them the multiples of `step`; of a list its
    length."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    step: int = 1

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.above else number >= self.low
        below = number < self.high if self.below else number <= self.high
        return above and below and (self.step == 1 or number % self.step == 0)

    def __str__(self) -> str:
        multiple = f", a multiple of {self.step}" if self.step > 1 else ""
        if self.above:
            end = f" and {'below' if self.below else 'at most'} {self.high}" if self.high < math.inf else ""
            return f"above {self.low}{end}"
        if self.high == math.inf:
            return f"of at least {self.low}{multiple}"
        if self.below:
            return f"of at least {self.low} and below {self.high}"
        return f"from {self.low} to {self.high}{multiple}"


def field_types(owner: type) -> dict[str, Any]:
    """The annotations of a class by field, with what `Annotated` adds."""
    return get_type_hints(owner, include_extras=True)


def field_docs(owner: type) -> dict[str, str]:
    """The docstring under each field of a class, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def check_fields(owner: Any, section: str) -> None:
    """Checks and converts all fields of a dataclass; a message calls them `section.name`."""
    for name, annotation in field_types(type(owner)).items():
        setattr(owner, name, check(f"{section}.{name}", getattr(owner, name), annotation))


def check(name: str, value: Any, annotation: Any) -> Any:
    """The value as the plain Python value that `annotation` asks for (numpy's numbers and lists are converted).

    ValueError naming the field, the value and what would be right.
    """
    try:
        return _converted(value, annotation)
    except ValueError:
        raise ValueError(f"{name} must be {describe(annotation)}, got {shown(value)}") from None


def read(name: str, value: Any, annotation: Any) -> Any:
    """As `check`, of a value from a text or from JSON: "20" is also a number, "1,2" and "a; b" are also lists."""
    try:
        given = _from_text(value.strip(), annotation) if isinstance(value, str) else value
        return _converted(_whole(given), annotation)
    except (ValueError, RecursionError):  # lists in lists in lists …
        raise ValueError(f"{name} must be {describe(annotation)}, got {shown(value)}") from None


def describe(annotation: Any) -> str:
    """What values of a type are, for a message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words = [extra for extra in arguments[1:] if isinstance(extra, str)]
        bounds = [str(extra) for extra in arguments[1:] if isinstance(extra, Range)]
        return words[0] if words else " ".join([describe(arguments[0]), *bounds])
    if origin is Literal:
        return _either([repr(choice) for choice in arguments])
    if origin in (Union, UnionType):  # None stands for the default, which nobody needs to be told to give
        return _either([describe(argument) for argument in arguments if argument is not NoneType])
    if origin in (tuple, list):
        return f"a list of {describe(arguments[0]).removeprefix('a ').replace('number', 'numbers', 1)}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(origin or annotation) or annotation.__name__


def _either(choices: list[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _converted(value: Any, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        converted = _converted(value, arguments[0])
        number = len(converted) if isinstance(converted, list | tuple) else converted
        if any(isinstance(extra, Range) and number not in extra for extra in arguments[1:]):
            raise ValueError
        return converted
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ValueError
        return value
    if origin in (Union, UnionType):
        for argument in arguments:
            try:
                return _converted(value, argument)
            except ValueError:
                pass
        raise ValueError
    if origin is tuple:
        return _tuple(value, arguments)
    if origin is list and isinstance(value, list | tuple):
        return [_converted(item, arguments[0]) for item in value]
    if annotation in (int, float):
        return _number(value, annotation)
    if annotation is bool and str(value) in ("True", "False"):  # numpy's too
        return bool(value)
    if annotation is not bool and isinstance(value, origin or annotation):
        return value
    raise ValueError


def _number(value: Any, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError
    if kind is int:
        if not isinstance(value, Integral):
            raise ValueError
        return int(value)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: Any) -> Any:
    """JSON's numbers, alone or in lists: 20.0 is 20, as long as a float can hold all whole numbers of its size."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise ValueError
    items = list(value)
    size = len(get_args(arguments[0])) if get_origin(arguments[0]) is tuple else 0
    if size and items and isinstance(items[0], Real | str):  # x, y, x, y, … for points
        items = [items[i : i + size] for i in range(0, len(items), size)]
    types = arguments[:1] * len(items) if arguments[-1] is ... else arguments
    if not items or len(items) != len(types):
        raise ValueError
    return tuple(_converted(item, kind) for item, kind in zip(items, types, strict=True))


def _from_text(text: str, annotation: Any) -> Any:
    """What a text may stand for: a number, a truth value, a list, or itself."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _from_text(text, arguments[0])
    if origin in (Union, UnionType):
        if any(get_origin(argument) is Literal and text in get_args(argument) for argument in arguments):
            return text
        return _from_text(text, next(argument for argument in arguments if get_origin(argument) is not Literal))
    if origin is tuple:
        return _list_from_text(text, arguments)
    if annotation is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower())
    if annotation is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if annotation in (int, float):
        return float(text)
    return text


def _list_from_text(text: str, arguments: tuple[Any, ...]) -> list[Any]:
    if arguments[0] is str:
        return [part.strip() or None for part in text.split(";")]
    kinds = get_args(arguments[0]) if get_origin(arguments[0]) is tuple else arguments[:1]
    return [_from_text(part, kinds[i % len(kinds)]) for i, part in enumerate(re.split(r"[,;\s]+", text))]
