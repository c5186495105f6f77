"""Adapters from two checkpoints: of what training changed, the closest matrices of low rank."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pbe.checkpoints.adapters import Adapter
from pbe.checkpoints.formats.opening import CheckpointError
from pbe.checkpoints.key_map import mismatches, shorten
from pbe.checkpoints.loading import build
from pbe.checkpoints.recognised import RecognisedCheckpoint
from pbe.checkpoints.surgery import input_order
from pbe.models.adapters import Update
from pbe.models.lora import layers_of
from pbe.models.paint_by_example import PaintByExample
from pbe.models.stable_diffusion import StableDiffusion


def extract_adapter(
    base: RecognisedCheckpoint,
    tuned: RecognisedCheckpoint,
    rank: int,
    callback: Callable[[str, float, float], object] = lambda *_: None,
) -> Adapter:
    """Adapters in float32 that make `base` nearly `tuned`, of at most `rank` in each layer that differs.

    `callback` gets each layer's name, the Frobenius norm of what the adapter misses, and that of the whole difference.
    Warns of parameters that differ and that adapters cannot hold: biases, norms, the other networks. Two tensors are
    read at a time. Raises `CheckpointError` where the UNets have other sizes or inputs, or do not differ.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    model = build(tuned)
    if not isinstance(model, PaintByExample | StableDiffusion):
        raise CheckpointError(f"{tuned.path} is {tuned.layout.name}, which takes no adapters")
    layers = {f"{name}.weight": name for name in layers_of(model)}
    found, expected = ({name: x.shapes[name] for name in layers if name in x.shapes} for x in (base, tuned))
    if faults := mismatches(found, expected):
        raise CheckpointError(f"the UNet of {base.path} is not that of {tuned.path}: it {'; '.join(faults)}")
    if input_order(base) != input_order(tuned):
        raise CheckpointError(f"the UNet's inputs are {input_order(base)} in {base.path}, {input_order(tuned)} there")
    updates: dict[str, Update] = {}
    unheld = [name for name in base.mappings if name not in tuned.mappings]
    for name, shape in tuned.shapes.items():
        if base.shapes.get(name) != shape:
            unheld.append(name)
            continue
        change = tuned.tensor(name).float() - base.tensor(name).float()
        for checkpoint in (base, tuned):
            checkpoint.release(name)
        if not change.isfinite().all():
            raise CheckpointError(f"{name} is not finite in {base.path} or {tuned.path}")
        if change.any() and name in layers:
            matrix = change.flatten(1)
            up, down = low_rank(matrix, rank)
            updates[layers[name]] = Update({"lora_up": up, "lora_down": down})
            callback(layers[name], (matrix - up @ down).norm().item(), matrix.norm().item())
        elif change.any():
            unheld.append(name)
    if not updates:
        raise CheckpointError(f"{tuned.path} has the weights of {base.path} in all layers that adapters can change")
    if unheld:
        warnings.warn(f"{len(unheld)} parameters differ that adapters cannot hold: {shorten(unheld)}", stacklevel=2)
    distilled = tuned.hints.distilled
    return Adapter(tuned.path, "peft", updates, 0, {"base_model_name_or_path": base.path.name}, distilled)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (out, r) and (r, in) of the closest matrix of this rank (Eckart and Young 1936), of like sizes.

    Its left singular vectors are the eigenvectors of M Mᵀ: in float64 that is as exact, and several times faster.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = low_rank(matrix.T, rank)
        return up.T, down.T
    double = matrix.double()
    up = torch.linalg.eigh(double @ double.T).eigenvectors[:, -rank:]  # of the largest eigenvalues
    down = up.T @ double
    root = down.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)  # of the singular values
    return (up * root).float(), (down / root[:, None]).float()
