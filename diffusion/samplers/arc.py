"""The arc: variables in which the ODE of every field is nearly a straight line.

For x_t = alpha x0 + sigma z and data of a standard deviation near c, let

    angle  = atan(sigma / (c alpha)),    radius = sqrt(sigma^2 + (c alpha)^2).

Then x / radius turns with d(x / radius) / d(angle) = slope, where

    slope = (velocity - (radius' / radius) x) / (radius angle').

The slope is 0 for Gaussian data of covariance c^2 I, whatever alpha and sigma are: VE, VP and linear become one ODE,
smooth up to both of its ends, alpha = 0 (angle pi/2) and sigma = 0 (angle 0). It is what "v" networks predict (Salimans
& Ho 2022, arXiv 2202.00512, app. D) and, up to its sign, the raw output of a network in EDM's wrap (Karras et al. 2022,
arXiv 2206.00364, eq. 7).

With Student-t noise (PFGM++, gravity) sigma is what the noise of each sample really is: Gaussian noise of an unknown
scale sigma R, of which the place at the horizon tells: R^2 = (D + |z|^2) / (D + d) with z = x_T / sigma_T, the inverse
of the posterior mean of its precision. So each sample has an arc, and times, of its own.

Fields that are not affine take alpha = 1, sigma = t where their time runs over decades, or else alpha = 1 - t/T,
sigma = t/T; the velocity alone enters, so that nothing is lost but some smoothness.

Shapes: times are (rows, n), with a row for each sample, or one for all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion.fields import AffineField, Field, StudentT
from diffusion.fields.affine import Schedule

USUAL_STD = 0.8  # of data, where a model does not tell: between images in [-1, 1] and standardised points


@runtime_checkable
class Measured(Protocol):
    """A model that knows the standard deviation per coordinate of its data."""

    data_std: float


def data_std(model) -> float:
    """Standard deviation per coordinate of the data of a model, or the usual one where it does not tell."""
    std = float(model.data_std) if isinstance(model, Measured) else USUAL_STD
    return std if 0 < std < math.inf else USUAL_STD  # data that do not vary have none


def data_mean(model) -> Tensor | None:
    """Mean of the data of a model, of the shape of one point, or None where it does not tell.

    A model whose conditions move the mean has none to tell.
    """
    return getattr(model, "data_mean", None)


def coefficients(field: Field, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma as `schedule` has them, without the derivatives, which cost most."""
    if not isinstance(field, AffineField):
        return schedule(field, t)[:2]
    flat = t.double().flatten()
    return field.alpha(flat).view(t.shape), field.sigma(flat).view(t.shape)


def schedule(field: Field, t: Tensor) -> Schedule:
    """alpha, sigma and their derivatives at the times `t`, in its shape and float64, in which any field is seen."""
    t = t.double()
    if isinstance(field, AffineField):
        flat = t.flatten()
        coefficients = field.schedule(flat[:, None], flat)
        return Schedule(*(c.view(t.shape) for c in coefficients))
    one, horizon = torch.ones_like(t), field.horizon
    if field.rho > 1:
        return Schedule(one, t, 0 * one, one)
    return Schedule(1 - t / horizon, t / horizon, -one / horizon, one / horizon)


def solve_times(field: Field, clock: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The times, float64, from t_min to T at which a rising clock has these values, by bisection in t^(1/rho)."""
    low, high = (torch.full_like(values, end ** (1 / field.rho)) for end in (field.t_min, field.horizon))
    for _ in range(64):
        middle = (low + high) / 2
        beyond = clock(middle**field.rho) > values
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (high**field.rho).clamp(field.t_min, field.horizon)


def times_of_noise(field: Field, levels: Tensor) -> Tensor:
    """The times, float64, at which sigma / alpha has these levels, or the nearest of t_min and T."""

    def ratio(t: Tensor) -> Tensor:
        alpha, sigma = coefficients(field, t)
        return sigma / alpha

    return solve_times(field, ratio, levels)


def noise_scales(field: Field, x: Tensor) -> Tensor:
    """R (rows, 1) float64 on the CPU, for states `x` at the horizon."""
    if not (isinstance(field, AffineField) and isinstance(field.base, StudentT)):
        return torch.ones(1, 1, dtype=torch.float64)
    D, d = field.base.dof, x[0].numel()
    sigma = field.sigma(torch.tensor(field.horizon, dtype=torch.float64))
    squared = x.flatten(1).cpu().double().square().sum(1, keepdim=True) / sigma.square()
    return ((D + squared) / (D + d)).sqrt()


class Places(NamedTuple):
    """Places on the arc, (rows, n) float64 each; slope = (velocity - drift x) / speed."""

    angle: Tensor
    radius: Tensor
    drift: Tensor  # d log(radius) / dt
    speed: Tensor  # radius d(angle) / dt
    noise_to_signal: Tensor  # R sigma / alpha

    def to(self, x: Tensor) -> "Places":
        """In the dtype and on the device of `x`."""
        return Places(*(value.to(x) for value in self))


class Arc:
    """The arcs of a field.

    Args:
        scale: c.
        noise: R (rows, 1).
    """

    def __init__(self, field: Field, scale: float | Tensor, noise: Tensor):
        self.field, self.scale, self.noise = field, scale, noise

    def at(self, t: Tensor) -> Places:
        alpha, sigma, alpha_dot, sigma_dot = schedule(self.field, t)
        noise, noise_dot = self.noise.to(t.device) * sigma, self.noise.to(t.device) * sigma_dot
        signal, signal_dot = self.scale * alpha, self.scale * alpha_dot
        radius = (signal.square() + noise.square()).sqrt()
        turn, drift = signal * noise_dot - noise * signal_dot, noise * noise_dot + signal * signal_dot
        return Places(torch.atan2(noise, signal), radius, drift / radius.square(), turn / radius, noise / alpha)

    def times(self, angles: Tensor) -> Tensor:
        """Where the angle has these values, (rows, n)."""
        return solve_times(self.field, lambda t: self.at(t).angle, angles)


def column(values: Tensor, n: int, x: Tensor) -> Tensor:
    """The n-th column of values (rows, N), shaped to broadcast against `x`."""
    return values[:, n].view(-1, *[1] * (x.dim() - 1))


def slope(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, at: Places, n: int) -> Tensor:
    """The slope (B, *shape) at `x` and the n-th of the times `t` (rows, N): one evaluation of the velocity."""
    return (velocity(x, t[:, n]) - column(at.drift, n, x) * x) / column(at.speed, n, x)
