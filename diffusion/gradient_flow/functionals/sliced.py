"""The sliced Wasserstein distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.slices import Sliced, argsort, unsorted


@dataclass(frozen=True, eq=False)
class SlicedWasserstein(Sliced):
    """F[q] = mean over directions theta of W_p^p between the projections theta . x of particles and data.

    The convention is that of Bonneel, Rabin, Peyre and Pfister (Sliced and Radon Wasserstein Barycenters of Measures,
    2015): no factor 1/2, and no factor d, so that in d dimensions the velocity of two points at distance r is 2 r / d
    for p = 2. On a line the optimal coupling is that of the quantiles, exact for N other than M.

    A derivative with respect to the weight of one particle is one-sided wherever a quantile i / N is also some j / M
    (all are, where N = M); `first_variation` is then the mean of both sides.

    Args:
        p: power of the cost |x - y|^p, 1 or more.

    Raises:
        UserError: p below 1.
    """

    p: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.p < float("inf"):
            raise UserError(f"p is {self.p}, expected a number of 1 or more")

    def cost(self, x, y):
        pairs = quantile_pairs(x.shape[1], y.shape[1], x.device)
        apart = x.gather(1, argsort(x))[:, pairs.first] - y.sort(1).values[:, pairs.second]
        return (self._power(apart) * pairs.weight.to(x)).sum(1)

    def push(self, x, y):
        number = x.shape[1]
        pairs = quantile_pairs(number, y.shape[1], x.device)
        order = argsort(x)
        apart = x.gather(1, order)[:, pairs.first] - y.sort(1).values[:, pairs.second]
        pull = self.p * apart.abs().pow(self.p - 1) * apart.sign() if self.p != 2 else 2 * apart
        if len(pairs.weight) > number:
            sums = torch.nn.functional.pad((pull * pairs.weight).cumsum(1), (1, 0))
            pull = number * (sums[:, pairs.ends[1:]] - sums[:, pairs.ends[:-1]]).to(x)
        return unsorted(-pull, order)

    def variation(self, x, y):
        """Kantorovich potentials: along the staircase of pairs, where it steps from one particle to the next at y,
        the potential grows by the difference of their costs to y."""
        number, data = x.shape[1], y.shape[1]
        order = argsort(x)
        x, y = x.gather(1, order), y.sort(1).values
        level = torch.arange(1, number, device=x.device) * data
        below, above = (level - 1) // number, level // number
        steps = [self._power(x[:, 1:] - y[:, side]) - self._power(x[:, :-1] - y[:, side]) for side in (below, above)]
        potential = torch.nn.functional.pad((sum(steps) / 2).cumsum(1, dtype=torch.float64), (1, 0))
        potential -= potential.mean(1, keepdim=True)
        return unsorted(potential.to(x), order)

    def _power(self, apart: Tensor) -> Tensor:
        return apart.square() if self.p == 2 else apart.abs().pow(self.p)


class QuantilePairs(NamedTuple):
    """The optimal coupling of N and M points on a line, S pairs; weights float64.

    Attributes:
        first: ranks of the N points, (S,).
        second: ranks of the M points, (S,).
        weight: mass of each pair, (S,).
        ends: the pairs of the point of rank i are ends[i] to ends[i + 1], (N + 1,).
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    ends: Tensor


def quantile_pairs(number: int, other: int, device: torch.device | str = "cpu") -> QuantilePairs:
    """The staircases i / number and j / other, merged; in whole numbers, so that common steps are common."""
    own = torch.arange(number + 1, device=device) * other
    levels = torch.cat([own, torch.arange(other + 1, device=device) * number]).unique()
    start, weight = levels[:-1], levels.diff().double() / (number * other)
    return QuantilePairs(start // other, start // number, weight, torch.searchsorted(levels, own))
