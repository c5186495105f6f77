"""What an evaluation found, as JSON, as text and as a page."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import pbe
from pbe.evaluation.cocoee import read_rgb
from pbe.evaluation.html import number, render
from pbe.evaluation.published import COLUMNS, PUBLISHED
from pbe.evaluation.scoring import TITLES, Figure, Judges, Scores
from pbe.evaluation.test_set import Benchmark, Item, result_files
from pbe.images.windows import mask_bounding_box
from pbe.io.atomic import replacing

WORST = 20
THUMBNAIL = 128  # pixels high
MAX_COLUMNS = 8  # of results
PACKAGES = ("torch", "torchvision", "torchmetrics", "lightning", "numpy", "pillow")


def title(figure: Figure, judges: Judges) -> str:
    """A figure's name as reports show it: with its backbone, and an arrow to the better side."""
    backbone = f" ({judges.backbones[figure.backbone].name})" if figure.backbone else ""
    return f"{TITLES[figure.name]}{backbone} {'↑' if figure.higher_is_better else '↓'}"


def describe_judges(judges: Judges, real: str | None) -> dict[str, Any]:
    """What the figures were made with, as JSON values; `real` names the real photos' folder."""
    return {
        "backbones": [
            {
                "kind": kind,
                "name": one.name,
                "file": one.file,
                "sha256": one.sha256,
                "features": one.num_features,
                "stand_in": one.is_stand_in,
            }
            for kind, one in judges.backbones.items()
        ],
        "real": real and {"folder": real, "pictures": {kind: one.count for kind, one in judges.real.items()}},
        "mixture": judges.mixture and {"components": len(judges.mixture.weights), "features": judges.mixture.features},
        "lpips": judges.lpips is not None,
        "bootstrap": {"resamples": judges.resamples, "level": judges.level, "seed": judges.seed},
    }


