"""Several edits at once: what they have sampled with equal settings at equal sizes is one batch for the network.

An edit is written as a generator that yields a `Sampling` wherever it needs latents, and is sent them. `sampled` makes
the ordinary function of it. As in `pbe.batch.job`, what is heavy is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import wraps
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from torch import Tensor

    from pbe.editing.settings import EditSettings
    from pbe.models.paint_by_example import Condition, PaintByExample
    from pbe.sampling import Callback, StepInfo

P = ParamSpec("P")
T = TypeVar("T")


class Sampling(NamedTuple):
    """What an edit asks for: latents z_0 (B, 4, h, w) for a condition, one for each of the seeds."""

    model: PaintByExample
    condition: Condition
    settings: EditSettings
    seeds: Sequence[int]
    callback: Callback | None = None
    z_photo: Tensor | None = None  # as `sample_latents` takes these three
    null_context: Tensor | None = None
    noise: Tensor | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What is equal for all that one batch can hold."""
        given = tuple(tensor is None for tensor in self[-3:])
        return id(self.model), self.condition.z_masked.shape[1:], replace(self.settings, seed=0), given


Steps = Generator[Sampling, Any, T]  # it is sent z_0


class Edit(Protocol[P, T]):
    """A function that edits, and as `begin` the generator that it is made of."""

    begin: Callable[P, Steps[T]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T: ...


def sampled(begin: Callable[P, Steps[T]]) -> Edit[P, T]:
    """The function that runs the generator alone, and returns what that returns."""

    @wraps(begin)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        (result,) = run_together([begin(*args, **kwargs)])
        return result

    alone.begin = begin  # type: ignore[attr-defined]
    return cast("Edit[P, T]", alone)


def run_together(edits: Sequence[Steps[T]]) -> list[T]:
    """What the edits return. Each is the same as alone, to rounding: its noise follows from its own seeds.

    What a callback raises ends its edit alone; what an edit raises is raised, and ends all.
    """
    import torch

    results: dict[int, T] = {}
    asked: dict[int, Sampling] = {}

    def go_on(i: int, answer: Tensor | Exception | None) -> None:
        try:
            asked[i] = edits[i].throw(answer) if isinstance(answer, Exception) else edits[i].send(answer)
        except StopIteration as end:
            results[i] = end.value

    with torch.no_grad():
        for i in range(len(edits)):
            go_on(i, None)
        while asked:
            key = next(iter(asked.values())).key
            equal = [i for i, sampling in asked.items() if sampling.key == key]
            for i, answer in zip(equal, sample([asked.pop(i) for i in equal]), strict=True):
                go_on(i, answer)
    return [results[i] for i in range(len(edits))]


def sample(requests: Sequence[Sampling]) -> list[Tensor | Exception]:
    """For each request, which are of one key, its latents or what is to be raised in its edit."""
    import torch

    from pbe.acceleration.offloading import on_device
    from pbe.editing.edit import sample_latents
    from pbe.models.paint_by_example import Condition

    model, condition, settings, seeds, _, *others = requests[0]
    if len(requests) > 1:
        conditions = (request.condition for request in requests)
        condition = Condition(*(torch.cat(tensors) for tensors in zip(*conditions, strict=True)))
        seeds = [seed for request in requests for seed in request.seeds]
        columns = zip(*(request[-3:] for request in requests), strict=True)
        others = [None if column[0] is None else repeated(column, requests) for column in columns]
    ends = list(accumulate(len(request.seeds) for request in requests))
    parts = [slice(end - len(request.seeds), end) for request, end in zip(requests, ends, strict=True)]
    raised: dict[int, Exception] = {}

    def tell_each(step: StepInfo) -> None:
        for i, (request, part) in enumerate(zip(requests, parts, strict=True)):
            try:
                if i not in raised and request.callback is not None:
                    request.callback(replace(step, x_t=step.x_t[part], z_0=step.z_0[part]))
            except Exception as error:
                raised[i] = error
        if len(raised) == len(requests):
            raise raised[0]

    try:
        with on_device(model.unet, model.device):
            z_0 = sample_latents(model, condition, settings, seeds, tell_each, *others)
    except Exception as error:
        if len(requests) == 1 or len(raised) == len(requests):
            return [raised.get(i, error) for i in range(len(requests))]
        return [answer for request in requests for answer in sample([request])]  # the memory may hold one
    return [raised.get(i, z_0[part]) for i, part in enumerate(parts)]


def repeated(tensors: Sequence[Tensor], requests: Sequence[Sampling]) -> Tensor:
    """One tensor of all the requests', with one row for each seed."""
    import torch

    numbers = [len(request.seeds) for request in requests]
    return torch.cat([x.expand(n, *x.shape[1:]) for x, n in zip(tensors, numbers, strict=True)])
