"""A system's results on a benchmark, a picture an item: what an earlier run made of the same things is kept."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pbe.baselines import Baseline, Edit, System, Weights, get_baseline
from pbe.baselines.systems import Setting
from pbe.batch.provenance import identify, made_from, save_described
from pbe.batch.run import Outcome
from pbe.checkpoints.loading import choose_device, choose_dtype
from pbe.editing.settings import MAX_SEED
from pbe.evaluation.test_set import Benchmark, Item, result_files

OF_ITEM = ("seed", "label", "inputs_crc32")  # what differs from result to result of a system


@dataclass(frozen=True)
class Plan:
    """What a system's results follow from, beside the items; the i-th item has the seed `seed + i`.

    about: the settings, and the name and checksum of each file, as JSON values.
    """

    name: str
    baseline: Baseline
    weights: Weights
    settings: dict[str, Setting]
    about: dict[str, Any]
    seed: int

    def open(self) -> System:
        """The system, with its networks; raises as `open_baseline` does."""
        return replace(self.baseline.load(self.weights), **self.settings)


def make_plan(
    name: str,
    weights: Weights,
    benchmark: Benchmark,
    given: Mapping[str, Setting],
    seed: int = 42,
) -> Plan:
    """How the system called `name` is to run on a benchmark, with the settings `given` (`Baseline.choose_settings`).

    All that can be known to fail before hours of work does so here. ValueError for an unknown name, for a file that is
    not given, for settings that make no sense, and where the system reads labels and the benchmark lacks some;
    FileNotFoundError for a file that is not there.
    """
    baseline = get_baseline(name)
    settings = baseline.choose_settings(given)
    largest = MAX_SEED - len(benchmark.items) + 1
    if not 0 <= seed <= largest:
        raise ValueError(f"seed must be between 0 and {largest}, got {seed}")
    unlabelled = [item.name for item in benchmark.items if not item.label]
    if baseline.guide == "label" and unlabelled:
        raise ValueError(
            f"{name} reads the class of each object, and {len(unlabelled)} of the {len(benchmark.items)} items of "
            f"{benchmark.folder} have none; the first is {unlabelled[0]}. --labels (the benchmark's labels=) gives them"
        )
    about: dict[str, Any] = {"system": name, **settings}
    if baseline.files:
        dtype = choose_dtype(weights.dtype, choose_device(weights.device))
        found = {kind: identify(Path(weights.path(kind)), dtype) for kind in baseline.files}
        about["weights"] = {kind: {"file": one.checkpoint, "crc32": one.crc32} for kind, one in found.items()}
        about["dtype"] = str(dtype).removeprefix("torch.")
    return Plan(name, baseline, weights, settings, about, seed)


def run_plan(
    plan: Plan,
    benchmark: Benchmark,
    out: Path,
    redo: bool = False,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Writes each item's raw result to `out/<id>.png`, unless it is there; raises as `open_baseline` does."""
    outcomes, maker = [], Maker(plan, out, redo)
    for i, item in enumerate(benchmark.items):
        outcomes.append(maker(item, i))
        if on_done is not None:
            on_done(outcomes[-1])
    return outcomes


@dataclass
class Maker:
    """Makes a system's results one by one; its networks are read when the first is to be made.

    An item that fails becomes an outcome, as in a batch.
    """

    plan: Plan
    out: Path
    redo: bool
    system: System | None = None

    def __call__(self, item: Item, i: int) -> Outcome:
        path = self.out / f"{item.name}.png"
        if not self.redo and is_finished(self.plan, item, i, path):
            return Outcome(i, "skipped")
        self.system = self.system or self.plan.open()
        return run_item(self.plan, self.system, item, i, path)


def run_item(plan: Plan, system: System, item: Item, i: int, path: Path) -> Outcome:
    """Makes and saves one result; what it follows from is stored in the file."""
    try:
        follows_from = settings_of(plan, item, i)
        # the networks see the whole patch, as in the paper
        mask = item.reference_mask if plan.baseline.guide == "cutout" else None
        edit = Edit.read(
            item.source, item.mask, item.reference, exemplar_mask=mask, label=item.label, seed=plan.seed + i
        )
        picture = system(edit)
        save_described(picture, path, follows_from, plan.name)
    except (ValueError, OSError, MemoryError) as error:
        return Outcome(i, "failed", str(error))
    except Exception as error:  # whatever befalls one item, hours into a run, those after it may still be fine
        message = str(error).partition("\n")[0]
        return Outcome(i, "failed", f"{type(error).__name__}: {message}")
    return Outcome(i, "done")


def is_finished(plan: Plan, item: Item, i: int, path: Path) -> bool:
    """Whether an item's result is there and follows from the plan, its seed and the item's files as they are now."""
    try:
        return made_from(path) == settings_of(plan, item, i)
    except OSError:
        return False  # an input cannot be read: running the item says so


def settings_of(plan: Plan, item: Item, i: int) -> dict[str, Any]:
    """What an item's result follows from, as JSON values."""
    files: dict[str, Path | None] = {"source": item.source, "mask": item.mask}
    if plan.baseline.guide != "label":
        files["reference"] = item.reference
    if plan.baseline.guide == "cutout":
        files["reference_mask"] = item.reference_mask
    return {
        **plan.about,
        "seed": plan.seed + i,
        **({"label": item.label} if plan.baseline.guide == "label" else {}),
        "inputs_crc32": {name: f"{zlib.crc32(file.read_bytes()):08x}" for name, file in files.items() if file},
    }


def settings_in(benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """What all the results in a folder were made with, the first item's seed among it, as the pictures themselves say.

    Empty where they do not, or not all the same: results of other programs. Raises as `result_files`.
    """
    found = []
    for i, path in enumerate(result_files(benchmark, folder)):
        stored = made_from(path)
        made = {key: value for key, value in stored.items() if key not in OF_ITEM}
        found.append({**made, "seed": stored["seed"] - i} if "seed" in stored else made)
    return found[0] if all(one == found[0] for one in found) else {}
