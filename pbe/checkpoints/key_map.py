"""Rules that translate the names and forms of a checkpoint's tensors into this library's, and back."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor


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


class Recipe(NamedTuple):
    """How to make one tensor of those called `sources`: their concatenation, or one part of the only one."""

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
        return tuple(self.build(*(torch.empty(shape, device="meta") for shape in shapes)).shape)


@dataclass(frozen=True)
class Table:
    """All rules of a layout, and the patterns of names it may hold that this library does not need, with the reason."""

    rules: tuple[Rule, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)

    def to_ours(self, names: Iterable[str]) -> dict[str, Recipe]:
        """The recipe for each of our names that tensors called `names` in this layout give."""
        return self._translate(names, {n: r for r in self.rules for n in r.theirs}, "ours")

    def to_theirs(self, names: Iterable[str]) -> dict[str, Recipe]:
        """The recipe for each name of this layout that tensors with our `names` give."""
        return self._translate(names, {n: r for r in self.rules if not r.alias for n in r.ours}, "theirs")

    def reason(self, name: str) -> str | None:
        """Why a tensor of this layout is dropped; None if it is not."""
        return next((why for pattern, why in self.dropped.items() if re.fullmatch(pattern, name)), None)

    def _translate(
        self, names: Iterable[str], by_name: Mapping[str, Rule], target: Literal["ours", "theirs"]
    ) -> dict[str, Recipe]:
        recipes: dict[str, Recipe] = {}
        unlisted = []
        for name in names:
            if self.reason(name) is not None:
                continue
            listed = next((prefix for prefix in prefixes(name) if prefix in by_name), None)
            if listed is None:
                unlisted.append(name)
                continue
            rule, rest = by_name[listed], name[len(listed) :]
            froms, tos = (rule.theirs, rule.ours) if target == "ours" else (rule.ours, rule.theirs)
            form = "convolution" if rule.form == "linear" and target == "ours" else rule.form
            sources = tuple(source + rest for source in froms)
            for part, to in enumerate(tos):
                recipes[to + rest] = Recipe(sources, form, part, len(tos))
        if unlisted:
            raise UnlistedNames(unlisted)
        return recipes


class UnlistedNames(ValueError):
    """Names that a layout's table does not list."""

    def __init__(self, names: list[str]):
        super().__init__(f"{len(names)} names that this layout does not have: {shorten(names)}")
        self.names = names


def prefixes(name: str) -> Iterator[str]:
    """The name, then its modules from the innermost to the outermost."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def shorten(names: list[str], limit: int = 8) -> str:
    """The first few names, for a message."""
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def same(*names: str) -> tuple[Rule, ...]:
    """Rules for names that are the same in both layouts."""
    return tuple(Rule((name,), (name,)) for name in names)
