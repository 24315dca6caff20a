"""The chain of jumps of an equation that may change in time: rates are found anew only where they are not known.

They are those at the start times a factor where drift and covariance are, which is asked at the centres of the cells.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from diffusion.fokker_planck.asking import at_any_time
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.jump_process import JumpProcess, Ledger
from diffusion.fokker_planck.jumps import Jumps, jumps_at, mean_jumps
from diffusion.fokker_planck.line_rates import mean_coefficients
from diffusion.fokker_planck.observables import steep_share, swing_share
from diffusion.fokker_planck.stepping import ROUNDING, Operator, Rule


class RatesInTime:
    """The rates of the jumps at any time, and the generators of their means.

    Args:
        start: a time.
        ledger: what all generators note together.

    Attributes:
        changing: whether the equation looks at the time; if not, it is never asked again.
        first: the rates at the start.
        coarsest: of an equation that changes, the mean rates of steps, and the masses (B, n) that jumped at them, of
            which the largest share was where cells may be too wide for the drift, and for its swings.
    """

    def __init__(self, equation: FokkerPlanck, box: Box, start: float, ledger: Ledger | None = None):
        self.equation, self.box, self.start, self.ledger = equation, box, start, ledger
        always = at_any_time(lambda time: jumps_at(equation, box, time, stacklevel=5))
        self.changing = always is None
        self.first = always or jumps_at(equation, box, start, stacklevel=3)
        self.at_start = MeanProcess(_Together(self, [[(start, 1.0)]]), 0)
        self.coarsest: dict[str, tuple[Jumps, Tensor]] = {}
        self._shares = {"steep": 0.0, "swing": 0.0}

    def at(self, time: float) -> Jumps:
        return self.means([[(time, 1.0)]])[0].jumps

    def look_at(self, jumps: Jumps, mass: Tensor) -> None:
        """Keep these for `coarsest` if they are."""
        for kind, share in (("steep", steep_share(self.box, jumps, mass)), ("swing", swing_share(jumps, mass))):
            if share > self._shares[kind]:
                self._shares[kind], self.coarsest[kind] = share, (jumps, mass)

    def means(self, rules: Sequence[Rule]) -> list["MeanProcess"]:
        """The generators of the chains of mean drift and covariance, by each of the rules."""
        if not self.changing:
            return [self.at_start] * len(rules)
        together = _Together(self, rules)
        return [
            self.at_start if rule == [(self.start, 1.0)] else MeanProcess(together, k) for k, rule in enumerate(rules)
        ]


class _Together:
    """What several mean chains ask for at once, when one of them needs it."""

    def __init__(self, rates: RatesInTime, rules: Sequence[Rule]):
        self.rates, self.rules = rates, rules

    @cached_property
    def values(self) -> Tensor:
        """Drift and covariance at the centres, in cells and squares of cells per unit of time, (P, n, d + d^2)."""
        box = self.rates.box
        units = torch.cat([box.spacing, torch.outer(box.spacing, box.spacing).flatten()])
        return mean_coefficients(self.rates.equation, box.centres, self.rules, full=True) / units

    @cached_property
    def jumps(self) -> list[Jumps]:
        return mean_jumps(self.rates.equation, self.rates.box, self.rules)


class MeanProcess(Operator):
    """The generator of a mean chain; its rates are found when it is to move anything.

    They are those at the start times a factor where it is known by its values that there is one.
    """

    left = 1 / 3  # rates are not linear in drift and noise

    def __init__(self, together: _Together, place: int):
        self.together, self.place = together, place

    @cached_property
    def values(self) -> Tensor:
        return self.together.values[self.place]

    def possible(self, values: Tensor) -> bool:
        """Whether the covariance is positive semi-definite everywhere."""
        dim = self.together.rates.box.dim
        a = values[:, dim:].reshape(-1, dim, dim)
        least = -ROUNDING * float(a.abs().max())
        if bool((a.diagonal(dim1=1, dim2=2) < least).any()):
            return False
        full = dim > 1 and bool((a != torch.diag_embed(a.diagonal(dim1=1, dim2=2))).any())
        return not full or bool((torch.linalg.eigvalsh(a) >= least).all())

    @cached_property
    def jumps(self) -> Jumps:
        rates = self.together.rates
        if self is rates.at_start:
            return rates.first
        known = vars(self).get("values")
        factor = None if known is None else rates.at_start.factor(known)
        return self.together.jumps[self.place] if factor is None else rates.first.scaled(factor)

    @cached_property
    def process(self) -> JumpProcess:
        rates = self.together.rates
        return JumpProcess(rates.box, self.jumps, rates.ledger)

    def advance(self, state: Tensor, duration: float) -> Tensor:
        rates = self.together.rates
        if rates.changing:
            rates.look_at(self.jumps, state[:, : rates.box.number])
        return self.process.advance(state, duration)
