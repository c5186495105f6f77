"""`make demo`: repaint the flower of a photo as others, with the small model that is part of the package.

One edit for each exemplar and each of the seeds 0 to 2, all of them shown, in outputs/demo/grid.png.
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
COLOURS = ("red", "yellow", "pink", "violet", "white")
SEEDS = range(3)


def main() -> int:
    start = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    model = pbe.load_model("demo", "cpu", "float32")  # the same picture on every machine
    limit_threads(model)
    settings = {**vars(quick_settings("demo")), "seed": SEEDS[0]}
    image, mask = Image.open(EXAMPLES / "flower.jpg"), Image.open(EXAMPLES / "flower_mask.png")
    exemplars = {colour: Image.open(EXAMPLES / f"flower_{colour}.jpg") for colour in COLOURS}
    results = {}
    for colour, exemplar in tqdm(exemplars.items(), desc="exemplars"):
        results[colour] = pbe.edit(model, image, mask, exemplar, num_images=len(SEEDS), **settings)
        for seed, result in zip(SEEDS, results[colour], strict=True):
            result.save(OUT / f"{colour}_{seed}.png")

    hole = Image.composite(Image.new("RGB", image.size, "gray"), image, mask)
    rows = [[image, *exemplars.values()], *([hole, *(results[c][seed] for c in COLOURS)] for seed in SEEDS)]
    labels = ["", *(f"seed {seed}" for seed in SEEDS)]
    grid(rows, row_labels=labels, column_labels=["photo", *COLOURS], cell_height=180).save(OUT / "grid.png")
    print(f"{OUT / 'grid.png'}: {len(COLOURS) * len(SEEDS)} edits in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
