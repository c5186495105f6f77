"""`pbe cut-out`: masks for the objects of a manifest, from their boxes, so that training can transplant them."""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser

if TYPE_CHECKING:
    from pbe.data.records import Record

Row = dict[str, str | float]
COLUMNS = ("image", "mask", "label", "x0", "y0", "x1", "y1")
SIDE = 512  # long side at which masks are drawn; GrabCut takes seconds for a whole photo


def parser(prog: str | None = None) -> Parser:
    p = Parser(
        prog=prog,
        description=__doc__,
        epilog="OUT gets masks/ and the manifest objects.csv, for data.donors. Objects that were not found whole are "
        "left out: their masks fill too little or all of their boxes, or do not reach the boxes' sides. Rows with a "
        "mask keep it. Needs OpenCV: pip install -e .[masks]",
    )
    p.add_argument("manifests", type=Path, nargs="+", help="CSV or JSONL with boxes, as training reads them")
    p.add_argument("--out", type=Path, required=True, help="the folder to write")
    p.add_argument("--force", action="store_true", help="replace an existing folder")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Writes the masks and their manifest; returns the exit code."""
    return run(parser(prog).parse_args(argv))


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pbe.data.crop import usable
    from pbe.data.manifest import Manifest
    from pbe.data.records import UnusablePicture
    from pbe.io.atomic import replacing

    sources = [Manifest(path) for path in args.manifests]
    rows: list[Row] = []
    problems: list[UnusablePicture] = []
    total = 0
    with replacing(args.out, args.force) as folder:
        (folder / "masks").mkdir(parents=True)
        with tqdm(total=sum(map(len, sources)), unit=" photos") as bar:
            for source in sources:
                for i in range(len(source)):
                    try:
                        with usable(f"{source.name}[{i}]"):
                            record = source[i]
                        total += len(record.boxes)
                        rows += rows_of(record, folder, args.out, first=len(rows))
                    except UnusablePicture as problem:  # one photo of thousands
                        problems.append(problem)
                    bar.update()
        if not rows:
            raise problems[0] if problems else ValueError(f"none of {total} objects was found whole")
        with (folder / "objects.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    print(f"{args.out / 'objects.csv'}: {len(rows)} of {total} objects")
    if problems:
        print(f"  {len(problems)} photos left out; the first: {problems[0]}")
    return 0


def rows_of(record: Record, folder: Path, out: Path, first: int) -> list[Row]:
    """The manifest's rows for the objects of a record that have a mask, or get one in `folder`/masks here.

    Paths are relative to `out`, which `folder` is renamed to; `first` is the number of the first row.
    """
    from PIL import Image

    from pbe.data.crop import Photo, to_pixels
    from pbe.data.manifest import written_row
    from pbe.data.records import MaskFile
    from pbe.images.grabcut import is_whole, segment
    from pbe.images.saving import save_picture
    from pbe.images.windows import Box

    with Photo(record.image) as photo:
        height, width = photo.size
        scale = min(1, SIDE / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        (pixels,) = photo.read([Box(0, 0, width, height)], [size], antialias=True)
    rows: list[Row] = []
    for k, corners in enumerate(record.boxes):
        given = record.masks[k] if record.masks else None
        if isinstance(given, MaskFile):
            mask = os.path.relpath(given.path, out)
        else:
            box = to_pixels(corners, size)
            drawn = given.draw(size) if given else segment(pixels.permute(1, 2, 0).contiguous().numpy(), box)
            if not (given or is_whole(drawn, box)):
                continue
            mask = f"masks/{first + len(rows):06}_{record.image.stem}.png"
            save_picture(Image.fromarray(drawn).convert("L"), folder / mask)
        rows.append({**written_row(record, k, out), "mask": mask})
    return rows
