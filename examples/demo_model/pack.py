"""The photos of some manifests as one small file, for training where there is nothing but the checkout.

python -m examples.demo_model.pack runs/demo_data/train.csv runs/demo_data/held_out.csv \\
    runs/demo_data/objects/objects.csv --out runs/demo_pack.zip

Photos become WebP, no larger than training at 128 x 128 pixels needs, masks PNG of one bit. The manifests lie beside
them under their own names, with the same rows.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from PIL import Image, ImageOps
from tqdm import tqdm

from pbe.io.atomic import replacing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", type=Path, nargs="+", help="CSV of split_photos or of pbe cut-out")
    parser.add_argument("--out", type=Path, required=True, help="the .zip to write")
    parser.add_argument("--side", type=int, default=144, help="largest short side of a photo (default 144)")
    parser.add_argument("--quality", type=int, default=40, help="of the photos' WebP (default 40)")
    args = parser.parse_args(argv)
    try:
        with replacing(args.out, overwrite=True) as part, ZipFile(part, "w", ZIP_STORED) as pack:
            photos = write(args.manifests, pack, args.side, args.quality)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {photos} photos, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def write(manifests: list[Path], pack: ZipFile, side: int, quality: int) -> int:
    """Writes manifests, photos and masks into `pack`, and says how many photos. Each is written once.

    ValueError for a box in pixels without the size of its photo, which would no longer fit.
    """
    names: dict[Path, str] = {}  # in the pack, by the picture's path
    for manifest in manifests:
        with manifest.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for line, row in enumerate(tqdm(rows, desc=manifest.name, unit=" rows"), start=2):
            if "width" not in row and max(float(row[corner]) for corner in ("x0", "y0", "x1", "y1")) > 1.5:
                raise ValueError(f"{manifest}, line {line}: a box in pixels needs the photo's width and height")
            for column in {"file", "image", "mask"} & {name for name, cell in row.items() if cell}:
                path = (manifest.parent / row[column]).resolve()
                if path not in names:
                    names[path] = f"{len(names):05}.{'png' if column == 'mask' else 'webp'}"
                    pack.writestr(names[path], encoded(path, side, None if column == "mask" else quality))
                row[column] = names[path]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        pack.writestr(manifest.name, text.getvalue(), ZIP_DEFLATED)
    return sum(name.endswith(".webp") for name in names.values())


def encoded(path: Path, side: int, quality: int | None) -> bytes:
    """A picture's file with a short side of at most `side`: WebP of a quality, or without one a mask's PNG."""
    with Image.open(path) as image:
        picture = ImageOps.exif_transpose(image).convert("RGB" if quality else "L")
    scale = min(1, side / min(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if quality:
        picture.save(file, "WEBP", quality=quality)
    else:
        picture.point(lambda value: 255 * (value >= 128)).convert("1").save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
