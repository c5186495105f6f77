"""The calls of its network that an edit makes: counted, and timed by kind."""

import time
from collections.abc import Callable, Hashable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.worker import Numbers, synchronize


class Calls:
    """Within its block, counts the calls of a network's methods; a kind is a method with arguments of some shapes.

    Unless `whole`, one call of each kind is computed and timed, and the others get its result again: what the edit
    would take follows from their number, before the minutes of a whole one are spent. A kind that is not in `warm` yet
    is computed once more before it is timed.
    """

    def __init__(self, network: nn.Module, methods: tuple[str, ...], whole: bool, warm: set, device: torch.device):
        self.network, self.whole, self.warm, self.device = network, whole, warm, device
        self.methods = {name: getattr(network, name) for name in methods if hasattr(network, name)}
        self.own = {name for name in self.methods if name in vars(network)}
        self.counts: dict[Hashable, int] = {}
        self.outputs: dict[Hashable, Any] = {}
        self.seconds: dict[Hashable, float] = {}
        self.extra = 0.0  # seconds of what warmed a kind up

    def __enter__(self) -> "Calls":
        for name, method in self.methods.items():
            setattr(self.network, name, partial(self.call, name, method))
        self.start = self.now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall = self.now() - self.start
        for name, method in self.methods.items():
            if name in self.own:
                setattr(self.network, name, method)
            else:
                delattr(self.network, name)

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def call(self, name: str, method: Callable, *args: Any, **keywords: Any) -> Any:
        shapes = (tuple(x.shape) if isinstance(x, Tensor) else None for x in (*args, *keywords.values()))
        kind = name, *shapes
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.whole:
            self.outputs[kind] = method(*args, **keywords)
        elif kind not in self.outputs:
            entered = start = self.now()
            for _ in range(1 if kind in self.warm else 2):
                start = self.now()
                self.outputs[kind] = method(*args, **keywords)
            self.seconds[kind] = self.now() - start
            self.extra += start - entered
            self.warm.add(kind)
        return self.outputs[kind]

    def numbers(self, batch: int) -> Numbers:
        """Seconds of the edit; its evaluations of the network per picture, of which a guided call is two; and `calls`:
        how many of each kind and, unless the edit was `whole`, the seconds of one, beside the `rest` of the edit."""
        noise = {kind: out if isinstance(out, Tensor) else out[0] for kind, out in self.outputs.items()}
        evaluations = sum(count * (len(noise[kind]) // batch) for kind, count in self.counts.items())
        if self.whole:
            return {"seconds": self.wall, "evaluations": evaluations, "calls": [[n] for n in self.counts.values()]}
        calls = [[count, self.seconds[kind]] for kind, count in self.counts.items()]
        rest = self.wall - self.extra - sum(self.seconds.values())
        seconds = rest + sum(count * one for count, one in calls)
        return {"seconds": seconds, "evaluations": evaluations, "calls": calls, "rest": rest}
