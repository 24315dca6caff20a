"""Families of test functions in one coordinate, each with the quadrature of Gauss that goes with it.

A basis of order N is N orthonormal functions phi_0, ..., phi_(N-1) and N nodes x_q with weights w_q, for which the
matrix V_qk = phi_k(x_q) sqrt(w_q) is orthogonal. A function u in the span is so held by its coefficients c or, the same
by a turn, by its numbers V c at the nodes, u(x_q) sqrt(w_q). Products with functions of x are then diagonal, and
derivatives are the matrix V B V^T, with B_jk = <phi_j, phi_k'> (Light, Hamilton & Lill 1985, "discrete variable
representation").

Each basis also has a positive tilt chi: the ratios phi_k / chi are the test functions, and 1 is among them.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.laws import GaussianMixture

MOST = 600  # functions of a basis: beyond it those of Hermite underflow


class Rule(NamedTuple):
    """Nodes of a basis and what follows from them, float64.

    Attributes:
        nodes: x (N,), rising.
        roots: sqrt(w) (N,).
        modes: V (N, N), a node a row.
        slopes: B (N, N), <phi_j, phi_k'>.
    """

    nodes: Tensor
    roots: Tensor
    modes: Tensor
    slopes: Tensor

    @property
    def derivative(self) -> Tensor:
        """V B V^T: from the numbers of u at the nodes to those of u'."""
        return self.modes @ self.slopes @ self.modes.mT


def _check_order(order: int) -> None:
    if not isinstance(order, int) or not 1 <= order <= MOST:
        raise UserError(f"order is {order!r}, expected a whole number of test functions from 1 to {MOST}")


def _check_interval(low: float, high: float) -> None:
    try:
        rising = -math.inf < float(low) < float(high) < math.inf
    except (TypeError, ValueError):
        rising = False
    if not rising:
        raise UserError(f"the interval is from {low!r} to {high!r}, expected two rising, finite numbers")


class Basis(ABC):
    """N orthonormal functions on a part of the line.

    Attributes:
        order: N.
        low, high: the ends of that part; a density outside is 0, unless it is periodic.
        degrees: of the functions (N,), rising: polynomial degree, or frequency.
    """

    order: int
    low: float
    high: float

    @property
    def degrees(self) -> Tensor:
        return torch.arange(self.order)

    @abstractmethod
    def rule(self) -> Rule:
        """Nodes, weights and matrices."""

    @abstractmethod
    def functions(self, x: Tensor) -> Tensor:
        """phi_k(x), (M, N), at `x` (M,)."""

    @abstractmethod
    def of_order(self, order: int) -> "Basis":
        """The same family with at least `order` functions."""

    def log_tilt(self, x: Tensor) -> Tensor:
        """log chi(x), (M,)."""
        return torch.zeros_like(x)

    def tilt_slope(self, x: Tensor) -> Tensor:
        """(log chi)'(x), (M,)."""
        return torch.zeros_like(x)

    def holds(self, x: Tensor) -> Tensor:
        """Whether the points (M,) are in its part of the line."""
        return (x >= self.low) & (x <= self.high)


def _three_terms(order: int, z: Tensor, first: Tensor, ratios: list[float]) -> Tensor:
    """Columns f_k with z f_k = b_(k+1) f_(k+1) + b_k f_(k-1), f_0 = `first`, b_1, b_2, ... = `ratios`."""
    columns, before, b = [first], torch.zeros_like(first), 0.0
    for following in ratios[: order - 1]:
        columns.append((z * columns[-1] - b * before) / following)
        before, b = columns[-2], following
    return torch.stack(columns, 1)


