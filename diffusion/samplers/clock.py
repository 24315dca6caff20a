"""A clock in which every field's ODE has features of one width."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.fields import Field
from diffusion.samplers.arc import times_of_noise


@dataclass(frozen=True)
class Clock:
    """u from 0 at the horizon to 1 at t_min, even in log((t + high) / (t + low)): in log t between the two times.

    Args:
        low, high: (rows, 1), a row for each sample, or one for all.
    """

    field: Field
    low: Tensor
    high: Tensor

    @classmethod
    def of_noise(cls, field: Field, band: tuple[float, float], noise: Tensor) -> "Clock":
        """Between two levels of noise to signal, on the CPU, for the noise scales (rows, 1) of samples."""
        low, high = (times_of_noise(field, level / noise) for level in band)
        return cls(field, low, torch.maximum(high, 4 * low))  # where the noise is large at t_min still, both are t_min

    def to(self, x: Tensor) -> "Clock":
        """In the dtype and on the device of `x`."""
        return Clock(self.field, self.low.to(x), self.high.to(x))

    def rows(self, index: Tensor) -> "Clock":
        """Of some of the samples."""
        return self if len(self.low) == 1 else Clock(self.field, self.low[index], self.high[index])

    def _ends(self) -> tuple[Tensor, Tensor]:
        return tuple(((t + self.high) / (t + self.low)).log() for t in (self.field.horizon, self.field.t_min))

    def times(self, u: Tensor) -> Tensor:
        """(rows, n) at u, 0-dimensional or (rows, n); beyond 0 and 1 those at the ends."""
        first, last = self._ends()
        ratio = (first + u.clamp(0, 1) * (last - first)).exp()
        return ((self.high - ratio * self.low) / (ratio - 1)).clamp(self.field.t_min, self.field.horizon)

    def rate(self, t: Tensor) -> Tensor:
        """dt/du (rows, n) at the times `t`."""
        first, last = self._ends()
        return (last - first) * (t + self.low) * (t + self.high) / (self.low - self.high)
