"""Processes that measure: one for each system or file, so that its start-up and its peak memory are its own.

Both ends are here: `Worker` and `run_once` start a process and read its numbers; `serve` and what follows run in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from benchmarks.budget import say

if TYPE_CHECKING:
    from _typeshed import DataclassInstance as Task  # of the worker's own module

ROOT = Path(__file__).resolve().parents[1]
SEED = 321
Numbers = dict[str, Any]
T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------------------
# The end that asks


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs a module of this package in the user's folder, where relative paths mean what the user wrote."""
    return [sys.executable, "-m", module, *arguments]


def environment(**defaults: str) -> dict[str, str]:
    """This process's environment, in which this package is found whatever the folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**defaults, **os.environ, "PYTHONPATH": path}


def run_once(module: str, *arguments: str) -> Numbers:
    """The numbers that a process prints at its end; RuntimeError with what it said if it fails."""
    command = module_command(module, *arguments)
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} ended with {run.returncode}:\n{run.stderr[-2000:]}")
    numbers = json.loads(run.stdout.splitlines()[-1])
    say(f"{' '.join([module.rpartition('.')[2], *arguments])}: {numbers['seconds']:.3g} s")
    return numbers


class Worker:
    """A process of the module that defines `task`, which runs the system `name`; `ask` it for one thing at a time.

    `started` waits for it and has the numbers of its start. Each answer is a line of progress. What it compiles is kept
    in TORCHINDUCTOR_CACHE_DIR, or else in a folder beside its own, where the next process of the same run finds it.
    RuntimeError with its last words where it ends before it has answered.
    """

    def __init__(self, name: str, task: Task, folder: Path):
        folder.mkdir(exist_ok=True)
        self.name, self.folder = name, folder
        self.task = "{dtype}, batch {batch}, {resolution}²".format(**asdict(task))
        arguments = (name, json.dumps(asdict(task)), str(folder), str(time.time()))
        with open(folder / "stderr.txt", "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                module_command(type(task).__module__, *arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(TORCHINDUCTOR_CACHE_DIR=str(folder.parent / "compiled")),
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout, self.busy = self.process.stdin, self.process.stdout, True

    @cached_property
    def started(self) -> Numbers:
        return self.answer("started")

    def ask(self, what: str) -> Numbers:
        assert self.started
        self.busy = True
        self.stdin.write(what + "\n")
        self.stdin.flush()
        return self.answer(what)

    def answer(self, what: str) -> Numbers:
        for line in self.stdout:
            if line.startswith("{"):
                self.busy = False
                numbers = json.loads(line)
                values = (f"{key} {value:.4g}" for key, value in numbers.items() if isinstance(value, int | float))
                say(f"{self.name}, {self.task}: {what}: {', '.join(values)}")
                return numbers
        code, errors = self.process.wait(), (self.folder / "stderr.txt").read_text(encoding="utf-8")
        raise RuntimeError(f"the process of {self.name!r} ended with {code}:\n{errors[-2000:]}")

    def close(self) -> None:
        if self.busy:  # nobody waits for the answer any more
            self.process.terminate()
        self.stdin.close()
        self.process.wait()
        self.stdout.close()


@contextmanager
def workers(task: Task, systems: Sequence[str]) -> Iterator[list[Worker]]:
    """One worker per system, all of them waiting."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folders = (Path(folder, str(i)) for i in range(len(systems)))
        yield [
            stack.enter_context(closing(Worker(name, task, own))) for name, own in zip(systems, folders, strict=True)
        ]


def is_full(error: RuntimeError) -> bool:
    """Whether a process ended because a GPU's memory is not enough."""
    return "out of memory" in str(error)


def unless_full(call: Callable[[], T]) -> T | None:
    """What the call returns, or None where a GPU's memory is not enough for it."""
    try:
        return call()
    except RuntimeError as error:
        if not is_full(error):
            raise
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The end that measures


def serve(started: Numbers, answer: Callable[[str], Numbers]) -> None:
    """Prints how the start went, then answers each line of stdin by one line of JSON, until nobody asks any more."""
    print(json.dumps(started), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(field: str) -> float:
    """This process's memory in GiB, on Linux: `VmRSS` now, `VmHWM` the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:"))


def memory(device: torch.device) -> Numbers:
    """Peaks in GiB: of the process's resident size, and of what is allocated and reserved on a GPU."""
    peaks = {}
    if Path("/proc/self/status").exists():
        peaks["peak RSS GiB"] = resident("VmHWM")
    if device.type == "cuda":
        peaks["peak GPU GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        peaks["peak GPU GiB, reserved"] = torch.cuda.max_memory_reserved(device) / 2**30
    return peaks
