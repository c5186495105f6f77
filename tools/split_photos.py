"""One manifest to train on and one held out, from folders with `boxes.csv` and `images/`.

python tools/split_photos.py ../shared/data/clothing ../shared/data/flowers --out runs/data

A photo is held out by its file name's hash: always the same ones, whatever else is added. Both files are in the order
of those hashes, so that their first rows are of every kind. A folder named twice is twice in `train.csv`: training sees
its photos twice as often.
"""

import argparse
import csv
import hashlib
import os
import sys
from pathlib import Path

COLUMNS = ("file", "class", "width", "height", "x0", "y0", "x1", "y1")


def photo_hash(name: str) -> int:
    """A number that follows from the photo's file name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="the folder of train.csv and held_out.csv")
    parser.add_argument("--every", type=int, default=10, help="hold out one photo of this many (default 10)")
    parser.add_argument("--min-fill", type=float, default=0.45, help="leave out boxes less full than this, where known")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"train.csv": [], "held_out.csv": []}
    for folder in args.folders:
        with (folder / "boxes.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if float(row.get("fill") or 1) < args.min_fill:
                    continue
                name = "held_out.csv" if photo_hash(row["file"]) % args.every == 0 else "train.csv"
                image = os.path.relpath(folder / "images" / row["file"], args.out)
                rows[name].append({column: row[column] for column in COLUMNS} | {"file": image})
    rows["held_out.csv"] = [*{row["file"]: row for row in rows["held_out.csv"]}.values()]
    for name, kept in rows.items():
        with (args.out / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(kept, key=lambda row: photo_hash(Path(row["file"]).name)))
        print(f"{args.out / name}: {len(kept)} photos")
    return 0


if __name__ == "__main__":
    sys.exit(main())