def _gauss(order: int, ratios: list[float], functions) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, roots of weights and V for orthonormal polynomials times sqrt of their weight (Golub & Welsch 1969)."""
    nodes = torch.from_numpy(eigvalsh_tridiagonal([0.0] * order, ratios[: order - 1]))
    nodes = (nodes - nodes.flip(0)) / 2
    values = functions(nodes)
    roots = values.square().sum(1).rsqrt()
    modes = values * roots[:, None]
    for _ in range(2):  # orthogonal to rounding
        modes = modes @ (1.5 * torch.eye(order, dtype=torch.float64) - 0.5 * modes.mT @ modes)
    return nodes, roots, modes


def _hermite_ratios(order: int) -> list[float]:
    return [math.sqrt(k) for k in range(1, order)]


def _legendre_ratios(order: int) -> list[float]:
    return [k / math.sqrt(4 * k * k - 1) for k in range(1, order)]


def _hermite(order: int, z: Tensor) -> Tensor:
    """Hermite functions: polynomials orthonormal under the standard Gaussian, times the root of its density."""
    return _three_terms(order, z, math.tau**-0.25 * (-z.square() / 4).exp(), _hermite_ratios(order))


def _legendre(order: int, z: Tensor) -> Tensor:
    """Orthonormal on [-1, 1]."""
    return _three_terms(order, z, torch.full_like(z, math.sqrt(0.5)), _legendre_ratios(order))


@lru_cache(maxsize=64)
def _hermite_rule(order: int) -> Rule:
    nodes, roots, modes = _gauss(order, _hermite_ratios(order), lambda z: _hermite(order, z))
    upper = torch.diag(torch.arange(1, order, dtype=torch.float64).sqrt() / 2, 1)
    return Rule(nodes, roots, modes, upper - upper.mT)


@lru_cache(maxsize=64)
def _legendre_rule(order: int) -> Rule:
    nodes, roots, modes = _gauss(order, _legendre_ratios(order), lambda z: _legendre(order, z))
    k = torch.arange(order, dtype=torch.float64)
    odd = (k[None] - k[:, None]) % 2 == 1
    slopes = torch.triu(((2 * k[:, None] + 1) * (2 * k + 1)).sqrt() * odd, 1)
    return Rule(nodes, roots, modes, slopes)


@lru_cache(maxsize=64)
def _fourier_rule(order: int) -> Rule:
    nodes = math.tau * (torch.arange(order, dtype=torch.float64) + 0.5) / order - math.pi
    roots = torch.full_like(nodes, math.sqrt(math.tau / order))
    slopes = torch.zeros(order, order, dtype=torch.float64)
    cosines = torch.arange(1, order, 2)
    frequencies = (cosines + 1.0) / 2
    slopes[cosines + 1, cosines], slopes[cosines, cosines + 1] = -frequencies.double(), frequencies.double()
    return Rule(nodes, roots, _fourier(order, nodes) * roots[:, None], slopes)


def _fourier(order: int, z: Tensor) -> Tensor:
    """1, cos z, sin z, cos 2z, sin 2z, ... orthonormal on a circle."""
    angles = z[:, None] * torch.arange(1, order // 2 + 1, dtype=z.dtype, device=z.device)
    waves = torch.stack([angles.cos(), angles.sin()], 2).reshape(len(z), order - 1) / math.sqrt(math.pi)
    return torch.cat([torch.full_like(z, 1 / math.sqrt(math.tau))[:, None], waves], 1)


class _Scaled(Basis):
    """A basis in z = (x - middle) / scale.

    Args:
        middle, scale: of the coordinate.
    """

    middle: float
    scale: float

    @staticmethod
    @abstractmethod
    def _unit_rule(order: int) -> Rule: ...

    @staticmethod
    @abstractmethod
    def _unit_functions(order: int, z: Tensor) -> Tensor: ...

    def rule(self) -> Rule:
        nodes, roots, modes, slopes = self._unit_rule(self.order)
        return Rule(self.middle + self.scale * nodes, roots * math.sqrt(self.scale), modes, slopes / self.scale)

    def functions(self, x: Tensor) -> Tensor:
        return self._unit_functions(self.order, (x - self.middle) / self.scale) / math.sqrt(self.scale)


class Hermite(_Scaled):
    """Hermite functions of the line: polynomials of degree below N times the root of a Gaussian density.

    The tilt is that root, so that the test functions are the polynomials and a density is the Gaussian times a
    polynomial. It converges where p^2 over the Gaussian can be integrated: a Gaussian tail of p must be narrower than
    sqrt(2) scale.

    Args:
        order: N.
        mean, scale: of the Gaussian.
    """

    low, high = -math.inf, math.inf
    _unit_rule, _unit_functions = staticmethod(_hermite_rule), staticmethod(_hermite)

    def __init__(self, order: int, mean: float = 0.0, scale: float = 1.0):
        _check_order(order)
        if not (math.isfinite(mean) and math.isfinite(scale) and scale > 0):
            raise UserError(f"Hermite has mean {mean} and scale {scale}, expected finite numbers and a positive scale")
        self.order, self.middle, self.scale = order, float(mean), float(scale)

    @classmethod
    def adapted(cls, order: int, to: Tensor | GaussianMixture) -> tuple["Hermite", ...]:
        """One basis for each coordinate, with the means and standard deviations of samples (M, d) or of a law."""
        if isinstance(to, Tensor):
            if to.dim() != 2 or len(to) < 2:
                raise UserError(f"the samples have shape {tuple(to.shape)}, expected (M, d) with M at least 2")
            means, stds = to.double().mean(0), to.double().std(0)
        else:
            means, stds = to.mean, to.covariance.diagonal().sqrt()
        return tuple(cls(order, mean, std) for mean, std in zip(means.tolist(), stds.tolist(), strict=True))

    def of_order(self, order: int) -> "Hermite":
        return Hermite(order, self.middle, self.scale)

    def log_tilt(self, x: Tensor) -> Tensor:
        return -((x - self.middle) / self.scale).square() / 4 - math.log(math.tau * self.scale**2) / 4

    def tilt_slope(self, x: Tensor) -> Tensor:
        return -(x - self.middle) / (2 * self.scale**2)


class Legendre(_Scaled):
    """Polynomials of degree below N on an interval; its ends let nothing through (reflecting), of themselves.

    Args:
        order: N.
        low, high: the ends.
    """

    _unit_rule, _unit_functions = staticmethod(_legendre_rule), staticmethod(_legendre)

    def __init__(self, order: int, low: float, high: float):
        _check_order(order)
        _check_interval(low, high)
        self.order, self.low, self.high = order, float(low), float(high)
        self.middle, self.scale = (low + high) / 2, (high - low) / 2

    def of_order(self, order: int) -> "Legendre":
        return Legendre(order, self.low, self.high)


class Fourier(_Scaled):
    """1 and the waves of frequency 1 to (N - 1) / 2 on a periodic interval.

    The fewest unknowns also where the density dies out inside the interval, which need not be periodic then.

    Args:
        order: N, odd.
        low, high: ends of a period.
    """

    _unit_rule, _unit_functions = staticmethod(_fourier_rule), staticmethod(_fourier)

    def __init__(self, order: int, low: float, high: float):
        _check_order(order)
        _check_interval(low, high)
        if order % 2 == 0:
            raise UserError(f"Fourier has order {order}, expected an odd number (1, cosines and sines): {order + 1}")
        self.order, self.low, self.high = order, float(low), float(high)
        self.middle, self.scale = (low + high) / 2, (high - low) / math.tau

    @property
    def degrees(self) -> Tensor:
        return (torch.arange(self.order) + 1) // 2

    def of_order(self, order: int) -> "Fourier":
        return Fourier(order + 1 - order % 2, self.low, self.high)

    def holds(self, x: Tensor) -> Tensor:
        return torch.isfinite(x)
