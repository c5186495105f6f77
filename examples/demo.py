"""`make demo`: repaint three photos as three exemplars each, with the small model that is part of the package.

All of it with seed 0, shown in outputs/demo/grid.png: photo | masked | exemplar | result | exemplar | result | …
"""

import sys
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import pbe
from pbe.editing.loading import limit_threads
from pbe.editing.settings import quick_settings
from pbe.images.grids import grid

EXAMPLES = Path(__file__).resolve().parent
OUT = EXAMPLES.parent / "outputs" / "demo"
EDITS = {  # by photo, whose mask lies beside it
    "flower.jpg": ("flower_yellow.jpg", "cup.jpg", "cat.png"),
    "astronaut.jpg": ("uniform.jpg", "flower_violet.jpg", "cat.png"),
    "coffee.png": ("flower_pink.jpg", "cat.png", "helmet.jpg"),
}


def main() -> int:
    start = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    model = pbe.load_model("demo", "cpu", "float32")  # the same picture on every machine
    limit_threads(model)
    settings = {**vars(quick_settings("demo")), "seed": 0}
    rows = []
    for name, exemplars in tqdm(EDITS.items(), desc="photos"):
        photo = EXAMPLES / name
        image, mask = Image.open(photo), Image.open(photo.with_name(f"{photo.stem}_mask.png"))
        rows.append([image, Image.composite(Image.new("RGB", image.size, "gray"), image.convert("RGB"), mask)])
        for exemplar in exemplars:
            picture = Image.open(EXAMPLES / exemplar)
            (result,) = pbe.edit(model, image, mask, picture, **settings)
            result.save(OUT / f"{photo.stem}_{Path(exemplar).stem}.png")
            rows[-1] += [picture, result]

    labels = ["photo", "masked", *("exemplar", "result") * 3]
    grid(rows, column_labels=labels, cell_height=180).save(OUT / "grid.png")
    count = sum(map(len, EDITS.values()))
    print(f"{OUT / 'grid.png'}: {count} edits in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
