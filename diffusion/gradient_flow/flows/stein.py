"""Stein variational gradient descent: the flow of tau * Entropy + R in the metric of a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.flows.langevin import split_of
from diffusion.gradient_flow.functionals.base import Functional, chunks, points_of
from diffusion.gradient_flow.functionals.kernels import Gaussian, Kernel, Scaled, kernel_of, median_distance


@dataclass(frozen=True)
class SteinFlow(Flow):
    """x + h phi(x), phi(x) = E_y[k(x, y) b(y) + tau grad_y k(x, y)], for F = tau * Entropy + R.

    Here y ~ q and b = -grad dR/dq: Liu and Wang 2016, arXiv 1608.04471, eq. 8. The entropy needs no estimate: by parts
    it became the gradient of the kernel, which drives particles apart. Without an entropy it is the velocity smoothed
    by the kernel. F falls by the squared kernel Stein discrepancy (Liu 2017, arXiv 1704.07520). One
    particle goes to a mode.

    Args:
        functional: tau * Entropy + R, such as KL(target).
        kernel: positive definite: Gaussian, InverseMultiquadric, which is slow to decay and sees mass escape (Gorham
            and Mackey 2017, arXiv 1703.01717), or a function of points (n, d), (m, d) -> (n, m) in torch operations,
            such as lambda x, y: x @ y.T + 1, by which a flow to a Gaussian keeps every Gaussian one (Liu and Wang
            2018, arXiv 1810.11693). One without a bandwidth has `median_rule` of the particles of each step.

    Raises:
        UserError: the kernel is none; the median rule meets particles that are all in one place.
    """

    functional: Functional
    kernel: Kernel | Callable[[Tensor, Tensor], Tensor] = field(default_factory=Gaussian)

    def __post_init__(self):
        object.__setattr__(self, "kernel", kernel_of(self.kernel))

    def subject(self):
        return split_of(self.functional)

    def begin(self, particles):
        return None

    def advance(self, moment, step_size, generator):
        x = moment.particles
        moved = x + step_size * direction(moment.functional, x, self.kernel)
        return replace(moment, particles=moved, time=moment.time + step_size)


def direction(functional: Functional, particles: Tensor, kernel: Kernel, at: Tensor | None = None) -> Tensor:
    """phi of `SteinFlow` at the particles (N, *shape), or at other points `at` (n, *shape)."""
    at = particles if at is None else at
    y, x = (points_of(points).to(torch.promote_types(points.dtype, torch.float32)) for points in (particles, at))
    split = split_of(functional)
    forces = split.rest.velocity(particles).flatten(1).to(y.dtype) if split.rest.parts else torch.zeros_like(y)
    if isinstance(kernel, Scaled) and kernel.bandwidth is None:
        kernel = replace(kernel, bandwidth=median_rule(y))
    rows = []
    for part in chunks(len(x), len(y)):
        with torch.no_grad():
            pulled = kernel.matrix(x[part], y) @ forces
        rows.append(pulled + split.temperature * kernel.slopes_there(x[part], y))
    return (torch.cat(rows) / len(y)).to(at.dtype).view(at.shape)


def median_rule(points: Tensor) -> float:
    """The bandwidth h of points (N, d) with 2 h^2 = median_{i<j} |x_i - x_j|^2 / log N; 1 for a single point.

    With it sum_j exp(-|x_i - x_j|^2 / (2 h^2)) is about 1, what x_i itself adds (Liu and Wang 2016, section 5).

    Raises:
        UserError: the median is 0.
    """
    number = len(points)
    return median_distance(points) / math.sqrt(2 * math.log(number)) if number > 1 else 1.0
