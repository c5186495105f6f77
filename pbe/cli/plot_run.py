"""`pbe plot-run`: the curves of a training run, from its metrics.jsonl. Needs the extra `plot`.

Several runs are drawn as one, the steps of each counted from the last one of the run before: for a run that began with
another's weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pbe.cli.errors import one_line_errors
from pbe.cli.flags import Parser
from pbe.io.rows import read_jsonl

LOSSES = {
    "train/loss": "training",
    "val/loss": "validation, fixed noise",
    "val/loss_wrong_exemplar": "the same with a wrong exemplar",
}
GAIN = "val/exemplar_gain"


def parser(prog: str | None = None) -> Parser:
    p = Parser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder that `pbe train` wrote")
    p.add_argument("--out", type=Path, required=True, help="the picture to write")
    return p


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Writes the picture; returns the exit code."""
    args = parser(prog).parse_args(argv)
    draw(read_metrics(args.runs), args.out)
    print(args.out)
    return 0


def read_metrics(runs: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of all runs, the steps of each counted on. ValueError for a folder that is not a run's."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        file, before = run / "metrics.jsonl", rows[-1]["step"] if rows else 0
        if not file.is_file():
            raise FileNotFoundError(f"{run} has no metrics.jsonl; give a folder that `pbe train` wrote")
        for line, row in read_jsonl(file):
            if isinstance(row, ValueError) or not isinstance(row.get("step"), int):
                raise ValueError(f"{file}, line {line}: {row if isinstance(row, ValueError) else 'no step'}")
            rows.append({**row, "step": row["step"] + before})
        if not any(name in row for row in rows for name in LOSSES):
            raise ValueError(f"{file} has none of {', '.join(LOSSES)}")
    return rows


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """The losses, and how much worse the loss is with a wrong exemplar. ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plotting needs the extra plot: pip install -e .[plot]") from None

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    losses, gains = figure.subplots(1, 2)
    for name, label in LOSSES.items():
        losses.plot(*curve(name), label=label)
    losses.set(xlabel="step", ylabel="mean squared error of the noise", yscale="log")
    losses.legend()

    steps, gain = curve(GAIN)
    _, error = curve(f"{GAIN}_se")
    gains.errorbar(steps, gain, [2 * e for e in error], capsize=3)
    gains.axhline(0, color="gray", linewidth=0.8)
    gains.set(xlabel="step", ylabel="loss with a wrong exemplar minus\nwith the right one, ± 2 standard errors")
    for axes in (losses, gains):
        axes.locator_params(axis="x", nbins=6)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
