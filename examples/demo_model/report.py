"""Figures on paper: JSON, Markdown tables, and grids of pictures to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from examples.demo_model.figures import Figure, Row
from pbe.editing.edit import edit
from pbe.editing.settings import DEMO
from pbe.images.grids import grid
from pbe.images.reading import read_exemplar, read_mask, read_picture
from pbe.images.saving import save_picture
from pbe.io.atomic import replacing
from pbe.models.paint_by_example import PaintByExample


def write_json(path: Path, settings: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """All settings and figures; an `Estimate` becomes an object with its five numbers."""
    content = {"settings": dict(settings), "figures": [asdict(figure) for figure in figures]}
    with replacing(path, overwrite=True) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_markdown(path: Path, settings: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    """A table for each figure, `value ± standard error`, under the settings."""
    lines = ["# Figures", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    lines += ["Numbers are value ± standard error, by the bootstrap over photos; figures.json has 95 % intervals.", ""]
    for number, figure in enumerate(figures, start=1):
        lines += [f"## {number}. {figure.title}", "", figure.note, "", *table(figure.rows), ""]
    with replacing(path, overwrite=True) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table of rows with the same keys."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in row.values()) for row in rows]
    return [f"| {line} |" for line in lines]


def save_grid(
    path: Path, columns: Mapping[str, Tensor], row_labels: Sequence[str] | None = None, cell: int = 128
) -> None:
    """Columns of pictures (N, 3, H, W) in [-1, 1] side by side, N rows."""
    rows = [
        [to_pil_image((picture / 2 + 0.5).clamp(0, 1)) for picture in row]
        for row in zip(*columns.values(), strict=True)
    ]
    save_picture(grid(rows, row_labels=row_labels, column_labels=list(columns), cell_height=cell), path)


def seed_grid(
    model: PaintByExample,
    edits: Sequence[tuple[str, str, str]],
    *,
    seeds: int = 16,
    seed: int = 0,
    guidance: float,
    steps: int,
    sampler: str,
    cell: int = 128,
) -> Image.Image:
    """Edits, each a (photo, mask, exemplar) of files, with the seeds from `seed` on, none left out: a row an edit."""
    rows = []
    for photo, mask, exemplar in edits:
        picture = read_picture(photo)
        repaint = Image.fromarray(read_mask(mask, picture.size))
        results = edit(
            model,
            photo,
            mask,
            exemplar,
            guidance=guidance,
            steps=steps,
            sampler=sampler,
            spacing=DEMO.spacing,
            seed=seed,
            num_images=seeds,
            batch_size=16,
        )
        rows.append([picture.source, repaint, read_exemplar(exemplar), *results])
    labels = ["photo", "mask", "exemplar", *(f"seed {seed + i}" for i in range(seeds))]
    return grid(rows, column_labels=labels, cell_height=cell)
