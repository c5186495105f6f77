"""The sizes of many pictures from their headers, read once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pbe.data.crop import usable
from pbe.data.records import UnusablePicture, upright_size
from pbe.io.atomic import replacing
from pbe.io.json_text import parse_json

VERSION = 1
THREADS = 16  # they wait for the disk


def read_sizes(folder: Path, names: Sequence[str], cache: Path) -> list[tuple[int, int] | str]:
    """(height, width) of each upright picture `folder`/name; where it has none, "missing" or "unreadable".

    cache: a file of sizes found before, which hold while a picture's length and time of change are the same. It is
    written where it can be.
    """
    kept = _read_cache(cache)

    def measure(name: str) -> tuple[list[int], tuple[int, int]] | str:
        path = folder / name
        try:
            with usable(path):
                stat = path.stat()
                key = [stat.st_size, stat.st_mtime_ns]
                entry = kept.get(str(path))
                if entry is not None and entry[:2] == key:
                    return key, (entry[2], entry[3])
                return key, upright_size(path)
        except UnusablePicture as problem:
            return problem.reason

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(measure, names))
    pairs = zip(names, found, strict=True)
    sizes = {str(folder / name): [*one[0], *one[1]] for name, one in pairs if not isinstance(one, str)}
    if sizes != kept:
        try:
            with replacing(cache, overwrite=True) as part:
                part.write_text(json.dumps({"version": VERSION, "sizes": sizes}), encoding="utf-8")
        except OSError:  # such as a folder that may only be read
            pass
    return [one if isinstance(one, str) else one[1] for one in found]


def _read_cache(path: Path) -> dict[str, list[int]]:
    """The entries of a cache: length and time of change of a file, height and width. Empty where it is not one."""
    try:
        content: Any = parse_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("sizes"), dict):
        return {}
    sound = all(
        isinstance(entry, list) and len(entry) == 4 and all(type(n) is int for n in entry) and min(entry[2:]) > 0
        for entry in content["sizes"].values()
    )
    return content["sizes"] if sound else {}
