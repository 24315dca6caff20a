"""What follows from a density on a grid and the rates of its jumps: current, entropy production, whether cells do."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.jumps import Jumps
from diffusion.fokker_planck.line_rates import as_array, namespace

STEEP = 2.0  # difference of the log density between neighbours at rest, above which a cell is too wide
STEEP_SHARE = 1e-3  # of the mass, that may be in such cells
SMALLEST = 1e-300
ONE_WAY = 300.0  # log of the ratio of jumps there and back
NEGLIGIBLE = 1e-14  # of the largest flow
NOISELESS = 50.0  # times as many cells as there are, above which it is no use to ask for them
LEAP = 0.05  # of g g^T at both places together, by which the change of it may differ from that of its derivatives
AT_WALLS = 1e-3  # of the mass, at the ends of a period
BEYOND = 1e-3  # of the mass, that would be beyond walls
AT_WALL = 1e-3  # of a cell, from the wall: there noise and drift may be looked at
CUT = 1e-3  # of the largest drift, by which it may differ between two ends that are one place
SWING, SWING_SHARE = 0.05, 0.5  # see Jumps; of the mass: less may be on either side of a leap, which does no harm


def pairs(jumps: list[Jumps], masses: Tensor) -> list[tuple[Jumps, Tensor]]:
    """Rates, of each of K times or one for all, with the masses (K, B, n) of the cells that jump at them."""
    if len(jumps) == 1:
        return [(jumps[0], masses.reshape(-1, masses.shape[2]))]
    return list(zip(jumps, masses, strict=True))


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

    Schnakenberg 1976, eq. 7.6. What is absorbed is not counted. Infinite where there is a flow one way only: next to
    cells without mass, or without noise.
    """
    total = torch.zeros(len(mass), dtype=torch.float64, device=mass.device)
    for e, rates in jumps.rates.items():
        there, back = rates[0] * mass, rates[1] * mass[:, box.neighbours(e).target]
        net, ratio = there - back, there.clamp_min(SMALLEST).log() - back.clamp_min(SMALLEST).log()
        one_way = (ratio.abs() > ONE_WAY) & (net.abs() > NEGLIGIBLE * net.abs().amax(1, keepdim=True))
        total += torch.where(one_way, math.inf, net * ratio).sum(1)
    return total


def warn_of_leaps(equation: FokkerPlanck, axes: Sequence[Tensor], time: float, masses: Tensor, stacklevel: int) -> None:
    """Warn where g g^T changes between neighbouring places by much more or less than its derivatives there say.

    The Ito term, the divergence of g g^T, is taken from these, and is lost where the noise leaps.

    Args:
        axes: the places along each coordinate.
        masses: at the places, (K, n).
    """
    shape = [len(axis) for axis in axes]
    x = torch.cartesian_prod(*axes).reshape(-1, len(shape))
    here = equation.covariance(x, time)
    if bool((here == here[:1]).all()):
        return
    leaping = torch.zeros(shape, dtype=torch.bool, device=x.device)
    for j, axis in enumerate(axes):
        direction = torch.zeros_like(x)
        direction[:, j] = 1
        found = torch.func.jvp(lambda x: equation.covariance(x, time), (x,), (direction,))
        a, slope = (value.detach().reshape(*shape, -1).movedim(j, 0) for value in found)
        steps = axis.diff().reshape(-1, *[1] * len(shape))
        gap = (a.diff(dim=0) - steps * (slope[1:] + slope[:-1]) / 2).abs().amax(-1)
        leaps = gap > LEAP * (a[1:].abs() + a[:-1].abs()).amax(-1)
        along = leaping.movedim(j, 0)  # a view
        along[1:] |= leaps
        along[:-1] |= leaps
    shares = masses.abs() @ leaping.reshape(-1).to(masses) / masses.abs().sum(1).clamp_min(SMALLEST)
    if float(shares.max()) > STEEP_SHARE:
        warnings.warn(
            f"the noise leaps: {float(shares.max()):.2g} of the mass is where g g^T changes from one place to the next "
            "otherwise than its derivatives say, from which its divergence is taken, so that the density may be wrong; "
            "take more cells or functions, or smoother noise (the grid takes leaps of noise along the axes)",
            stacklevel=stacklevel + 1,
        )


def warn_if_at_walls(box: Box, masses: Tensor, equation: FokkerPlanck, times: Sequence[float], stacklevel: int) -> None:
    """Warn where mass has come to lie against reflecting walls: the domain may cut it off.

    The density at a wall, times how far it would go on beyond: while it spreads, D / |f| if the drift f leads away from
    the wall, at most the width of the domain.

    Args:
        masses: of the cells at the times, (K, B, n).
        equation: asked at the last time, and only where there is mass at walls.
    """
    axes, last, time = [i for i, word in enumerate(box.boundary) if word == "reflecting"], masses[-1], times[-1]
    if not axes or not bool((last @ box.walls * max(box.cells) > BEYOND * last.sum(1)).any()):
        return
    reach = torch.zeros(box.number, dtype=torch.float64, device=masses.device)
    for axis in axes:
        places, (low, high) = box.centres[:, axis], box.domain[axis]
        for outward, end, wall in ((1, high, places == places.max()), (-1, low, places == places.min())):
            x = box.centres[wall]
            x[:, axis] = end - outward * AT_WALL * box.widths[axis]
            a = equation.covariance(x, time).detach()
            spread = (a.diagonal(dim1=1, dim2=2) if a.dim() == 3 else a.reshape(len(x), -1).expand_as(x))[:, axis] / 2
            push = outward * equation.drift(x, time).detach()[:, axis]
            far = (2 * spread * (time - times[0])).sqrt() + push.clamp_min(0) * (time - times[0])
            far = torch.where(push < 0, torch.minimum(far, spread / push.abs()), far)
            reach[wall] += (far / box.widths[axis]).clamp_max(box.cells[axis])
    first, last = (mass @ reach / mass.sum(1).clamp_min(SMALLEST) for mass in masses[[0, -1]])
    beyond = float(torch.where(first < last / 100, last, 0.0).max())
    if beyond > BEYOND:
        warnings.warn(
            f"mass has come to lie at reflecting walls: about {min(beyond, 1.0):.2g} of it would be beyond, if the "
            "domain went on; if these are not meant to hold it, take a larger domain, or absorbing walls to see what "
            "leaves",
            stacklevel=stacklevel + 1,
        )


