"""The maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffusion.gradient_flow.functionals.base import Functional, check_data, chunks, with_data
from diffusion.gradient_flow.functionals.kernels import Gaussian, Kernel, kernel_of


@dataclass(frozen=True, eq=False)
class MMD(Functional):
    """F[q] = E k(x, x') - 2 E k(x, y) + E k(y, y'), x ~ q, y ~ data: the squared MMD (Gretton et al., A Kernel
    Two-Sample Test, 2012), over all pairs, each point with itself too, so that particles that are the data rest.

    Its flow is that of Arbel et al. (Maximum Mean Discrepancy Gradient Flow, 2019). Cost O(N (N + M)) a step.

    Args:
        kernel: a Kernel, or a symmetric function of points (n, d), (m, d) -> (n, m) in torch operations.
        data: (M, *shape).

    Raises:
        UserError: no such kernel or data, or particles of another dimension.
    """

    kernel: Kernel | Callable[[Tensor, Tensor], Tensor] = field(default_factory=Gaussian)
    data: Tensor | None = None

    def __post_init__(self):
        check_data(self.data)
        object.__setattr__(self, "kernel", kernel_of(self.kernel).fitted(self.data.flatten(1)))

    def value(self, particles):
        x, y = with_data(particles, self.data)
        inside, across = self._mean(x, x), self._mean(x, y)
        return (inside - 2 * across + self._among_data.to(inside)).to(particles.dtype)

    @torch.no_grad()
    def velocity(self, particles):
        x, y = with_data(particles, self.data)
        velocity = torch.cat(
            [
                self.kernel.slopes(x[rows], y) / len(y) - self.kernel.slopes(x[rows], x) / len(x)
                for rows in chunks(len(x), max(len(x), len(y)))
            ]
        )
        return (2 * velocity).to(particles.dtype).view_as(particles)

    @torch.no_grad()
    def first_variation(self, particles):
        x, y = with_data(particles, self.data)
        return torch.cat(
            [
                2 * (self._sums(x[rows], x) / len(x) - self._sums(x[rows], y) / len(y))
                for rows in chunks(len(x), max(len(x), len(y)))
            ]
        ).to(particles.dtype)

    @cached_property
    def _among_data(self) -> Tensor:
        """E k(y, y'), which no particle changes."""
        y = self.data.flatten(1)
        with torch.no_grad():
            return self._mean(y, y)

    def _mean(self, x: Tensor, y: Tensor) -> Tensor:
        """E k(x, y), float64."""
        sums = [self._sums(x[rows], y).sum() for rows in chunks(len(x), len(y))]
        return torch.stack(sums).sum() / (len(x) * len(y))

    def _sums(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_j k(x, y_j), (n,), float64."""
        return self.kernel.matrix(x, y).sum(1, dtype=torch.float64)
