"""Files of detail adapters: the tensors that `is_detail` names, and their sizes as `detail` in the entry `pbe`."""

import torch
from torch import Tensor, nn

from pbe.checkpoints.formats.lazy_tensors import converted
from pbe.checkpoints.formats.opening import Checkpoint, CheckpointError
from pbe.checkpoints.key_map import average_name, mismatches, shorten
from pbe.io.json_text import shown
from pbe.models.detail import DetailConfig, add_detail, detail_parts, detail_shapes, is_detail
from pbe.models.paint_by_example import PaintByExample

Detail = tuple[DetailConfig, dict[str, Tensor]]  # its sizes, and its tensors by name


def holds_detail(file: Checkpoint) -> bool:
    """Whether any tensor has a name as a detail adapter has."""
    return any(map(is_detail, file.names()))


def read_detail(file: Checkpoint, model: nn.Module) -> Detail:
    """The detail adapter in a file for a model, which may be on the meta device; its averages, where training made any.

    Raises `CheckpointError` where the file lacks tensors or has others than an adapter for this model.
    """
    if not isinstance(model, PaintByExample):
        raise CheckpointError(f"{file.path} holds a detail adapter; {type(model).__name__} takes none")
    entry = file.entry.get("detail")
    try:
        if not isinstance(entry, dict):
            raise ValueError("expected an adapter's tokens, layers and width")
        config = DetailConfig(**entry)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: its entry 'detail' is {shown(entry)}: {error}") from None
    averages = {average_name(name) for name in file.names()} & file.names()
    sources = {name: name for name in file.names() if name not in averages}
    sources |= {name: average for name in sources if (average := average_name(name)) in averages}
    faults = mismatches(
        {name: tuple(file.shape(source)) for name, source in sources.items()},
        detail_shapes(detail_parts(model, config)),
    )
    if integers := [name for name, source in sources.items() if not file.dtype(source).is_floating_point]:
        faults.append(f"has numbers other than floats in {len(integers)}: {shorten(integers)}")
    if faults:
        raise CheckpointError(f"{file.path} holds a detail adapter that does not fit the model: it {'; '.join(faults)}")
    return config, {name: file.tensor(source) for name, source in sources.items()}


def use_detail(model: PaintByExample, detail: Detail, strength: float, dtype: torch.dtype) -> None:
    """Puts an adapter into a model in this precision, with values `strength` times as large; raises as `converted`."""
    config, tensors = detail
    tensors = {name: x * strength if name.endswith("to_v_detail.weight") else x for name, x in tensors.items()}
    tensors = {name: converted(x, dtype, name, model.device) for name, x in tensors.items()}
    add_detail(model, detail_parts(model, config), tensors)
