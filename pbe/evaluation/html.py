"""The page of a report: one file that works from the disk, with its pictures inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

MAX_NAMED = 4  # systems in the heading

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --dim: #777; --accent: #c2410c; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1.2rem; max-width: 76rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { margin: .3rem 0 .8rem; max-width: 52rem; } .dim { color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; max-width: 8rem; }
th:first-child, td:first-child { text-align: left; }
small { display: block; color: var(--dim); font-size: .75rem; font-weight: normal; }
.note { border-left: 3px solid var(--accent); padding: .2rem 0 .2rem .8rem; }
.controls { display: flex; gap: 1rem; flex-wrap: wrap; align-items: center; margin: .5rem 0 1rem; }
select { font: inherit; padding: .15rem .4rem; }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; } figure img { display: block; max-width: 100%; border-radius: 3px; }
figcaption { font-size: .75rem; color: var(--dim); font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: .8rem; border-radius: 4px; overflow-x: auto; font-size: .8rem; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const system = document.getElementById("system"), score = document.getElementById("score");
function option(select, value, text) {
  const one = document.createElement("option");
  one.value = value; one.textContent = text; select.append(one);
}
function figure(name, value) {
  const one = document.createElement("figure"), image = document.createElement("img");
  const caption = document.createElement("figcaption");
  image.src = data.pictures[name]; image.loading = "lazy";
  image.alt = "source, reference and results of item " + name;
  const label = data.labels[name] ? " · " + data.labels[name] : "";
  const shown = value === null ? "no score" : +value.toFixed(4);
  caption.textContent = name.replace(/^0+(?=.)/, "") + label + " · " + shown;
  one.append(image, caption);
  return one;
}
function scores() {
  const found = data.systems[system.value], chosen = score.value;
  score.replaceChildren();
  found.scores.forEach((one, i) => option(score, i, one.title));
  if (chosen && found.scores[chosen]) score.value = chosen;
  show();
}
function show() {
  const one = data.systems[system.value].scores[score.value];
  const sign = one.higher_is_better ? 1 : -1, values = one.values;
  const names = Object.keys(data.pictures), scored = names.filter(name => values[name] !== null);
  scored.sort((a, b) => sign * (values[a] - values[b]) || (a < b ? -1 : 1));
  const fill = (id, list) => document.getElementById(id).replaceChildren(...list.map(n => figure(n, values[n])));
  fill("worst", scored.slice(0, data.worst));
  fill("sheet", [...scored.slice().reverse(), ...names.filter(name => values[name] === null)]);
}
data.systems.forEach((one, i) => option(system, i, one.name));
system.onchange = scores; score.onchange = show; scores();
"""


