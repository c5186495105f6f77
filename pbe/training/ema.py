"""Exponential moving average of the parameters that train, and of no others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pbe.checkpoints.key_map import average_name

# Lightning's EMAWeightAveraging copies the whole module: 386 M frozen parameters of Paint by Example too.


class ParameterAverage(nn.Module):
    """Averages of `parameters` by name, called as in CompVis checkpoints.

    They are parameters that need no gradient rather than buffers, which DDP would send to every process in each step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"the decay of the average must be between 0 and 1, got {decay}")
        self.decay = decay
        self._averaged = tuple(parameters.values())
        for name, parameter in parameters.items():
            average = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            self.register_parameter(average_name(name).removeprefix("model_ema."), average)

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """One step, the `num_updates`-th from 1: average ← d average + (1 - d) parameter.

        The decay d = min(decay, (1 + n) / (10 + n)) is low at first, so that the start is soon forgotten.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        get_ema_multi_avg_fn(decay)(list(self.parameters()), list(self._averaged), num_updates)

    def swap(self) -> None:
        """Exchanges the averages with the parameters; a second call puts them back."""
        for average, parameter in zip(self.parameters(), self._averaged, strict=True):
            average.data, parameter.data = parameter.data, average.data