def make_report(
    benchmark: Benchmark, scores: Sequence[Scores], judges: Judges, real: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All of an evaluation as JSON values; `settings` say how the results were made."""
    return {
        "pbe": pbe.__version__,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "benchmark": {
            "folder": benchmark.folder.resolve().name,
            "items": len(benchmark.items),
            "of": benchmark.total,
            "id_list_sha256": hashlib.sha256((benchmark.folder / "id_list.npy").read_bytes()).hexdigest(),
        },
        "settings": dict(settings),
        "judges": describe_judges(judges, real),
        "systems": [
            {
                "system": one.system,
                "figures": [
                    {"key": figure.key, "title": title(figure, judges), **asdict(figure)} for figure in one.figures
                ],
                "per_item": {
                    key: {
                        item.name: None if math.isnan(value) else value
                        for item, value in zip(benchmark.items, values.tolist(), strict=True)
                    }
                    for key, values in one.per_item.items()
                },
            }
            for one in scores
        ],
        "labels": {item.name: item.label for item in benchmark.items if item.label},
        "published": {"columns": COLUMNS, "rows": [one._asdict() for one in PUBLISHED]},
    }


def write_report(
    report: Mapping[str, Any],
    benchmark: Benchmark,
    results: Mapping[str, Path],
    out: str | Path,
    max_pictures: int = 200,
) -> None:
    """Writes `report.json`, `report.md` and `report.html` into a folder; `results` are the systems' folders by name."""
    out = Path(out)
    shown = choose_items(report, benchmark, max_pictures)
    files = {system: result_files(benchmark, folder) for system, folder in results.items()}
    pictures = {
        benchmark.items[i].name: strip(benchmark.items[i], [found[i] for found in files.values()]) for i in shown
    }
    for name, text in (
        ("report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"),
        ("report.md", markdown(report) + "\n"),
        ("report.html", render(report, pictures, WORST)),
    ):
        with replacing(out / name, overwrite=True) as part:
            part.write_text(text, encoding="utf-8")


def choose_items(report: Mapping[str, Any], benchmark: Benchmark, most: int) -> list[int]:
    """The items whose pictures a page shows: all, or the worst by each score and others evenly spread, `most` or so."""
    count = len(benchmark.items)
    if count <= most:
        return list(range(count))
    position = {item.name: i for i, item in enumerate(benchmark.items)}
    shown = set(np.linspace(0, count - 1, most).astype(int).tolist())
    for system in report["systems"]:
        better = {figure["key"]: figure["higher_is_better"] for figure in system["figures"]}
        for key, values in system["per_item"].items():
            there = [name for name, value in values.items() if value is not None]
            there.sort(key=values.__getitem__, reverse=not better[key])
            shown |= {position[name] for name in there[:WORST]}
    return sorted(shown)


def strip(item: Item, results: Sequence[Path]) -> str:
    """Source with the mask's box, reference, and results, side by side, small, as a JPEG in a data URI.

    Many results stand in rows: with composited ones after as many raw ones, a system's two are above each other.
    """
    source = read_rgb(item.source)
    box = mask_bounding_box(item.repaint())
    draw = ImageDraw.Draw(source)
    line = max(2, source.height // 100)
    draw.rectangle((box.x0, box.y0, box.x1 - 1, box.y1 - 1), outline=(230, 30, 30), width=line)
    source, reference, *results = (
        thumbnail(cell) for cell in (source, read_rgb(item.reference), *map(read_rgb, results))
    )
    first = source.width + reference.width + 4
    columns = math.ceil(len(results) / math.ceil(len(results) / MAX_COLUMNS))
    rows = math.ceil(len(results) / columns)
    canvas = Image.new("RGB", (first + columns * (source.width + 2) - 2, rows * (THUMBNAIL + 2) - 2), "white")
    canvas.paste(source, (0, 0))
    canvas.paste(reference, (source.width + 2, 0))
    for i, result in enumerate(results):  # each as large as the source
        canvas.paste(result, (first + i % columns * (source.width + 2), i // columns * (THUMBNAIL + 2)))
    data = io.BytesIO()
    canvas.save(data, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def thumbnail(image: Image.Image) -> Image.Image:
    return image.resize((min(2 * THUMBNAIL, max(1, round(image.width * THUMBNAIL / image.height))), THUMBNAIL))


def table(report: Mapping[str, Any]) -> str:
    """The figures as text: a row a system, with the intervals below."""
    titles = {figure["key"]: figure["title"] for one in report["systems"] for figure in one["figures"]}
    columns = [["", *(text for one in report["systems"] for text in (one["system"], ""))]]
    for key, title in titles.items():
        cells = []
        for one in report["systems"]:
            figure = next((figure for figure in one["figures"] if figure["key"] == key), None)
            cells += cell(figure, report["benchmark"]["items"]) if figure else ("", "")
        columns.append([title, *cells])
    widths = [max(map(len, cells)) for _, *cells in columns]
    heads = [
        textwrap.wrap(head.replace(" ↑", "\xa0↑").replace(" ↓", "\xa0↓"), max(width, 12), break_long_words=False)
        for (head, *_), width in zip(columns, widths, strict=True)
    ]
    widths = [max([width, *map(len, head)]) for width, head in zip(widths, heads, strict=True)]
    height = max(map(len, heads))
    heads = [[""] * (height - len(head)) + head for head in heads]
    lines = [*zip(*heads, strict=True), *zip(*(cells for _, *cells in columns), strict=True)]
    text = ["  ".join([f"{line[0]:{widths[0]}}", *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    if any(backbone["stand_in"] for backbone in report["judges"]["backbones"]):
        text.append("Figures of the stand-in classifier compare with nothing published.")
    return "\n".join(text).replace("\xa0", " ")


def markdown(report: Mapping[str, Any]) -> str:
    """The figures as a table of Markdown: a row a system, each figure with its interval."""
    titles = {figure["key"]: figure["title"] for one in report["systems"] for figure in one["figures"]}
    lines = [["", *titles.values()], ["---"] * (len(titles) + 1)]
    for one in report["systems"]:
        found = {figure["key"]: cell(figure, report["benchmark"]["items"]) for figure in one["figures"]}
        lines.append([one["system"].replace("|", "\\|"), *(" ".join(found.get(key, ())) for key in titles)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(figure: Mapping[str, Any], items: int) -> tuple[str, str]:
    """A figure, and its interval with the number of items if it is not over all."""
    value, low, high = (number(figure[name]) for name in ("value", "low", "high"))
    count = f" n={figure['count']}" if figure["count"] < items else ""
    return value, f"[{low}, {high}]{count}"
