"""The functionals that every law is checked on. One that joins `FUNCTIONALS` inherits all of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.gradient_flow.functional import Functional
from diffusion.gradient_flow.potential import Potential


class Case(NamedTuple):
    """A functional, in 2 and in 5 dimensions.

    Attributes:
        build: data (M, d) -> functional.
        rest: whether particles that are the data themselves do not move.
        tolerance: of velocities against autograd, relative.
    """

    name: str
    build: Callable[[Tensor], Functional]
    rest: bool = False
    tolerance: float = 1e-6

    def __str__(self) -> str:
        return self.name


FUNCTIONALS = [
    Case("potential", lambda data: Potential(lambda x: (x**4).sum(1) / 4 + x[:, 0] * x[:, 1])),
    Case(
        "sum",
        lambda data: 0.5 * Potential(lambda x: x.square().sum(1)) + 2.0 * Potential(lambda x: x.cos().prod(1)),
    ),
]


def draws(number: int, dim: int, seed: int, spread: float = 1.0) -> Tensor:
    """Normal points (number, dim), float64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(number, dim, generator=generator, dtype=torch.float64)
