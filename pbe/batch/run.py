"""Batches of edits: rows of a CSV or JSONL file, each run once and written where it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pbe.batch.job import COLUMNS, RENAMED, Job, read_inputs, run_job
from pbe.batch.provenance import Weights, check_writable, is_finished, provenance_of, save_result
from pbe.editing.settings import is_given
from pbe.io.rows import read_rows

if TYPE_CHECKING:
    from pbe.models.paint_by_example import Distilled, PaintByExample
    from pbe.sampling import Callback


class Outcome(NamedTuple):
    """What became of one row of a batch file."""

    line: int
    status: Literal["done", "skipped", "failed"]
    reason: str = ""


def read_jobs(
    path: Path, defaults: Mapping[str, Any], distilled: Callable[[Job], Distilled | None] = lambda _: None
) -> tuple[list[Job], list[Outcome]]:
    """The jobs of a `.csv` file (with a header) or a `.jsonl` file (an object per line), and the rows that are refused.

    Paths in the file are relative to its folder; where a row is silent, `defaults` holds, then what its model was
    distilled for. Jobs with the same adapters follow each other, so that each model is loaded once. ValueError for
    another kind of file or text, an unknown column of a header, two rows with one `out`, and an `out` that is another
    row's input.
    """
    jobs, failed = [], []
    for line, row in read_rows(path, COLUMNS, renamed=RENAMED, allow_short=True):
        try:
            if isinstance(row, ValueError):
                raise row
            given = {name: value for name, value in row.items() if is_given(value)}
            jobs.append(Job.from_row({**defaults, **given}, path.parent, line, distilled))
        except (ValueError, OSError) as error:  # the latter of its adapters
            failed.append(Outcome(line, "failed", str(error)))
    if not jobs and not failed:
        raise ValueError(f"{path} has no rows")
    _check_outputs_differ(path, jobs)
    groups = {adapters: i for i, adapters in enumerate(dict.fromkeys(job.adapters for job in jobs))}
    return sorted(jobs, key=lambda job: groups[job.adapters]), failed


def _check_outputs_differ(path: Path, jobs: Sequence[Job]) -> None:
    inputs = {os.path.realpath(job.path(name)): job.line for job in jobs for name in job.inputs}
    outputs: dict[str, int] = {}
    for job in jobs:
        out = os.path.realpath(job.path(job.out))
        if out in outputs:
            raise ValueError(f"{path}: lines {outputs[out]} and {job.line} both write {job.out}")
        if out in inputs:  # whether the row reads it before or after would depend on the order
            raise ValueError(f"{path}: line {job.line} writes {job.out}, which line {inputs[out]} reads")
        outputs[out] = job.line


def is_done(job: Job, weights: Weights) -> bool:
    """Whether the job's picture is there, made with the job's settings from the same inputs and weights."""
    return is_finished(job.path(job.out), partial(provenance_of, job, weights))


def run_row(
    load: Callable[[], PaintByExample],
    job: Job,
    weights: Weights,
    redo: bool = False,
    callback: Callback | None = None,
) -> Outcome:
    """Run one row with the model that `load` gives and save its picture, unless that is done already.

    A row that cannot be run becomes an outcome; whatever `load` raises is raised, unless the row's adapters may be why.
    """
    if not redo and is_done(job, weights):
        return Outcome(job.line, "skipped")
    shared = load() if job.adapters is None else None

    def edit() -> None:
        model = shared or load()
        inputs = read_inputs(job)
        provenance = provenance_of(job, weights)
        check_writable(job.path(job.out), inputs.photo, provenance)
        (image,) = run_job(model, job, inputs, callback=callback)
        save_result(image, job.path(job.out), provenance)

    return attempt(job.line, edit)


def attempt(line: int, work: Callable[[], None]) -> Outcome:
    """What became of `work` for a row; an error is noted, since hours into a batch the next rows may be fine."""
    try:
        work()
    except (ValueError, OSError, MemoryError) as error:
        return Outcome(line, "failed", str(error))
    except Exception as error:
        message = str(error).partition("\n")[0]
        return Outcome(line, "failed", f"{type(error).__name__}: {message}")
    return Outcome(line, "done")
