"""Laws and fields such as a user might invent, for the shared list of fields in problems.py."""

import math

import torch
from torch import Tensor
from torch.distributions import Laplace, Uniform
from torch.nn import functional as F

from diffusion.fields import (
    AffineField,
    Field,
    Law,
    PrincipalGaussian,
    Product,
    RadialField,
    TrajectoryField,
    drifting,
    expand_time,
    laplace,
    straight,
)


class Logistic(Law):
    """A law of one's own, with independent logistic coordinates: the two methods that a Law needs, and its std."""

    std = math.pi / math.sqrt(3)

    def draw(self, size, generator=None, dtype=None, device=None):
        return torch.rand(size, generator=generator, dtype=dtype, device=device).logit()

    def log_prob(self, z):
        return (-z - 2 * F.softplus(-z)).flatten(1).sum(1)


def cosine_laplace() -> AffineField:
    return AffineField(
        lambda t: (0.5 * math.pi * t).cos(), lambda t: (0.5 * math.pi * t).sin(), Product(Laplace(0.0, 1.0)), 1.0
    )


def half_uniform() -> AffineField:
    """alpha does not vanish at the horizon, and p_t has jumps."""
    law = Product(Uniform(-2.0, 2.0, validate_args=False))
    return AffineField(lambda t: 1 - 0.5 * t, lambda t: 3 * t + t.square(), law, 1.0)


def quadratic_logistic() -> AffineField:
    return AffineField(lambda t: (1 + t).reciprocal(), lambda t: t + t.square(), Logistic(), 4.0, rho=3.0)


def narrowing() -> RadialField:
    """A radial law of one's own, without an inverse, that changes its shape with time and does not grow like t."""
    return RadialField(lambda r, t: -torch.expm1(-((r / (t + t.square())) ** (4 + t)) / 2), 3, 5.0, rho=5.0)


def principal() -> TrajectoryField:
    """Straight lines to a Gaussian with a mean and correlations, in three coordinates."""
    u = torch.tensor([[2.0, 1.0, 2.0], [1.0, 2.0, -2.0]], dtype=torch.float64) / 3
    return straight(PrincipalGaussian([0.5, -1.0, 2.0], u.tolist(), [4.0, 0.3], 0.7))


def coupled() -> TrajectoryField:
    """Lines to a prior whose coordinates mix on the way, in two dimensions: nothing is known but the map."""

    def trajectory(x0: Tensor, x_T: Tensor, t: Tensor) -> Tensor:
        mixed = torch.stack([x_T[..., 0] + 0.6 * x_T[..., 1].sin(), x_T[..., 1] - 0.8 * x_T[..., 0].tanh()], -1)
        return (1 - t) * x0 + t * (1 - t) * x0.flip(-1).sin() + t * mixed

    return TrajectoryField(trajectory, laplace(), 1.0)


def swirling() -> TrajectoryField:
    """The centre moves along a curve, with coordinates that mix, while the noise grows as the sine."""
    return drifting(
        lambda x0, t: (1 - t) * x0 + t * (1 - t) * x0.roll(1, -1).square(), lambda t: (0.5 * math.pi * t).sin()
    )


class Sheared(Field):
    """x = x0 + t (I + t N) z with z Gaussian and N of square zero, in an even number of dimensions.

    The Jacobian I / t + N of the velocity has entries off the diagonal, so that random probes of its trace scatter.
    """

    horizon = 1.0

    def __init__(self, shear: float):
        self.shear = shear

    def _mix(self, x: Tensor) -> Tensor:
        """N x: the second half of the coordinates, cumulated, in the place of the first."""
        half = x.shape[1] // 2
        return torch.cat([self.shear * x[:, half:].cumsum(1), torch.zeros_like(x[:, half:])], 1)

    def sample(self, x0, t, generator=None):
        z, t = torch.randn(x0.shape, generator=generator, dtype=x0.dtype), expand_time(t, x0)
        return x0 + t * (z + t * self._mix(z))

    def velocity(self, x, t, x0):
        return (x - x0) / expand_time(t, x) + self._mix(x - x0)

    def log_prob(self, x, t, x0):
        t = expand_time(t, x)
        z = (x - x0) / t - self._mix(x - x0)
        return -0.5 * (z.square() + math.log(math.tau)).sum(1) - x.shape[1] * t.flatten().log()
