"""Nodes from functions: ComfyUI's types, ranges, defaults and tooltips are those of the parameters and of the settings.

A parameter is `Annotated` with its tooltip, and before that with a `Socket` or with a function that gives its choices.
It is optional where it has a default. `**values` stands for settings of an edit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pbe.editing.settings import QUICK, SETTINGS, setting_docs
from pbe.io.fields import Range, describe

Input = tuple[Any, dict[str, Any]]
F = TypeVar("F", bound=Callable[..., tuple[Any, ...]])

TITLE = "Paint by Example"
FINEST = 0.001  # what numbers are rounded to
NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}


class Socket(str):
    """ComfyUI's name for the type of a value that comes from another node."""


def node(*first: str, advanced: Sequence[str] = ()) -> Callable[[F], F]:
    """Makes a node of a function, with these settings as `**values`, the `advanced` ones folded away."""

    def enter(run: F) -> F:
        signature = inspect.signature(run, eval_str=True)
        named = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]

        def input_types(_: type) -> dict[str, dict[str, Input]]:
            inputs = {one.name: as_input(one.annotation, one.default) for one in named}
            required = {one.name: inputs.pop(one.name) for one in named if one.default is one.empty}
            return {"required": required, "optional": inputs | setting_inputs(first) | setting_inputs(advanced, True)}

        words = run.__name__.replace("_", " ")
        outputs = tuple(str(get_args(kind)[1]) for kind in get_args(signature.return_annotation))
        about = {
            "INPUT_TYPES": classmethod(input_types),
            "RETURN_TYPES": outputs,
            "RETURN_NAMES": tuple(kind.removeprefix("PBE_").lower() for kind in outputs),
            "FUNCTION": "run",
            "CATEGORY": TITLE,
            "DESCRIPTION": " ".join((run.__doc__ or "").split()),
            "run": staticmethod(run),
        }
        name = f"Pbe{words.title().replace(' ', '')}"
        NODE_CLASS_MAPPINGS[name] = type(name, (), about)
        NODE_DISPLAY_NAME_MAPPINGS[name] = f"{TITLE}: {words}"
        return run

    return enter


def setting_inputs(names: Sequence[str], advanced: bool = False) -> dict[str, Input]:
    """The inputs of settings of an edit, which begin as those of the page."""
    docs = setting_docs()
    inputs = {name: as_input(SETTINGS[name], getattr(QUICK, name), docs[name]) for name in names}
    for name, (_, options) in inputs.items():
        options |= {"advanced": True} if advanced else {}
        options |= {"control_after_generate": True} if name == "seed" else {}
    return inputs


def as_input(kind: Any, default: Any, tooltip: str = "") -> Input:
    """ComfyUI's type and options for a parameter, or for a setting with its documentation as `tooltip`."""
    whole, extras = kind, [None]
    while get_origin(kind) is Annotated:
        kind, *extras = get_args(kind)
    found = extras[0]
    options: dict[str, Any] = {"tooltip": tooltip or extras[-1]}
    if isinstance(found, Socket):
        return str(found), options
    if callable(found):
        return found(), options
    options["default"] = default
    if get_origin(kind) is Literal:
        return list(get_args(kind)), options
    if kind is bool:
        return "BOOLEAN", options
    if kind not in (int, float):  # a text, or a number that may be left out: an empty text is not given
        options["default"] = "" if default is None else str(default)
        options["tooltip"] += f" It is {describe(whole)}{'' if default else ', or empty'}."
        return "STRING", options
    bounds = found if isinstance(found, Range) else Range(-math.inf)
    step = FINEST if kind is float else bounds.step
    options |= {"min": bounds.low + step * bounds.above, "step": bounds.step}
    if bounds.high < math.inf:
        options["max"] = bounds.high - step * bounds.below
    return ("INT", options) if kind is int else ("FLOAT", options | {"step": 0.05, "round": FINEST})
