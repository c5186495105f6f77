"""Several results of one edit: for seeds, for guidance scales, and all of them in one picture."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.batch.job import Inputs, Job
from pbe.editing.settings import COUNT, SETTINGS
from pbe.io.fields import check, read

if TYPE_CHECKING:
    from PIL import Image

MAX_COLUMNS = 6


def variants(args: argparse.Namespace, job: Job, num_images: int) -> tuple[dict[tuple[float, int], Job], Path | None]:
    """The jobs to run by (guidance, seed), each with its own output, and where their comparison goes, if any."""
    sweep, settings = args.sweep_guidance is not None, job.settings
    scales = read("--sweep-guidance", args.sweep_guidance, tuple[float, ...]) if sweep else (settings.guidance,)
    seeds = [settings.seed + i for i in range(num_images)] if args.seeds is None else parse_seeds(args.seeds)
    check("the number of results", len(scales) * len(seeds), COUNT)
    with_grid = args.grid or sweep or args.seeds is not None

    out = Path(job.out)
    in_folder = job.out.endswith(("/", os.sep)) or out.is_dir()
    base = out / f"{Path(job.image).stem}.png" if in_folder else out
    jobs = {}
    for guidance, seed in product(scales, seeds):
        label = f"-guidance{guidance:g}" if sweep else ""
        name = f"{base.stem}{label}-{seed}{base.suffix}"
        is_alone = not in_folder and not with_grid and len(seeds) == 1
        out_path = base if is_alone else base.with_name(name)
        variant = replace(settings, guidance=guidance, seed=seed)
        jobs[guidance, seed] = replace(job, settings=variant, out=str(out_path))
    if not with_grid:
        return jobs, None
    grid_path = base.with_name(f"{base.stem}-grid.png") if in_folder else base
    replace(job, out=str(grid_path))  # ValueError where it is one of the inputs, as for the results
    return jobs, grid_path


def parse_seeds(text: str) -> list[int]:
    """Seeds from `1..8`, `1,5,9` or both: each once, in the order given."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", part)
        if found is None:
            raise ValueError(f"--seeds {text!r} is not a range like 1..8 or a list like 1,5,9")
        first, last = (read("--seeds", seed, SETTINGS["seed"]) for seed in (found[1], found[2] or found[1]))
        check(f"the number of seeds in {part}", last - first + 1, COUNT)
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def runs(seeds: Sequence[int]) -> list[tuple[int, int]]:
    """Seeds as runs of consecutive ones, (first, count): each run is edited in batches."""
    found: list[tuple[int, int]] = []
    for seed in seeds:
        if found and seed == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((seed, 1))
    return found


def comparison(
    inputs: Inputs, results: Mapping[tuple[float, int], Image.Image], scales: Sequence[float], seeds: Sequence[int]
) -> Image.Image:
    """Image | masked | exemplar | results; for several guidance scales and seeds a table of the results below those."""
    from PIL import Image

    from pbe.images.grids import grid
    from pbe.images.reading import read_picture

    def shown(image: Image.Image) -> Image.Image:
        return read_picture(image).to_rgb8()

    photo = shown(inputs.photo)
    masked = Image.composite(Image.new("RGB", photo.size, "gray"), photo, Image.fromarray(inputs.canvas.repaint))
    many = len(inputs.exemplars) > 1
    cells = [photo, masked, *inputs.exemplars]
    captions = [
        "image",
        "masked",
        *(f"exemplar {i + 1}" if many else "exemplar" for i in range(len(inputs.exemplars))),
    ]
    if len(scales) > 1 and len(seeds) > 1:
        table = [[shown(results[guidance, seed]) for seed in seeds] for guidance in scales]
        return grid(
            [cells, *table],
            captions=[captions, *([f"seed {seed}" for seed in seeds] for _ in scales)],
            row_labels=["", *(f"guidance {guidance:g}" for guidance in scales)],
        )
    for (guidance, seed), image in results.items():
        cells.append(shown(image))
        captions.append(f"guidance {guidance:g}" if len(scales) > 1 else f"seed {seed}")
    per_row = math.ceil(len(cells) / math.ceil(len(cells) / MAX_COLUMNS))
    starts = range(0, len(cells), per_row)
    return grid([cells[i : i + per_row] for i in starts], captions=[captions[i : i + per_row] for i in starts])
