"""The core of the server and of the page: one thread that edits, and a bounded queue of edits before it.

Edits that wait together and have equal settings are run together, see `pbe.editing.together`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from PIL import Image

from pbe.editing.together import Sampling, Steps, run_together
from pbe.sampling import StepInfo

T = TypeVar("T")
BATCH_SIZE = 4  # results of one edit that are sampled at a time


class Cancelled(Exception):
    """Nobody waits for the edit any longer."""


class TooLong(Exception):
    """The edit took longer than an edit may."""


class Full(Exception):
    """The queue is full; the argument says in how many seconds there may be room."""


class Closed(Exception):
    """The engine ends: the edit was not begun, or not finished."""


@dataclass(eq=False)
class Ticket(Generic[T]):
    """An edit that waits, runs or is over. Its `future` has the result, or one of the exceptions above.

    begin: the edit, which calls the ticket's `step` after each step and its `show` with previews. It runs in the
        context (of contextvars) in which the ticket was made.
    number: of results.
    key: edits are run together if these are equal; None is equal to nothing.
    changed: called, in any thread, when it begins, after each step, with each preview and at the end.
    """

    begin: Callable[[Ticket[T]], Steps[T]]
    number: int = 1
    key: Hashable = None
    changed: Callable[[], object] = lambda: None
    future: Future[T] = field(default_factory=Future)
    preview: list[Image.Image] = field(default_factory=list)
    done: int = 0  # steps, of `total`
    total: int = 0
    started: float | None = None  # by time.monotonic, as `until`
    until: float = math.inf
    together: int = 0  # how many edits were begun with it, itself among them
    stop: type[Exception] | None = None
    context: Context = field(default_factory=copy_context)

    def cancel(self, reason: type[Exception] = Cancelled) -> None:
        """Ends the edit at its next step, or before it begins."""
        self.stop = reason
        if self.started is None:
            self.end(reason())

    def check(self) -> None:
        """Raises what ends the edit, if something does."""
        if self.stop is not None:
            raise self.stop()
        if time.monotonic() > self.until:
            raise TooLong

    def step(self, step: StepInfo) -> None:
        """What the edit calls after each step."""
        self.check()
        self.done += 1
        # each region that is edited by itself has as many steps again
        batches = -(-self.number // BATCH_SIZE)
        self.total = max(self.total, step.steps * batches, self.done + step.steps - step.index - 1)
        self.changed()

    def show(self, pictures: list[Image.Image], _: StepInfo) -> None:
        """What the edit calls with previews."""
        self.preview = pictures
        self.changed()

    def run(self) -> Steps[None]:
        """The edit, whose result or error goes to the future."""
        edit = self.begin(self)
        go_on: Callable[[], Sampling] = partial(next, edit)
        try:
            self.check()
            self.changed()
            while True:
                asked = self.context.run(go_on)
                try:
                    go_on = partial(edit.send, (yield asked))
                except Exception as error:
                    go_on = partial(edit.throw, error)
        except StopIteration as end:
            self.end(result=end.value)
        except Exception as error:
            self.end(error)

    def end(self, error: Exception | None = None, result: T | None = None) -> None:
        """Sets the future, unless that is done."""
        try:
            self.future.set_exception(error) if error else self.future.set_result(result)  # type: ignore[arg-type]
        except InvalidStateError:
            return  # cancelled in the moment in which it begins
        self.changed()


class Engine:
    """Runs edits in a thread of its own, in the order in which they come; those that are equal together.

    max_waiting: edits in the queue.
    max_batch: results that are sampled together.
    max_seconds: that an edit may take, from its beginning.
    """

    def __init__(self, max_waiting: int = 64, max_batch: int = 4, max_seconds: float = math.inf):
        self.max_waiting, self.max_batch, self.max_seconds = max_waiting, max_batch, max_seconds
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.closed = False
        self.pace = 1.0  # seconds an edit, of late
        self.condition = threading.Condition()
        self.thread = threading.Thread(target=self.work, name="pbe-engine", daemon=True)
        self.thread.start()

    def submit(self, ticket: Ticket[T], force: bool = False) -> Ticket[T]:
        """Puts an edit into the queue. Full where that has no room, unless `force` is set; Closed at the end."""
        with self.condition:
            if not force:
                self.check_room()
            self.waiting.append(ticket)
            self.condition.notify()
        return ticket

    def check_room(self) -> None:
        """Full or Closed, as `submit`."""
        if self.closed:
            raise Closed
        waiting = sum(not ticket.future.done() for ticket in self.waiting)
        if waiting >= self.max_waiting:
            raise Full(max(1, math.ceil(self.pace * waiting)))

    def work(self) -> None:
        while batch := self.take():
            begun = time.monotonic()
            try:
                run_together([ticket.run() for ticket in batch])
            except Exception as error:  # the queue goes on, whatever it is
                for ticket in batch:
                    ticket.end(error)
            self.pace += 0.2 * ((time.monotonic() - begun) / len(batch) - self.pace)

    def take(self) -> list[Ticket]:
        """The first edit that waits, and those behind it that can be run with it; nothing at the end."""
        with self.condition:
            self.running = []
            while True:
                self.waiting = [ticket for ticket in self.waiting if not ticket.future.done()]
                if self.waiting or self.closed:
                    break
                self.condition.wait()
            room = self.max_batch
            for ticket in self.waiting:
                size = min(ticket.number, BATCH_SIZE)
                first = self.running[0] if self.running else ticket
                if ticket is first or (ticket.key is not None and ticket.key == first.key and size <= room):
                    self.running.append(ticket)
                    room -= size
            self.waiting = [ticket for ticket in self.waiting if ticket not in self.running]
            for ticket in self.running:
                ticket.started, ticket.together = time.monotonic(), len(self.running)
                ticket.until = ticket.started + self.max_seconds
            return self.running

    def hand_back(self) -> None:
        """Ends the edits that wait, with Closed, and takes no more; those that run go on."""
        with self.condition:
            self.closed = True
            left, self.waiting = self.waiting, []
            self.condition.notify()
        for ticket in left:
            ticket.cancel(Closed)

    def close(self, seconds: float = 0) -> None:
        """`hand_back`, and the end of those that still run after these seconds."""
        self.hand_back()
        self.thread.join(seconds)
        for ticket in self.running:
            ticket.cancel(Closed)
        self.thread.join()
