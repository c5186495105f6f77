"""The page of a report: one file that works from the disk, with its pictures inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

MAX_NAMED = 4  # systems in the heading


def number(value: float) -> str:
    """Two digits after the point; four up to 1, and three significant ones where those would be zeros."""
    if abs(value) > 1 + 1e-9:
        return f"{value:.2f}"
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def jpeg_uri(data: bytes) -> str:
    """A JPEG as an address that holds it."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def titles(report: Mapping[str, Any]) -> dict[str, str]:
    """The titles of all the systems' scores by key."""
    return {score["key"]: score["title"] for one in report["systems"] for score in one["scores"]}


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know to compare a report's scores with others."""
    judges, found = report["judges"], []
    scores = [score for one in report["systems"] for score in one["scores"]]
    released = sorted({score["title"] for score in scores if score["is_released"]})
    if released:
        found.append(f"{', '.join(released)}: computed as the paper's, whose results are raw ones of all 3,500 items.")
    if real := judges["real"]:
        found.append(f"FID is against the {max(real['pictures'].values())} photos of {real['folder']}.")
    if any(score["name"] in ("fid", "foreground_fid") for score in scores):
        items = report["test_set"]["items"]
        found.append(f"FID grows as pictures get fewer: compare it only with others over {items} items.")
    if any(one["surrogate"] for one in judges["backbones"]):
        found.append("A surrogate's scores order these systems alone: do not compare them with published ones.")
    if not real:
        found.append("No FID: no folder of real photos was given.")
    if judges["mixture"] is None:
        found.append("No QS: no mixture of real photos was given.")
    if not judges["lpips"]:
        found.append("No background LPIPS: no weights were given; MSE and SSIM tell whether the background was kept.")
    return found


def render(report: Mapping[str, Any], pictures: Mapping[str, str], worst: int) -> str:
    """The page of a report as `pbe.evaluation.report.make_report` makes it; `pictures` are data URIs by item's name."""
    systems = [one["system"] for one in report["systems"]]
    test_set = report["test_set"]
    part = "" if test_set["items"] == test_set["of"] else f" (of {test_set['of']}: not the whole test set)"
    settings = {key: report[key] for key in ("settings", "judges", "test_set", "versions", "pbe")}
    data = {
        "worst": worst,
        "pictures": dict(pictures),
        "labels": report["labels"],
        "systems": [
            {
                "name": one["system"],
                "scores": [
                    {
                        "title": score["title"],
                        "higher_is_better": score["higher_is_better"],
                        "values": {name: one["per_item"][score["key"]][name] for name in pictures},
                    }
                    for score in one["scores"]
                    if score["key"] in one["per_item"]
                ],
            }
            for one in report["systems"]
        ],
    }
    template = resources.files("pbe.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        heading=escape(", ".join(systems) if len(systems) <= MAX_NAMED else f"{len(systems)} sets of results"),
        test_set=f"{escape(test_set['folder'])}: {test_set['items']} items{part}",
        version=escape(report["pbe"]),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in notes(report)),
        level=f"{100 * report['judges']['bootstrap']['level']:g} %",
        scores=_scores(report),
        published=_published(report),
        legend=escape(" · ".join(["image with its box", "exemplar", *systems])),
        worst=worst,
        shown=f"{len(pictures)} of {test_set['items']}",
        settings=escape(json.dumps(settings, indent=1, ensure_ascii=False)),
        data=embedded(data),
    )


def _scores(report: Mapping[str, Any]) -> str:
    heads, rows = titles(report), []
    for one in report["systems"]:
        found = {score["key"]: score for score in one["scores"]}
        cells = [_cell(found.get(key), report["test_set"]["items"]) for key in heads]
        rows.append([escape(one["system"]), *cells])
    return _table(["system", *heads.values()], rows)


def _cell(score: Mapping[str, Any] | None, items: int) -> str:
    if score is None:
        return ""
    count = f", n = {score['count']}" if score["count"] < items else ""
    return f"{number(score['value'])}<small>{number(score['low'])} to {number(score['high'])}{count}</small>"


def _published(report: Mapping[str, Any]) -> str:
    columns, rows = report["published"]["columns"], []
    for one in report["published"]["rows"]:
        found = (one["scores"].get(key) for key in columns)
        cells = ["" if x is None else f"{x:.{3 if x < 1 else 2}f}" for x in found]
        rows.append([f"{escape(one['system'])}<small>{escape(one['source'])}</small>", *cells])
    return _table(["system", *columns.values()], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts for the head and of markup for the rows' cells."""
    # an arrow stays with the word before it
    heads = [escape(text[:-2] + "\xa0" + text[-1] if text[-1] in "↑↓" else text) for text in head]
    lines = [[f"<th>{text}</th>" for text in heads], *([f"<td>{text}</td>" for text in row] for row in rows)]
    first, *others = [f"<tr>{''.join(cells)}</tr>" for cells in lines]
    return f"<table><thead>{first}</thead><tbody>{''.join(others)}</tbody></table>"
