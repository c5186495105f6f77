"""Figures on paper: JSON, Markdown tables, and grids of pictures to look at."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

import pbe
from examples.demo_model.settings import Settings
from examples.demo_model.tables import Row, Table
from pbe.editing.settings import DEMO
from pbe.images.grids import grid
from pbe.images.reading import read_exemplar, read_mask, read_picture
from pbe.images.saving import save_picture
from pbe.io.atomic import replacing
from pbe.models.paint_by_example import PaintByExample


def load(args: argparse.Namespace) -> PaintByExample:
    """The model of --ckpt with --adapter on --device, in float32; ValueError for another kind of model."""
    model = pbe.load_model(args.ckpt, device=args.device, dtype="float32", adapters=args.adapter)
    if not isinstance(model, PaintByExample):
        raise ValueError(f"{args.ckpt} holds {type(model).__name__}, not Paint by Example")
    return model


def write_tables(out: Path, about: Mapping[str, Any], tables: Sequence[Table]) -> None:
    """figures.json, where a `Statistic` is an object with its five numbers, and figures.md."""
    content = {"settings": dict(about), "figures": [asdict(table) for table in tables]}
    lines = ["# Figures", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["Numbers are value ± standard error, by the bootstrap over photos; figures.json has 95 % intervals.", ""]
    for number, table in enumerate(tables, start=1):
        lines += [f"## {number}. {table.title}", "", table.note, "", *markdown(table.rows), ""]
    texts = {"figures.json": json.dumps(content, indent=1) + "\n", "figures.md": "\n".join(lines)}
    for name, text in texts.items():
        with replacing(out / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table of rows with the same keys."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(str(value) for value in row.values()) for row in rows]
    return [f"| {line} |" for line in lines]


def save_grid(path: Path, columns: Mapping[str, Tensor], row_labels: Sequence[str] | None = None) -> None:
    """Columns of pictures (N, 3, H, W) in [-1, 1] side by side, N rows."""
    rows = [
        [to_pil_image((picture / 2 + 0.5).clamp(0, 1)) for picture in row]
        for row in zip(*columns.values(), strict=True)
    ]
    save_picture(grid(rows, row_labels=row_labels, column_labels=list(columns), cell_height=128), path)


def write_seed_grid(args: argparse.Namespace, settings: Settings) -> None:
    """The command `grid`: each edit's files and its results with the seeds from --seed on, none left out."""
    model = load(args)
    chosen = replace(
        DEMO, guidance=settings.guidance, steps=settings.steps, sampler=settings.sampler, seed=settings.seed
    )
    rows = []
    for image, mask, exemplar in args.edit:
        results = pbe.edit(model, image, mask, exemplar, num_images=args.count, batch_size=16, **vars(chosen))
        picture = read_picture(image)
        repaint = Image.fromarray(read_mask(mask, picture.size))
        rows.append([picture.source, repaint, read_exemplar(exemplar), *results])
    seeds = range(settings.seed, settings.seed + args.count)
    labels = ["image", "mask", "exemplar", *(f"seed {seed}" for seed in seeds)]
    save_picture(grid(rows, column_labels=labels, cell_height=args.cell), args.out)
    print(f"{args.out}: {len(args.edit)} edits, seeds {seeds[0]} to {seeds[-1]}")
