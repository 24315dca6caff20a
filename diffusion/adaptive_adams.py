"""Integration of many independent ODEs dy/du = f(u, y) from u = 0 to 1, each with its own steps and orders.

Adams methods of variable step and order in Newton's form (Shampine & Gordon 1975; Hairer, Norsett & Wanner 1993, sec.
III.5 and III.7). With the divided differences D_j of the last slopes and g_j(h), the integral over the step of
(s - u_n) (s - u_n-1) .. of j factors,

    predicted = y + sum over j < k of g_j D_j,    corrected = predicted + g_k D'_k,

where D' has the slope at the prediction as its newest. That slope is kept for the next steps, so that a step costs one
evaluation (PEC; evaluating again, at the corrected state, costs twice as much and gains little). The error of order k
is the difference between the corrections of orders k and k - 1, (g_k - g_k-1 (h + u_n - u_n-k+1)) D'_k. It does not see
that the slope is that of the prediction, which matters for long steps; so the correction, g_k D'_k, is bounded as well.
The order is that of k - 1, k and k + 1 which allows the longest next step, and at the start rises with every step.

Shapes: B problems of n coordinates, b of them in one call; u, steps and orders are float64 on the CPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ORDER = 8  # at most
FIRST, LONGEST, SHORTEST = 5e-4, 0.05, 1e-12  # steps
SAFETY, GROWTH, CUT = 0.7, 4.0, 0.2

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]  # (u (b,), y (b, n), index (b,)) -> (b, n)
Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]  # (error of a step, y after it, index) -> (b,)


class Arrived(NamedTuple):
    """Where the problems are: u (B,) is 1, or less where the evaluations were spent."""

    y: Tensor
    u: Tensor
    evaluations: Tensor  # (B,)
    error: Tensor  # (B,) sum of the ratios of the steps


def integrate(slope: Slope, y: Tensor, ratio: Ratio, max_evaluations: int, largest: float = math.inf) -> Arrived:
    """From `y` (B, n) at u = 0.

    Args:
        slope: is called with the problems that are still on their way only; index, on the CPU, says which.
        ratio: of the error of a step to what is allowed.
        max_evaluations: for a problem.
        largest: correction, root mean square.
    """
    number, y = len(y), y.clone()
    index = torch.arange(number)
    table = y.new_zeros(ORDER + 2, *y.shape)  # D_j
    table[0] = slope(torch.zeros(number, dtype=torch.float64), y, index)
    nodes = torch.zeros(ORDER + 2, number, dtype=torch.float64)  # the places of the last slopes, newest first
    u, h = torch.zeros(number, dtype=torch.float64), torch.full((number,), FIRST, dtype=torch.float64)
    order, known, evaluations = (torch.ones(number, dtype=torch.int64) for _ in range(3))  # known: slopes in the table
    error = torch.zeros(number, dtype=torch.float64)

    while len(index := ((u < 1) & (evaluations < max_evaluations)).nonzero()[:, 0]):
        k, column, here = order[index], torch.arange(len(index)), index.to(y.device)
        left = 1 - u[index]
        step = torch.minimum(h[index], left)
        end = torch.where(step < left, u[index] + step, 1.0)
        g, gaps = _integrals(step, nodes[:, index] - u[index]), end - nodes[:, index]
        old, used = table[:, here], torch.arange(ORDER + 2)[:, None] < k
        predicted = y[here] + torch.einsum("jb,jbn->bn", (g * used).to(y), old)
        evaluations[index] += 1
        new = _differences(slope(end, predicted, index), old, gaps.to(y), (known[index] + 1).to(here.device))

        def term(factors: Tensor, j: Tensor, new=new, column=column) -> Tensor:
            return factors.to(y)[:, None] * new[j.to(y.device), column.to(y.device)]

        corrected = predicted + term(g[k, column], k)

        def off(j: Tensor, g=g, gaps=gaps, column=column, index=index, corrected=corrected, term=term) -> Tensor:
            """Ratio of the error at the order j to what is allowed."""
            error = term(g[j, column] - g[j - 1, column] * gaps[j - 1, column], j)
            allowed = torch.maximum(ratio(error, corrected, index), root_mean_square(term(g[j, column], j)) / largest)
            return allowed.cpu().double().clamp_min(1e-12).nan_to_num(1e12, 1e12)

        own = off(k)
        fine = (own <= 1) & corrected.isfinite().all(1).cpu()
        factor, best = own ** (-1 / (k + 1)), k
        for other, possible in ((k - 1, k > 1), (k + 1, fine & (k < ORDER) & (known[index] > k))):
            longer = off(other.clamp_min(1)) ** (-1 / (other + 1))
            better = possible & (longer > factor)
            factor, best = torch.where(better, longer, factor), torch.where(better, other, best)
        starting = fine & (known[index] == k) & (k < ORDER)
        order[index] = torch.where(starting, k + 1, best)
        factor = (SAFETY * factor).clamp(CUT, GROWTH)
        h[index] = (step * torch.where(fine, factor, factor.clamp_max(SAFETY))).clamp(SHORTEST, LONGEST)

        done, kept = index[fine], fine.to(y.device)
        y[here[kept]], table[:, here[kept]] = corrected[kept], new[:, kept]
        error[done] += own[fine]
        u[done], known[done] = end[fine], (known[done] + 1).clamp_max(ORDER + 1)
        nodes[:, done] = torch.cat([end[None, fine], nodes[:-1, done]])
    return Arrived(y, u, evaluations, error)


def root_mean_square(x: Tensor) -> Tensor:
    """Root mean square coordinate (b,) of rows (b, n)."""
    return x.square().mean(1).sqrt()


def _integrals(step: Tensor, places: Tensor) -> Tensor:
    """g_j (J, b): the integral of (s - places_0) .. (s - places_j-1) over s from 0 to `step` (b,)."""
    powers = 1 / torch.arange(1, len(places) + 2, dtype=step.dtype)[:, None]
    product = torch.zeros(len(places) + 1, len(step), dtype=step.dtype)  # coefficients, in units of the step
    product[0], integrals = 1, []
    for place in places / step:
        integrals.append((product * powers).sum(0))
        product = torch.cat([-place * product[:1], product[:-1] - place * product[1:]])
    return torch.stack(integrals) * step ** torch.arange(1, len(places) + 1, dtype=step.dtype)[:, None]


def _differences(newest: Tensor, old: Tensor, gaps: Tensor, known: Tensor) -> Tensor:
    """The table (J, b, n) of divided differences with one more slope, 0 from the row `known` (b,) on."""
    rows = [newest]
    for j in range(1, len(old)):
        rows.append(((rows[-1] - old[j - 1]) / gaps[j - 1, :, None]).where((j < known)[:, None], 0))
    return torch.stack(rows)
