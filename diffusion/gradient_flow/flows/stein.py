"""Stein variational gradient descent: the flow of tau * Entropy + R in the metric of a kernel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.functionals.base import Functional, Sum, chunks, points_of
from diffusion.gradient_flow.functionals.entropy import Entropy

MEDIAN_OF = 2048
"""Particles whose distances the median rule looks at, at most."""


class SteinKernel(ABC):
    """A positive definite kernel k(x, y) with its gradient in y."""

    @abstractmethod
    def held(self, points: Tensor) -> SteinKernel:
        """The kernel with a bandwidth for `points` (N, d)."""

    @abstractmethod
    def smoothed(self, x: Tensor, y: Tensor, forces: Tensor, temperature: float) -> Tensor:
        """sum_j k(x_i, y_j) forces_j + temperature grad_y k(x_i, y_j), (n, d), for x (n, d), y and forces (N, d)."""


@dataclass(frozen=True)
class Radial(SteinKernel):
    """k(x, y) = phi(|x - y|^2 / h^2).

    Args:
        bandwidth: h; without it h^2 = median_{i<j} |x_i - x_j|^2 / log N for the particles of each step (Liu and Wang
            2016, section 5), by the first and evenly spaced ones where they are very many.
    """

    bandwidth: float | None = None

    def __post_init__(self):
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise UserError(f"bandwidth is {self.bandwidth}, expected a positive number, or None for the median rule")

    @abstractmethod
    def profile(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """phi and its derivative."""

    def held(self, points):
        return self if self.bandwidth is not None else replace(self, bandwidth=median_bandwidth(points))

    def smoothed(self, x, y, forces, temperature):
        inverse = self.bandwidth**-2
        centre = y.mean(0)
        x, y = x - centre, y - centre
        squares = (x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
        phi, slope = self.profile(inverse * squares)
        pushed = slope @ y - slope.sum(1, keepdim=True) * x
        return phi @ forces + (2 * temperature * inverse) * pushed


@dataclass(frozen=True)
class RBF(Radial):
    """exp(-|x - y|^2 / h^2), as in Liu and Wang 2016."""

    def profile(self, squares):
        phi = (-squares).exp()
        return phi, -phi


@dataclass(frozen=True)
class InverseMultiquadric(Radial):
    """(1 + |x - y|^2 / h^2)^(-1/2): slow to decay, it sees mass escape (Gorham and Mackey 2017, arXiv 1703.01717)."""

    def profile(self, squares):
        phi = (1 + squares).rsqrt()
        return phi, -0.5 * phi**3


@dataclass(frozen=True)
class Linear(SteinKernel):
    """x . y + 1: a flow to a Gaussian moves mean and covariance, and every Gaussian stays one (Liu and Wang 2018)."""

    def held(self, points):
        return self

    def smoothed(self, x, y, forces, temperature):
        return x @ (y.T @ forces) + forces.sum(0) + temperature * len(y) * x


@dataclass(frozen=True)
class SteinFlow(Flow):
    """x + h phi(x), phi(x) = E_y[k(x, y) b(y) + tau grad_y k(x, y)], for F = tau * Entropy + R.

    Here y ~ q and b = -grad dR/dq: Liu and Wang 2016, arXiv 1608.04471, eq. 8. The entropy needs no estimate: by parts
    it became the gradient of the kernel, which drives particles apart. Without an entropy it is the velocity smoothed
    by the kernel. F falls by the squared kernel Stein discrepancy (Liu 2017, arXiv 1704.07520, theorem 3.4). One
    particle goes to a mode.

    Args:
        functional: tau * Entropy + R, such as KL(target).
        kernel: RBF, InverseMultiquadric, Linear, or one's own.

    Raises:
        UserError: the kernel is none; the median rule meets particles that are all in one place.
    """

    functional: Functional
    kernel: SteinKernel = field(default_factory=RBF)

    def __post_init__(self):
        if not isinstance(self.kernel, SteinKernel):
            raise UserError(f"kernel is {self.kernel!r}, expected a SteinKernel such as RBF()")

    def subject(self):
        return _Split(self.functional)

    def begin(self, particles):
        return None

    def advance(self, moment, step_size, generator):
        x = moment.particles
        moved = x + step_size * direction(moment.functional, x, self.kernel)
        return replace(moment, particles=moved, time=moment.time + step_size)


@dataclass(frozen=True)
class _Split(Functional):
    """A functional whose entropies are fitted only where they are asked for."""

    whole: Functional

    def terms(self):
        return self.whole.terms()

    def fitted(self, particles, generator=None):
        parts = (
            term
            if isinstance(term.functional, Entropy)
            else term._replace(functional=term.functional.fitted(particles, generator))
            for term in self.terms()
        )
        return _Split(Sum(tuple(parts)))

    def value(self, particles):
        return self.whole.fitted(particles).value(particles)

    def velocity(self, particles):
        return self.whole.fitted(particles).velocity(particles)

    def first_variation(self, particles):
        return self.whole.fitted(particles).first_variation(particles)


def direction(functional: Functional, particles: Tensor, kernel: SteinKernel, at: Tensor | None = None) -> Tensor:
    """phi of `SteinFlow` at the particles (N, *shape), or at other points `at` (n, *shape)."""
    at = particles if at is None else at
    y, x = (points_of(points).to(torch.promote_types(points.dtype, torch.float32)) for points in (particles, at))
    temperature, rest = 0.0, []
    for term in functional.terms():
        if isinstance(term.functional, Entropy):
            temperature += term.weight
        else:
            rest.append(term)
    forces = Sum(tuple(rest)).velocity(particles).flatten(1).to(y.dtype) if rest else torch.zeros_like(y)
    kernel = kernel.held(y)
    rows = [kernel.smoothed(x[part], y, forces, temperature) for part in chunks(len(x), len(y))]
    return (torch.cat(rows) / len(y)).to(at.dtype).view(at.shape)


@torch.no_grad()
def median_bandwidth(points: Tensor) -> float:
    """h of the median rule for points (N, d), sqrt(median / log N) with log 2 at least; 1 for a single point."""
    number = len(points)
    if number == 1:
        return 1.0
    some = points[:: -(-number // MEDIAN_OF)]
    squared = float(torch.pdist(some - some.mean(0)).square().median())
    if not squared > 0:
        raise UserError(f"most of the {number} particles are all in one place, expected a spread; give the bandwidth")
    return math.sqrt(squared / math.log(max(number, 2)))
