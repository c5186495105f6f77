"""The curves of a run: drawn from what the logger writes, and one line where they cannot be."""

import json
import sys

import pytest
from PIL import Image

from pbe.cli import main

ROWS = [
    {"step": 10, "train/loss": 0.5},
    {"step": 20, "train/loss": 0.4, "val/loss": 0.45, "val/loss_wrong_exemplar": 0.5},
    {"step": 20, "val/exemplar_gain": 0.05, "val/exemplar_gain_se": 0.01},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return tmp_path / "run"


def test_curves_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one.png", tmp_path / "made" / "two.png"
    assert main(["plot-run", str(run), "--out", str(one)]) == 0
    assert main(["plot-run", str(run), str(run), "--out", str(two)]) == 0
    with Image.open(one) as picture, Image.open(two) as longer:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # curves, not an empty page
        assert picture.size == longer.size
        assert picture.tobytes() != longer.tobytes()


def test_steps_of_a_further_run_are_counted_on(run):
    from pbe.cli.plot_run import read_metrics

    assert [row["step"] for row in read_metrics([run, run])] == [10, 20, 20, 30, 40, 40]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metrics.jsonl"),
        ("", "has none of train/loss"),
        ('{"step": 1, "val/l1": 2}\n', "has none of train/loss"),
        ('{"step": 1, "train/loss": 2}\n{"st', "metrics.jsonl, line 2: not JSON"),
        ('{"train/loss": 2}\n', "metrics.jsonl, line 1: no step"),
    ],
)
def test_what_is_no_run_is_one_line(run, tmp_path, capsys, text, message):
    file = run / "metrics.jsonl"
    file.unlink() if text is None else file.write_text(text)
    assert main(["plot-run", str(run), "--out", str(tmp_path / "curves.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_without_matplotlib_the_extra_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot-run", str(run), "--out", str(tmp_path / "curves.png")]) == 2
    assert "the extra plot" in capsys.readouterr().err
