"""A batch of edits on several devices, under Lightning's `Trainer.predict`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning
import torch
import torch.distributed
from torch.utils.data import DataLoader

from pbe.acceleration import Compile
from pbe.batch.job import Job
from pbe.batch.provenance import identify
from pbe.batch.run import Outcome, run_row
from pbe.checkpoints.loading import choose_device
from pbe.editing.loading import check_memory, limit_threads, load_editor


def share_of(num_jobs: int, rank: int, world_size: int) -> range:
    """The jobs of one process, by index: every `world_size`-th from `rank`.

    All shares have one length, the last index of some may be `num_jobs` or more and means nothing to do: Lightning
    refuses an empty share, and its own sampler for prediction fails where there are fewer rows than processes.
    """
    return range(rank, -(-num_jobs // world_size) * world_size, world_size)


class BatchEditing(lightning.LightningModule):
    """Each process loads the model on its device, runs its share of the jobs and writes their pictures.

    After prediction `outcomes` holds what became of all the jobs, in every process.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        checkpoint: Path,
        dtype: str = "auto",
        low_memory: bool = False,
        compile: Compile | None = None,
        redo: bool = False,
    ):
        super().__init__()
        self.jobs, self.checkpoint, self.model_dtype = jobs, checkpoint, dtype
        self.low_memory, self.compile_networks, self.redo = low_memory, compile, redo
        self.outcomes: list[Outcome] = []

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        model = load_editor(self.checkpoint, device, self.model_dtype, self.low_memory, self.compile_networks)
        limit_threads(model)
        weights = identify(self.checkpoint, model.dtype)
        # Not a submodule: Lightning would move it to the device whole, and copy the first process's to all.
        self.run: Callable[[Job], Outcome] = partial(run_row, lambda: model, weights=weights, redo=self.redo)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(share_of(len(self.jobs), self.trainer.global_rank, self.trainer.world_size), batch_size=None)

    def predict_step(self, index: int, batch_idx: int) -> None:
        if index < len(self.jobs):
            self.outcomes.append(self.run(self.jobs[index]))

    def on_predict_end(self) -> None:
        if self.trainer.world_size > 1:
            shares: list[list[Outcome]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(shares, self.outcomes)
            self.outcomes = sorted(outcome for share in shares for outcome in share)


def run_jobs(
    jobs: Sequence[Job],
    checkpoint: Path,
    device: str = "auto",
    dtype: str = "auto",
    low_memory: bool = False,
    compile: Compile | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    redo: bool = False,
    progress: bool = True,
) -> list[Outcome] | None:
    """Run every job once on `devices` processes of each of `num_nodes` nodes, each with a model of its own by
    `load_editor`.

    Returns the outcomes in the first process, None in the others: Lightning starts the program again for each. On
    several nodes the program is started on each, by SLURM, torchrun, or with MASTER_ADDR and NODE_RANK set.
    ValueError for a device that cannot be divided or is not there that often; else raises as `load_editor` does.
    """
    check_memory(low_memory, compile)
    editing = BatchEditing(jobs, checkpoint, dtype, low_memory, compile, redo)
    trainer = predict_on(editing, device, devices, num_nodes, progress)
    return editing.outcomes if trainer.is_global_zero else None


def predict_on(
    module: lightning.LightningModule, device: str, devices: int, num_nodes: int, progress: bool
) -> lightning.Trainer:
    """Has a module that divides its own work predict on several processes; the trainer that did.

    ValueError for a device that cannot be divided or is not there that often.
    """
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"device={device!r} cannot be several devices; choose one of auto, cpu, cuda, mps")
    kind = choose_device(device).type
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(kind, devices)
    if devices > there:
        raise ValueError(f"devices={devices}, but torch sees {there} of type {kind} here")
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
    with warnings.catch_warnings():
        # Beside making a picture, reading its row costs nothing; and the pictures are written, not returned.
        warnings.filterwarnings("ignore", message=".*does not have many workers|predict returned None")
        trainer.predict(module, return_predictions=False)
    return trainer
