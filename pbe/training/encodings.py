"""Encodings of training examples that are kept in files, so that a step costs the UNet alone.

Example i of epoch e is, encoded, that of epoch e mod `crops`; its draws are those of epoch e. While there are as many
crops as epochs, training is what it is without, to the rounding of 16 bits.
"""

from __future__ import annotations

import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from pbe.data.dataset import ExampleDataset, digest_of
from pbe.data.example import EncodedExample, Example, collate
from pbe.io.atomic import locked, replacing, write_text
from pbe.io.fields import Range, check_fields
from pbe.models.paint_by_example import latent_mask
from pbe.models.vae import AutoencoderKL

RECORDS_PER_FILE = 2048


@dataclass
class EncodingsConfig:
    """Encoding the training pictures once, in place of in each step."""

    folder: str | None = None
    """Where the encodings are kept, which the first run makes, and others with the same autoencoder and the same data
    share. None: each step encodes its pictures."""
    crops: Annotated[int, Range(1, 10_000)] = 8
    """How many examples of each record are kept, with other crops, masks and augmentations; more can be added later."""

    def __post_init__(self) -> None:
        check_fields(self, "encodings")


class Part(NamedTuple):
    """One file of encodings: of some records, in one epoch."""

    path: Path
    epoch: int
    records: range


class EncodedDataset(ExampleDataset):
    """The examples of `dataset`, read from a folder of encodings that is complete."""

    def __init__(self, dataset: ExampleDataset, folder: Path, crops: int):
        super().__init__(dataset.source, dataset.recipe, dataset.seed, dataset.donors)
        self._skipped = dataset._skipped  # when they were encoded
        self.folder, self.crops = folder, crops
        self._opened: dict[Path, np.ndarray] = {}

    def __getitem__(self, i: int) -> EncodedExample:  # type: ignore[override]
        """Example `i` of the epoch."""
        path = part_path(self.folder, self.epoch % self.crops, i // RECORDS_PER_FILE)
        if path not in self._opened:
            self._opened[path] = np.load(path, mmap_mode="r")
        row = self._opened[path][i % RECORDS_PER_FILE]
        kept = {name: torch.tensor(row[name], dtype=torch.float32) for name in row.dtype.names}
        return EncodedExample(**kept, seed=torch.tensor(self.step_seed(i)), file=f"{self.source.name}[{i}]")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a worker opens files for itself


def part_path(folder: Path, epoch: int, number: int) -> Path:
    return folder / f"epoch-{epoch:04}-part-{number:04}.npy"


def parts(folder: Path, num_records: int, crops: int) -> Iterator[Part]:
    """The files that a folder has when it is complete."""
    starts = range(0, num_records, RECORDS_PER_FILE)
    for epoch, (number, start) in itertools.product(range(crops), enumerate(starts)):
        records = range(start, min(start + RECORDS_PER_FILE, num_records))
        yield Part(part_path(folder, epoch, number), epoch, records)


def encoded(
    dataset: ExampleDataset,
    vae: AutoencoderKL,
    config: EncodingsConfig,
    batch_size: int,
    workers: int,
    precision: Callable[[], AbstractContextManager[Any]],
    makes: bool = True,
) -> EncodedDataset:
    """The dataset with its examples encoded; encodes what the folder lacks, a file at a time.

    precision: makes the context in which the autoencoder computes. makes: whether this process encodes; one that does
    not waits for the one that does. Raises `ValueError` for a folder of another autoencoder's or other data's
    encodings, `OSError` where the disk is full.
    """
    assert config.folder is not None
    folder = Path(config.folder)
    wanted = list(parts(folder, len(dataset), config.crops))
    while not makes and not all(part.path.exists() for part in wanted):
        time.sleep(1)
    if makes:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", f"another process makes the encodings in {folder}"):
            check_folder(folder, dataset, vae)
            missing = [part for part in wanted if not part.path.exists()]
            encode_parts(missing, dataset, vae, batch_size, workers, precision)
    return EncodedDataset(dataset, folder, config.crops)


def check_folder(folder: Path, dataset: ExampleDataset, vae: AutoencoderKL) -> None:
    """Writes what the folder's encodings are of; ValueError where it has those of something else."""
    crc = 0
    for tensor in vae.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), crc)
    about = {
        "autoencoder": [crc, vae.config.latent_scale],
        "records": dataset.digest,
        "donors": digest_of(dataset.donors) if dataset.donors else None,
        "recipe": asdict(dataset.recipe),
        "seed": dataset.seed,
    }
    about = json.loads(json.dumps(about))  # tuples become lists
    path = folder / "encodings.json"
    if not path.exists():
        write_text(path, json.dumps(about, indent=1))
    before = json.loads(path.read_text("utf-8"))
    if other := [name for name in about if before.get(name) != about[name]]:
        raise ValueError(
            f"{folder} has encodings for another {' and '.join(other)}: delete it, or give another encodings.folder"
        )


@torch.no_grad()
def encode_parts(
    missing: list[Part],
    dataset: ExampleDataset,
    vae: AutoencoderKL,
    batch_size: int,
    workers: int,
    precision: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Writes the files that are missing."""
    device = next(vae.parameters()).device
    with tqdm(total=sum(len(part.records) for part in missing), desc="encoding", disable=not missing) as bar:
        for part in missing:
            dataset.set_epoch(part.epoch)
            loader = DataLoader(dataset, batch_size, sampler=part.records, num_workers=workers, collate_fn=collate)
            rows = None
            with replacing(part.path, overwrite=False) as beside:
                for number, batch in enumerate(loader):
                    with precision():  # examples are made without it
                        values = encode_example(batch, vae, device)
                    if rows is None:
                        dtype = [(name, np.float16, x.shape[1:]) for name, x in values.items()]
                        rows = np.lib.format.open_memmap(beside, "w+", np.dtype(dtype), (len(part.records),))
                    for name, x in values.items():
                        rows[name][number * batch_size :][: len(x)] = x
                    bar.update(len(batch.seed))
                assert rows is not None
                rows.flush()
                del rows


def encode_example(example: Example, vae: AutoencoderKL, device: torch.device) -> dict[str, np.ndarray]:
    """What is kept of a batch, by name."""
    posteriors = [vae.encode(x.to(device)) for x in (example.image, example.masked_image)]
    values = {
        "posteriors": torch.stack([torch.stack([p.mean, p.std], dim=1) for p in posteriors], dim=1),
        "mask": latent_mask(example.mask, vae.config.downsampling),
        "exemplar": example.exemplar,
        "noisy": example.noisy,
    }
    return {name: x.float().cpu().numpy() for name, x in values.items()}
