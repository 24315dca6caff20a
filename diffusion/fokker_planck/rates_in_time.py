"""The chain of jumps of an equation that may change in time: rates are found anew only where they are not known.

They are those at the start times a factor where drift and covariance are, which is asked at the centres of the cells.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffusion.fokker_planck.asking import at_any_time
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.evolution import in_parts, weighted
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
        always = at_any_time(lambda time: jumps_at(equation, box, time, stacklevel=5))
        self.changing = always is None
        self.first = always or jumps_at(equation, box, start, stacklevel=3)
        self.at_start = MeanProcess(self, [(start, 1.0)])

    def at(self, time: float) -> Jumps:
        (process,) = self.means([(time, time)])
        return process.jumps

    def means(self, intervals: Sequence[tuple[float, float]]) -> Iterator["MeanProcess"]:
        """The generators of the mean chains over each of the times (t, t')."""
        if not self.changing:
            yield from [self.at_start] * len(intervals)
            return
        for rules in in_parts(intervals, self.box.centres.numel()):
            values = iter(self.coefficients([time for rule in rules for time, _ in rule]))
            for rule in rules:
                process = MeanProcess(self, rule, list(itertools.islice(values, len(rule))))
                yield self.at_start if rule == [(self.start, 1.0)] else process

    def coefficients(self, times: Sequence[float]) -> Tensor:
        """Drift and covariance at the centres, in cells and squares of cells per unit of time, (K, n, d + d^2)."""
        spacing = self.box.spacing
        drift, a = self.equation.over(self.box.centres, times)
        a = a / (spacing[:, None] * spacing) if a.dim() == 4 else a.reshape(*a.shape[:2], -1, 1) * self._per_square
        return torch.cat([drift / spacing, a.reshape(*a.shape[:2], -1)], 2).detach()

    @cached_property
    def _per_square(self) -> Tensor:
        """(d, d)."""
        return self.box.per_square.diag()


class MeanProcess(Operator):
    """The generator of the mean chain over a time, or at one; its rates are found when it is to move anything.

    Attributes:
        values: the mean of the coefficients.

    Args:
        rule: the moments that the mean is made of, and their weights.
        parts: the coefficients at these, (n, d + d^2); asked for when needed unless given.
    """

    def __init__(self, rates: RatesInTime, rule: list[tuple[float, float]], parts: list[Tensor] | None = None):
        self.rates, self._parts = rates, parts
        self.times, self.weights = zip(*rule, strict=True)

    @cached_property
    def parts(self) -> Sequence[Tensor]:
        return self.rates.coefficients(self.times) if self._parts is None else self._parts

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
