"""A system's results on a test set, one picture per item: what an earlier run made of the same things is kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from pbe.baselines import Baseline, System, Task, WeightFiles, get_baseline
from pbe.batch.provenance import identify, is_finished, made_from, save_described
from pbe.batch.run import Outcome, attempt
from pbe.editing.loading import dtype_for
from pbe.editing.settings import MAX_SEED
from pbe.evaluation.test_set import TestSet, result_files

OF_ITEM = ("seed", "label", "inputs_crc32")  # what differs from result to result of a system


@dataclass(frozen=True)
class SystemRun:
    """A system on a test set; its i-th item has the seed `seed + i`.

    about: what all its results follow from: the settings, and the name and checksum of each file, as JSON values.
    """

    name: str
    baseline: Baseline
    weights: WeightFiles
    settings: dict[str, Any]
    about: dict[str, Any]
    test_set: TestSet
    seed: int

    def open(self) -> System:
        """The system, with its networks; raises as `open_baseline` does."""
        return self.baseline.load(self.weights).with_settings(**self.settings)

    def provenance_of(self, i: int) -> dict[str, Any]:
        """What the i-th result follows from, as JSON values."""
        item, guide = self.test_set.items[i], self.baseline.guide
        files = {"image": item.image, "mask": item.mask}
        if guide != "label":
            files["exemplar"] = item.exemplar
        if guide == "cutout" and item.exemplar_mask:
            files["exemplar_mask"] = item.exemplar_mask
        label = {"label": item.label} if guide == "label" else {}
        crc32 = {name: f"{zlib.crc32(file.read_bytes()):08x}" for name, file in files.items()}
        return {**self.about, "seed": self.seed + i, **label, "inputs_crc32": crc32}

    def save_result(self, system: System, i: int, path: Path) -> None:
        """Makes the i-th result and saves it with what it follows from."""
        item, provenance = self.test_set.items[i], self.provenance_of(i)
        # the networks see the whole patch, as in the paper
        mask = item.exemplar_mask if self.baseline.guide == "cutout" else None
        task = Task.read(item.image, item.mask, item.exemplar, exemplar_mask=mask, label=item.label, seed=self.seed + i)
        save_described(system(task), path, provenance, self.name)


def prepare_run(
    name: str, weights: WeightFiles, test_set: TestSet, given: Mapping[str, Any], seed: int = 42
) -> SystemRun:
    """A run of the system called `name` on a test set, with the settings `given` (`Baseline.choose_settings`).

    All that can be known to fail before hours of work does so here. ValueError for an unknown name, for a file that is
    not given, for settings that make no sense, and where the system reads labels and the test set lacks some;
    FileNotFoundError for a file that is not there.
    """
    baseline = get_baseline(name)
    settings = baseline.choose_settings(given, weights)
    largest = MAX_SEED - len(test_set.items) + 1
    if not 0 <= seed <= largest:
        raise ValueError(f"seed must be between 0 and {largest}, got {seed}")
    unlabelled = [item.name for item in test_set.items if not item.label]
    if baseline.guide == "label" and unlabelled:
        raise ValueError(
            f"{name} reads the class of each object, and {len(unlabelled)} of the {len(test_set.items)} items of "
            f"{test_set.folder} have none; the first is {unlabelled[0]}. --labels (the test set's labels=) gives them"
        )
    return SystemRun(name, baseline, weights, settings, describe(name, weights, settings), test_set, seed)


def describe(name: str, weights: WeightFiles, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A system with its settings, and the name and checksum of each of its files, as JSON values."""
    about: dict[str, Any] = {"system": name, **settings}
    if files := get_baseline(name).files:
        dtype = dtype_for(weights.path(files[0]), weights.dtype, weights.device)
        found = {kind: identify(Path(weights.path(kind)), dtype, weights.adapters) for kind in files}
        about["weights"] = {kind: {"file": one.checkpoint, "crc32": one.crc32} for kind, one in found.items()}
        if weights.weights != "auto" and "paint_by_example" in files:
            about["weights"]["paint_by_example"]["weights"] = weights.weights
        about["dtype"] = str(dtype).removeprefix("torch.")
        if weights.adapters and "paint_by_example" in files:
            about["adapters"] = list(found["paint_by_example"].adapters)
    return about


# --- making results ---------------------------------------------------------------------------------------


def result_maker(run: SystemRun, out: Path, redo: bool) -> Callable[[int], Outcome]:
    """The function that writes a run's i-th result to `out/<id>.png`, unless it is there.

    The networks are read when the first result is to be made, and what `SystemRun.open` raises is raised; an item
    that fails becomes an outcome, as in a batch.
    """
    system = cache(run.open)

    def make(i: int) -> Outcome:
        path = out / f"{run.test_set.items[i].name}.png"
        if not redo and is_finished(path, partial(run.provenance_of, i)):
            return Outcome(i, "skipped")
        return attempt(i, partial(run.save_result, system(), i, path))

    return make


def run_distributed(
    runs: Sequence[SystemRun],
    folders: Mapping[str, Path],
    devices: int,
    num_nodes: int = 1,
    device: str = "auto",
    redo: bool = False,
    progress: bool = True,
) -> dict[str, list[Outcome]] | None:
    """Writes the results of several systems on one test set, each to its folder, as `pbe.batch.distributed.divide`.

    Returns the outcomes by system in the first process, None in the others.
    """
    from pbe.batch.distributed import divide

    count = len(runs[0].test_set.items)

    def set_up(device: torch.device) -> Callable[[int], Outcome]:
        @lru_cache(maxsize=1)  # the networks of one system are in memory at a time
        def maker(k: int) -> Callable[[int], Outcome]:
            run = replace(runs[k], weights=replace(runs[k].weights, device=device))
            return result_maker(run, folders[run.name], redo)

        return lambda index: maker(index // count)(index % count)

    outcomes = divide(len(runs) * count, set_up, device, devices, num_nodes, progress)
    if outcomes is None:
        return None
    return {run.name: outcomes[k * count : (k + 1) * count] for k, run in enumerate(runs)}


def settings_in(test_set: TestSet, folder: Path) -> dict[str, Any]:
    """What all the results in a folder were made with, including the first item's seed, as the pictures say.

    Empty where they do not, or not all the same: results of other programs. Raises as `result_files`.
    """
    found = []
    for i, path in enumerate(result_files(test_set, folder)):
        stored = made_from(path)
        made = {key: value for key, value in stored.items() if key not in OF_ITEM}
        found.append({**made, "seed": stored["seed"] - i} if "seed" in stored else made)
    return found[0] if all(one == found[0] for one in found) else {}
