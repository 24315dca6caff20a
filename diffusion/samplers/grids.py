"""Time grids: where a fixed-step sampler stops on its way from the horizon to t_min."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.base import Field


class Grid(ABC):
    """A rule that lays times for any field."""

    @abstractmethod
    def __call__(self, field: Field, points: int) -> Tensor:
        """`points` falling times from ``field.horizon`` to ``field.t_min``, (points,) float64."""


@dataclass(frozen=True)
class PowerGrid(Grid):
    """Even in t^(1/rho) (Karras et al. 2022, eq. 5); rho = 1 is uniform in t.

    Args:
        rho: None takes the field's own clock: 7 for VE, PFGM++ and gravity, 1 for VP and linear.
    """

    rho: float | None = None

    def __call__(self, field: Field, points: int) -> Tensor:
        rho = field.rho if self.rho is None else self.rho
        if not rho > 0:
            raise UserError(f"PowerGrid has rho={rho}, expected a positive number, such as 7, or None")
        first, last = field.horizon ** (1 / rho), field.t_min ** (1 / rho)
        times = torch.linspace(first, last, points, dtype=torch.float64) ** rho
        times[-1], times[0] = field.t_min, field.horizon
        return times


@dataclass(frozen=True)
class LogGrid(Grid):
    """Even in log t, which for VE, PFGM++ and gravity is even in log-SNR."""

    def __call__(self, field: Field, points: int) -> Tensor:
        ends = torch.tensor([field.horizon, field.t_min], dtype=torch.float64).log()
        times = torch.linspace(*ends.tolist(), points, dtype=torch.float64).exp()
        times[-1], times[0] = field.t_min, field.horizon
        return times
