"""Rows of text files, read so that every error names its line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends. ValueError naming the line that is not UTF-8."""
    # Bytes that are not UTF-8 are let through at first: the decoder's own error knows of no line.
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


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Line numbers and objects of a JSONL file; for a line that holds none, the error to raise or to note. Blank lines
    are left out; raises as `read_lines`."""
    for line, text in enumerate(read_lines(path), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            row = ValueError(f"not JSON: {error}")
        if not isinstance(row, dict | ValueError):
            row = ValueError(f"not a JSON object: {text.strip()[:40]}")
        yield line, row