def warn_if_cut(box: Box, masses: Tensor, equation: FokkerPlanck, time: float, stacklevel: int) -> None:
    """Warn where there is mass at the ends of a periodic coordinate, and drift or noise differ from one to the other.

    Args:
        masses: of the cells at the times, (K, B, n).
    """
    masses = masses.reshape(-1, box.number)
    for axis in (axis for axis, word in enumerate(box.boundary) if word == "periodic"):
        places, (low, high) = box.centres[:, axis], box.domain[axis]
        at_end = places < low + box.widths[axis]
        share = float((masses @ (at_end | (places > high - box.widths[axis])).to(masses) / masses.sum(1)).max())
        if not share > AT_WALLS:
            continue
        first = box.centres[at_end].clone()
        last = first.clone()
        first[:, axis], last[:, axis] = low, high
        for name, function in (("drift", equation.drift), ("g g^T", equation.covariance)):
            gap = float((function(first, time) - function(last, time)).abs().max())
            if gap > CUT * float(function(box.centres, time).abs().max()):
                warnings.warn(
                    f"the {name} differs by {gap:.3g} between the ends of coordinate {axis}, which is periodic, and "
                    f"{share:.2g} of the mass is there; if no leap is meant, take a larger domain or other walls",
                    stacklevel=stacklevel + 1,
                )


def steepness(box: Box, jumps: Jumps) -> Tensor:
    """(d, n): by how much, at most, the log density at rest would change to a neighbour along each coordinate."""
    steepest = torch.zeros(box.dim, box.number, dtype=torch.float64, device=box.device)
    for e, rates in jumps.rates.items():
        change = rates.clamp_min(SMALLEST).log().diff(dim=0)[0].abs()
        target = box.neighbours(e).target
        change = torch.maximum(change, torch.zeros_like(change).scatter_reduce(0, target, change, "amax"))
        for axis, step in enumerate(e):
            if step:
                steepest[axis] = torch.maximum(steepest[axis], change / abs(step))
    return steepest


def steep_share(box: Box, jumps: Jumps, mass: Tensor) -> float:
    """The share, or more, of the masses (B, n) where jumps are much more frequent one way than the other: the most."""
    factor, most, mass = math.exp(STEEP), 0.0, as_array(mass)
    for e, pair in jumps.rates.items():
        pair = as_array(pair)
        (steep,) = namespace(pair).where((pair[0] > factor * pair[1]) | (pair[1] > factor * pair[0]))
        if len(steep):
            target = as_array(box.neighbours(e).target)[steep]
            shares = (mass[:, steep].sum(1) + mass[:, target].sum(1)) / namespace(mass).clip(
                mass.sum(1), SMALLEST, None
            )
            most = max(most, float(shares.max()))
    return most


def swing_share(jumps: Jumps, mass: Tensor) -> float:
    """The share of the masses (B, n) in cells within which what drives the jumps swings: the most."""
    if not float(as_array(jumps.swings).max()) > SWING:
        return 0.0
    return float((mass @ (jumps.swings > SWING).to(mass) / mass.sum(1).clamp_min(SMALLEST)).max())


def warn_if_coarse(box: Box, each: list[tuple[Jumps, Tensor]], stacklevel: int) -> None:
    """Warn where, in any of the states, much of the mass is in cells that are too wide for the drift or its swings.

    Args:
        each: rates, and masses (B, n) that jump at them.
    """
    factors, worst, swinging = [1.0] * box.dim, 0.0, 0.0
    for jumps, mass in each:
        swinging = max(swinging, swing_share(jumps, mass))
        if not steep_share(box, jumps, mass) > STEEP_SHARE:
            continue
        shares = mass / mass.sum(1, keepdim=True).clamp_min(SMALLEST)
        steep = steepness(box, jumps)
        for axis, change in enumerate(steep):
            beyond = (shares @ (change > STEEP).to(shares)).max()
            if float(beyond) > STEEP_SHARE:
                worst = max(worst, float(beyond))
                order = change.argsort(descending=True)
                least = int((shares[:, order].cumsum(1) <= STEEP_SHARE).sum(1).min())
                factors[axis] = max(factors[axis], float(change[order[min(least, box.number - 1)]]) / STEEP)
    if worst > 0:
        needed = [math.ceil(n * factor) for n, factor in zip(box.cells, factors, strict=True)]
        still = [axis for axis, factor in enumerate(factors) if factor > NOISELESS]
        advice = f"about {needed} cells would do"
        if still:
            advice = f"there is next to no noise along coordinates {still}, where the grid is of first order at best"
        warnings.warn(
            f"the grid is too coarse for the drift: {worst:.2g} of the mass is in cells across which the density at "
            f"rest would change by a factor of more than exp({STEEP:g}); {advice}",
            stacklevel=stacklevel + 1,
        )
    if swinging > SWING_SHARE:
        warnings.warn(
            f"the grid is too coarse for the drift, which swings within the cells that hold {swinging:.2g} of the mass;"
            " take more of them, at least four from a low to a high of the drift",
            stacklevel=stacklevel + 1,
        )
