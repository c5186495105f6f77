"""Fuzzing of rows: each manifest, COCO json or list of jobs is read, or is an error that names file and line.

    python -m tests.fuzz.rows --seconds 600

Sound files are changed by bytes, and rows are made of values of every type under the names of columns.
"""

import csv
import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from pbe.data.coco import Coco
from pbe.data.manifest import ALIASES, COLUMNS, Manifest
from pbe.io.rows import read_rows
from tests.fuzz.running import changed, main

NAMES = (*COLUMNS, *ALIASES, "x2", "y2", "reference", "XMin", " image ", "other", "\x1b[2J")
PIECES = [
    b"[" * 3000,
    b'{"a":' * 3000,
    b"1e400",
    b"NaN",
    b"-0",
    b"9" * 5000,
    b'"',
    b"\\ud800",
    b"\0",
    b";",
    b"\t",
    b"\r",
]
SCALARS = st.one_of(
    st.sampled_from([None, True, "", "a.png", "b.png", "c.png", "/dev/null", ".", "../..", "nan", "1e400", 10**400]),
    st.integers(-10, 200),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
BOXES = st.lists(st.integers(0, 90) | st.floats(0, 1.1), min_size=4, max_size=4)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows that are nearly right."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        row: dict[str, Any] = {"image": draw(st.sampled_from(["a.png", "b.png", "none.png"])), "box": draw(BOXES)}
        for _ in range(draw(st.integers(0, 3))):
            row[draw(st.sampled_from(NAMES))] = draw(VALUES)
        if draw(st.integers(0, 4)) == 0:
            row.pop(draw(st.sampled_from(list(row))))
        made.append(row)
    return made


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and content."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        name, data = "list.jsonl", "\n".join(map(json.dumps, draw(rows()))).encode()
    elif kind == 1:
        buffer = io.StringIO()
        made = [{**row, **dict(zip(("x0", "y0", "x1", "y1"), draw(BOXES), strict=True))} for row in draw(rows())]
        names = [name for name in dict.fromkeys(name for row in made for name in row) if name != "box"]
        delimiter = draw(st.sampled_from(",;\t"))
        writer = csv.DictWriter(buffer, names, delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(made)
        name, data = "list.csv", buffer.getvalue().encode(errors="surrogatepass")
    else:
        name, data = "coco.json", json.dumps(mutate(draw, coco())).encode()
    return (name, changed(draw, data, PIECES)) if draw(st.integers(0, 2)) == 0 else (name, data)


@cache
def coco_text() -> str:
    return json.dumps(
        {
            "images": [{"id": k, "file_name": f"{name}.png", "width": 60, "height": 40} for k, name in enumerate("ab")],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [
                {"image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 20], "segmentation": [[1, 2, 30, 2, 30, 20]]},
                {"image_id": 1, "category_id": 1.0, "bbox": [1, 2, 30, 20],
                 "segmentation": {"size": [40, 60], "counts": [100, 40, 2260]}},
            ],
        }
    )  # fmt: skip


def coco() -> Any:
    return json.loads(coco_text())


def mutate(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some of its parts replaced or removed."""
    if draw(st.integers(0, 14)) == 0:
        return draw(VALUES)
    if isinstance(value, dict):
        return {name: mutate(draw, x) for name, x in value.items() if draw(st.integers(0, 29))}
    return [mutate(draw, x) for x in value] if isinstance(value, list) else value


def check(value: object, folder: Path) -> None:
    """Raises AssertionError where reading says nothing, and whatever else it should not raise."""
    assert isinstance(value, tuple)
    path = folder / value[0]
    for name in ("a", "b"):
        if not (folder / f"{name}.png").exists():
            Image.new("RGB", (60, 40)).save(folder / f"{name}.png")
    path.write_bytes(value[1])
    try:
        source = Coco(path, folder) if path.suffix == ".json" else Manifest(path, area=(0.02, 0.8))
    except (ValueError, FileNotFoundError) as error:
        if str(path) not in str(error):
            raise
    else:
        for i in range(len(source)):
            try:
                record = source[i]
                for mask in record.masks or ():
                    mask.draw((40, 60))
                assert ((record.boxes >= 0) & (record.boxes <= 1)).all()
            except (ValueError, OSError):
                pass
    if path.suffix != ".json":
        try:
            list(read_rows(path, COLUMNS))
        except ValueError as error:
            if str(path) not in str(error):
                raise


if __name__ == "__main__":
    sys.exit(main(__doc__, files(), check))
