"""The chain of jumps of an equation that may change in time: rates are found anew only where they are not known.

They are those at the start times a factor where drift and covariance are, which is asked at the centres of the cells.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.evolution import moments, weighted
from diffusion.fokker_planck.jump_process import JumpProcess, Ledger
from diffusion.fokker_planck.jumps import Jumps, jumps_at, mean_jumps
from diffusion.fokker_planck.stepping import Operator


class RatesInTime:
    """The rates of the jumps at any time, and the generators of their means.

    Args:
        start: a time.
        ledger: what all generators note together.

    Attributes:
        changing: whether the equation looks at the time; if not, it is never asked again.
        first: the rates at the start.
    """

    def __init__(self, equation: FokkerPlanck, box: Box, start: float, ledger: Ledger | None = None):
        self.equation, self.box, self.start, self.ledger = equation, box, start, ledger
        always = equation.at_any_time(lambda time: jumps_at(equation, box, time, stacklevel=5))
        self.changing = always is None
        self.first = always or jumps_at(equation, box, start, stacklevel=3)
        self.at_start = MeanProcess(self, start, start)

    def at(self, time: float) -> Jumps:
        return self.mean(time, time).jumps

    def mean(self, start: float, stop: float) -> "MeanProcess":
        """The generator of the mean chain from `start` to `stop`."""
        known = not self.changing or start == stop == self.start
        return self.at_start if known else MeanProcess(self, start, stop)

    def coefficients(self, time: float) -> Tensor:
        """Drift and covariance at the centres, in cells and squares of cells per unit of time, (n, d + d^2)."""
        spacing = self.box.spacing
        drift = self.equation.drift(self.box.centres, time) / spacing
        a = self.equation.covariance(self.box.centres, time)
        a = a / (spacing[:, None] * spacing) if a.dim() == 3 else a.reshape(len(a), -1, 1) * self._per_square
        return torch.cat([drift, a.reshape(len(a), -1)], 1).detach()

    @cached_property
    def _per_square(self) -> Tensor:
        """(d, d)."""
        return self.box.per_square.diag()


class MeanProcess(Operator):
    """The generator of the mean chain over a time, or at one; its rates are found when it is to move anything.

    Attributes:
        values: the mean of the coefficients.
    """

    def __init__(self, rates: RatesInTime, start: float, stop: float):
        self.rates = rates
        self.times, self.weights = zip(*moments(start, stop), strict=True)

    @cached_property
    def parts(self) -> list[Tensor]:
        """The coefficients at the moments that the mean is made of."""
        return [self.rates.coefficients(time) for time in self.times]

    @cached_property
    def values(self) -> Tensor:
        return weighted(self.weights, self.parts)

    @cached_property
    def jumps(self) -> Jumps:
        rates = self.rates
        if self is rates.at_start:
            return rates.first
        factors = [rates.at_start.factor(part) for part in self.parts]
        if None not in factors:
            return rates.first.scaled(float(np.dot(self.weights, factors)))
        return mean_jumps(self.weights, [jumps_at(rates.equation, rates.box, time) for time in self.times])

    @cached_property
    def process(self) -> JumpProcess:
        return JumpProcess(self.rates.box, self.jumps, self.rates.ledger)

    def advance(self, state: Tensor, duration: float) -> Tensor:
        return self.process.advance(state, duration)
