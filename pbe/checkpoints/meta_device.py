"""Models without memory behind their parameters: their names and shapes, ready to be filled."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


class SkipInitialisation(TorchFunctionMode):
    """Leaves `torch.nn.init` out: on the meta device there is nothing to write, and drawing normal numbers there makes
    torch import its whole compiler first, which takes longer than loading a model."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_on_meta(model_class: Callable[[Any], Model], config: Any) -> Model:
    """The model for `config` on the meta device; draws nothing from any random generator."""
    with torch.device("meta"), SkipInitialisation():
        return model_class(config)
