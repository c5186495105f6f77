"""`make demo`: repaint three photos as four exemplars each, with the small model that is part of the package.

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
EDITS = {  # by photo, whose mask lies beside it
    "flower.jpg": ("cup.webp", "cat.png", "helmet.webp", "shuttle.webp"),
    "astronaut.jpg": ("uniform.webp", "dahlia.webp", "cat.png", "cup.webp"),
    "coffee.png": ("dahlia.webp", "cat.png", "shuttle.webp", "helmet.webp"),
}
SEEDS = range(3)


def main() -> int:
    start = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    model = pbe.load_model("demo", "cpu", "float32")  # the same picture on every machine
    limit_threads(model)
    # a fifth of the time, for nearly the same pictures
    settings = {**vars(quick_settings("demo")), "steps": 4, "guidance": 1.0, "seed": SEEDS[0]}
    rows = []
    for name, exemplars in tqdm(EDITS.items(), desc="photos"):
        photo, results = EXAMPLES / name, []
        image, mask = Image.open(photo), Image.open(photo.with_name(f"{photo.stem}_mask.png"))
        pictures = [Image.open(EXAMPLES / exemplar) for exemplar in exemplars]
        for exemplar, picture in zip(exemplars, pictures, strict=True):
            results.append(pbe.edit(model, image, mask, picture, num_images=len(SEEDS), **settings))
            for seed, result in zip(SEEDS, results[-1], strict=True):
                result.save(OUT / f"{photo.stem}_{Path(exemplar).stem}_{seed}.png")
        masked = Image.composite(Image.new("RGB", image.size, "gray"), image.convert("RGB"), mask)
        rows += [[image, *pictures], *([masked, *row] for row in zip(*results, strict=True))]

    labels = ["", *(f"seed {seed}" for seed in SEEDS)] * len(EDITS)
    grid(rows, row_labels=labels, cell_height=140).save(OUT / "grid.png")
    count = sum(map(len, EDITS.values())) * len(SEEDS)
    print(f"{OUT / 'grid.png'}: {count} edits in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
