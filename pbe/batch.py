"""Batches of edits: rows of a CSV or JSONL file, each run once and written where it says."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pbe.jobs import COLUMNS, Job, check_output, make_job, read_inputs, read_settings, run_job, save_result, settings_of

if TYPE_CHECKING:
    import torch

    from pbe.models.paint_by_example import PaintByExample
    from pbe.sampling import Callback


class Outcome(NamedTuple):
    """What became of one row of a batch file."""

    line: int
    status: Literal["done", "skipped", "failed"]
    reason: str = ""


def read_jobs(path: Path, defaults: Mapping[str, Any]) -> tuple[list[Job], list[Outcome]]:
    """The jobs of a `.csv` file (with a header) or a `.jsonl` file (an object a line), and the rows that are none.

    Paths in the file are relative to its folder; where a row is silent, `defaults` holds. ValueError for another kind
    of file, an unknown column, two rows with one `out`, and an `out` that is another row's input.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a batch file ends in .csv or .jsonl")
    jobs, failed = [], []
    try:
        for line, row in readers[path.suffix.lower()](path):
            try:
                if isinstance(row, ValueError):
                    raise row
                given = {name: value for name, value in row.items() if value not in (None, "")}
                jobs.append(make_job({**defaults, **given}, path.parent, line))
            except ValueError as error:
                failed.append(Outcome(line, "failed", str(error)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not jobs and not failed:
        raise ValueError(f"{path} has no rows")
    _check_outputs_differ(path, jobs)
    return jobs, failed


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        _check_columns(path, names)
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a column twice: {', '.join(names)}")
        for row in reader:
            surplus = None in row
            yield reader.line_num, ValueError("more cells than the header has columns") if surplus else row


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                row = ValueError(f"not JSON: {error}")
            if not isinstance(row, dict | ValueError):
                row = ValueError(f"not a JSON object: {text.strip()[:40]}")
            if isinstance(row, dict):
                _check_columns(path, list(row), line)
            yield line, row


def _check_columns(path: Path, names: Sequence[str], line: int = 1) -> None:
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise ValueError(f"{path}, line {line}: unknown column {unknown[0]!r}; known are {', '.join(COLUMNS)}")


def _check_outputs_differ(path: Path, jobs: Sequence[Job]) -> None:
    inputs = {job.path(name).resolve(): job.line for job in jobs for name in job.inputs}
    outputs: dict[Path, int] = {}
    for job in jobs:
        out = job.path(job.out).resolve()
        if out in outputs:
            raise ValueError(f"{path}: lines {outputs[out]} and {job.line} both write {job.out}")
        if out in inputs:  # whether the row reads it before or after would depend on the order
            raise ValueError(f"{path}: line {job.line} writes {job.out}, which line {inputs[out]} reads")
        outputs[out] = job.line


_ABOUT_RESULT = ("pbe", "size")  # stored beside the settings, no part of them


def is_finished(job: Job, checkpoint: Path, dtype: torch.dtype) -> bool:
    """Whether the job's picture exists, is no older than its inputs and checkpoint, and has the job's settings."""
    out = job.path(job.out)
    sources = [*map(job.path, job.inputs), checkpoint]
    if not out.is_file() or not all(source.exists() for source in sources):
        return False
    if max(map(_last_change, sources)) > out.stat().st_mtime:
        return False
    stored = read_settings(out) or {}
    settings = {name: value for name, value in stored.items() if name not in _ABOUT_RESULT}
    return settings == settings_of(job, checkpoint, dtype)


def _last_change(path: Path) -> float:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)


def run_row(
    model: PaintByExample, job: Job, checkpoint: Path, redo: bool = False, callback: Callback | None = None
) -> Outcome:
    """Run one row and save its picture, unless that is done already; a row that cannot be run becomes an outcome."""
    try:
        if not redo and is_finished(job, checkpoint, model.dtype):
            return Outcome(job.line, "skipped")
        inputs = read_inputs(job)
        check_output(job.path(job.out), inputs.picture.source)
        (image,) = run_job(model, job, inputs, callback=callback)
        save_result(image, job.path(job.out), settings_of(job, checkpoint, model.dtype))
    except (ValueError, OSError, MemoryError) as error:
        return Outcome(job.line, "failed", str(error))
    return Outcome(job.line, "done")
