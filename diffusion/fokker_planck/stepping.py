"""One step of du/dt = A(t) u, and an estimate of its error that a swing of A between the ends cannot hide.

What is known of A is its mean over any time. A step looks at the whole, at equal parts, at an uneven part and at both
ends. It is exact where all of these, and many uneven parts, are one operator times a factor. It is smooth where a
polynomial through the parts foretells the ends; elsewhere (a jump, or swings that the parts do not resolve) the error
is taken to be what the operators at the ends or of the uneven part would change.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

ROUNDING = 1e-13  # relative, up to which operators are the same
UNEVEN = 0.381966  # share of the uneven part
END = 1e-9  # share of the step by which the ends are inside
SMOOTH = 0.1  # of the range of A, up to which the ends may differ from what is foretold
PARTS = 5, 10, 20, 40  # uneven, to integrate a factor
AGREEMENT = 1e-11  # of two of these; the finer is better by a factor of 256


class Operator(ABC):
    """A linear map A of states (B, n).

    Attributes:
        values: the numbers that it is made of; operators of one equation at several times have them in the same order.
    """

    values: Tensor

    @abstractmethod
    def advance(self, state: Tensor, duration: float) -> Tensor:
        """exp(duration A) state."""

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


Means = Callable[[Sequence[tuple[float, float]]], Iterable[Operator]]


class Step(NamedTuple):
    """A state (B, n) after a step.

    Attributes:
        error: estimate, in the norm asked for.
        smooth: whether the step resolves how A changes.
    """

    state: Tensor
    error: float
    smooth: bool


def step(
    means: Means, state: Tensor, t: float, h: float, norm: Callable[[Tensor], float], extrapolate: bool = False
) -> Step:
    """Of order 2, two halves compared with the whole; extrapolated of order 4, from halves and quarters.

    Args:
        means: the means of A over each of the given times.
    """
    ends = t + END * h, t + h - END * h
    shares = [(0, 1), (0, 1 / 2), (1 / 2, 1), (0, UNEVEN)]
    whole, *others = means([(t + low * h, t + high * h) for low, high in shares] + [(end, end) for end in ends])
    factor = _factor(means, whole, others, t, h)
    if factor is not None:
        return Step(whole.advance(state, factor * h), 0.0, True)
    parts, odd = [others[:2]], others[2:]
    if extrapolate:
        parts.append(list(means([(t + k * h / 4, t + (k + 1) * h / 4) for k in range(4)])))
    coarse = whole.advance(state, h)
    results = [coarse]
    for operators in parts:
        result = state
        for operator in operators:
            result = operator.advance(result, h / len(operators))
        results.append(result)
    if extrapolate:
        results = [fine + (fine - rough) / 3 for rough, fine in itertools.pairwise(results)]
    error = norm(results[-1] - results[-2]) / (15 if extrapolate else 3)
    smooth = _smooth(parts[-1], *odd)
    if not smooth:
        error = max(error, *(norm(operator.advance(state, h) - coarse) for operator in odd))
    return Step(results[-1], error, smooth)


def _factor(means: Means, whole: Operator, some: list[Operator], t: float, h: float) -> float | None:
    """c with exp(c h whole) the exact step, where A is one operator times a factor of time; otherwise None."""
    if any(operator is not whole and whole.factor(operator.values) is None for operator in some):
        return None
    known, change = 1.0, 1.0
    for number in PARTS:
        cuts = [(k / number) ** 1.2 for k in range(number + 1)]
        factor = 0.0
        operators = means([(t + low * h, t + high * h) for low, high in itertools.pairwise(cuts)])
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
