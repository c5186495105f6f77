"""A model loaded for editing alone, in the form that its device computes fastest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pbe.acceleration import Compile
    from pbe.checkpoints.adapters import AdapterLike
    from pbe.checkpoints.recognised import WeightChoice
    from pbe.models.paint_by_example import Distilled, PaintByExample

SMALL_RESOLUTION = 128


class AdaptedModels:
    """The models that `load` makes with different adapters. One is in memory: the last, which goes before the next."""

    def __init__(self, load: Callable[[tuple[AdapterLike, ...]], PaintByExample]):
        self.load = load
        self.last: tuple[tuple[AdapterLike, ...], PaintByExample] | None = None

    def __call__(self, adapters: Sequence[AdapterLike]) -> PaintByExample:
        wanted = tuple(adapters)
        if self.last is None or self.last[0] != wanted:
            self.last = None
            self.last = wanted, self.load(wanted)
        return self.last[1]


def load_editor(
    checkpoint: Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    low_memory: bool = False,
    compile: Compile | None = None,
    adapters: Sequence[AdapterLike] = (),
    tiny_decoder: Path | None = None,
    vae: Path | None = None,
    weights: WeightChoice = "auto",
) -> PaintByExample:
    """`pbe.load_model` for a file that must hold Paint by Example, prepared for editing alone, with its adapters.

    With `low_memory` each network is on the device only while it computes. A folder of exported networks is opened by
    `pbe.export.load_exported`.

    Raises:
        ValueError: for another model, for `low_memory` with the whole network's compilation, and for anything but a
            device and a precision with exported networks.
    """
    from pbe.acceleration import prepare_for_inference
    from pbe.acceleration.offloading import offload
    from pbe.checkpoints.adapters import add_adapters
    from pbe.checkpoints.formats.opening import is_exported
    from pbe.checkpoints.loading import choose_device, choose_dtype, load_model
    from pbe.models.paint_by_example import PaintByExample

    check_memory(low_memory, compile)
    if is_exported(checkpoint):
        from pbe.export import load_exported

        asked = {"adapters": adapters, "tiny_decoder": tiny_decoder, "low_memory": low_memory, "compile": compile}
        asked |= {"vae": vae, "weights": weights != "auto"}
        if refused := [name for name, value in asked.items() if value]:
            why = "adapters can be folded in when it is exported" if adapters else "use the checkpoint that it is from"
            raise ValueError(f"{checkpoint} holds exported networks, which take no {', '.join(refused)}: {why}")
        return load_exported(checkpoint, device, dtype)
    chosen = choose_device(device)
    home, precision = choose_device("cpu") if low_memory else chosen, choose_dtype(dtype, chosen)
    # on the CPU preparing converts what is mapped, with no copy between; to a device the least is sent
    form = "stored" if home.type == "cpu" else precision
    model = load_model(checkpoint, home, form, tiny_decoder=tiny_decoder, vae=vae, weights=weights)
    if not isinstance(model, PaintByExample):
        raise ValueError(f"{checkpoint} holds {type(model).__name__}, editing needs Paint by Example")
    if adapters:
        add_adapters(model, *adapters, dtype=precision)
    if low_memory:
        model = offload(model, chosen)
    return prepare_for_inference(model, consume=True, dtype=precision, compile=compile)


def dtype_for(checkpoint: str | Path, dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The precision in which the model of a checkpoint is to compute: exported networks have their own."""
    import torch

    from pbe.checkpoints.formats.opening import is_exported
    from pbe.checkpoints.loading import choose_device, choose_dtype

    return torch.float32 if is_exported(checkpoint) else choose_dtype(dtype, choose_device(device))


def distilled_for(checkpoint: str | Path, adapters: Sequence[AdapterLike] = ()) -> Distilled | None:
    """What the model in a checkpoint, or the last distilled one of its adapters, was distilled for, which an edit's
    settings follow from before it is loaded.

    Raises as `pbe.load_model` for a file that cannot be opened.
    """
    from pbe.checkpoints.adapters import open_adapter, with_strength
    from pbe.checkpoints.formats.opening import open_checkpoint
    from pbe.checkpoints.loading import hints_of

    shown = [path for path, strength in map(with_strength, adapters) if strength]
    files = [open_checkpoint(checkpoint), *(open_adapter(path)[0] for path in shown)]
    return next((found for file in reversed(files) if (found := hints_of(file).distilled)), None)


def adapter(text: str) -> tuple[Path, float]:
    """A file of adapters and its strength, of FILE or FILE:STRENGTH."""
    file, colon, number = text.rpartition(":")
    try:
        return (Path(file), float(number)) if colon else (Path(text), 1.0)
    except ValueError:  # a colon of the name's own
        return Path(text), 1.0


def check_memory(low_memory: bool, compile: Compile | None) -> None:
    """ValueError for what cannot be combined: the whole network's graphs keep their memory."""
    if low_memory and compile == "whole":
        raise ValueError("compile='whole' keeps the memory that low_memory gives back: use compile='regions'")


def limit_threads(model: PaintByExample) -> None:
    """Lets the process compute with one thread where a CPU runs a model of pictures of at most 128 pixels, unless
    OMP_NUM_THREADS says otherwise.

    Four threads make so small a network a quarter faster. On a busy machine they make it twenty times slower: in each
    layer all wait for the one that has no core (docs/editing.md).
    """
    import torch

    small = model.config.resolution <= SMALL_RESOLUTION and model.device.type == "cpu"
    if small and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
