"""The index of OpenImages' boxes: their CSV, converted once to arrays that every worker process maps into memory.

The training file lists 14.6 million boxes (https://storage.googleapis.com/openimages/web/download_v7.html). Its index
is a folder of `meta.json` and plain arrays, with one row per picture or per box:

    ids      uint64 (pictures,)      the 16 hexadecimal digits of ImageID, ascending
    offsets  uint32 (pictures + 1,)  the boxes of picture i are offsets[i] to offsets[i + 1]
    boxes    uint16 (boxes, 4)       x0, y0, x1, y1 in 65535ths of the width and height
    labels   uint16 (boxes,)         places in the list `labels` of meta.json
    flags    uint8 (boxes,)          bit k is FLAGS[k]

It holds every box: which areas are allowed is a setting of the training run, applied when the index is opened.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbe.data.records import EDGE_TOLERANCE
from pbe.io.atomic import replacing

COORDINATES = ("XMin", "YMin", "XMax", "YMax")
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
ROW_ARRAYS = {"boxes": "<u2", "labels": "<u2", "flags": "u1"}
ARRAYS = {"ids": "<u8", "offsets": "<u4", **ROW_ARRAYS}
VERSION = 1
LEVELS = 65535  # a step is 0.15 px of a picture 10,000 px wide
BLOCK = 1 << 22  # bytes of CSV parsed at a time, about 50,000 rows


@dataclass
class IndexFacts:
    """`meta.json` of an index: what it holds, and what of the CSV it leaves out."""

    csv: str
    csv_bytes: int
    rows: int = 0
    images: int = 0
    boxes: int = 0
    clipped: int = 0  # boxes that reached over the edge, by up to EDGE_TOLERANCE
    empty: int = 0  # boxes without area, left out
    missing: int | None = None  # pictures without a file, left out; None: not looked for
    labels: tuple[str, ...] = ()
    version: int = VERSION


def read_facts(index: Path) -> IndexFacts:
    """`meta.json` of an index. FileNotFoundError or ValueError if there is none or one of another version."""
    path = index / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{index} is not an index of boxes: it has no meta.json; `pbe index-boxes` writes one")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; run `pbe index-boxes` again") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this library reads {VERSION}; run `pbe index-boxes` again")
    return IndexFacts(**{**values, "labels": tuple(values["labels"])})


# --- reading the CSV --------------------------------------------------------------------------------------


def _read_rows(path: Path, progress: Callable[[int], Any]) -> Iterator[tuple[int, np.ndarray]]:
    """Blocks of rows as structured arrays of the columns wanted, each with its first row's line number."""
    with open(path, "rb") as file:
        header = file.readline()
        names = _decode(header, path, 1).removeprefix("\ufeff").strip().split(",")
        for name in ("ImageID", "LabelName", *COORDINATES):
            if name not in names:
                raise ValueError(f"{path} has no column {name!r}, as OpenImages' files of boxes have; it has: {names}")
        kinds = {"ImageID": "S17", "LabelName": "S33", **dict.fromkeys(COORDINATES, "f8"), **dict.fromkeys(FLAGS, "f4")}
        columns = [name for name in kinds if name in names]
        dtype, places = [(name, kinds[name]) for name in columns], [names.index(name) for name in columns]
        progress(len(header))
        line = 2
        while block := file.read(BLOCK):
            block += file.readline()
            text = _decode(block, path, line).replace("\r\n", "\n")
            if not text.strip():  # blank lines at the end
                continue
            try:
                rows = np.loadtxt(io.StringIO(text), dtype, comments=None, delimiter=",", usecols=places, ndmin=1)
            except ValueError as error:
                raise ValueError(f"{path}, {_first_bad_row(text, line, names, columns) or error}") from None
            yield line, rows
            line += block.count(b"\n")
            progress(len(block))


def _decode(block: bytes, path: Path, line: int) -> str:
    """The text of a block that starts in this line; ValueError naming the line that is not UTF-8."""
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        line += block.count(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line} is not UTF-8 (byte 0x{block[error.start]:02x})") from None


