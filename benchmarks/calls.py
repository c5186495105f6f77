"""The calls of its network that an edit makes: counted, and timed by kind."""

import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.worker import Numbers, synchronize


class Calls:
    """Counts the calls of a network's methods while `run` runs; a kind is a method with arguments of some shapes.

    One call of each kind is computed and timed, and the others get its result again: what the edit would take follows
    from their number, before the minutes of a whole one are spent. A kind that is not in `warm` yet is computed once
    more before it is timed.
    """

    def __init__(self, network: nn.Module, methods: tuple[str, ...], warm: set, device: torch.device):
        self.network, self.warm, self.device = network, warm, device
        self.methods = {name: getattr(network, name) for name in methods if hasattr(network, name)}
        self.counts: dict[Hashable, int] = {}
        self.outputs: dict[Hashable, Any] = {}
        self.seconds: dict[Hashable, float] = {}
        self.computed = 0.0  # seconds of all calls

    def run(self, edit: Callable[[], object], batch: int) -> Numbers:
        """Seconds of the edit; its evaluations of the network per picture, of which a guided call is two; `calls`, how
        many of each kind and the seconds of one; and the `rest` of the edit."""
        own = dict(vars(self.network))
        for name, method in self.methods.items():
            setattr(self.network, name, partial(self.call, name, method))
        try:
            wall = self.timed(edit)[0]
        finally:
            for name in self.methods:
                delattr(self.network, name)
            vars(self.network).update(own)
        noise = {kind: out if isinstance(out, Tensor) else out[0] for kind, out in self.outputs.items()}
        evaluations = sum(count * (len(noise[kind]) // batch) for kind, count in self.counts.items())
        calls = [[count, self.seconds[kind]] for kind, count in self.counts.items()]
        rest = wall - self.computed
        seconds = rest + sum(count * one for count, one in calls)
        return {"seconds": seconds, "evaluations": evaluations, "calls": calls, "rest": rest}

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        start = time.perf_counter()
        output = call()
        synchronize(self.device)
        return time.perf_counter() - start, output

    def call(self, name: str, method: Callable, *args: Any, **keywords: Any) -> Any:
        kind = name, *map(shapes, (*args, *keywords.values()))
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if kind not in self.outputs:
            for _ in range(1 if kind in self.warm else 2):
                self.seconds[kind], self.outputs[kind] = self.timed(partial(method, *args, **keywords))
                self.computed += self.seconds[kind]
            self.warm.add(kind)
        return self.outputs[kind]


def shapes(value: Any) -> Hashable:
    """The shape of a tensor, or of each in a list; None for anything else."""
    if isinstance(value, (list, tuple)):
        return tuple(map(shapes, value))
    return tuple(value.shape) if isinstance(value, Tensor) else None
