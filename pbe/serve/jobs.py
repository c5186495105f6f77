"""The server's jobs: edits as folders of their own, found again after a restart, the oldest removed for new ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pbe.batch.job import COLUMNS, Job
from pbe.io.atomic import remove, write_text
from pbe.serve.engine import Cancelled, Closed, Engine, Full, Ticket
from pbe.serve.problems import Problem
from pbe.serve.uploads import result_paths

Status = Literal["queued", "running", "done", "failed", "cancelled"]
STATE = "job.json"  # written beside a job's files at its beginning and its end; without it they are left over
OVER = ("done", "failed", "cancelled")


@dataclass(eq=False)
class Record:
    """A job, and what became of it. A lasting one is there until it is deleted; others end with their request."""

    id: str
    job: Job
    number: int
    lasting: bool = True
    created: float = field(default_factory=time.time)
    status: Status = "queued"
    error: dict[str, Any] | None = None  # as a client gets it
    step: int = 0  # of `steps`, which are known once it runs
    steps: int = 0
    problem: Problem | None = None  # of which that is
    ticket: Ticket[list[str]] | None = None  # until it is over
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Goes on with those who wait for a change."""
        before, self.changed = self.changed, asyncio.Event()
        before.set()

    async def wait(self, seconds: float) -> bool:
        """Waits for a change, or as long; whether the job is over."""
        changed = self.changed
        if self.status not in OVER:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), seconds)
        return self.status in OVER

    @property
    def paths(self) -> list[Path]:
        """Its results."""
        return result_paths(self.job, self.number) if self.status == "done" else []

    def to_json(self) -> dict[str, Any]:
        """What a client sees."""
        seed, url = self.job.settings.seed, f"/v1/jobs/{self.id}/results"
        names = ("id", "status", "created", "step", "steps", "error")
        results = [{"seed": seed + i, "url": f"{url}/{i}"} for i in range(len(self.paths))]
        return {name: getattr(self, name) for name in names} | {"results": results}

    def save(self) -> None:
        stored = self.to_json() | {"row": self.job.to_row(), "number": self.number}
        write_text(self.job.path(STATE), json.dumps(stored))

    @classmethod
    def load(cls, folder: Path) -> Record:
        """A job of a server that ended; OSError, ValueError, KeyError or TypeError where it has left none."""
        stored = json.loads((folder / STATE).read_text("utf-8"))
        names = ("number", "created", "status", "step", "steps", "error")
        return cls(folder.name, Job.from_row(stored["row"], folder), **{name: stored[name] for name in names})


class Jobs:
    """The jobs of a server, in a folder of its own.

    ticket_of: makes a job's edit with a number of results.
    quota: bytes of the folder above which the oldest jobs that are over are removed.
    ended: called with each job that is over, and its ticket.
    """

    def __init__(
        self,
        engine: Engine,
        ticket_of: Callable[[Job, int], Ticket[list[str]]],
        folder: Path,
        quota: int,
        ended: Callable[[Record, Ticket], object],
    ):
        self.engine, self.ticket_of, self.folder, self.quota, self.ended = engine, ticket_of, folder, quota, ended
        self.records: dict[str, Record] = {}
        self.loop = asyncio.get_running_loop()
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for path in self.folders():
            try:
                found.append(Record.load(path))
            except (OSError, ValueError, KeyError, TypeError):
                remove(path)
        for record in sorted(found, key=lambda record: record.created):
            self.records[record.id] = record
            if record.status not in OVER:
                self.queue(record, force=True)

    def folders(self) -> list[Path]:
        """Those of jobs, whoever made them; what else lies there is not touched."""
        return [path for path in self.folder.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]

    def used(self) -> int:
        """Bytes of all jobs' files, some of which may be removed meanwhile."""
        total = 0
        for folder, _, names in chain.from_iterable(map(os.walk, self.folders())):
            for name in names:
                with suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_size
        return total

    def new_folder(self) -> Path:
        """A folder for a new job's files; its name is the job's id. Full where the quota leaves no room for it."""
        self.engine.check_room()
        over = [record for record in list(self.records.values()) if record.status in OVER and record.lasting]
        while (used := self.used()) > self.quota and over:
            with suppress(KeyError):  # deleted meanwhile
                self.delete(over.pop(0).id)
        if used > self.quota:
            raise Full(max(1, round(self.engine.pace)))
        path = self.folder / uuid.uuid4().hex
        path.mkdir(mode=0o700)
        return path

    def add(self, record: Record) -> Record:
        """Queues a new job. Full or Closed as `Engine.submit`."""
        if record.lasting:
            record.save()
        self.records[record.id] = record
        try:
            self.queue(record)
        except Exception:
            del self.records[record.id]
            raise
        return record

    def queue(self, record: Record, force: bool = False) -> None:
        record.ticket = self.ticket_of(record.job, record.number)
        record.ticket.changed = partial(self.note, record)
        self.engine.submit(record.ticket, force)

    def note(self, record: Record) -> None:
        """Takes over what has changed of a job's ticket, in whichever thread it did."""
        ticket = record.ticket
        if ticket is None:  # cancelled in the moment in which it begins
            return
        record.step, record.steps = ticket.done, ticket.total
        if ticket.future.done():
            self.end(record, ticket)
        else:
            record.status = "running"
        with suppress(RuntimeError):  # the server's loop has ended before
            self.loop.call_soon_threadsafe(record.wake)

    def end(self, record: Record, ticket: Ticket[list[str]]) -> None:
        """Notes how a job has ended; a lasting one that was handed back is not over, and the next server begins it."""
        error = ticket.future.exception()
        if isinstance(error, Closed) and record.lasting:
            record.status = "queued"
        elif isinstance(error, Exception):
            record.problem = Problem.of(error, record.job.folder, COLUMNS)
            record.error = record.problem.error
            record.status = "cancelled" if isinstance(error, Cancelled) else "failed"
        else:
            record.status = "done"
        record.ticket = None  # and with it the frames of an exception
        if record.lasting and record.status in OVER and record.id in self.records:
            with suppress(OSError):  # a full disk: the job is made again after a restart
                record.save()
        self.ended(record, ticket)

    def delete(self, id: str) -> None:
        """Ends a job and forgets it; KeyError where there is none."""
        record = self.records.pop(id)
        ticket = record.ticket
        if ticket is None:
            remove(record.job.folder)
        else:
            ticket.future.add_done_callback(lambda _: remove(record.job.folder))
            ticket.cancel()
