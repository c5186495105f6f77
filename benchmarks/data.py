"""How fast training examples are made, against a plain version of the same recipe.

    python -m benchmarks data photos/boxes.csv

One process, one thread. Both versions make the same examples from the same random numbers, in turns; the median over
pairs of the ratio of their times does not suffer from what else the machine does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from benchmarks.arguments import make_parser
from benchmarks.budget import say
from benchmarks.report import markdown
from pbe.data.augment import augment_exemplar
from pbe.data.example import Example, make_generator
from pbe.data.recipe import Geometry, draw_geometry, make_example
from pbe.data.recipe_config import RecipeConfig
from pbe.data.records import Record
from pbe.data.sources import SourceConfig, open_source
from pbe.models.clip import CLIP_MEAN, CLIP_STD

VARIANTS = {
    "512 px, the paper's recipe": RecipeConfig(),
    "512 px, without draft decoding": RecipeConfig(draft=False),
    "512 px, antialiased": RecipeConfig(antialias=True),
    "256 px": RecipeConfig(resolution=256),
    "64 px, exemplar 56 px": RecipeConfig(resolution=64, exemplar_size=56),
}


def parser() -> argparse.ArgumentParser:
    p = make_parser("data", __doc__)
    p.add_argument("boxes", type=Path, help="a manifest of photos with boxes; best of 1024 pixels and more")
    p.add_argument("--pairs", type=int, default=5, help="rounds of both versions in turns (default 5)")
    return p


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Nothing beside what all sections check."""


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The timings of each variant of the recipe: those so far after each."""
    source = open_source(SourceConfig(kind="manifest", path=str(args.boxes)))
    records = [source[i] for i in range(len(source))]
    recipes: dict[str, dict[str, float]] = {}
    for (name, config), _ in zip(VARIANTS.items(), args.budget.rounds(len(VARIANTS), "recipes"), strict=False):
        recipes[name] = asdict(measure_recipe(records, config, args.pairs))
        say(f"{name}: {recipes[name]['ours']:.3g} examples a second")
        yield {"recipes": recipes}


def plain_example(record: Record, config: RecipeConfig, generator: torch.Generator) -> Example:
    """The example that `make_example` gives, as one writes it first with PIL and torchvision (and as the original
    does): decode, convert, normalise and mask the whole photo, then crop and resize.

    For upright photos with a box each, squashed, without targets or object masks. Its `source` is already masked.
    """
    with Image.open(record.image) as file:
        photo = file.convert("RGB")
    geometry = draw_geometry(record, (photo.height, photo.width), config, generator)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    image = T.normalize(to_tensor(photo), [0.5] * 3, [0.5] * 3)
    mask = to_tensor(plain_mask(geometry, photo))
    masked = image * mask

    def crop(picture: torch.Tensor) -> torch.Tensor:
        window = geometry.window
        picture = T.crop(picture, window.y0, window.x0, window.height, window.width)
        return T.resize(picture, [config.resolution] * 2, antialias=config.antialias)

    exemplar = to_tensor(photo.crop(geometry.exemplar_box))
    exemplar = T.resize(exemplar, [config.exemplar_size] * 2, antialias=config.antialias)
    if config.augment:
        exemplar = augment_exemplar(exemplar, config, generator)
    exemplar = T.normalize(exemplar, list(CLIP_MEAN), list(CLIP_STD))
    return Example(crop(image), crop(masked), crop(mask), exemplar, torch.tensor(0), str(record.image))


def plain_mask(geometry: Geometry, photo: Image.Image) -> Image.Image:
    """The mask of the whole photo, white = keep."""
    assert geometry.outline is not None  # of a box
    corners = [tuple(point) for point in geometry.outline.tolist()]
    mask = Image.new("L", photo.size, 255)
    ImageDraw.Draw(mask).polygon(corners, fill=0)
    return mask


@dataclass(frozen=True)
class Timing:
    """Examples a second of one core, medians over the rounds, and the median ratio of the rounds."""

    photos: int
    plain: float
    ours: float
    speedup: float


def measure_recipe(records: Sequence[Record], config: RecipeConfig, pairs: int = 5) -> Timing:
    """Times both versions in turns, over all the records in each round, in this thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [
            (seconds_of(plain_example, records, config, seed), seconds_of(make_example, records, config, seed))
            for seed in range(pairs + 1)
        ][1:]  # the first warms up
    finally:
        torch.set_num_threads(threads)
    plain, ours = (median(len(records) / seconds for seconds in times) for times in zip(*rounds, strict=True))
    return Timing(len(records), plain, ours, median(a / b for a, b in rounds))


def seconds_of(make: Callable, records: Sequence[Record], config: RecipeConfig, seed: int) -> float:
    start = time.perf_counter()
    for i, record in enumerate(records):
        make(record, config, make_generator(seed, i))
    return time.perf_counter() - start


def tables(content: dict[str, Any]) -> str:
    """Examples a second and core."""
    rows = [
        [name, str(timing["photos"]), f"{timing['plain']:.1f}", f"{timing['ours']:.1f}", f"{timing['speedup']:.2f}"]
        for name, timing in content["recipes"].items()
    ]
    return markdown(["photos", "plain", "here", "ratio"], rows)
