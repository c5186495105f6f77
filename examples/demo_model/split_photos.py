"""One manifest to train on and one held out, from folders with `boxes.csv`, `images/` and perhaps `masks/`; an animal's
head, where its box is known, is an object of its own.

python -m examples.demo_model.split_photos photos/clothing photos/flowers --out runs/data

A photo is held out by its file name's hash: always the same ones, whatever else is added. Both files are in the order
of those hashes, so that their first rows are of every kind.
"""

import argparse
import csv
import hashlib
import os
import sys
from pathlib import Path

from pbe.io.atomic import replacing

BOX = ("x0", "y0", "x1", "y1")
COLUMNS = ("file", "class", "width", "height", *BOX)


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

    if args.every < 2:
        parser.error(f"--every must be at least 2, got {args.every}")
    try:
        split(args.folders, args.out, args.every, args.min_fill)
    except KeyError as missing:
        print(f"error: a boxes.csv of {', '.join(map(str, args.folders))} has no column {missing}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def split(folders: list[Path], out: Path, every: int, min_fill: float) -> None:
    """Writes `train.csv` and `held_out.csv`."""
    rows: dict[str, list[dict[str, str]]] = {"train.csv": [], "held_out.csv": []}
    for folder in folders:
        with (folder / "boxes.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if float(row.get("fill") or 1) < min_fill:
                    continue
                name = "held_out.csv" if photo_hash(row["file"]) % every == 0 else "train.csv"
                kept = {column: row[column] for column in COLUMNS}
                kept["file"] = os.path.relpath(folder / "images" / row["file"], out)
                mask = folder / "masks" / f"{Path(row['file']).stem}.png"
                if mask.is_file():
                    kept["mask"] = os.path.relpath(mask, out)
                rows[name].append(kept)
                if row.get("head_x0"):  # an animal fills its photo, its head leaves context
                    rows[name].append({**kept, **{side: row[f"head_{side}"] for side in BOX}, "mask": ""})
    for name, objects in rows.items():
        columns = [*COLUMNS, "mask"] if any("mask" in row for row in objects) else COLUMNS
        with replacing(out / name, overwrite=True) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(sorted(objects, key=lambda row: photo_hash(Path(row["file"]).name)))
        print(f"{out / name}: {len(objects)} objects")


if __name__ == "__main__":
    sys.exit(main())
