"""Functions whose derivatives keep their digits in the tail, where those of torch are a sum that rounds to zero."""

import torch
from torch import Tensor


def tanh(x: Tensor) -> Tensor:
    """tanh; torch's derivative, 1 - tanh^2, has lost all its digits by |x| = 19."""
    decay = torch.exp(-2 * x.abs())
    return torch.where(x.abs() < 1, torch.tanh(x), x.sign() * (1 - decay) / (1 + decay))


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1; torch's derivative, 1 + expm1, has lost all its digits by x = -37."""
    return torch.where(x > -1, torch.expm1(x), torch.exp(x.clamp(max=0)) - 1)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); torch's derivative, sigmoid (1 - sigmoid), has lost all its digits by x = 37."""
    return torch.where(x < 0, torch.sigmoid(x), 1 / (1 + torch.exp(-x.clamp(min=0))))
