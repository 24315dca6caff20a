"""Integrals of a density along rays: the mass of a law and the law of its radius, in any number of dimensions.

In polar coordinates about any origin, p(x) dx = p(o + r n) r^(d-1) dr dn. Given its direction n, the distance of a draw
from o therefore has density p(o + r n) r^(d-1) up to a constant, whatever the law and whatever the origin; and the mass
is the area of the sphere times the mean, over uniform directions, of the integral along the ray.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DROP = 30.0  # nats below the peak of the integrand at which it is given up
REACH = 300.0  # nats of distance that are searched for mass
PANELS, NODES = 4, 16  # of the Gauss-Legendre rule on each side of the start
ELEMENTS = 2**19  # numbers in memory at a time


class RayIntegral(NamedTuple):
    """Integral of p r^(d-1) dr along rays, in two parts."""

    log_below: Tensor  # (R,) from the origin to the start
    log_above: Tensor  # (R,) from the start to infinity
    jumps: Tensor  # (R,) whether the support ends where the density is still large

    @property
    def log_total(self) -> Tensor:
        return torch.logaddexp(self.log_below, self.log_above)


def integrate_rays(
    log_prob: Callable[[Tensor], Tensor], origin: Tensor, direction: Tensor, start: Tensor, width: float
) -> RayIntegral:
    """Integrate a density along the rays origin + r direction.

    Args:
        log_prob: maps points (R, K, d) on R rays to log-densities (R, K).
        origin: (R, d).
        direction: (R, d) unit vectors.
        start: (R,) distances that divide each ray in two; where the mass is, roughly. Outside of a bounded support they
            are halved until they are inside.
        width: of log r over the mass, roughly.
    """
    dim = origin.shape[1]
    for _ in range(60):
        outside = log_prob(origin[:, None] + start[:, None, None] * direction[:, None])[:, 0].isneginf()
        if not bool(outside.any()):
            break
        start = torch.where(outside, start / 2, start)
    log_start = start.log()
    # Nearer to the origin than this, origin + r direction no longer resolves r.
    floor = (1e3 * torch.finfo(origin.dtype).eps * origin.abs().amax(1)).clamp_min(1e-280).log()

    def integrand(offset: Tensor) -> Tensor:
        s = log_start[:, None] + offset
        value = log_prob(origin[:, None] + s.exp()[..., None] * direction[:, None]) + dim * s
        return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

    limits = (floor - log_start).clamp(-REACH, -1e-3), torch.full_like(log_start, REACH)
    sides = [_search(integrand, limit, width) for limit in limits]
    peak = torch.maximum(sides[0].peak, sides[1].peak)
    ends, jumps = zip(*(_end(integrand, side, peak) for side in sides), strict=True)
    below, above = (_integrate(integrand, end, width) for end in ends)
    return RayIntegral(below, above, jumps[0] | jumps[1])


class _Side(NamedTuple):
    offset: Tensor  # (R, K) of log r from the start
    value: Tensor  # (R, K)

    @property
    def peak(self) -> Tensor:
        return self.value.amax(1)


def _search(integrand: Callable[[Tensor], Tensor], limit: Tensor, width: float) -> _Side:
    """The integrand at points that spread geometrically from the start to `limit`."""
    far = torch.asinh(limit.abs() / width)
    steps = torch.linspace(0, 1, max(2, math.ceil(float(far.max()) / 0.25)), dtype=limit.dtype, device=limit.device)
    offset = limit.sign()[:, None] * width * (steps * far[:, None]).sinh()
    return _Side(offset, integrand(offset))


def _end(integrand: Callable[[Tensor], Tensor], side: _Side, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Where the integrand is given up, (R,), and whether it jumps to nothing there, (R,)."""
    last = torch.arange(side.value.shape[1], device=peak.device)
    inside = (last * (side.value > (peak - DROP)[:, None])).amax(1)
    outside = (inside + 1).clamp_max(side.value.shape[1] - 1)
    near, far = (side.offset.gather(1, k[:, None])[:, 0] for k in (inside, outside))
    ends = side.value.gather(1, outside[:, None])[:, 0].isneginf()
    if not bool(ends.any()):
        return far, ends
    for _ in range(50):
        middle = (near + far) / 2
        empty = integrand(middle[:, None])[:, 0].isneginf() & ends
        near, far = torch.where(ends & ~empty, middle, near), torch.where(empty, middle, far)
    edge = torch.where(ends, near, far)
    return edge, ends & (integrand(edge[:, None])[:, 0] > peak - DROP)


def _integrate(integrand: Callable[[Tensor], Tensor], end: Tensor, width: float) -> Tensor:
    """log of the integral from the start to `end`, in y with log r = start + width sinh(y)."""
    node, weight = (torch.from_numpy(part).to(end) for part in np.polynomial.legendre.leggauss(NODES))
    panel = torch.arange(PANELS, dtype=end.dtype, device=end.device)
    node = ((panel[:, None] + (node + 1) / 2) / PANELS).flatten()
    weight = (weight / (2 * PANELS)).repeat(PANELS)
    far = torch.asinh(end.abs() / width)
    y = node * far[:, None]
    log_jacobian = (width * far).log()[:, None] + y.cosh().log()
    return (integrand(end.sign()[:, None] * width * y.sinh()) + log_jacobian + weight.log()).logsumexp(1)


def log_sphere_area(dim: int) -> float:
    """log of the area of the unit sphere in `dim` dimensions."""
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


def spread(log_r: Tensor) -> float:
    """The width of a sample of log-distances, from its quartiles."""
    low, high = log_r.quantile(torch.tensor([0.25, 0.75], dtype=log_r.dtype, device=log_r.device))
    return max(float(high - low) / 1.35, 1e-6)
