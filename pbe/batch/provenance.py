"""A result's provenance, saved with it: settings, checksums of the inputs and of the weights.

As in `pbe.batch.job`, what is heavy is imported where it is used: the command line reads its arguments before.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pbe.batch.job import Job

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from pbe.checkpoints.adapters import AdapterLike
    from pbe.checkpoints.recognised import WeightChoice

# What of a checkpoint tells it from another.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".json", ".onnx", ".data", ".pt2")  # in a folder
NUM_SAMPLES, SAMPLE_BYTES = 256, 16384
ABOUT_RESULT = ("pbe", "size")  # stored beside the provenance, not part of it


class Weights(NamedTuple):
    """Which weights made a result."""

    checkpoint: str  # the file's name
    crc32: str
    dtype: str
    adapters: tuple[dict[str, Any], ...] = ()  # of each the file's name, crc32 and strength
    tiny_decoder_crc32: str | None = None  # of a file of its own
    vae_crc32: str | None = None  # of a file of its own
    choice: WeightChoice = "auto"  # of averages or what they average


def identify(
    checkpoint: Path,
    dtype: torch.dtype,
    adapters: Sequence[AdapterLike] = (),
    tiny_decoder: Path | None = None,
    vae: Path | None = None,
    weights: WeightChoice = "auto",
) -> Weights:
    """The weights that `pbe.load_model` takes of a checkpoint, a file or a folder, and what it is given beside it.

    FileNotFoundError where one of them is not there.
    """
    from pbe.checkpoints.adapters import with_strength
    from pbe.checkpoints.formats.opening import find_checkpoint

    checkpoint = find_checkpoint(checkpoint)
    files = [(find_checkpoint(path), strength) for path, strength in map(with_strength, adapters)]
    about = [{"file": path.name, "crc32": crc_of(path), "strength": strength} for path, strength in files]
    tiny, own_vae = (crc_of(find_checkpoint(path)) if path else None for path in (tiny_decoder, vae))
    name = str(dtype).removeprefix("torch.")
    return Weights(checkpoint.name, crc_of(checkpoint), name, tuple(about), tiny, own_vae, weights)


def crc_of(checkpoint: Path) -> str:
    """A checksum of a file or a folder of weights; FileNotFoundError without it.

    It is over each file's size and evenly spaced samples of it, which takes no longer for large files.
    """
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: there is no such checkpoint")
    files = [checkpoint]
    if checkpoint.is_dir():
        inside = [*checkpoint.glob("*"), *checkpoint.glob("*/*")]
        files = sorted(file for file in inside if file.suffix in WEIGHT_SUFFIXES)
    crc = 0
    for path in files:
        size = path.stat().st_size
        crc = zlib.crc32(f"{path.relative_to(checkpoint)} {size}".encode(), crc)
        with path.open("rb", buffering=0) as file:
            for start in sorted({i * max(size - SAMPLE_BYTES, 0) // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)}):
                file.seek(start)
                crc = zlib.crc32(file.read(SAMPLE_BYTES), crc)
    return f"{crc:08x}"


def checksums(job: Job) -> dict[str, str]:
    """The CRC-32 of each of a job's input files, by the name that the job has for it."""
    return {name: f"{zlib.crc32(job.path(name).read_bytes()):08x}" for name in job.inputs}


def provenance_of(job: Job, weights: Weights, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a result follows from, as JSON values by column name, with the checksums of the files that were read
    (`inputs`, where they are known already)."""
    row = json.loads(json.dumps(job.to_row()))  # lists for tuples, as they are read back
    del row["out"]
    if job.settings.decoder == "tiny" and weights.tiny_decoder_crc32:
        row["tiny_decoder_crc32"] = weights.tiny_decoder_crc32
    return row | {
        "inputs_crc32": dict(checksums(job) if inputs is None else inputs),
        "checkpoint": weights.checkpoint,
        "checkpoint_crc32": weights.crc32,
        "dtype": weights.dtype,
        **({"adapters": list(weights.adapters)} if weights.adapters else {}),
        **({"vae_crc32": weights.vae_crc32} if weights.vae_crc32 else {}),
        **({"weights": weights.choice} if weights.choice != "auto" else {}),
    }


def save_result(image: Image.Image, path: Path, provenance: Mapping[str, Any]) -> None:
    """Save a result with its provenance: as JSON under the key `pbe` and as a line to read; see `save_picture`."""
    shown = ("sampler", "steps", "guidance", "seed", "window", "checkpoint", "dtype")
    line = ", ".join(f"{name} {provenance[name]}" for name in shown)
    save_described(image, path, provenance, f"Paint by Example: {line}")


def save_described(image: Image.Image, path: Path, provenance: Mapping[str, Any], description: str) -> None:
    """Save a picture with its provenance and a line to read."""
    from pbe import __version__
    from pbe.images.saving import save_picture

    stored = {**provenance, "pbe": __version__, "size": list(image.size)}
    save_picture(image, path, {"pbe": json.dumps(stored), "Description": description, "Software": f"pbe {__version__}"})


def read_provenance(path: Path) -> dict[str, Any] | None:
    """What `save_result` stored in a picture, or None where there is nothing."""
    from pbe.images.pillow import UNREADABLE, open_image
    from pbe.images.saving import read_info

    try:
        with open_image(path) as image:
            stored = json.loads(read_info(image)["pbe"])
    except UNREADABLE:
        return None  # not a picture, or not one of ours
    return stored if isinstance(stored, dict) else None


def made_from(path: Path) -> dict[str, Any]:
    """The provenance of the picture at `path`, as it was saved with it; empty where there is none."""
    return {name: value for name, value in (read_provenance(path) or {}).items() if name not in ABOUT_RESULT}


def is_finished(path: Path, provenance: Callable[[], Mapping[str, Any]]) -> bool:
    """Whether the picture at `path` is there, with the provenance that its making would give it now."""
    stored = made_from(path)
    try:
        return bool(stored) and stored == provenance()
    except OSError:
        return False  # an input cannot be read: making the picture says so


def check_writable(path: Path, image: Image.Image, provenance: Mapping[str, Any]) -> None:
    """Find out that a result of the kind and size of `image` cannot be saved at `path`, before it is computed.

    The folder is made. ValueError for a suffix that cannot hold it, OSError where nothing can be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file name")
    trial = path.with_name(f".trial-{path.stem}{path.suffix}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the result's own saving warns
            for size in ((image.width, 1), (1, image.height)):  # some formats bound the sides
                save_result(image.crop((0, 0, *size)), trial, provenance)
    except ValueError as error:
        raise ValueError(str(error).replace(str(trial), str(path))) from None
    except OSError as error:
        file = next((parent for parent in path.parents if parent.is_file()), None)
        reason = f"{file} is a file, not a folder" if file else error.strerror or error
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        if trial.exists():  # below a file even this question is an error
            trial.unlink()
