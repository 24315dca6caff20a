"""One step of du/dt = A(t) u, and an estimate of its error that a swing of A between the ends cannot hide.

What is known of A is its weighted mean over any moments. A step looks at quarters, at an uneven part and at both ends.
It is exact where all of these, and many uneven parts, are one operator times a factor. It is smooth where a polynomial
through the quarters foretells the ends: then it is of order 4, by two exponentials without a commutator (Blanes & Moan
2006),

    exp(h/2 (7 R - L) / 6) exp(h/2 (7 L - R) / 6),    L and R the means of A over the first half and the second,

which are possible unless noise changes by a factor of 7 from half to half; two steps of half the length are compared
with the whole one. Where they are not it is of order 2, by exponentials of means; so it is elsewhere (a jump, or swings
that the quarters do not resolve), and the error is what the operators at the ends or of the uneven part would change.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

ROUNDING = 1e-13  # relative, up to which operators are the same
UNEVEN = 0.381966  # share of the uneven part
END = 1e-9  # share of the step by which the ends are inside
SMOOTH = 0.1  # of the range of A, up to which the ends may differ from what is foretold
PARTS = 5, 10, 20, 40  # uneven, to integrate a factor
AGREEMENT = 1e-11  # of two of these; the finer is better by a factor of 256
AHEAD = 7 / 6, -1 / 6  # shares of two means, from which an exponential is made
AT_ONCE = 4_000_000  # numbers


class Operator(ABC):
    """A linear map A of states (B, n).

    Attributes:
        values: the numbers that it is made of; operators of one equation at several times have them in the same order.
        left: share of the difference between a step and its two halves that is the error of these: 1/15 at order 4, for
            operators that are linear in their values; 1/3 where a part of order 2 may be larger.
    """

    values: Tensor
    left: float = 1 / 15

    @abstractmethod
    def advance(self, state: Tensor, duration: float) -> Tensor:
        """exp(duration A) state."""

    def possible(self, values: Tensor) -> bool:
        """Whether there is an operator of other values, of which the exponential is to be taken."""
        return True

    def factor(self, values: Tensor) -> float | None:
        """Of this operator, that the one of other values is, where there is one and it is not negative."""
        if values.shape != self.values.shape:
            return None
        square, largest = self._sizes
        factor = float((values * self.values).sum()) / max(square, 1e-300)
        gap = float(values.sub(self.values, alpha=factor).abs().max())
        return factor if factor >= 0 and gap <= ROUNDING * max(1.0, factor) * largest else None

    @cached_property
    def _sizes(self) -> tuple[float, float]:
        """The sum of the squares of the values, and the largest of their absolute values."""
        return float(self.values.square().sum()), float(self.values.abs().max())


Rule = list[tuple[float, float]]  # moments in time, and their weights
Means = Callable[[Sequence[Rule]], Sequence[Operator]]


def moments(start: float, stop: float, points: int = 4) -> Rule:
    """Gauss and Legendre's rule for the mean over a time; the time itself if both are one."""
    if start == stop:
        return [(start, 1.0)]
    middle, half = (start + stop) / 2, (stop - start) / 2
    return [(middle + half * node, weight / 2) for node, weight in _gauss(points)]


@lru_cache
def _gauss(points: int) -> Rule:
    return [(float(node), float(weight)) for node, weight in zip(*leggauss(points), strict=True)]


def mixed(shares: Sequence[float], rules: Sequence[Rule]) -> Rule:
    """The rule for the sum of shares times means."""
    return [(time, share * weight) for share, rule in zip(shares, rules, strict=True) for time, weight in rule]


