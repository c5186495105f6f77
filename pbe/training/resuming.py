"""The checkpoint that a run goes on from: which one it is, and whether it is one."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pbe.checkpoints.formats.opening import open_checkpoint
from pbe.training.callbacks.checkpoints import list_checkpoints, step_of
from pbe.training.callbacks.stopping import StopSignals

# What a checkpoint of a training run holds beside its tensors.
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "pbe": dict,
    "global_step": int,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "data_position": (list, tuple),
    "global_batch": int,
    "num_records": int,
    "metrics": dict,
}
MAX_MESSAGE = 300  # characters of another library's message


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run's folder with the most optimiser steps, of this program's and of those that Lightning
    writes when SLURM requeues a job; None: it has none. Raises as `read_entries` does."""
    steps = {path: step_of(path) for path in list_checkpoints(folder / "checkpoints")[-1:]}
    steps |= {path: read_entries(path)["global_step"] for path in sorted(folder.glob("hpc_ckpt_*.ckpt"))}
    return max(steps, key=steps.__getitem__) if steps else None


def read_entries(path: Path) -> dict[str, Any]:
    """What a checkpoint of a training run holds beside its tensors. ValueError where it is not one, `OSError` where it
    cannot be read."""
    entries = open_checkpoint(path).extras
    wrong = [name for name, kind in ENTRIES.items() if not isinstance(entries.get(name), kind)]
    if not wrong and not isinstance(entries["pbe"].get("config"), dict):
        wrong = ["pbe.config"]
    if wrong:
        raise ValueError(
            f"{path} is not a checkpoint that a training run can go on from: it has no {', '.join(wrong)}; "
            "model.init= begins a new run with its weights"
        )
    return entries


@contextmanager
def restoring(path: Path, stop: StopSignals) -> Iterator[None]:
    """ValueError that names the checkpoint, in place of whatever is raised until its state is restored."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.PickleError) as error:
        if stop.training:
            raise
        message = " ".join(str(error).split())[:MAX_MESSAGE]
        message = message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
        raise ValueError(f"{path}: the run cannot go on from this checkpoint: {message}") from error
