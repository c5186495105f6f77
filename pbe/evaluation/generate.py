"""The benchmark's results by a checkpoint: raw, as the paper scores them, and composited, as `pbe.edit` gives them.

An item is sampled once, with the whole source as the window; what the model painted outside the mask is in the raw
result, and replaced by the source's pixels in the composited one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from pbe import windows
from pbe.batch import Outcome, is_finished, run_row
from pbe.checkpoints.loading import choose_device, choose_dtype
from pbe.editing import seam_weights
from pbe.evaluation.benchmark import Benchmark, Item
from pbe.jobs import Job, check_job, identify, load_editor
from pbe.pictures import UNREADABLE, read_picture
from pbe.prediction import run_jobs
from pbe.saving import read_info, save_picture
from pbe.windows import Box


def make_jobs(
    benchmark: Benchmark,
    out: str | Path,
    sampler: str = "plms",
    steps: int = 50,
    scale: float = 5.0,
    seed: int = 42,
    resolution: int | None = None,
) -> list[Job]:
    """One edit an item, whose raw result goes to `out/<id>.png`; the i-th item has the seed `seed + i`.

    The defaults are the released script's. Raises as `pbe.jobs.check_job`.
    """
    folder, out = benchmark.folder.resolve(), Path(out).resolve()
    jobs = [
        Job(
            image=str(item.source.relative_to(benchmark.folder)),
            mask=str(item.mask.relative_to(benchmark.folder)),
            reference=(str(item.reference.relative_to(benchmark.folder)),),
            out=str(out / f"{item.name}.png"),
            sampler=sampler,
            steps=steps,
            scale=scale,
            seed=seed + i,
            window="full",
            raw=True,
            resolution=resolution,
            folder=folder,
            line=i,
        )
        for i, item in enumerate(benchmark.items)
    ]
    check_job(jobs[0])
    return jobs


def generate(
    jobs: Sequence[Job],
    checkpoint: Path,
    device: str = "auto",
    dtype: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    redo: bool = False,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome] | None:
    """Runs the jobs that are not done; with several devices under Lightning, where only the first process returns them
    and the process group is closed.

    `on_done` is called after each job of a single process. Raises as `load_editor` and `run_jobs`.
    """
    weights = identify(checkpoint, choose_dtype(dtype, choose_device(device)))
    if not redo and all(is_finished(job, weights) for job in jobs):
        return [Outcome(job.line, "skipped") for job in jobs]
    if devices * num_nodes > 1:
        outcomes = run_jobs(jobs, checkpoint, device, dtype, devices, num_nodes, redo)
        torch.distributed.destroy_process_group()  # metrics computed later would wait for processes that have ended
        return outcomes
    model = load_editor(checkpoint, device, dtype)
    outcomes = []
    for job in jobs:
        outcomes.append(run_row(model, job, weights, redo))
        if on_done is not None:
            on_done(outcomes[-1])
    return outcomes


def composite_result(item: Item, raw: Path, out: Path) -> None:
    """Writes an item's composited result from its raw one, unless it was made of the very same file before."""
    crc = f"{zlib.crc32(raw.read_bytes()):08x}"
    if out.is_file() and _made_of(out) == crc:
        return
    source, painted = read_picture(item.source, "source"), read_picture(raw, "raw result")
    height, width = source.size
    window = Box(0, 0, width, height)
    weights = seam_weights(item.repaint(), window, feather=None)
    pixels = windows.composite(source.pixels, painted.rgb(), window, weights)
    save_picture(source.with_pixels(pixels), out, {"raw_crc32": crc})


def _made_of(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return read_info(image).get("raw_crc32")
    except UNREADABLE:
        return None  # cut off, and made again
