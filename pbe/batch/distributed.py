"""Work divided over several devices, under Lightning's `Trainer.predict`: a batch's rows, or a test set's items."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Generic, TypeVar

import lightning
import torch
import torch.distributed
from torch.utils.data import DataLoader

from pbe.acceleration import Compile
from pbe.batch.job import Job
from pbe.batch.provenance import identify
from pbe.batch.run import Outcome, run_row
from pbe.checkpoints.adapters import AdapterLike
from pbe.checkpoints.loading import choose_device
from pbe.checkpoints.recognised import WeightChoice
from pbe.editing.loading import AdaptedModels, check_memory, limit_threads, load_editor
from pbe.models.paint_by_example import PaintByExample

Result = TypeVar("Result")


def share_of(count: int, rank: int, world_size: int) -> range:
    """The items of one process, of `count` by index: every `world_size`-th from `rank`.

    All shares have one length, the last index of some may be `count` or more and means nothing to do: Lightning
    refuses an empty share, and its own sampler for prediction fails where there are fewer items than processes.
    """
    return range(rank, -(-count // world_size) * world_size, world_size)


class DividedWork(lightning.LightningModule, Generic[Result]):
    """Each process calls `set_up` with its device, and what that returns with each index of its share.

    After prediction `results` holds those of all indices, in every process. They must be picklable. What `set_up`
    loads is not a submodule: Lightning would move it to the device whole, and copy the first process's to all.
    """

    def __init__(self, count: int, set_up: Callable[[torch.device], Callable[[int], Result]]):
        super().__init__()
        self.count, self.set_up = count, set_up
        self.results: dict[int, Result] = {}

    def setup(self, stage: str) -> None:
        self.work = self.set_up(self.trainer.strategy.root_device)

    def predict_dataloader(self) -> DataLoader:
        share = share_of(self.count, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None)  # type: ignore[arg-type]  # a range is a dataset

    def predict_step(self, index: int, batch_idx: int) -> None:
        if index < self.count:
            self.results[index] = self.work(index)

    def on_predict_end(self) -> None:
        shares: list[dict[int, Result]] = [{} for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(shares, self.results)
        self.results = {index: result for share in shares for index, result in share.items()}


def divide(
    count: int,
    set_up: Callable[[torch.device], Callable[[int], Result]],
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    progress: bool = True,
) -> list[Result] | None:
    """The results of `set_up(device)(index)` for `count` indices, on `devices` processes of each of `num_nodes` nodes.

    Returns them in the first process, None in the others: Lightning starts the program again for each. On several
    nodes the program is started on each, by SLURM, torchrun, or with MASTER_ADDR and NODE_RANK set. The process group
    is closed in the end: metrics computed later would wait for processes that have ended.

    ValueError for a device that cannot be divided, or of which there are not enough.
    """
    work = DividedWork(count, set_up)
    return [work.results[i] for i in range(count)] if predict(work, device, devices, num_nodes, progress) else None


def predict(work: DividedWork, device: str, devices: int, num_nodes: int, progress: bool) -> bool:
    """Does the work in all processes; whether this is the first of them. Raises as `divide`."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device={device!r} cannot be several devices; choose one of auto, cpu, cuda, mps")
    kind = choose_device(device).type
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, devices)
    if devices > there:
        raise ValueError(f"devices={devices}, but torch sees {there} of type {kind} here")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        accelerator=kind,
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        inference_mode=False,  # `edit` wants no gradients anyway, and compiled networks are as in one process
    )
    try:
        with warnings.catch_warnings():
            # Reading an index costs nothing beside the work; and results are kept here, not returned.
            warnings.filterwarnings("ignore", message=".*does not have many workers|predict returned None")
            trainer.predict(work, return_predictions=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return trainer.is_global_zero


# --- batches of edits -------------------------------------------------------------------------------------


def row_runner(
    jobs: Sequence[Job],
    checkpoint: Path,
    dtype: str = "auto",
    low_memory: bool = False,
    compile: Compile | None = None,
    redo: bool = False,
    adapters: Sequence[AdapterLike] = (),
    tiny_decoder: Path | None = None,
    vae: Path | None = None,
    weights: WeightChoice = "auto",
) -> Callable[[torch.device], Callable[[int], Outcome]]:
    """What loads the model by `load_editor` on a device and runs the jobs with it, for `divide`; raises as they do."""
    check_memory(low_memory, compile)

    def set_up(device: torch.device) -> Callable[[int], Outcome]:
        def load(adapters: tuple[AdapterLike, ...]) -> PaintByExample:
            model = load_editor(checkpoint, device, dtype, low_memory, compile, adapters, tiny_decoder, vae, weights)
            limit_threads(model)
            return model

        def run(index: int) -> Outcome:
            used = jobs[index].with_adapters(adapters)
            return run_row(partial(editors, used), jobs[index], identified(used), redo)

        editors = AdaptedModels(load)
        identified = cache(lambda used: identify(checkpoint, precision, used, tiny_decoder, vae, weights))
        precision = editors(adapters).dtype
        identified(tuple(adapters))  # what is not there shows now
        return run

    return set_up
