"""Whether draws follow a density: by the law of their radii, and by Stein's identities."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.fields.checks import Check, Subject, bumps, gradient, in_standard_errors, judge, largest_allowed
from diffusion.fields.rays import ELEMENTS, RayIntegral, integrate_rays, spread


def quantiles_of_radius(subject: Subject, x: Tensor, x0: Tensor, log_prob) -> tuple[Tensor, RayIntegral]:
    """The quantile (N,) of each draw's distance from x0 in the law that the density gives it along its ray."""
    gap = (x - x0).flatten(1)
    r = gap.norm(dim=1)
    width = spread(r.log())
    chunk = max(1, ELEMENTS // (128 * subject.dim))
    parts = [
        integrate_rays(log_prob(x0[i]), x0[i].flatten(1), gap[i] / r[i, None], r[i], width)
        for i in (slice(k, k + chunk) for k in range(0, len(x), chunk))
    ]
    law = RayIntegral(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return (law.log_below - law.log_total).exp(), law


def legendre(u: Tensor) -> Tensor:
    """The first four Legendre polynomials on (0, 1), (N, 4): of mean zero exactly if u is uniform."""
    s = 2 * u - 1
    return torch.stack([s, (3 * s**2 - 1) / 2, (5 * s**3 - 3 * s) / 2, (35 * s**4 - 30 * s**2 + 3) / 8], 1)


def stein(
    subject: Subject, number: int, draw: Callable[[int], tuple[Tensor, Tensor]], log_prob: Callable[..., Tensor]
) -> Tensor:
    """grad log p . u + div u (N, 8) for bounded vector fields u: of mean zero if the draws follow the density.

    Args:
        draw: of a number of points, with the origin of each.
        log_prob: of points and their origins.
    """
    phi, unit, statistics = bumps(subject), None, []
    chunk = max(64, ELEMENTS // (8 * subject.dim))
    for _ in range(0, number, chunk):
        x, x0 = draw(chunk)
        gap = (x - x0).flatten(1)
        unit = gap.square().mean(1).median().sqrt() if unit is None else unit
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = gradient(log_prob(x, x0), x).flatten(1) * unit
        u, div = phi.fields(gap / unit)
        statistics.append((u * score[:, None]).sum(2) + div)
    return torch.cat(statistics)


def sampler_follows_density(subject: Subject) -> tuple[Check, dict[float, Tensor]]:
    """Draws have the radii and obey the Stein identities of the density; with the quantiles of the radii by time."""
    field, name = subject.field, "sampler"
    number, more = subject.number(1.5e6, 256, 100_000), subject.number(1.5e6, 4000, 100_000)
    statistics, quantiles, jumps = [], {}, False
    for t in subject.time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist():
        x0 = subject.rows(number)
        x = subject.sample(x0, t)
        log_p = field.log_prob(x, t, x0)
        if not bool(log_p.isfinite().all()):
            bad = f"log_prob is {float(log_p[~log_p.isfinite()][0])} at a draw of t={t:.4g}"
            return Check(name, math.inf, largest_allowed(1), "standard errors", False, bad), quantiles
        u, law = quantiles_of_radius(subject, x, x0, lambda x0, t=t: subject.log_prob_on_rays(x0, t))
        quantiles[t], jumps = u, jumps or bool(law.jumps.any())

        def draw(number: int, t: float = t) -> tuple[Tensor, Tensor]:
            x0 = subject.rows(number)
            return subject.sample(x0, t), x0

        identities = (
            [] if law.jumps.any() else [stein(subject, more, draw, lambda x, x0, t=t: field.log_prob(x, t, x0))]
        )
        statistics.append([legendre(u), *identities])
    # At each time, and all times together: a fault at all times adds up.
    radii = torch.stack([part[0] for part in statistics])
    means = [in_standard_errors(part) for time in statistics for part in time] + [
        in_standard_errors(radii.flatten(0, 1))
    ]
    z = torch.cat(means)
    note = f"{number:,} draws at 3 times; radius law" + (
        "; density has jumps: no Stein identity" if jumps else ", Stein"
    )
    figure = float(z.abs().nan_to_num(nan=math.inf).max())
    return judge(name, figure, largest_allowed(len(z)), "standard errors", note), quantiles
