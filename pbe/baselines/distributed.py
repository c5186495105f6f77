"""A benchmark's results divided over several devices, under Lightning's `Trainer.predict`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import lightning
import torch
import torch.distributed
from torch.utils.data import DataLoader

from pbe.baselines.running import Maker, Plan
from pbe.batch.distributed import predict_on, share_of
from pbe.batch.run import Outcome
from pbe.evaluation.test_set import Benchmark


class Generation(lightning.LightningModule):
    """Each process makes its share of every system's results, one system after another, on its device.

    After prediction `outcomes` holds what became of all the items, by system, in every process.
    """

    def __init__(self, plans: Sequence[Plan], benchmark: Benchmark, folders: Mapping[str, Path], redo: bool = False):
        super().__init__()
        self.plans, self.benchmark, self.folders, self.redo = plans, benchmark, folders, redo
        self.maker: Maker | None = None
        self.outcomes: dict[str, list[Outcome]] = {plan.name: [] for plan in plans}

    def predict_dataloader(self) -> DataLoader:
        count = len(self.plans) * len(self.benchmark.items)
        return DataLoader(share_of(count, self.trainer.global_rank, self.trainer.world_size), batch_size=None)

    def predict_step(self, index: int, batch_idx: int) -> None:
        number, i = divmod(index, len(self.benchmark.items))
        if number == len(self.plans):
            return  # shares are equally long, and this one has nothing more to do
        plan = self.plans[number]
        if self.maker is None or self.maker.plan.name != plan.name:
            self.maker = None  # the networks of one system are in memory at a time
            weights = replace(plan.weights, device=self.trainer.strategy.root_device)
            self.maker = Maker(replace(plan, weights=weights), self.folders[plan.name], self.redo)
        self.outcomes[plan.name].append(self.maker(self.benchmark.items[i], i))

    def on_predict_end(self) -> None:
        shares: list[dict[str, list[Outcome]]] = [{} for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(shares, self.outcomes)
        self.outcomes = {name: sorted(outcome for share in shares for outcome in share[name]) for name in self.outcomes}


def run_divided(
    plans: Sequence[Plan],
    benchmark: Benchmark,
    folders: Mapping[str, Path],
    devices: int,
    num_nodes: int = 1,
    device: str = "auto",
    redo: bool = False,
    progress: bool = True,
) -> dict[str, list[Outcome]] | None:
    """Writes the results of several systems, each to its folder, on `devices` processes of each of `num_nodes` nodes.

    Returns the outcomes by system in the first process, and closes the process group: metrics computed later would
    wait for processes that have ended. In the others, which Lightning starts as the program anew, it returns None.
    ValueError for a device that cannot be divided or is not there that often.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    generation = Generation(plans, benchmark, folders, redo)
    trainer = predict_on(generation, device, devices, num_nodes, progress)
    torch.distributed.destroy_process_group()
    return generation.outcomes if trainer.is_global_zero else None
