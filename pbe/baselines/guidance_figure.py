"""The paper's figure 8: ever more precise texts against the exemplar as guidance (arXiv 2211.13227, section 4.4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from pbe import __version__
from pbe.baselines import System, Task, WeightFiles, get_baseline
from pbe.baselines.running import describe
from pbe.baselines.stable_diffusion import StableDiffusionText
from pbe.images.grids import grid, with_box
from pbe.images.saving import save_picture

TEXT, EXEMPLAR = "stable-diffusion-text", "paint-by-example"


def save_guidance_figure(
    out: Path,
    image: Path,
    mask: Path,
    exemplar: Path,
    texts: Sequence[str],
    seeds: Sequence[int],
    weights: WeightFiles,
    steps: int | None = None,
    on_picture: Callable[[], None] | None = None,
) -> None:
    """Writes one picture: the image, Stable Diffusion's result for each text, the exemplar, Paint by Example's result.

    One row per seed, which both systems draw from. The file holds the texts, seeds, settings and checksums of the
    weights. ValueError for no or blank texts, repeated seeds, a file not given and as `Task.read` and `open_baseline`;
    FileNotFoundError for a file that is not there.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"the figure needs texts that say something, got {list(texts)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"the figure needs seeds, each once, got {list(seeds)}")
    task = Task.read(image, mask, exemplar)
    settings = {name: get_baseline(name).choose_settings({"steps": steps}, weights) for name in (TEXT, EXEMPLAR)}
    about = {
        "texts": list(texts),
        "seeds": list(seeds),
        "systems": {name: describe(name, weights, chosen) for name, chosen in settings.items()},
        "pbe": __version__,
    }
    by_text, by_exemplar = paint_both(task, texts, seeds, weights, settings, on_picture)
    outlined = with_box(Image.fromarray(task.image), task.repaint)
    rows = [[outlined, *painted, task.exemplar, ours] for painted, ours in zip(by_text, by_exemplar, strict=True)]
    figure = grid(
        rows,
        row_labels=[f"seed {seed}" for seed in seeds] if len(seeds) > 1 else None,
        column_labels=["image", *texts, "exemplar", "Paint by Example"],
    )
    info = {
        "pbe": json.dumps(about),
        "Description": "Text against an exemplar as guidance",
        "Software": f"pbe {__version__}",
    }
    save_picture(figure, out, info)


def paint_both(
    task: Task,
    texts: Sequence[str],
    seeds: Sequence[int],
    weights: WeightFiles,
    settings: dict[str, dict[str, Any]],
    on_picture: Callable[[], None] | None = None,
) -> tuple[list[list[Image.Image]], list[Image.Image]]:
    """By seed: the results for each text, and that for the exemplar. One system's networks are in memory at a time."""

    def done(picture: Image.Image) -> Image.Image:
        if on_picture is not None:
            on_picture()
        return picture

    def open_(name: str) -> System:
        return get_baseline(name).load(weights).with_settings(**settings[name])

    tasks = [replace(task, seed=seed) for seed in seeds]
    system = open_(TEXT)
    assert isinstance(system, StableDiffusionText)
    by_text = [[done(system.paint(one, text)) for text in texts] for one in tasks]
    del system
    painter = open_(EXEMPLAR)
    return by_text, [done(painter(one)) for one in tasks]
