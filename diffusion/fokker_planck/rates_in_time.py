"""The chain of jumps of an equation that may change in time: rates are found anew only where they are not known.

They are those at the start times a factor where drift and covariance are, which is asked at the centres of the cells.
"""

from functools import cached_property

import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.evolution import mean_over, moments
from diffusion.fokker_planck.jump_process import JumpProcess, Ledger
from diffusion.fokker_planck.jumps import Jumps, jumps_at, mean_jumps
from diffusion.fokker_planck.stepping import Operator, ratio


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
        self.changing = equation.looks_at_time(box.centres)
        self.first = jumps_at(equation, box, start, stacklevel=3)

    def at(self, time: float) -> Jumps:
        if not self.changing or time == self.start:
            return self.first
        factor = ratio(self.coefficients(time), self._at_start)
        return self.first.scaled(factor) if factor else jumps_at(self.equation, self.box, time)

    def mean(self, start: float, stop: float) -> "MeanProcess":
        """The generator of the mean chain from `start` to `stop`."""
        return MeanProcess(self, start, stop) if self.changing else self._unchanging

    def coefficients(self, time: float) -> Tensor:
        """Drift and covariance at the centres, in cells and squares of cells per unit of time, in one row."""
        spacing = self.box.spacing
        drift = self.equation.drift(self.box.centres, time) / spacing
        a = self.equation.covariance(self.box.centres, time)
        a = a / (spacing[:, None] * spacing) if a.dim() == 3 else a.reshape(len(a), -1, 1) * self._per_square
        return torch.cat([drift.reshape(-1), a.reshape(-1)]).detach()

    @cached_property
    def _per_square(self) -> Tensor:
        """(d, d)."""
        return self.box.spacing.square().reciprocal().diag()

    @cached_property
    def _at_start(self) -> Tensor:
        return self.coefficients(self.start)

    @cached_property
    def _unchanging(self) -> "MeanProcess":
        return MeanProcess(self, self.start, self.start)


class MeanProcess(Operator):
    """The generator of the mean chain over a time; its rates are found when it is to move anything.

    Attributes:
        values: the mean of the coefficients.
    """

    def __init__(self, rates: RatesInTime, start: float, stop: float):
        self.rates, self.start, self.stop = rates, start, stop

    @cached_property
    def values(self) -> Tensor:
        return mean_over(self.rates.coefficients, self.start, self.stop)

    @cached_property
    def process(self) -> JumpProcess:
        times, weights = zip(*moments(self.start, self.stop), strict=True)
        return JumpProcess(self.rates.box, mean_jumps(weights, [self.rates.at(t) for t in times]), self.rates.ledger)

    def advance(self, state: Tensor, duration: float) -> Tensor:
        return self.process.advance(state, duration)
