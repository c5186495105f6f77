"""`torch.compile` for prepared models: the networks as a whole, or each kind of block once.

A graph is made for each size of picture and number of contexts, at the first call with it, and lasts as long as the
process; what torch generates for it is kept between processes in the folder TORCHINDUCTOR_CACHE_DIR (by default in the
system's temporary folder, by user name). Nothing changes but the rounding.
"""

from collections.abc import Callable
from functools import wraps
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pbe.acceleration.unet import FoldedBlock, FusedBlock
from pbe.models.blocks import ResBlock
from pbe.models.paint_by_example import PaintByExample
from pbe.models.vae import ResnetBlock

Compile = Literal["regions", "whole"]

# The blocks that the networks repeat, and the method that does not depend on a block's place in them.
REGIONS = {ResBlock: "body", FoldedBlock: "body", FusedBlock: "forward", ResnetBlock: "forward"}


def compile_networks(model: PaintByExample, how: Compile, backend: str | Callable = "inductor") -> None:
    """Replaces methods of a prepared model's UNet and decoder by functions that their first call compiles.

    "regions" compiles the residual and transformer blocks, one graph for all blocks of a kind and shape, so there is
    less to compile. "whole" makes one graph of all the UNet, and on CUDA replays it as a CUDA graph, in the place of
    hundreds of launches; and one of the decoder, which runs once per picture. Beyond 8 sizes torch computes without
    graphs.
    """
    if how == "regions":
        compile_regions(nn.ModuleList([model.unet, model.vae.decoder]), backend)
        return
    replayed = model.device.type == "cuda" and backend == "inductor"
    fast = "reduce-overhead" if replayed else None
    for network, method, mode in (
        (model.unet, "predict", fast),
        (model.unet, "predict_from", fast),  # two graphs: with deep features, and without
        (model.vae.decoder, "forward", None),
    ):
        compiled = torch.compile(getattr(network, method), mode=mode, dynamic=False, backend=backend)
        setattr(network, method, compiled if mode is None else kept(compiled))


def compile_regions(network: nn.Module, backend: str | Callable) -> None:
    """Gives all blocks of one kind, with weights of the same shapes, the same compiled function."""
    compiled: dict[tuple, Callable] = {}
    for block in network.modules():
        if type(block) in REGIONS:
            name = REGIONS[type(block)]
            kind = type(block), *(tuple(parameter.shape) for parameter in block.parameters())
            if kind not in compiled:
                compiled[kind] = torch.compile(own_code(getattr(type(block), name)), dynamic=False, backend=backend)
            setattr(block, name, MethodType(compiled[kind], block))


def own_code(function: FunctionType) -> FunctionType:
    """The same function with a code object of its own: torch keeps graphs by that, and gives up after 8 of one."""
    code = function.__code__.replace()
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def kept(predict: Callable) -> Callable:
    """`predict`, its results copied: a CUDA graph's replay overwrites the last result, and samplers keep four."""

    @wraps(predict)
    def cloned(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(Tensor.clone, predict(*args))

    return cloned


def is_compiled(network: nn.Module) -> bool:
    """Whether a user compiled the network, or a part of it: by `network.compile()` or `torch.compile(network)`."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in network.modules())
