"""Functionals that compare particles with data along lines: projected on directions, each a problem of sorting.

A slice costs O((M + N) log(M + N)). Notation: L directions, N particles x, M data points y; projections are
(L, N) and (L, M).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, check_data, chunks, points_of, with_data

DIRECTIONS = 64
"""Directions where none are asked for: in a plane, and at least beyond it."""


@dataclass(frozen=True, eq=False)
class Sliced(Functional):
    """The mean over directions of a functional of laws on a line, over `unit(d)`.

    In one dimension there is one direction and nothing is left to chance. In a plane the directions are spread evenly
    over half a turn; beyond, they are the rows of random orthogonal matrices (Rowland et al., Orthogonal Estimation of
    Wasserstein Distances, 2019). `fitted` draws them anew, so that a flow sees them all; before it they are fixed.

    Args:
        data: (M, *shape).
        directions: their number L; by default 64, or the dimension where it is larger. Beyond a plane the error of the
            velocity falls as 1 / sqrt(L), and at d = L = 64 is half of it or more: noise, averaged over a flow's steps.
        drawn: the directions, (L, d); `fitted` sets them.

    Raises:
        UserError: no such data, a number below 1, or particles of another dimension.
    """

    data: Tensor
    directions: int | None = None
    drawn: Tensor | None = None

    def __post_init__(self):
        check_data(self.data)
        number = self.directions
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise UserError(f"directions is {number!r}, expected a whole number of 1 or more, or none")

    @abstractmethod
    def cost(self, x: Tensor, y: Tensor) -> Tensor:
        """The functional on lines, (L,)."""

    @abstractmethod
    def push(self, x: Tensor, y: Tensor) -> Tensor:
        """Velocities on lines, (L, N)."""

    @abstractmethod
    def variation(self, x: Tensor, y: Tensor) -> Tensor:
        """First variations on lines, (L, N)."""

    def unit(self, dim: int) -> float:
        """What the mean over directions is divided by."""
        return 1.0

    def fitted(self, particles, generator=None):
        dim = points_of(particles, self.data[0].numel()).shape[1]
        device = particles.device if generator is None else generator.device
        drawn = draw(dim, self.number(dim), generator, device).to(particles.device)
        return replace(self, data=self.data.to(particles.device), drawn=drawn)

    def value(self, particles):
        x, y, theta = self._inputs(particles)
        costs = [self.cost(theta[part] @ x.T, theta[part] @ y.T) for part in chunks(len(theta), len(x) + len(y))]
        return (torch.cat(costs).mean() / self.unit(x.shape[1])).to(particles.dtype)

    @torch.no_grad()
    def velocity(self, particles):
        x, y, theta = self._inputs(particles)
        total = torch.zeros_like(x)
        for part in chunks(len(theta), len(x) + len(y)):
            total.addmm_(self.push(theta[part] @ x.T, theta[part] @ y.T).T, theta[part])
        total /= len(theta) * self.unit(x.shape[1])
        total.masked_fill_(~x.isfinite().all(1, keepdim=True), torch.nan)  # sorted, they have a rank like all others
        return total.to(particles.dtype).view_as(particles)

    @torch.no_grad()
    def first_variation(self, particles):
        x, y, theta = self._inputs(particles)
        parts = chunks(len(theta), len(x) + len(y))
        total = sum(self.variation(theta[part] @ x.T, theta[part] @ y.T).sum(0) for part in parts)
        return (total / (len(theta) * self.unit(x.shape[1]))).to(particles.dtype)

    def number(self, dim: int) -> int:
        """Directions in so many dimensions."""
        return 1 if dim == 1 else self.directions or max(DIRECTIONS, dim if dim > 2 else 0)

    def _inputs(self, particles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Particles, data and directions, in single precision or better."""
        x, y = with_data(particles, self.data)
        dim = x.shape[1]
        theta = draw(dim, self.number(dim), torch.Generator().manual_seed(0)) if self.drawn is None else self.drawn
        return x, y, theta.to(x)


def draw(dim: int, number: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Unit vectors (number, dim), float64, evenly spread as `Sliced` says; one in one dimension."""
    options = {"dtype": torch.float64, "device": device, "generator": generator}
    if dim == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=device)
    if dim == 2:
        turn = torch.rand((), **options)
        angle = math.pi / number * (torch.arange(number, dtype=torch.float64, device=device) + turn)
        return torch.stack([angle.cos(), angle.sin()], 1)
    blocks = torch.randn(-(-number // dim), dim, min(number, dim), **options)
    return torch.linalg.qr(blocks)[0].mT.reshape(-1, dim)[:number]


def mean_projection(dim: int) -> float:
    """E|theta . e| for a unit vector e and theta uniform on the sphere."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def argsort(lines: Tensor) -> Tensor:
    """The order of each row, (L, n) -> (L, n). On a CPU by numpy, which has vector instructions for it."""
    if lines.device.type == "cpu":
        return torch.from_numpy(np.argsort(lines.detach().numpy(), axis=1))
    return lines.detach().argsort(dim=1)


def unsorted(values: Tensor, order: Tensor) -> Tensor:
    """What belongs to rows in their order, as before it: the inverse of gather(1, order)."""
    return torch.empty_like(values).scatter_(1, order, values)
