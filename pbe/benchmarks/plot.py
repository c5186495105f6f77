"""The curves of `scaling`: `python tools/benchmark.py plot scaling.json --out scaling.png`. Needs the extra `plot`."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pbe.benchmarks.edit import MEASURED
from pbe.benchmarks.report import ratios
from pbe.benchmarks.scaling import AXES, INDEX, peak
from pbe.benchmarks.table import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(content: dict, out: Path) -> None:
    """Time and memory along the batch, the resolution and the rows; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    times, memories = figure.subplots(2, 3)
    for axis, time, memory in zip(AXES, times[:-1], memories[:-1], strict=True):
        for system in content[axis][0]["systems"]:
            draw_edits(content[axis], axis, system, time, memory)
        time.set(ylabel=f"time, times that of {AXES[axis].format(content[axis][0]['task'][axis])}")
        memory.set(xlabel=axis, ylabel="peak GiB")
    draw_index(content["index"], times[-1], memories[-1])
    along = [[point["task"][axis] for point in content[axis]] for axis in AXES]
    rows = [point["rows"] for point in content["index"]]
    for ax in (*times, *memories):
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
        if ax in (*times, memories[2]):
            ax.set_yscale("log", base=10 if ax in (times[2], memories[2]) else 2)
            ax.yaxis.set_major_formatter("{x:g}")
        else:
            ax.set_ylim(bottom=0)
    for values, column in zip((*along, rows), zip(times, memories, strict=True), strict=True):
        for ax in column:
            ax.set_xscale("log")
            ax.set_xticks(values, [f"{value:,}" for value in values])
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    task = content["batch"][0]["task"]
    figure.suptitle(f"{content['device']}, {task['dtype']}", fontsize="medium")
    figure.savefig(out, dpi=100)


def draw_edits(points: Sequence[dict], axis: str, system: str, time: "Axes", memory: "Axes") -> None:
    """One system's times relative to the first point, pair by pair, and its peaks."""
    points = [point for point in points if "error" not in point["systems"][system]]
    values = [point["task"][axis] for point in points]
    measured = [point["systems"][system] for point in points]
    for what, label in MEASURED.items():
        growth = [statistics.median(ratios(one[what], measured[0][what])) for one in measured]
        time.plot(values, growth, marker="o", markersize=3, label=f"{system}: {label.removesuffix(' s')}")
    memory.plot(values, [peak(one) for one in measured], marker="o", markersize=3, label=system)


def draw_index(points: Sequence[dict], time: "Axes", memory: "Axes") -> None:
    """Of each of INDEX the times relative to the first point, pair by pair, and the growth in memory."""
    rows = [point["rows"] for point in points]
    for what, label in INDEX.items():
        first = [one["seconds"] for one in points[0][what]]
        growth = [statistics.median(ratios([one["seconds"] for one in point[what]], first)) for point in points]
        time.plot(rows, growth, marker="o", markersize=3, label=label)
        peaks = [statistics.median(one["GiB"] for one in point[what]) for point in points]
        memory.plot(rows, peaks, marker="o", markersize=3, label=label)
    time.set(ylabel=f"time, times that of {rows[0]:,} rows")
    memory.set(xlabel="rows", ylabel="GiB beside the imports")


def main(argv: Sequence[str]) -> int:
    """Writes the picture; returns the exit code."""
    p = argparse.ArgumentParser(prog="benchmark.py plot", description=__doc__)
    p.add_argument("file", type=Path, help="JSON that `scaling` wrote with --out")
    p.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = p.parse_args(argv)
    try:
        content = read(args.file)
        if content["section"] != "scaling":
            raise ValueError(f"{args.file} holds {content['section']!r}; only 'scaling' has curves")
        draw(content, args.out)
    except ImportError:
        print("error: plotting needs the extra plot: pip install -e '.[plot]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