def weighted(rules: Sequence[Rule], at: Callable[[list[float]], Tensor], numbers: int) -> Tensor:
    """The weighted sums (P, ...) over the moments of P rules, of what `at` gives at K times (K, ...).

    Args:
        numbers: that it gives at each time: at most AT_ONCE are asked for together, each time once.
    """
    place = {time: k for k, time in enumerate(dict.fromkeys(time for rule in rules for time, _ in rule))}
    times, shares = list(place), torch.zeros(len(rules), len(place), dtype=torch.float64)
    for row, rule in zip(shares.numpy(), rules, strict=True):
        for time, weight in rule:
            row[place[time]] += weight
    many, total = max(1, AT_ONCE // numbers), 0.0
    for k in range(0, len(times), many):
        values = at(times[k : k + many])
        total = total + torch.tensordot(shares[:, k : k + many].to(values), values, 1)
    return total


class Step(NamedTuple):
    """A state (B, n) after a step.

    Attributes:
        error: estimate, in the norm asked for.
        smooth: whether the step resolves how A changes.
    """

    state: Tensor
    error: float
    smooth: bool


def step(means: Means, state: Tensor, t: float, h: float, norm: Callable[[Tensor], float]) -> Step:
    """One step from t to t + h.

    Args:
        means: the means of A by each of several rules.
    """

    def mean(low: float, high: float) -> Rule:
        return moments(t + low * h, t + high * h)

    quarters = [mean(k / 4, (k + 1) / 4) for k in range(4)]
    ends = [[(t + END * h, 1.0)], [(t + h - END * h, 1.0)]]
    whole, *others = means([mixed([1 / 4] * 4, quarters), *quarters, mean(0, UNEVEN), *ends])
    factor = _factor(means, whole, others, t, h)
    if factor is not None:
        return Step(whole.advance(state, factor * h), 0.0, True)
    halves, coarse, fine = [mean(0, 1 / 2), mean(1 / 2, 1)], state, state  # at other moments than the quarters
    parts, odd = others[:4], others[4:]
    smooth = _smooth(parts, *odd)
    if smooth and _possible(whole, [part.values for part in parts]):
        pairs = [halves, quarters[:2], quarters[2:]]
        exponents = means([mixed(AHEAD, pair) for first in pairs for pair in (first, first[::-1])])
        for operator in exponents[:2]:
            coarse = operator.advance(coarse, h / 2)
        for operator in exponents[2:]:
            fine = operator.advance(fine, h / 4)
        return Step(fine, norm(fine - coarse) * whole.left, True)
    coarse = whole.advance(state, h)
    for operator in means(halves):
        fine = operator.advance(fine, h / 2)
    errors = [] if smooth else [norm(operator.advance(state, h) - coarse) for operator in odd]
    return Step(fine, max([norm(fine - coarse) / 3, *errors]), smooth)


def _possible(whole: Operator, quarters: list[Tensor]) -> bool:
    """Whether all exponents are, from the values of the mean operators of the quarters."""
    first, second, third, last = quarters
    for one, other in (((first + second) / 2, (third + last) / 2), (first, second), (third, last)):
        for pair in ((one, other), (other, one)):
            if not whole.possible(AHEAD[0] * pair[0] + AHEAD[1] * pair[1]):
                return False
    return True


def _factor(means: Means, whole: Operator, some: list[Operator], t: float, h: float) -> float | None:
    """c with exp(c h whole) the exact step, where A is one operator times a factor of time; otherwise None."""
    if all(operator is whole for operator in some):
        return 1.0
    if any(operator is not whole and whole.factor(operator.values) is None for operator in some):
        return None
    known, change = 1.0, 1.0
    for number in PARTS:
        cuts = [(k / number) ** 1.2 for k in range(number + 1)]
        factor = 0.0
        operators = means([moments(t + low * h, t + high * h) for low, high in itertools.pairwise(cuts)])
        for (low, high), operator in zip(itertools.pairwise(cuts), operators, strict=True):
            share = 1.0 if operator is whole else whole.factor(operator.values)
            if share is None:
                return None
            factor += (high - low) * share
        before, change = change, abs(factor - known)
        known = factor
        if change < (ROUNDING if number == PARTS[0] else AGREEMENT):
            return factor
        if number > PARTS[1] and change > before / 5:
            return None
    return None


def _smooth(parts: list[Operator], uneven: Operator, first: Operator, last: Operator) -> bool:
    """Whether the slopes of a polynomial through the integrals of A are A at both ends."""
    operators = [*parts, uneven]
    if any(operator.values.shape != first.values.shape for operator in [*operators, last]):
        return False
    middle = sum(part.values for part in parts) / len(parts)
    shifted = [operator.values - middle for operator in operators]
    ends = [first.values - middle, last.values - middle]
    size = max(float(values.abs().max()) for values in [*shifted, *ends])
    allowed = SMOOTH * size + ROUNDING * float(middle.abs().max())
    for end, weights in zip(ends, _foretold(len(parts)), strict=True):
        foretold = sum(float(weight) * values for weight, values in zip(weights, shifted, strict=True))
        if not float((foretold - end).abs().max()) <= allowed:
            return False
    return True


@lru_cache
def _foretold(number: int) -> np.ndarray:
    """Weights (2, number + 1) of the means over equal parts and the uneven part, for the values at both ends."""
    powers = np.arange(number + 1)
    edges = [(k / number, (k + 1) / number) for k in range(number)] + [(0.0, UNEVEN)]
    means = np.array(
        [(high ** (powers + 1) - low ** (powers + 1)) / (powers + 1) / (high - low) for low, high in edges]
    )
    ends = np.array([(powers == 0).astype(float), np.ones(number + 1)])
    return np.linalg.solve(means.T, ends.T).T
