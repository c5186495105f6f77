"""`pbe index-boxes`: convert OpenImages' CSV of boxes to the index that training reads."""

import argparse
from pathlib import Path

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__)
    p.add_argument("csv", type=Path, help="such as oidv6-train-annotations-bbox.csv")
    p.add_argument("--out", type=Path, required=True, help="the folder to write")
    p.add_argument("--images", type=Path, help="the pictures' folder: leave out the pictures that have no file there")
    p.add_argument("--classes", type=Path, help="class-descriptions-boxable.csv: store the classes' names, not codes")
    p.add_argument("--force", action="store_true", help="replace an existing folder")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Writes the index; returns the exit code."""
    return run(parser(prog).parse_args(argv))


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from pbe.data.open_images_index import index_boxes

    with tqdm(total=args.csv.stat().st_size, unit="B", unit_scale=True, desc=args.csv.name) as bar:
        facts = index_boxes(args.csv, args.out, args.images, args.classes, args.force, bar.update)
    print(f"{args.out}: {facts.images:,} pictures, {facts.boxes:,} boxes, {len(facts.labels)} classes")
    for count, what in (
        (facts.empty, "boxes without area left out"),
        (facts.clipped, "boxes cut off at the picture's edge"),
        (facts.missing, f"pictures left out: no file in {args.images}"),
    ):
        if count:
            print(f"  {count:,} {what}")
    return 0
