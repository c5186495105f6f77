"""Maps between the names and forms of a checkpoint's tensors and this library's, in both directions."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

EMA_PREFIX = "model_ema."  # of averaged copies, in CompVis checkpoints
MAX_LAYERS = 64  # of one kind; CLIP's largest tower has 48


@dataclass(frozen=True)
class Rule:
    """Corresponding names, each a parameter's or a module's with everything below it.

    One of ours and one of theirs hold the same tensor, as `form` says: "same", "linear" (ours is a 1x1 convolution,
    theirs a linear layer), "transposed". Where one side has several names, the other is their concatenation along the
    first axis. An `alias` is a name that some files have in place of the usual one: it is read and never written.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Literal["same", "linear", "transposed"] = "same"
    alias: bool = False


def same(*names: str) -> list[Rule]:
    """Rules for names that are the same in both layouts."""
    return [Rule((name,), (name,)) for name in names]


def renamed(
    names: Mapping[str, str],
    ours: str = "",
    theirs: str = "",
    form: Literal["same", "linear", "transposed"] = "same",
    alias: bool = False,
) -> list[Rule]:
    """Rules for our names and theirs, which follow the prefixes `ours` and `theirs`."""
    return [Rule((ours + a,), (theirs + b,), form, alias) for a, b in names.items()]


class TensorMapping(NamedTuple):
    """How to make one tensor from those called `sources`: their concatenation, or one part of the only one."""

    sources: tuple[str, ...]
    form: Literal["same", "linear", "convolution", "transposed"] = "same"
    part: int = 0
    parts: int = 1

    def build(self, *tensors: Tensor) -> Tensor:
        """The tensor; a view of the source where that is possible."""
        if len(tensors) > 1:
            return torch.cat(tensors)
        tensor = tensors[0]
        if self.parts > 1:
            return tensor.chunk(self.parts)[self.part]
        if self.form == "convolution" and tensor.ndim == 2:  # biases have one dimension and stay as they are
            return tensor[:, :, None, None]
        if self.form == "linear" and tensor.ndim == 4:
            return tensor[:, :, 0, 0]
        if self.form == "transposed":
            return tensor.T
        return tensor

    def shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, given the sources'."""
        if len(shapes) == self.parts == 1 and self.form == "same":
            return tuple(shapes[0])
        return tuple(self.build(*(torch.empty(shape, device="meta") for shape in shapes)).shape)


@dataclass(frozen=True)
class KeyMap:
    """The rules of a layout, and patterns of names that it may hold and this library does not need, with the reason."""

    rules: Sequence[Rule]
    dropped: Mapping[str, str] = field(default_factory=dict)

    def to_ours(self, names: Iterable[str]) -> dict[str, TensorMapping]:
        """By our name, how to make each tensor from those called `names` in this layout; raises `UnlistedNames`."""
        return self._map(names, {name: rule for rule in self.rules for name in rule.theirs}, to_ours=True)

    def to_theirs(self, names: Iterable[str]) -> dict[str, TensorMapping]:
        """By the name in this layout, how to make each tensor from ours called `names`; raises `UnlistedNames`."""
        written = (rule for rule in self.rules if not rule.alias)
        return self._map(names, {name: rule for rule in written for name in rule.ours}, to_ours=False)

    def reason(self, name: str) -> str | None:
        """Why a tensor of this layout is dropped; None if it is not."""
        return next((why for pattern, why in self.dropped.items() if re.fullmatch(pattern, name)), None)

    def _map(self, names: Iterable[str], by_name: Mapping[str, Rule], to_ours: bool) -> dict[str, TensorMapping]:
        mappings: dict[str, TensorMapping] = {}
        unlisted = []
        for name in names:
            if self.reason(name) is not None:
                continue
            listed = next((prefix for prefix in prefixes(name) if prefix in by_name), None)
            if listed is None:
                unlisted.append(name)
                continue
            rule, rest = by_name[listed], name[len(listed) :]
            froms, tos = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
            form = "convolution" if rule.form == "linear" and to_ours else rule.form
            sources = tuple(source + rest for source in froms)
            mappings |= {to + rest: TensorMapping(sources, form, i, len(tos)) for i, to in enumerate(tos)}
        if unlisted:
            raise UnlistedNames(unlisted)
        return mappings


class UnlistedNames(ValueError):
    """Names that no rule of a layout lists."""

    def __init__(self, names: list[str]):
        super().__init__(f"{len(names)} names that this layout does not have: {shorten(names)}")


def prefixes(name: str) -> Iterator[str]:
    """The name, then its modules from the innermost to the outermost."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def count(names: Iterable[str], template: str) -> int:
    """How many different numbers stand in the place of `*` in names that begin like `template`.

    ValueError for more than any model has: a small file could otherwise ask for all combinations of levels and blocks.
    """
    pattern = re.compile(re.escape(template).replace(r"\*", r"(\d+)"))
    found = len({m[1] for m in map(pattern.match, names) if m})
    if found > MAX_LAYERS:
        raise ValueError(f"{found:,} layers {template}; expected at most {MAX_LAYERS}")
    return found


def average_name(name: str) -> str:
    """What the moving average of the parameter `name` is called in CompVis checkpoints."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def shorten(names: list[str], limit: int = 8) -> str:
    """The first few names, for a message."""
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def mismatches(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """How the shapes of tensors, by name, differ from the expected ones: parts of a message, empty if they agree."""
    misshaped = [name for name in expected if name in found and found[name] != expected[name]]
    faults = {
        "lacks": [name for name in expected if name not in found],
        "has no place for": [name for name in found if name not in expected],
        "has the wrong shape in": [f"{name} {found[name]} for {expected[name]}" for name in misshaped],
    }
    return [f"{verb} {len(names)}: {shorten(names)}" for verb, names in faults.items() if names]
