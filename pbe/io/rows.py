"""Rows of CSV and JSONL files, read so that every error names its line."""

import csv
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pbe.io.json_text import parse_json
from pbe.io.suggest import closest, did_you_mean

MISSPELT = 0.8  # similarity from which an unknown name among ignored columns is taken for a known one misspelt

Row = tuple[int, dict[str, Any] | ValueError]


def read_rows(
    path: Path,
    columns: Collection[str],
    *,
    renamed: Mapping[str, str] = MappingProxyType({}),
    aliases: Mapping[str, str] = MappingProxyType({}),
    ignore_others: bool = False,
    allow_short: bool = False,
) -> Iterator[Row]:
    """Line numbers and rows of a `.csv` file with a header, or of a `.jsonl` file with an object per line.
    The cells of a CSV are parted by commas, or as the header is: by semicolons or tabs.

    Empty cells and nulls are left out of a row. A row that cannot be read is a ValueError, without file and line, to
    be raised or noted by the caller; the rows after it follow.

    Args:
        columns: the names that a row may have.
        renamed: new names of columns by their old ones, which are refused.
        aliases: names of columns by other ones, in lower case, which are read as these where a row has no column of
            that name. Upper case and blanks around names are then accepted too.
        ignore_others: accept other names too, unless they look like one of `columns` misspelt.
        allow_short: a CSV row may have fewer cells than the header; the missing ones are empty.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the file, for another suffix, text that is not UTF-8 or not CSV, and a CSV header that has
            an unknown name or one name twice.
    """

    def plain(name: str) -> str:
        lower = name.strip().lower()
        return lower if aliases and (lower in columns or lower in aliases) else name

    @functools.cache  # every row of a JSONL file repeats its names
    def problem_of(name: str) -> str | None:
        if name in renamed:
            return f"column {name!r} is now called {renamed[name]!r}"
        known = plain(name) in columns or plain(name) in aliases
        if known or (ignore_others and not closest(name, columns, MISSPELT)):
            return None
        return f"unknown column {name!r}{did_you_mean(name, columns)}"

    def find_problem(names: Iterable[str]) -> str | None:
        return next(filter(None, map(problem_of, names)), None)

    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: a file of rows ends in .csv or .jsonl")
    for line, row in _read_csv(path, find_problem, allow_short) if suffix == ".csv" else read_jsonl(path):
        if not isinstance(row, ValueError):
            problem = find_problem(row)
            row = ValueError(problem) if problem else {k: value for k, value in row.items() if value not in ("", None)}
        if aliases and not isinstance(row, ValueError):
            row = {plain(name): value for name, value in row.items()}
            for other in [name for name in row if name in aliases]:
                row.setdefault(aliases[other], row.pop(other))
        yield line, row


def _read_csv(path: Path, find_problem: Callable[[Iterable[str]], str | None], allow_short: bool) -> Iterator[Row]:
    lines = read_lines(path)
    header = next(lines, "")
    # What spreadsheets write where the comma is part of numbers.
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.DictReader(itertools.chain([header], lines), strict=True, delimiter=delimiter)
    try:
        names = list(reader.fieldnames or ())
        if problem := find_problem(names):
            raise ValueError(f"{path}, line 1: {problem}")
        if len(set(names)) < len(names):
            raise ValueError(f"{path} names a column twice: {', '.join(names)}")
        for row in reader:
            if None in row:
                yield reader.line_num, ValueError("more cells than the header has columns")
            elif None in row.values() and not allow_short:
                yield reader.line_num, ValueError("fewer cells than the header has columns")
            else:
                yield reader.line_num, row
    except csv.Error as error:  # where its row ends, and the next begins, is then unknown
        raise ValueError(f"{path}, after line {reader.line_num}: {error}; .jsonl holds what .csv cannot") from None


def read_jsonl(path: Path) -> Iterator[Row]:
    """Line numbers and objects of a JSONL file; a line that is not an object is a ValueError, to be raised or noted.
    Blank lines are left out; raises as `read_lines`."""
    for line, text in enumerate(read_lines(path), start=1):
        if not text.strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            row = ValueError(f"not JSON: {error}")
        if not isinstance(row, dict | ValueError):
            row = ValueError(f"not a JSON object: {text.strip()[:40]}")
        yield line, row


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends. ValueError naming the line that is not UTF-8 or has a NUL byte."""
    if not path.is_file():
        what = "it is not a file" if path.exists() else "there is no such file"
        raise FileNotFoundError(f"{path}: {what}")
    # Bytes that are not UTF-8 are let through at first: the decoder's own error does not tell the line.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = line[error.start].encode(errors="surrogateescape").hex()
                raise ValueError(
                    f"{path}, line {number} is not UTF-8 (byte 0x{byte}); save the file as UTF-8 text"
                ) from None
            if "\0" in line:
                raise ValueError(f"{path}, line {number} holds a NUL byte; save the file as UTF-8 text")
            yield line
