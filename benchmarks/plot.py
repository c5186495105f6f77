"""The curves of `scaling`: `python -m benchmarks plot scaling.json --out scaling.png`. Needs the extra `plot`.

Several files are drawn as one run, such as those that hold an axis each.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.edit import MEASURED
from benchmarks.report import ratios
from benchmarks.scaling import AXES, INDEX, peak
from benchmarks.table import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(content: dict, out: Path) -> None:
    """Time and memory along the batch, the resolution and the rows, one column for each that was measured.

    ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    shown = [axis for axis in (*AXES, "index") if content[axis]]
    figure = Figure(figsize=(4 * len(shown), 6.4), layout="constrained")
    columns = figure.subplots(2, len(shown), squeeze=False).T
    for axis, (time, memory) in zip(shown, columns, strict=True):
        points = content[axis]
        if axis == "index":
            draw_index(points, time, memory)
            values = [point["rows"] for point in points]
        else:
            for system in points[0]["systems"]:
                draw_edits(points, axis, system, time, memory)
            values = [point["task"][axis] for point in points]
            time.set(ylabel=f"time, times that of {AXES[axis].format(values[0])}")
            time.set_yscale("log", base=2)
            memory.set(xlabel=axis, ylabel="peak GiB", ylim=(0, None))
        time.yaxis.set_major_formatter("{x:g}")
        for ax in (time, memory):
            ax.grid(alpha=0.3)
            ax.legend(fontsize="small")
            ax.set_xscale("log")
            ax.set_xticks(values, [f"{value:,}" for value in values])
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    precisions = sorted({point["task"]["dtype"] for axis in AXES for point in content[axis]})
    figure.suptitle(", ".join([content["device"], *precisions]), fontsize="medium")
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
    time.set(ylabel=f"time, times that of {rows[0]:,} rows", yscale="log")
    memory.set(xlabel="rows", ylabel="GiB beside the imports", yscale="log")
    memory.yaxis.set_major_formatter("{x:g}")


def main(argv: Sequence[str]) -> int:
    """Writes the picture; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    p.add_argument("files", nargs="+", type=Path, help="JSON that `scaling` wrote with --out")
    p.add_argument("--out", type=Path, required=True, help="the picture to write")
    args = p.parse_args(argv)
    try:
        contents = [read(file) for file in args.files]
        for file, content in zip(args.files, contents, strict=True):
            if content["section"] != "scaling":
                raise ValueError(f"{file} holds {content['section']!r}; only 'scaling' has curves")
        axes = {axis: [point for content in contents for point in content[axis]] for axis in (*AXES, "index")}
        if not any(axes.values()):
            raise ValueError(f"{args.files[0]} has no points yet")
        draw(contents[0] | axes, args.out)
    except ImportError:
        print("error: plotting needs the extra plot: pip install -e '.[plot]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
