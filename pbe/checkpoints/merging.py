"""Merging checkpoints: their weighted sum, and the difference of two that is added to a third.

Computed in float32 one tensor at a time, from files that are read as they are needed.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from pbe.checkpoints.formats.lazy_tensors import CheckpointError, converted
from pbe.checkpoints.formats.opening import open_checkpoint
from pbe.checkpoints.key_map import mismatches
from pbe.checkpoints.layouts import find_layout
from pbe.checkpoints.loading import recognise
from pbe.checkpoints.recognised import RecognisedCheckpoint
from pbe.checkpoints.surgery import FIRST_CONVOLUTION, Tensors, config_of, input_order, network, network_of


def part_of(name: str) -> str:
    """The network that a tensor belongs to: unet, vae, clip-text, clip-vision, condition, tiny-decoder, …"""
    return network_of(name).lower().replace(" ", "-")


def check_parts(parts: Iterable[str], held: Iterable[str]) -> None:
    """Raises `ValueError` for a network that a merge does not change."""
    if unknown := sorted({*parts} - {*held}):
        raise ValueError(f"there is no part {unknown[0]!r} to merge here; choose {', '.join(sorted(held)) or 'none'}")


def merge(
    checkpoints: Sequence[RecognisedCheckpoint],
    weights: Sequence[float],
    parts: Mapping[str, Sequence[float]] | None = None,
) -> Tensors:
    """The weighted sum of checkpoints, computed in float32, in the first one's dtypes.

    `parts` has other weights for single networks (`part_of`). Raises `CheckpointError` unless all have the same sizes
    and the same meaning of the UNet's inputs, and where the sum overflows float16; `ValueError` for an unknown part.
    """
    parts = parts or {}
    if not checkpoints or {len(checkpoints)} != set(map(len, (weights, *parts.values()))):
        raise ValueError(f"{len(checkpoints)} checkpoints and {len(weights)} weights: give one weight per checkpoint")
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.mappings.keys() != first.mappings.keys() or config_of(other) != config_of(first):
            raise CheckpointError(f"{other.path} has other sizes than {first.path}, or was distilled otherwise")
        if f"{FIRST_CONVOLUTION}.weight" in first.shapes and input_order(other) != input_order(first):
            raise CheckpointError(
                f"{other.path} has the inputs {input_order(other)}, {first.path} has "
                f"{input_order(first)}: `pbe checkpoint expand` brings them into one order"
            )
    check_parts(parts, {part_of(name) for name in first.mappings})
    merged = {}
    for name in first.mappings:
        total = torch.zeros(first.shapes[name])
        for checkpoint, weight in zip(checkpoints, parts.get(part_of(name), weights), strict=True):
            total += weight * checkpoint.tensor(name, dtype=torch.float32)
            checkpoint.release(name)
        merged[name] = converted(total, first.dtype(name), f"the merged {name}")
    return merged


def open_for_merging(path: str | Path) -> RecognisedCheckpoint:
    """`open_recognised`, and also a file that lacks its text tower or its autoencoder."""
    file = open_checkpoint(path)
    without = (None, "text tower", "autoencoder")
    return recognise(file, next((network for network in without if find_layout(file.names(), network)), None))


def add_difference(
    a: RecognisedCheckpoint,
    b: RecognisedCheckpoint,
    c: RecognisedCheckpoint,
    weight: float = 1.0,
    parts: Mapping[str, float] | None = None,
) -> tuple[Tensors, dict[str, int]]:
    """A + weight (B - C), which carries a fine-tune B of C over to A: computed in float32, in A's dtypes. Also how many
    tensors of each network were left out, since one of the three lacks it.

    Where the UNets' inputs differ, as those of Stable Diffusion and Paint by Example do, of their first convolution the
    inputs z_t alone change. `parts` has other weights for single networks (`part_of`).

    Raises `CheckpointError` where a network that all three have differs in names or shapes, and where the result
    overflows float16; `ValueError` for a weight that is not finite and a part that is not merged.
    """
    parts, kernel = parts or {}, f"{FIRST_CONVOLUTION}.weight"
    if not all(map(math.isfinite, (weight, *parts.values()))):
        raise ValueError(f"the weights must be finite, got {weight} {dict(parts) or ''}")
    held = [Counter(map(part_of, one.mappings)) for one in (a, b, c)]
    shared = set.intersection(*map(set, held))
    check_parts(parts, shared)
    z_t_alone = "unet" in shared and len(set(map(input_order, (a, b, c)))) > 1
    expected, *found = (
        {name: x for name, x in one.shapes.items() if part_of(name) in shared and not (z_t_alone and name == kernel)}
        for one in (a, b, c)
    )
    for one, shapes in zip((b, c), found, strict=True):
        if faults := mismatches(shapes, expected):
            raise CheckpointError(f"{one.path} does not fit {a.path}: it {'; '.join(faults)}")
    if not shared:
        raise CheckpointError(f"{a.path}, {b.path} and {c.path} have no network in common")
    tensors = network(a)
    for name in tensors:
        strength = parts.get(part_of(name), weight)
        if part_of(name) not in shared or not strength:
            continue
        x, y = (one.tensor(name, dtype=torch.float32) for one in (b, c))
        if name == kernel and z_t_alone:
            x, y = (F.pad(w[:, :4], (0, 0, 0, 0, 0, a.shapes[name][1] - 4)) for w in (x, y))  # (C, in, 3, 3)
        total = a.tensor(name, dtype=torch.float32) + strength * (x - y)
        tensors[name] = converted(total, a.dtype(name), f"the merged {name}")
        for one in (a, b, c):
            one.release(name)
    return tensors, {part: max(x[part] for x in held) for part in sorted(set().union(*held) - shared)}
