"""What follows from a density on a grid and the rates of its jumps: current, entropy production, whether cells do."""

import math
import warnings

import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.jumps import Jumps

STEEP = 2.0  # difference of the log density between neighbours at rest, above which a cell is too wide
STEEP_SHARE = 1e-3  # of the mass, that may be in such cells
SMALLEST = 1e-300


def current(box: Box, jumps: Jumps, mass: Tensor) -> Tensor:
    """(B, d, n): probability per unit of time and area in each cell; half of each jump belongs to each of its ends.

    Args:
        mass: of the cells, (B, n).
    """
    total = mass[:, None] * jumps.way
    for e, rates in jumps.rates.items():
        target = box.neighbours(e).target
        net = rates[0] * mass - rates[1] * mass[:, target]
        halves = torch.zeros_like(net).index_add_(1, target, net) + net
        step = box.spacing * torch.tensor(e, dtype=torch.float64, device=box.device)
        total += halves[:, None] * step[:, None] / 2
    return total / box.volume


def entropy_production(box: Box, jumps: Jumps, mass: Tensor) -> Tensor:
    """(B,) in nats per unit of time: sum (a - b) log(a / b) over pairs of cells, with a and b the mass that jumps.

    Schnakenberg 1976, eq. 7.6. What is absorbed is not counted.
    """
    total = torch.zeros(len(mass), dtype=torch.float64, device=mass.device)
    for e, rates in jumps.rates.items():
        there = (rates[0] * mass).clamp_min(SMALLEST)
        back = (rates[1] * mass[:, box.neighbours(e).target]).clamp_min(SMALLEST)
        total += ((there - back) * (there / back).log()).sum(1)
    return total


def steepness(box: Box, jumps: Jumps) -> Tensor:
    """(d, n): by how much, at most, the log density at rest would change to a neighbour along each coordinate."""
    steepest = torch.zeros(box.dim, box.number, dtype=torch.float64, device=box.device)
    for e, rates in jumps.rates.items():
        found = box.neighbours(e)
        change = torch.where(found.inside, (rates[0] / rates[1]).log().abs(), 0.0)
        change = torch.maximum(change, torch.zeros_like(change).scatter_reduce(0, found.target, change, "amax"))
        for axis, step in enumerate(e):
            if step:
                steepest[axis] = torch.maximum(steepest[axis], change / abs(step))
    return steepest


def warn_if_coarse(box: Box, each: list[Jumps], masses: Tensor, stacklevel: int) -> None:
    """Warn where, at any of K times, much of the mass (K, B, n) is in cells that are too wide for the drift."""
    factors, worst, known, steep = [1.0] * box.dim, 0.0, None, None
    for jumps, mass in zip(each, masses, strict=True):
        if jumps is not known:
            known, steep = jumps, steepness(box, jumps)
        share = (mass / mass.sum(1, keepdim=True).clamp_min(SMALLEST)).amax(0)
        for axis, change in enumerate(steep):
            beyond = float(share[change > STEEP].sum())
            if beyond > STEEP_SHARE:
                worst = max(worst, beyond)
                order = change.argsort(descending=True)
                at = int((share[order].cumsum(0) <= STEEP_SHARE).sum())
                factors[axis] = max(factors[axis], float(change[order[min(at, box.number - 1)]]) / STEEP)
    if worst > 0:
        needed = [math.ceil(n * factor) for n, factor in zip(box.cells, factors, strict=True)]
        warnings.warn(
            f"the grid is too coarse for the drift: {worst:.2g} of the mass is in cells across which the density at "
            f"rest would change by a factor of more than exp({STEEP:g}); about {needed} cells would do",
            stacklevel=stacklevel + 1,
        )
