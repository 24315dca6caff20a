"""Time grids: where a fixed-step sampler stops on its way from the horizon to t_min."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.base import Field
from diffusion.samplers.arc import coefficients, solve_times


class Grid(ABC):
    """A rule that lays times for any field."""

    @abstractmethod
    def __call__(self, field: Field, points: int) -> Tensor:
        """`points` falling times from ``field.horizon`` to ``field.t_min``, (points,) float64."""


def a_grid(grid: object) -> None:
    """
    Raises:
        UserError: it is no grid.
    """
    if not isinstance(grid, Grid):
        raise UserError(f"sampler has grid={grid!r}, expected a grid, such as PowerGrid")


@dataclass(frozen=True)
class PowerGrid(Grid):
    """Even in t^(1/rho) (Karras et al. 2022, eq. 5); rho = 1 is uniform in t.

    Args:
        rho: None takes the field's own clock: 7 for VE, PFGM++ and gravity, 1 for VP and linear.
    """

    rho: float | None = None

    def __post_init__(self):
        if self.rho is not None and not (isinstance(self.rho, int | float) and 0 < self.rho < math.inf):
            raise UserError(f"PowerGrid has rho={self.rho!r}, expected a positive number, such as 7, or None")

    def __call__(self, field: Field, points: int) -> Tensor:
        rho = field.rho if self.rho is None else self.rho
        first, last = field.horizon ** (1 / rho), field.t_min ** (1 / rho)
        times = torch.linspace(first, last, points, dtype=torch.float64) ** rho
        times[-1], times[0] = field.t_min, field.horizon
        return times


@dataclass(frozen=True)
class SigmaGrid(Grid):
    """Even in sigma_t^(1/rho), EDM's rule for fields whose sigma is not t (Karras et al. 2022, eq. 5)."""

    rho: float = 7.0

    def __post_init__(self):
        if not (isinstance(self.rho, int | float) and 0 < self.rho < math.inf):
            raise UserError(f"SigmaGrid has rho={self.rho!r}, expected a positive number, such as 7")

    def __call__(self, field: Field, points: int) -> Tensor:
        def clock(t: Tensor) -> Tensor:
            return coefficients(field, t)[1] ** (1 / self.rho)

        first, last = clock(torch.tensor([field.horizon, field.t_min], dtype=torch.float64)).tolist()
        return _between(field, solve_times(field, clock, torch.linspace(first, last, points, dtype=torch.float64)))


@dataclass(frozen=True)
class LogSNRGrid(Grid):
    """Even in log(sigma / alpha), half of the negative log-SNR (Lu et al. 2022, arXiv 2206.00927, sec. 3.4).

    Args:
        largest: noise / signal where the even part begins, for fields that end in pure noise, alpha_T = 0.
    """

    largest: float = 100.0

    def __post_init__(self):
        if not (isinstance(self.largest, int | float) and 0 < self.largest < math.inf):
            raise UserError(f"LogSNRGrid has largest={self.largest!r}, expected a positive number, such as 100")

    def __call__(self, field: Field, points: int) -> Tensor:
        def clock(t: Tensor) -> Tensor:
            alpha, sigma = coefficients(field, t)
            return sigma.log() - alpha.log()

        first, last = clock(torch.tensor([field.horizon, field.t_min], dtype=torch.float64)).tolist()
        first = min(first, math.log(self.largest)) if math.isinf(first) else first
        return _between(field, solve_times(field, clock, torch.linspace(first, last, points, dtype=torch.float64)))


@dataclass(frozen=True)
class BandGrid(Grid):
    """Even in log((s + low) / (s + high)) with s = sigma / alpha, so that both ends, s = 0 and infinity, are regular.

    Field lines bend where the noise is as large as some structure of the data, from `low`, the size of the finest, to
    `high`, the distance between the coarsest. There the grid is even in log s; beyond either end it soon thins out.

    Args:
        low, high: in units of the data, 0 < low < high.
        shares: of the way from T to t_min in this clock, rising from 0 to 1, one for each point. None is even shares.
    """

    low: float
    high: float
    shares: tuple[float, ...] | None = None

    def __post_init__(self):
        if not 0 < self.low < self.high:
            raise UserError(f"BandGrid has low={self.low} and high={self.high}, expected 0 < low < high")
        if self.shares is not None:
            shares = torch.tensor(self.shares, dtype=torch.float64)
            if not (shares[0] == 0 and shares[-1] == 1 and bool((shares.diff() > 0).all())):
                raise UserError(f"BandGrid has shares={self.shares}, expected numbers rising from 0 to 1")

    def __call__(self, field: Field, points: int) -> Tensor:
        return self.rows(field, points, torch.ones(1, 1, dtype=torch.float64))[0]

    def rows(self, field: Field, points: int, noise: Tensor) -> Tensor:
        """Times (rows, points) for samples whose noise is sigma times `noise` (rows, 1)."""
        even = torch.linspace(0, 1, points, dtype=torch.float64)
        shares = even if self.shares is None else torch.tensor(self.shares, dtype=torch.float64)
        if len(shares) != points:
            raise UserError(f"the grid has {len(shares)} shares, expected {points}, one for each of its points")
        ends = self.clock(field, torch.tensor([[field.horizon, field.t_min]], dtype=torch.float64), noise)
        values = torch.lerp(ends[:, :1], ends[:, 1:], shares)
        return _between(field, solve_times(field, lambda t: self.clock(field, t, noise), values))

    def clock(self, field: Field, t: Tensor, noise: Tensor) -> Tensor:
        """(rows, n) at times `t` (rows, n), rising."""
        alpha, sigma = coefficients(field, t)
        return ((noise * sigma + self.low * alpha) / (noise * sigma + self.high * alpha)).log()


def _between(field: Field, times: Tensor) -> Tensor:
    times[..., 0], times[..., -1] = field.horizon, field.t_min
    return times
