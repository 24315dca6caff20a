"""The entropy of particles that are blurred by a kernel: the blob method."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.weighting import wide
from diffusion.gradient_flow.functionals.base import chunks, points_of
from diffusion.gradient_flow.scores.base import ScoreEstimator


@dataclass(frozen=True)
class Blob(ScoreEstimator):
    """F[q] = E log (K * q), with K the Gaussian kernel of standard deviation h.

    The regularisation of the entropy by Carrillo, Craig and Patacchini (2019, arXiv 1709.09195, eq. 1.12): a functional
    of any law, of particles too, whose first variation log(K * q) + K * (q / (K * q)) has both terms, so that value and
    score belong together to rounding and particles that follow the score bring the value down. As h goes to 0, slower
    than the distance between particles, it becomes E log q.

    A particle is at distance 0 of itself, so its sum of kernels is at least 1, and nothing underflows.

    It is an estimate for few dimensions. The score of 400 particles of a Gaussian is wrong by 0.3 of itself in 2
    dimensions, by 0.7 in 5, and in 10 there is next to none, as few particles are within h of another; that of 8 modes
    on a ring is wrong by 0.8 with the rule, whose h is as wide as the modes lie apart, and by 0.4 with a third of it.
    SteinScore does better in all of these, but has no value.

    Args:
        bandwidth: h, per coordinate; without it Silverman's rule (1986, eq. 4.14) chooses it for the particles to which
            it is fitted, and holds it until it is fitted again.
        held: what the rule chose.

    Raises:
        UserError: bandwidth is no positive number; or the rule meets particles that are all in one place.
    """

    bandwidth: float | None = None
    held: float | None = None

    def __post_init__(self):
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise UserError(f"bandwidth is {self.bandwidth}, expected a positive number, or None for Silverman's rule")

    def fitted(self, particles, generator=None):
        return self if self.bandwidth is not None else replace(self, held=silverman(particles))

    def value(self, particles):
        log_density, _ = self._log_density(particles)
        return log_density.mean().to(particles.dtype)

    def log_density(self, particles):
        log_density, sums = self._log_density(particles)
        points, h = _single(particles), self._width(particles)
        shares = [(kernel / sums).sum(1) for _, kernel in _kernels(points, h)]
        return (log_density + torch.cat(shares) - 1).to(particles.dtype)

    @torch.no_grad()
    def score(self, particles):
        points, h = _single(particles), self._width(particles)
        points = points - points.mean(0)
        parts = list(chunks(len(points), len(points)))
        kept = list(_kernels(points, h)) if len(parts) == 1 else None  # else made twice
        sums = torch.cat([kernel.sum(1) for _, kernel in kept or _kernels(points, h)])
        rows = []
        for part, kernel in kept or _kernels(points, h):
            weights = kernel * (sums[part, None].reciprocal() + sums.reciprocal())
            rows.append((weights @ points - weights.sum(1, keepdim=True) * points[part]) / h**2)
        return torch.cat(rows).to(particles.dtype).view(particles.shape)

    def _width(self, particles: Tensor) -> float:
        return self.bandwidth or self.held or silverman(particles)

    def _log_density(self, particles: Tensor) -> tuple[Tensor, Tensor]:
        """log (K * q) at the particles (N,), and their sums of kernels (N,)."""
        points, h = _single(particles), self._width(particles)
        number, dim = points.shape
        sums = torch.cat([kernel.sum(1) for _, kernel in _kernels(points, h)])
        return sums.log() - math.log(number) - 0.5 * dim * math.log(math.tau * h**2), sums


def silverman(particles: Tensor) -> float:
    """s (4 / ((d + 2) N))^(1 / (d + 4)), with s^2 the mean variance of a coordinate."""
    points = points_of(particles.detach())
    number, dim = points.shape
    spread = float(points.to(wide(points.device)).var(0, correction=0).mean().sqrt())
    if not spread > 0:
        raise UserError(f"the {number} particles are all in one place, expected a spread; give the bandwidth")
    return spread * (4 / ((dim + 2) * number)) ** (1 / (dim + 4))


def _single(particles: Tensor) -> Tensor:
    """Points (N, d), of float32 at least."""
    points = points_of(particles)
    return points.to(torch.promote_types(points.dtype, torch.float32))


def _kernels(points: Tensor, h: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows of exp(-|x_i - x_j|^2 / (2 h^2)), some at a time, (n, N)."""
    points = (points - points.detach().mean(0)) / h
    halves = 0.5 * points.square().sum(1)
    for part in chunks(len(points), len(points)):
        exponents = points[part] @ points.T - halves[part, None] - halves
        exponents.diagonal(part.start).zero_()  # far out it is lost in rounding
        yield part, exponents.clamp_max(0).exp()