def _first_bad_row(text: str, line: int, names: list[str], columns: list[str]) -> str | None:
    """What is wrong, and in which line: numpy's message counts from the block's start and names no column."""
    for number, row in enumerate(csv.reader(text.splitlines()), start=line):
        if row and len(row) != len(names):
            return f"line {number}: {len(row)} cells where the header has {len(names)}"
        for name in columns[2:] if row else ():
            cell = row[names.index(name)]
            try:
                float(cell)
            except ValueError:
                return f"line {number}: {name} is {cell!r}, not a number"
    return None


_DIGITS = np.full(256, 255, dtype=np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def parse_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ImageIDs (N,) of dtype S17 as uint64, and which of them (N,) are 16 lower-case hexadecimal digits."""
    digits = _DIGITS[np.ascontiguousarray(ids).view(np.uint8).reshape(-1, 17)]  # (N, 17)
    sound = (digits[:, :16] < 16).all(axis=1) & (digits[:, 16] == 255)
    pairs = digits[:, 0:16:2] << 4 | digits[:, 1:16:2] & 15  # (N, 8) bytes
    return np.ascontiguousarray(pairs).view(">u8")[:, 0].astype("<u8"), sound


def _first(bad: np.ndarray) -> int | None:
    places = np.flatnonzero(bad)
    return int(places[0]) if places.size else None


def _check_rows(rows: np.ndarray, sound_ids: np.ndarray, corners: np.ndarray, path: Path, line: int) -> None:
    """ValueError for the first row with an ImageID, coordinates or flags that cannot be."""
    if (i := _first(~sound_ids)) is not None:
        name = rows["ImageID"][i].decode()
        raise ValueError(f"{path}, line {line + i}: ImageID {name!r} is not 16 hexadecimal digits, as OpenImages' are")
    near = ((corners >= -EDGE_TOLERANCE) & (corners <= 1 + EDGE_TOLERANCE)).all(axis=1)  # False for NaN
    if (i := _first(np.logical_not(near))) is not None:
        values = ", ".join(f"{name} {value:g}" for name, value in zip(COORDINATES, corners[i], strict=True))
        raise ValueError(f"{path}, line {line + i}: {values}: not fractions of the picture's width and height")
    for name in set(FLAGS) & set(rows.dtype.names or ()):
        if (i := _first(rows[name] % 1 != 0)) is not None:  # True for NaN and infinities
            raise ValueError(f"{path}, line {line + i}: {name} is {rows[name][i]:g}, not a whole number")
    if (i := _first(np.char.str_len(rows["LabelName"]) > 32)) is not None:
        raise ValueError(f"{path}, line {line + i}: LabelName is longer than 32 characters")


def _read_classes(path: Path) -> dict[str, str]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{path} must have rows of a class's code and name, as class-descriptions-boxable.csv has")
    return {row[0]: row[1] for row in rows}


# --- the pictures' folder ---------------------------------------------------------------------------------


def _stems(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".jpg") and entry.name.isascii():
                yield entry.name.removesuffix(".jpg")


def ids_in(folder: Path, most: int | None = None) -> np.ndarray:
    """The ids (N,) of pictures `<id>.jpg` in a folder, ascending; of the first `most` files only, where given."""
    ids, sound = parse_ids(np.fromiter(itertools.islice(_stems(folder), most), dtype="S17"))
    return np.sort(ids[sound])


def sub_folders(images: Path) -> list[Path]:
    with os.scandir(images) as entries:  # not by iterdir: asking a million files for their kind takes seconds
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def check_folder(images: Path) -> None:
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: there is no such folder of pictures")


def contains(ascending: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(N,) bool: which of `ids` (N,) are among the `ascending` ones."""
    if not len(ascending):
        return np.zeros(len(ids), dtype=bool)
    return ascending[np.searchsorted(ascending, ids).clip(max=len(ascending) - 1)] == ids


# --- writing the index ------------------------------------------------------------------------------------


def index_boxes(
    csv_file: str | Path,
    folder: str | Path,
    images: str | Path | None = None,
    classes: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda n: None,
) -> IndexFacts:
    """Writes the index of a CSV of boxes in OpenImages' format; columns are found by name, others are ignored.

    images: the pictures' folder; those without a file in it are left out. classes: `class-descriptions-boxable.csv`,
    for names in place of codes such as `/m/01yrx`. `progress` is called with the number of bytes read since the last
    call. The folder appears whole or not at all. Memory grows by about 20 bytes per picture and 1 per box, and by 32
    per box where the rows are not sorted by ImageID (those of the official files are).

    ValueError naming a missing column, or the line and value of a row that cannot be read; FileExistsError for an
    existing folder unless `overwrite`.
    """
    csv_file, folder = Path(csv_file), Path(folder)
    facts = IndexFacts(csv_file.name, csv_file.stat().st_size)
    found = None
    if images is not None:
        check_folder(Path(images))
        found = np.unique(np.concatenate([ids_in(path) for path in (Path(images), *sub_folders(Path(images)))]))
    names = {} if classes is None else _read_classes(Path(classes))
    codes: dict[bytes, int] = {}
    missing = [np.empty(0, dtype="<u8")]
    with replacing(folder, overwrite) as part:
        part.mkdir()
        for line, rows in _read_rows(csv_file, progress):
            ids, sound = parse_ids(rows["ImageID"])
            corners = np.stack([rows[name] for name in COORDINATES], axis=1)  # (N, 4)
            _check_rows(rows, sound, corners, csv_file, line)
            boxes = np.rint(corners.clip(0, 1) * LEVELS).astype("<u2")
            keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            facts.rows += len(rows)
            facts.clipped += int(np.count_nonzero(((corners < 0) | (corners > 1)).any(axis=1)))
            facts.empty += int(np.count_nonzero(~keep))
            if found is not None:
                there = contains(found, ids)
                missing.append(np.unique(ids[~there]))
                keep &= there
            labels = np.array([codes.setdefault(label, len(codes)) for label in rows["LabelName"].tolist()])
            if len(codes) > LEVELS:
                raise ValueError(f"{csv_file} has more than {LEVELS} different LabelNames")
            labels = labels.astype(ARRAYS["labels"])
            flags = np.zeros(len(rows), dtype=np.uint8)
            for bit, name in enumerate(FLAGS):
                if name in (rows.dtype.names or ()):
                    flags |= (rows[name] == 1).astype(np.uint8) << bit  # -1 is "unknown"
            facts.boxes += int(np.count_nonzero(keep))
            for name, values in (("rows", ids), ("boxes", boxes), ("labels", labels), ("flags", flags)):
                with open(part / name, "ab") as file:
                    values[keep].tofile(file)
        if not facts.boxes:
            where = f" of a picture in {images}" if images is not None else ""
            raise ValueError(f"{csv_file}: none of its {facts.rows} rows is a box{where}")
        facts.images = _group_rows(part)
        facts.missing = None if found is None else len(np.unique(np.concatenate(missing)))
        facts.labels = tuple(names.get(code.decode(), code.decode()) for code in codes)
        (part / "meta.json").write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    return facts


def _group_rows(folder: Path) -> int:
    """Replaces the ids of the boxes' pictures by one id per picture and where its boxes start; returns their number."""
    rows = folder / "rows"
    ids: np.ndarray = np.memmap(rows, ARRAYS["ids"], mode="r")  # a file, whose pages the system can take back
    if (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        for name, dtype in ROW_ARRAYS.items():
            values = np.fromfile(folder / name, dtype).reshape(len(order), -1)
            values[order].tofile(folder / name)
    starts = np.append(0, np.flatnonzero(ids[1:] != ids[:-1]) + 1)
    ids[starts].tofile(folder / "ids")
    np.append(starts, len(ids)).astype(ARRAYS["offsets"]).tofile(folder / "offsets")
    rows.unlink()
    return len(starts)
