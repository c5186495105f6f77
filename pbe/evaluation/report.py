"""What an evaluation found, as JSON, as text and as a page."""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pbe
from pbe.evaluation.cocoee import read_rgb
from pbe.evaluation.html import jpeg_uri, notes, number, render, titles
from pbe.evaluation.markdown import table
from pbe.evaluation.published import COLUMNS, PUBLISHED
from pbe.evaluation.scoring import TITLES, Judges, Score, SystemScores
from pbe.evaluation.test_set import Item, TestSet, result_files
from pbe.images.grids import with_box
from pbe.io.atomic import write_text

WORST = 20
THUMBNAIL = 128  # pixels high
MAX_COLUMNS = 8  # of results
PACKAGES = ("torch", "torchvision", "torchmetrics", "lightning", "numpy", "pillow")


def title(score: Score, judges: Judges) -> str:
    """A score's name as reports show it: with its backbone, and an arrow to the better side."""
    backbone = f" ({judges.backbones[score.backbone].name})" if score.backbone else ""
    return f"{TITLES[score.name]}{backbone} {'↑' if score.higher_is_better else '↓'}"


def describe_judges(judges: Judges, real: str | None) -> dict[str, Any]:
    """What the scores were made with, as JSON values; `real` names the real photos' folder."""
    return {
        "backbones": [
            {
                "kind": kind,
                "name": one.name,
                "file": one.file,
                "sha256": one.sha256,
                "features": one.num_features,
                "surrogate": one.is_surrogate,
            }
            for kind, one in judges.backbones.items()
        ],
        "real": real and {"folder": real, "pictures": {kind: one.count for kind, one in judges.real.items()}},
        "mixture": judges.mixture and {"components": len(judges.mixture.weights), "features": judges.mixture.features},
        "lpips": judges.lpips is not None,
        "bootstrap": asdict(judges.bootstrap),
    }


def make_report(
    test_set: TestSet, scores: Sequence[SystemScores], judges: Judges, real: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All of an evaluation as JSON values; `settings` say how the results were made."""
    return {
        "pbe": pbe.__version__,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "test_set": {
            "folder": test_set.folder.resolve().name,
            "items": len(test_set.items),
            "of": test_set.total,
            "id_list_sha256": hashlib.sha256((test_set.folder / "id_list.npy").read_bytes()).hexdigest(),
        },
        "settings": dict(settings),
        "judges": describe_judges(judges, real),
        "systems": [
            {
                "system": one.system,
                "scores": [{"key": score.key, "title": title(score, judges), **asdict(score)} for score in one.scores],
                "per_item": {
                    key: {
                        item.name: None if math.isnan(value) else value
                        for item, value in zip(test_set.items, values.tolist(), strict=True)
                    }
                    for key, values in one.per_item.items()
                },
            }
            for one in scores
        ],
        "labels": {item.name: item.label for item in test_set.items if item.label},
        "published": {"columns": COLUMNS, "rows": [one._asdict() for one in PUBLISHED]},
    }


def write_report(
    report: Mapping[str, Any], test_set: TestSet, results: Mapping[str, Path], out: str | Path, max_pictures: int = 200
) -> None:
    """Writes `report.json`, `report.md` and `report.html` into a folder; `results` are the systems' folders by name."""
    files = [result_files(test_set, folder) for folder in results.values()]
    pictures = {
        test_set.items[i].name: strip(test_set.items[i], [found[i] for found in files])
        for i in choose_items(report, test_set, max_pictures)
    }
    page = render(report, pictures, WORST)
    data = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("report.json", data), ("report.md", markdown(report) + "\n"), ("report.html", page)):
        write_text(Path(out) / name, text)


def choose_items(report: Mapping[str, Any], test_set: TestSet, most: int) -> list[int]:
    """The items whose pictures a page shows: all, or about `most`, the worst by each score and others evenly spread."""
    count = len(test_set.items)
    if count <= most:
        return list(range(count))
    position = {item.name: i for i, item in enumerate(test_set.items)}
    shown = set(np.linspace(0, count - 1, most).astype(int).tolist())
    for system in report["systems"]:
        better = {score["key"]: score["higher_is_better"] for score in system["scores"]}
        for key, values in system["per_item"].items():
            there = [name for name, value in values.items() if value is not None]
            there.sort(key=values.__getitem__, reverse=not better[key])
            shown |= {position[name] for name in there[:WORST]}
    return sorted(shown)


def strip(item: Item, results: Sequence[Path]) -> str:
    """Image with the mask's box, exemplar, and results, side by side, small, as a JPEG in a data URI.

    Many results stand in rows: with the composited ones after the raw ones, a system's two are above each other.
    """
    image, exemplar, *cells = (
        cell.resize((min(2 * THUMBNAIL, max(1, round(cell.width * THUMBNAIL / cell.height))), THUMBNAIL))
        for cell in (with_box(read_rgb(item.image), item.repaint()), *map(read_rgb, (item.exemplar, *results)))
    )
    first = image.width + exemplar.width + 4
    columns = math.ceil(len(cells) / math.ceil(len(cells) / MAX_COLUMNS))
    rows = math.ceil(len(cells) / columns)
    canvas = Image.new("RGB", (first + columns * (image.width + 2) - 2, rows * (THUMBNAIL + 2) - 2), "white")
    canvas.paste(image, (0, 0))
    canvas.paste(exemplar, (image.width + 2, 0))
    for i, cell in enumerate(cells):  # each as large as the image
        canvas.paste(cell, (first + i % columns * (image.width + 2), i // columns * (THUMBNAIL + 2)))
    data = io.BytesIO()
    canvas.save(data, format="JPEG", quality=80)
    return jpeg_uri(data.getvalue())


# --- text -------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """The scores as a table of Markdown, and what a reader must know of them: one row per system, each score with its
    interval, and with the number of items if it is not over all."""
    heads = titles(report)
    rows = []
    for one in report["systems"]:
        cells = dict.fromkeys(heads, "")
        for score in one["scores"]:
            value, low, high = (number(score[name]) for name in ("value", "low", "high"))
            count = f" n={score['count']}" if score["count"] < report["test_set"]["items"] else ""
            cells[score["key"]] = f"{value} ({low} to {high}){count}"
        rows.append([one["system"], *cells.values()])
    return "\n".join([table(["system", *heads.values()], rows), "", *(f"- {note}" for note in notes(report))])
