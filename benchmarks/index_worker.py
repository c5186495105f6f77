"""What an index of boxes costs, in a process of its own so that its peak memory is its own.

    python -m benchmarks.index_worker {write,read,manifest} FOLDER

`write` turns FOLDER/boxes.csv into FOLDER/index, `read` opens that index as training does and visits some of it, and
`manifest` opens FOLDER/manifest.csv; each prints its seconds and peak memory as JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.worker import resident
from pbe.data.manifest import Manifest
from pbe.data.open_images import OpenImages
from pbe.data.open_images_index import index_boxes

BOXES_A_PICTURE = 8  # about OpenImages' own number
VISITS = 1000


def write_tables(rows: int, folder: Path) -> None:
    """Files of `rows` random boxes: `boxes.csv` as OpenImages' and `manifest.csv`, with the one picture that sources
    look for when they open a folder."""
    rng = np.random.default_rng(rows)
    pictures = np.arange(rows, dtype=np.uint64) // np.uint64(BOXES_A_PICTURE)
    names = [f"{int(i):016x}" for i in pictures]
    corner, size = rng.uniform(0.05, 0.4, (rows, 2)), rng.uniform(0.2, 0.5, (rows, 2))
    boxes = np.concatenate([corner, corner + size], axis=1).round(4).tolist()
    with open(folder / "boxes.csv", "w", encoding="utf-8") as file:
        file.write("ImageID,LabelName,XMin,YMin,XMax,YMax\n")
        file.writelines(f"{name},/m/01yrx,{a},{b},{c},{d}\n" for name, (a, b, c, d) in zip(names, boxes, strict=True))
    with open(folder / "manifest.csv", "w", encoding="utf-8") as file:
        file.write("image,x0,y0,x1,y1\n")
        file.writelines(f"{name}.jpg,{a},{b},{c},{d}\n" for name, (a, b, c, d) in zip(names, boxes, strict=True))
    (folder / f"{names[0]}.jpg").touch()


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    before, start = resident("VmRSS"), time.perf_counter()
    if what == "write":
        index_boxes(folder / "boxes.csv", folder / "index", overwrite=True)
    elif what == "read":
        source = OpenImages(folder / "index", folder)
    else:
        Manifest(folder / "manifest.csv")
    numbers = {"seconds": time.perf_counter() - start, "GiB": resident("VmHWM") - before}
    if what == "read":
        visits = np.random.default_rng(0).integers(len(source), size=VISITS).tolist()
        start = time.perf_counter()
        for i in visits:
            source[i]
        numbers["seconds a visit"] = (time.perf_counter() - start) / VISITS
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
