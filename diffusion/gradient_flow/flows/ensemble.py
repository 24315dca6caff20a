"""Moves of particles by the places of others, that leave a law as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion.gradient_flow.functionals.base import chunks

if TYPE_CHECKING:
    from diffusion.gradient_flow.flows.tempering import Bridge, Known

NEIGHBOURS, CENTRES = 8, 1024
"""A kernel is as wide as the distance to that neighbour; so many kernels at most."""


def jumped(
    now: Known, bridge: Bridge, share: float, ask: Callable[[Tensor], Known], generator: torch.Generator | None
) -> tuple[Known, float]:
    """Each half of the particles jumps by the other half, once; and the share of jumps that were accepted.

    The proposal is a draw y from kappa(y) = mean_j N(y; c_j, w_j^2), c_j in the other half, whatever the x that it is
    for, and it is accepted with the probability min(1, pi(y) kappa(x) / (pi(x) kappa(y))). The other half does not move
    meanwhile, so the law in which all are independent draws from pi stays as it is.
    """
    x = now.x
    order = torch.randperm(len(x), generator=generator, device=x.device)
    halves = order[: len(x) // 2], order[len(x) // 2 :]
    taken = 0
    for movers, others in (halves, halves[::-1]):
        centres = bridge.standard(now.x[others[:CENTRES]])
        widths = neighbour_widths(centres)
        mean = torch.randint(len(centres), (len(movers),), generator=generator, device=x.device)
        noise = torch.randn(len(movers), x.shape[1], generator=generator, dtype=x.dtype, device=x.device)
        old = now.taken(movers)
        new = ask(bridge.centre + bridge.scale * (centres[mean] + widths[mean, None] * noise))
        gain = bridge.log_density(new, share) - bridge.log_density(old, share)
        gain = gain + log_kernels(bridge.standard(old.x), centres, widths)
        gain = gain - log_kernels(bridge.standard(new.x), centres, widths)
        uniform = torch.rand(len(movers), generator=generator, dtype=x.dtype, device=x.device)
        accepted = ((uniform.log() < gain) & new.score.isfinite().all(1)).nonzero()[:, 0]
        now = now.changed(movers[accepted], new.taken(accepted))
        taken += len(accepted)
    return now, taken / len(x)


def neighbour_widths(points: Tensor) -> Tensor:
    """Standard deviations (n,) of kernels at points (n, d): the distance to the 8th neighbour over sqrt(d)."""
    number, dim = points.shape
    rank = min(NEIGHBOURS, number - 1) + 1  # a point is its own first
    distances = torch.cat(
        [torch.cdist(points[part], points).kthvalue(rank, 1).values for part in chunks(number, number)]
    )
    return (distances / math.sqrt(dim)).clamp_min(torch.finfo(points.dtype).eps ** 0.5)


def log_kernels(x: Tensor, centres: Tensor, widths: Tensor) -> Tensor:
    """log mean_j N(x; centres_j, widths_j^2) up to a constant, (N,)."""
    heights, rates = -x.shape[1] * widths.log(), 0.5 / widths.square()
    return torch.cat(
        [
            (heights - rates * torch.cdist(x[part], centres).square()).logsumexp(1)
            for part in chunks(len(x), len(centres))
        ]
    )
