"""Exponential moving average of weights."""

import copy

import torch
from torch import nn


class EMA:
    """A copy of a module whose weights are the average of the module's over recent steps.

    The average after step n decays by min(decay, (1 + n) / (10 + n)) a step, so that early weights are soon forgotten.
    It is kept in the precision of the weights themselves (float32 in mixed-precision training).

    Args:
        module: the module that is trained.
        decay: limit of the decay; the average then spans about 1 / (1 - decay) steps.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self._pairs = (list(self.module.parameters()), list(module.parameters()))
        self._buffers = (list(self.module.buffers()), list(module.buffers()))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._pairs, 1 - decay)
        for mine, theirs in zip(*self._buffers, strict=True):
            mine.copy_(theirs)
