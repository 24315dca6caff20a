"""A nonparametric score in closed form: a Gaussian's, corrected by kernels whose weights match the score."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.scores.base import ScoreEstimator
from diffusion.gradient_flow.scores.kernel_family import Frame, Kernels

SCALES = tuple(2.0**power for power in range(-4, 3))  # bandwidths over the median distance
FIRST = SCALES[1:-1]
ERRORS = 2.0  # standard errors of a loss that are added to it
RIDGES = tuple(10.0**-power for power in range(7))


class Choice(NamedTuple):
    """What is held between fits.

    Attributes:
        centres: z, (M, d), some of the particles.
        round: whether kernels are round in the coordinates of the particles, or else in whitened ones.
        scale: bandwidth over the median distance of the centres.
        ridge: lambda; infinite for no correction.
    """

    centres: Tensor
    round: bool
    scale: float
    ridge: float


@dataclass(frozen=True)
class SteinScore(ScoreEstimator):
    """log q(x) = -|u|^2 / 2 + sum_m a_m exp(-|y - z_m|^2 / (2 h^2)), with u the whitened x, and y = u or y ~ x.

    The weights minimise the mean of |s|^2 / 2 + div s over the particles for s the gradient in u (score matching,
    Hyvarinen 2005), plus lambda times the norm of the sum in the space of the kernel: linear equations of M unknowns.
    By Stein's identity these say that s is the projection of the true score on the gradients of kernels. It is the
    kernel exponential family (Sriperumbudur et al. 2017, arXiv 1312.3516) on few centres (Sutherland et al. 2018, arXiv
    1705.08360), the curl-free one of the estimators of Zhou, Shi and Zhu (2020, arXiv 2005.10099), of which the Stein
    gradient estimator (Li and Turner 2018, arXiv 1705.07107) is another.

    Whether kernels are round in u or in x, h and lambda are those of the lowest loss of each half of the particles
    under the weights of the other, with two standard errors added, as narrow kernels have noisy losses: out of all
    where it is fitted first, then out of those near the last choice. Where none is below 0 it is the Gaussian alone.

    One fit costs N M^2, a choice a few of them. Everything is float64.

    Args:
        centres: M, or all particles where they are fewer; drawn anew with each fit.
        held: the choice.

    Raises:
        UserError: centres is not positive; the particles span no volume; a value, as the density is not normalised.
    """

    centres: int = 200
    held: Choice | None = None

    def __post_init__(self):
        if not isinstance(self.centres, int) or self.centres < 1:
            raise UserError(f"centres is {self.centres!r}, expected a whole number of 1 or more")

    def fitted(self, particles, generator=None):
        return replace(self, held=self._choice(particles, generator))

    def value(self, particles):
        raise UserError(
            "the density of a Stein score is not normalised, expected an estimator with a value such as Blob() or "
            "GaussianScore()"
        )

    @torch.no_grad()
    def log_density(self, particles):
        frame, kernels, weights = self._solved(particles)
        return (kernels.sums(frame.u, weights) - 0.5 * frame.u.square().sum(1)).to(particles.dtype)

    @torch.no_grad()
    def score(self, particles):
        frame, kernels, weights = self._solved(particles)
        score = frame.unwhitened(kernels.gradient(frame.u, weights) - frame.u)
        return score.to(particles.dtype).view(particles.shape)

    def _solved(self, particles: Tensor) -> tuple[Frame, Kernels, Tensor]:
        choice, frame = self.held or self._choice(particles, None), Frame.of(particles)
        kernels = Kernels.of(frame, choice.centres.to(frame.u), choice.round, choice.scale)
        (moments,) = kernels.moments(frame.u, torch.zeros(len(frame.u), device=frame.u.device), 1)
        return frame, kernels, kernels.solve(moments, choice.ridge)

    @torch.no_grad()
    def _choice(self, particles: Tensor, generator: torch.Generator | None) -> Choice:
        frame = Frame.of(particles)
        generator = generator or torch.Generator().manual_seed(0)
        order = torch.randperm(len(frame.u), generator=generator, device=generator.device).to(frame.u.device)
        centres = particles.detach().flatten(1).to(frame.u)[order[: self.centres]]
        half = torch.empty_like(order)
        half[order] = torch.arange(len(order), device=order.device) % 2
        best, lowest = Choice(centres, *self._candidates()[0], math.inf), math.inf
        for round, scale in self._candidates():
            kernels = Kernels.of(frame, centres, round, scale)
            parts = kernels.moments(frame.u, half, 2)
            ridges, losses = self._ridges(), []
            for mine, other in ((0, 1), (1, 0)):
                weights = [kernels.solve(parts[mine], ridge, share=0.5) for ridge in ridges]
                losses.append(kernels.losses(frame.u[half == other], torch.stack(weights, 1)))
            spread, mean = torch.std_mean(torch.cat(losses), 0)
            bound = mean + ERRORS * spread / len(order) ** 0.5
            if float(bound.min()) < lowest:
                best, lowest = Choice(centres, round, scale, ridges[int(bound.argmin())]), float(bound.min())
        return best if lowest < 0 else best._replace(ridge=math.inf)

    def _ridges(self) -> tuple[float, ...]:
        if self.held is None or self.held.ridge == math.inf:
            return RIDGES
        now = RIDGES.index(self.held.ridge)
        return RIDGES[max(0, now - 1) : now + 2]

    def _candidates(self) -> list[tuple[bool, float]]:
        if self.held is None:
            return [(round, scale) for round in (False, True) for scale in FIRST]
        now = SCALES.index(self.held.scale)
        near = SCALES[max(0, now - 1) : now + 2]
        return [*((self.held.round, scale) for scale in near), (not self.held.round, self.held.scale)]
