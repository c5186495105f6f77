"""Curves of a training run: `python tools/plot_run.py runs/tiny --out curves.png`. Needs the extra `plot`.

Several runs are drawn as one, the steps of each counted on from the last of the run before: for a run that began with
another's weights.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="+", help="the run's folder, with metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("error: plotting needs the extra plot: pip install matplotlib", file=sys.stderr)
        return 2

    lines = []
    for run in args.run:
        before = lines[-1]["step"] if lines else 0
        own = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines += [{**line, "step": line["step"] + before} for line in own]

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(line["step"], line[name]) for line in lines if name in line]
        return [step for step, _ in points], [value for _, value in points]

    figure, (losses, gains) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, label in (
        ("train/loss", "training"),
        ("val/loss", "validation, fixed noise"),
        ("val/loss_wrong_exemplar", "the same with a wrong exemplar"),
    ):
        losses.plot(*curve(name), label=label)
    losses.set(xlabel="step", ylabel="mean squared error of the noise", yscale="log")
    losses.legend()

    steps, gain = curve("val/exemplar_gain")
    _, error = curve("val/exemplar_gain_se")
    gains.errorbar(steps, gain, [2 * e for e in error], capsize=3)
    gains.axhline(0, color="gray", linewidth=0.8)
    gains.set(xlabel="step", ylabel="loss with a wrong exemplar minus\nwith the right one, ± 2 standard errors")
    for axes in (losses, gains):
        axes.locator_params(axis="x", nbins=6)
    figure.savefig(args.out, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
