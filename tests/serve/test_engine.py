"""The queue before a model: what is run together, and what ends an edit."""

import threading
import time
from contextvars import ContextVar

import pytest
from fakes import at_once

from pbe.sampling import StepInfo
from pbe.serve import engine as engines
from pbe.serve.engine import Cancelled, Closed, Engine, Full, Ticket, TooLong

SECONDS = 30  # until a test gives up


class Hold:
    """An edit that is over once it is let go; it takes a step every hundredth of a second."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()
        self.ticket = Ticket(at_once(self.work).begin)

    def work(self, ticket):
        self.begun.set()
        while not self.go.wait(0.01):
            ticket.step(StepInfo(0, 1, 0, None, None))
        return "held"


@pytest.fixture
def engine():
    engine = Engine(max_waiting=8, max_batch=4)
    yield engine
    engine.close()


@pytest.fixture
def held(engine):
    hold = Hold()
    engine.submit(hold.ticket)
    assert hold.begun.wait(SECONDS)
    yield hold
    hold.go.set()


def ticket(ran: list, name: str, key=None, number: int = 1) -> Ticket:
    return Ticket(at_once(lambda ticket: ran.append((name, ticket.together))).begin, number, key)


def test_edits_run_in_order_and_equal_ones_together(engine, held):
    ran: list = []
    kinds = [("a", 1), ("b", 2), ("c", 1), ("d", None), ("e", None), ("f", 1)]
    tickets = [engine.submit(ticket(ran, name, key)) for name, key in kinds]
    held.go.set()
    for one in tickets:
        one.future.result(SECONDS)
    assert ran == [("a", 3), ("c", 3), ("f", 3), ("b", 1), ("d", 1), ("e", 1)]


def test_no_more_results_are_run_together_than_one_batch_holds(engine, held):
    ran: list = []
    tickets = [engine.submit(ticket(ran, name, 1, number)) for name, number in [("a", 2), ("b", 9), ("c", 1), ("d", 2)]]
    held.go.set()
    for one in tickets:
        one.future.result(SECONDS)
    assert ran == [("a", 2), ("c", 2), ("b", 1), ("d", 1)]


def test_a_full_queue_says_when_there_may_be_room(engine, held):
    ran: list = []
    engine.pace = 2.0
    waiting = [engine.submit(ticket(ran, "a")) for _ in range(8)]
    with pytest.raises(Full) as full:
        engine.submit(ticket(ran, "b"))
    assert full.value.args == (16,)
    waiting[0].cancel()
    engine.submit(ticket(ran, "c"))
    with pytest.raises(Full):
        engine.check_room()


def test_a_waiting_edit_that_is_cancelled_never_begins(engine, held):
    ran: list = []
    one, other = (engine.submit(ticket(ran, name)) for name in "ab")
    one.cancel()
    with pytest.raises(Cancelled):
        one.future.result(0)
    held.go.set()
    other.future.result(SECONDS)
    assert ran == [("b", 1)]


def test_a_running_edit_ends_at_its_next_step(held):
    held.ticket.cancel()
    with pytest.raises(Cancelled):
        held.ticket.future.result(SECONDS)


def test_an_edit_that_takes_too_long_ends():
    hold = Hold()
    Engine(max_seconds=0.05).submit(hold.ticket)
    with pytest.raises(TooLong):
        hold.ticket.future.result(SECONDS)


def test_what_runs_is_finished_and_what_waits_is_handed_back(engine, held):
    ran: list = []
    waiting = engine.submit(ticket(ran, "a"))
    engine.hand_back()
    with pytest.raises(Closed):
        waiting.future.result(0)
    with pytest.raises(Closed):
        engine.submit(ticket(ran, "b"))
    held.go.set()
    assert held.ticket.future.result(SECONDS) == "held"
    engine.thread.join(SECONDS)
    assert not engine.thread.is_alive()
    assert ran == []


def test_the_end_does_not_wait_for_ever(engine, held):
    begun = time.monotonic()
    engine.close(0.05)
    with pytest.raises(Closed):
        held.ticket.future.result(0)
    assert time.monotonic() - begun < SECONDS / 3


def test_errors_and_results_go_to_their_edits(engine, held):
    def fail(ticket):
        raise ValueError("no such thing")

    wrong = engine.submit(Ticket(at_once(fail).begin, key=1))
    right = engine.submit(Ticket(at_once(lambda ticket: 7).begin, key=1))
    held.go.set()
    assert right.future.result(SECONDS) == 7
    with pytest.raises(ValueError, match="no such thing"):
        wrong.future.result(SECONDS)


def test_the_queue_goes_on_after_a_bug(engine, monkeypatch):
    def broken(edits):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "run_together", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            engine.submit(ticket([], "a")).future.result(SECONDS)
    engine.submit(ticket([], "b")).future.result(SECONDS)


def test_an_edit_runs_in_the_context_in_which_it_was_made(engine):
    visitor: ContextVar[str] = ContextVar("visitor", default="nobody")
    visitor.set("ann")
    made = Ticket(at_once(lambda ticket: visitor.get()).begin)
    visitor.set("bob")
    assert engine.submit(made).future.result(SECONDS) == "ann"


def test_progress_counts_all_batches_and_regions():
    counted = Ticket(at_once(lambda ticket: None).begin, number=6)
    seen = []
    for index in [0, 1, 0, 1, 0, 1]:  # two batches, and another region
        counted.step(StepInfo(index, 2, 0, None, None))
        seen.append((counted.done, counted.total))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4), (5, 6), (6, 6)]
