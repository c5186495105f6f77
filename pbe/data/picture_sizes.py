"""The sizes of many pictures from their headers, read once and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pbe.data.crop import usable
from pbe.data.records import UnusablePicture, upright_size
from pbe.io.atomic import write_text
from pbe.io.json_text import parse_json

THREADS = 16  # they wait for the disk


def read_sizes(folder: Path, names: Sequence[str], cache: Path) -> list[tuple[int, int] | str]:
    """(height, width) of each upright picture `folder`/name; where it has none, "missing" or "unreadable".

    cache: a file of what was found before: for each picture its length and time of change in bytes and nanoseconds,
    while which are the same the size holds, height and width. It is written where it can be.
    """
    kept = None
    with suppress(OSError, ValueError):  # there is none, or it is not ours
        kept = parse_json(cache.read_bytes())

    def measure(name: str) -> list[int] | str:
        path = folder / name
        try:
            with usable(path):
                stat = path.stat()
                match kept.get(str(path)) if isinstance(kept, dict) else None:
                    case [stat.st_size, stat.st_mtime_ns, int() as height, int() as width] if height > 0 < width:
                        return [stat.st_size, stat.st_mtime_ns, height, width]
                return [stat.st_size, stat.st_mtime_ns, *upright_size(path)]
        except UnusablePicture as problem:
            return problem.reason

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(measure, names))
    sizes = {str(folder / name): one for name, one in zip(names, found, strict=True) if not isinstance(one, str)}
    if sizes != kept:
        with suppress(OSError):  # such as a folder that may only be read
            write_text(cache, json.dumps(sizes))
    return [one if isinstance(one, str) else (one[2], one[3]) for one in found]
