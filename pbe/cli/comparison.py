"""Several results of one edit: for some seeds, for some guidance scales, and all of them in one picture."""

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
from pbe.editing.parsing import parse_numbers

if TYPE_CHECKING:
    from PIL import Image

MAX_COLUMNS = 6


def variants(args: argparse.Namespace, job: Job, num_images: int) -> tuple[dict[tuple[float, int], Job], Path | None]:
    """The jobs to run by (scale, seed), each with its own output, and where their comparison goes if one is wanted."""
    scales = parse_numbers(args.sweep_scale) if args.sweep_scale else [job.scale]
    seeds = parse_seeds(args.seeds) if args.seeds else [job.seed + i for i in range(num_images)]
    with_grid = args.grid or args.sweep_scale is not None or args.seeds is not None

    out = Path(job.out)
    in_folder = job.out.endswith(("/", os.sep)) or out.is_dir()
    base = out / f"{Path(job.image).stem}.png" if in_folder else out
    jobs = {}
    for scale, seed in product(scales, seeds):
        label = f"-scale{scale:g}" if args.sweep_scale else ""
        name = f"{base.stem}{label}-{seed}{base.suffix}"
        is_alone = not in_folder and not with_grid and len(seeds) == 1
        jobs[scale, seed] = replace(job, scale=scale, seed=seed, out=str(base if is_alone else base.with_name(name)))
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
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"--seeds {text!r} is neither a range like 1..8 nor a list like 1,5,9")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
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
    """Source | masked | exemplar | results; for several scales and seeds a table of the results below those."""
    import numpy as np
    from PIL import Image

    from pbe.images.grids import grid
    from pbe.images.reading import read_picture

    def shown(image: Image.Image) -> Image.Image:
        rgb = read_picture(image).rgb()[0].permute(1, 2, 0).numpy()
        return Image.fromarray(np.rint((rgb + 1) * 127.5).astype(np.uint8))

    source = shown(inputs.picture.source)
    masked = Image.composite(Image.new("RGB", source.size, "gray"), source, Image.fromarray(inputs.repaint))
    many = len(inputs.exemplars) > 1
    cells = [source, masked, *inputs.exemplars]
    captions = [
        "source",
        "masked",
        *(f"exemplar {i + 1}" if many else "exemplar" for i in range(len(inputs.exemplars))),
    ]
    if len(scales) > 1 and len(seeds) > 1:
        table = [[shown(results[scale, seed]) for seed in seeds] for scale in scales]
        return grid(
            [cells, *table],
            captions=[captions, *([f"seed {seed}" for seed in seeds] for _ in scales)],
            row_labels=["", *(f"scale {scale:g}" for scale in scales)],
        )
    for (scale, seed), image in results.items():
        cells.append(shown(image))
        captions.append(f"scale {scale:g}" if len(scales) > 1 else f"seed {seed}")
    per_row = math.ceil(len(cells) / math.ceil(len(cells) / MAX_COLUMNS))
    starts = range(0, len(cells), per_row)
    return grid([cells[i : i + per_row] for i in starts], captions=[captions[i : i + per_row] for i in starts])
