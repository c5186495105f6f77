"""How the JSON of a run begins, how it is written and read, and how its Markdown is made."""

import json
import platform
import shlex
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pbe import __version__
from pbe.io.atomic import replacing


def about(section: str, argv: Sequence[str], device: str = "cpu") -> dict[str, Any]:
    """Where the numbers of a run come from: the command, the versions and the machine."""
    return {
        "section": section,
        "command": shlex.join(["python", "-m", "benchmarks", section, *argv]),
        "finished": False,
        "pbe": __version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "safetensors", "openvino", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str) -> str:
    """What computes: the GPU's name, or the processor's where the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes a run's numbers, where a file is wanted."""
    if path:
        with replacing(path, overwrite=True) as part:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    """The median and the range; nothing of no values."""
    if len(values) < 2:
        return "".join(f"{value:.3g}" for value in values)
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def median_of(values: Sequence[float], form: str) -> str:
    """The median in this format; nothing of no values."""
    return format(statistics.median(values), form) if values else ""


def ratios(values: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Pair by pair: both were measured in turns, and a busy spell of the machine met both.

    A run that was cut short has a value less of what was not reached in the last round.
    """
    return [a / b for a, b in zip(values, reference, strict=False)]


def times(values: dict[str, Sequence[float]], reference: str) -> dict[str, str]:
    """How many times as long as `reference` each system takes, pair by pair."""
    cells = {name: spread(ratios(one, values[reference])) for name, one in values.items()}
    return cells | {reference: "1"}


def markdown(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column, the rows' names, has no title."""
    columns = ["", *columns]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