def number(value: float) -> str:
    """Two digits after the point; four up to 1, and three significant ones where those would be zeros."""
    if abs(value) > 1 + 1e-9:
        return f"{value:.2f}"
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def render(report: Mapping[str, Any], pictures: Mapping[str, str], worst: int) -> str:
    """The page of a report as `pbe.evaluation.report.make_report` makes it; `pictures` are data URIs by item's name."""
    systems = [one["system"] for one in report["systems"]]
    names = ", ".join(systems) if len(systems) <= MAX_NAMED else f"{len(systems)} sets of results"
    benchmark, judges = report["benchmark"], report["judges"]
    part = "" if benchmark["items"] == benchmark["of"] else f" (of {benchmark['of']}: not the whole benchmark)"
    settings = {key: report[key] for key in ("settings", "judges", "benchmark", "versions", "pbe")}
    data = {
        "worst": worst,
        "pictures": dict(pictures),
        "labels": report["labels"],
        "systems": [
            {
                "name": one["system"],
                "scores": [
                    {
                        "title": figure["title"],
                        "higher_is_better": figure["higher_is_better"],
                        "values": {name: one["per_item"][figure["key"]][name] for name in pictures},
                    }
                    for figure in one["figures"]
                    if figure["key"] in one["per_item"]
                ],
            }
            for one in report["systems"]
        ],
    }
    level = f"{100 * judges['bootstrap']['level']:g} %"
    legend = escape(" · ".join(["source with its box", "reference", *systems]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation: {escape(names)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(names)}</h1>
<p class="dim">{escape(benchmark["folder"])}: {benchmark["items"]} items{part} · pbe {escape(report["pbe"])}</p>
{_notes(report)}
<h2>Figures</h2>
<p class="dim">Below each figure its {level} bootstrap interval: how far it would move with other pictures.</p>
<div class="scroll">{_figures(report)}</div>
<h2>Published figures on COCOEE, for reference</h2>
<div class="scroll">{_published(report)}</div>
<h2>Items by score</h2>
<div class="controls">
<label>System <select id="system"></select></label>
<label>Score <select id="score"></select></label>
<span class="dim">{legend}</span>
</div>
<h2>Worst {worst}</h2>
<div class="sheet" id="worst"></div>
<h2>Contact sheet, best first</h2>
<p class="dim">{len(pictures)} of {benchmark["items"]} items.</p>
<div class="sheet" id="sheet"></div>
<h2>Settings</h2>
<pre>{escape(json.dumps(settings, indent=1, ensure_ascii=False))}</pre>
<script type="application/json" id="data">{_inline(data)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _inline(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _notes(report: Mapping[str, Any]) -> str:
    judges, notes = report["judges"], []
    figures = [figure for one in report["systems"] for figure in one["figures"]]
    released = sorted({figure["title"] for figure in figures if figure["is_released"]})
    if released:
        notes.append(f"{', '.join(released)}: computed as the paper's, whose results are raw ones of all 3,500 items.")
    if real := judges["real"]:
        notes.append(f"FID is against the {max(real['pictures'].values())} photos of {real['folder']}.")
    if any(figure["name"] in ("fid", "foreground_fid") for figure in figures):
        notes.append(
            f"FID grows as pictures get fewer: that over the {report['benchmark']['items']} items here compares with "
            "others over as many."
        )
    if any(one["stand_in"] for one in judges["backbones"]):
        notes.append(
            "Figures of the stand-in classifier order these systems on this benchmark; "
            "they compare with nothing published."
        )
    if not real:
        notes.append("No FID: no folder of real photos was given.")
    if judges["mixture"] is None:
        notes.append("No QS: no mixture of real photos was given.")
    if not judges["lpips"]:
        notes.append("No background LPIPS: no weights were given; MSE and SSIM tell whether the background was kept.")
    return "\n".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _figures(report: Mapping[str, Any]) -> str:
    titles = {figure["key"]: figure["title"] for one in report["systems"] for figure in one["figures"]}
    rows = []
    for one in report["systems"]:
        found = {figure["key"]: figure for figure in one["figures"]}
        cells = [_cell(found.get(key), report["benchmark"]["items"]) for key in titles]
        rows.append(f"<tr><td>{escape(one['system'])}</td>{''.join(cells)}</tr>")
    return _table(["system", *titles.values()], rows)


def _cell(figure: Mapping[str, Any] | None, items: int) -> str:
    if figure is None:
        return "<td></td>"
    count = f", n = {figure['count']}" if figure["count"] < items else ""
    span = f"{number(figure['low'])} to {number(figure['high'])}{count}"
    return f"<td>{number(figure['value'])}<small>{span}</small></td>"


def _published(report: Mapping[str, Any]) -> str:
    columns = report["published"]["columns"]
    rows = []
    for one in report["published"]["rows"]:
        found = (one["figures"].get(key) for key in columns)
        cells = ("<td></td>" if x is None else f"<td>{x:.{3 if x < 1 else 2}f}</td>" for x in found)
        source = f"<small>{escape(one['source'])}</small>"
        rows.append(f"<tr><td>{escape(one['system'])}{source}</td>{''.join(cells)}</tr>")
    return _table(["system", *columns.values()], rows)


def _table(head: list[str], rows: list[str]) -> str:
    # an arrow stays with the word before it
    cells = "".join(
        f"<th>{escape(text[:-2] + chr(0xA0) + text[-1] if text[-1] in '↑↓' else text)}</th>" for text in head
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
