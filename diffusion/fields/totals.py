"""Checks of whole laws: that their mass is 1, that the last of them is the prior, that the prior is what it says."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.fields.base import Unavailable
from diffusion.fields.checks import Check, Subject, bumps, in_standard_errors, judge, largest_allowed, skipped
from diffusion.fields.draws import legendre, quantiles_of_radius, stein
from diffusion.fields.rays import ELEMENTS, integrate_rays, log_sphere_area, spread

MASS, RESOLVED, GOOD = 1e-3, 0.02, 0.01  # of log mass: tolerance, largest and satisfactory standard errors
MOST_RAYS = 2048
KL, KL_PER_COORDINATE = 0.05, 1e-4  # nats
MOST_WHITENED, MOST_LINES = 128, 512  # dimensions

Density = Callable[[Tensor], Tensor]  # points (R, K, d) to log-densities (R, K)


def mass(subject: Subject) -> Check:
    """The integral of the density is 1 at three times."""
    name, worst, error, how = "mass", 0.0, 0.0, ""
    for t in subject.time(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist():
        log_mass, its_error, its_how = _mass(subject, subject.rows(1), t)
        if not its_error <= RESOLVED:
            return skipped(name, f"no estimate in {subject.dim} dimensions is to be trusted at t={t:.3g}")
        if abs(log_mass) > worst or not how:
            worst, error, how = abs(log_mass), its_error, f"mass {math.exp(log_mass):.4g} at t={t:.3g}, by {its_how}"
    return judge(name, worst, MASS + largest_allowed(3) * error, "|log mass|", how)


class _Rays(NamedTuple):
    """Directions about a centre, in coordinates in which the law is closer to isotropic."""

    log_prob: Density
    centre: Tensor  # (1, d)
    gap: Tensor  # (N, d) draws, from the centre

    def uniform(self, subject: Subject) -> Tensor:
        """64 unit vectors."""
        return torch.nn.functional.normalize(subject.normal(64, subject.dim), dim=1)

    def log_totals(self, direction: Tensor, stretch: float = 1.0) -> Tensor:
        """Logarithms (R,) of area times integrals along rays; their mean over uniform directions is the mass.

        A stretch other than 1 moves the nodes of the quadrature.
        """
        log_r = self.gap.norm(dim=1).log()
        begin = stretch * log_r.median().exp().expand(len(direction))
        origin = self.centre.expand(len(direction), -1)
        law = integrate_rays(self.log_prob, origin, direction, begin, stretch * spread(log_r))
        return law.log_total + log_sphere_area(origin.shape[1])


def _mass(subject: Subject, x0: Tensor, t: float) -> tuple[float, float, str]:
    """The best estimate of log mass, its standard error (infinite where it is not to be trusted) and its name."""
    field, dim = subject.field, subject.dim
    number = subject.number(2e6, 512, 32768)
    draws = subject.sample(x0.expand(number, *subject.shape), t).flatten(1)
    log_prob, middle = subject.log_prob_on_rays(x0, t), draws.median(0).values[None]
    centres = {"rays from x0": x0.flatten(1), "rays from the median": middle}
    with contextlib.suppress(Unavailable):
        centres["rays from the label 0"] = field.transport(x0, torch.zeros_like(x0), t).flatten(1)
    ways = {how: _Rays(log_prob, centre, draws - centre) for how, centre in centres.items()}
    totals = {how: rays.log_totals(rays.uniform(subject)) for how, rays in ways.items()}
    if min(_mean(values)[1] for values in totals.values()) > GOOD and 1 < dim <= MOST_WHITENED and number > 16 * dim:
        how, rays = "whitened rays", _whitened(log_prob, middle, draws - middle)
        ways[how], totals[how] = rays, rays.log_totals(rays.uniform(subject))
    best = min(totals, key=lambda how: _mean(totals[how])[1])
    values, most = totals[best], max(256, min(MOST_RAYS, MOST_RAYS * subject.effort))
    while _mean(values)[1] > GOOD and len(values) < most:
        values = torch.cat([values, ways[best].log_totals(ways[best].uniform(subject))])
    log_mass, error = _mean(values)
    if error > RESOLVED:
        if dim <= MOST_LINES and _is_product(subject, log_prob, draws):
            return *_mass_by_lines(log_prob, draws[:8], middle), "lines, independent coordinates"
        return log_mass, math.inf, best
    # Rays through draws see every mode, and weighed by 1 / integral they give 1 / mass; other nodes, other rounding.
    through = torch.nn.functional.normalize(ways[best].gap[:128], dim=1)
    seen, again = (ways[best].log_totals(through, stretch) for stretch in (1.0, 1.3))
    inverse, its_error = _mean(-seen)
    missed = float(seen.max() - values.max()) > math.log(2)
    if missed or abs(log_mass + inverse) > GOOD + 5 * math.hypot(error, its_error):
        return log_mass, math.inf, best
    doubt = float((seen - again).abs().max())
    return log_mass, math.hypot(error, doubt), best


def _is_product(subject: Subject, log_prob: Density, draws: Tensor) -> bool:
    """Whether two draws that exchange some of their coordinates keep the product of their densities."""
    one, other = draws[:32], draws[32:64]
    swap = subject.uniform(*one.shape) < 0.5
    parts = one, other, torch.where(swap, one, other), torch.where(swap, other, one)
    a, b, c, d = (log_prob(part[:, None])[:, 0] for part in parts)
    return bool(((a + b - c - d).abs() < 1e-6 * (1 + a.abs() + b.abs())).all())


def _mean(log_values: Tensor) -> tuple[float, float]:
    """log of the mean of values given by their logarithms, and its standard error, infinite where one value rules."""
    weights = log_values.softmax(0) * len(log_values)
    error = float(weights.std()) / math.sqrt(len(weights))
    log_mean = float(log_values.logsumexp(0)) - math.log(len(log_values))
    return log_mean, error if math.isfinite(error) else math.inf


def _whitened(log_prob: Density, centre: Tensor, gap: Tensor) -> _Rays:
    """Rays in coordinates in which Tyler's shape matrix (1987), which exists for every tail, is the identity."""
    sized = gap[gap.norm(dim=1) > 0]
    dim, shape = gap.shape[1], torch.eye(gap.shape[1], dtype=gap.dtype)
    for _ in range(20):
        squared = (torch.cholesky_solve(sized.T, torch.linalg.cholesky(shape)).T * sized).sum(1, keepdim=True)
        shape = sized.T @ (sized / squared) * dim / len(sized)
    factor = torch.linalg.cholesky(shape)
    white = torch.linalg.solve_triangular(factor, gap.T, upper=False).T
    log_det = factor.diagonal().log().sum()
    return _Rays(lambda points: log_prob(points @ factor.T + centre) + log_det, torch.zeros_like(centre), white)


def _mass_by_lines(log_prob: Density, places: Tensor, middle: Tensor) -> tuple[float, float]:
    """p(x) over the product of its conditional densities along the coordinate axes: the mass of a product law.

    For other laws the estimate differs from place to place, which its standard error shows. Each line is divided at
    `middle` (1, d), where the density of a coordinate may have a kink.
    """
    number, dim = places.shape
    here = log_prob(places[:, None])[:, 0]
    estimates, gap = here, places - middle
    reach = gap.abs().clamp_min(1e-3 * gap.abs().median())
    for axes in torch.arange(dim).split(max(1, ELEMENTS // (256 * number * dim))):
        unit = torch.eye(dim, dtype=places.dtype)[axes]
        origin = places.repeat_interleave(2 * len(axes), 0)
        direction = torch.stack([unit, -unit], 1).flatten(0, 1).repeat(number, 1)
        start = reach[:, axes].flatten().repeat_interleave(2)

        def along(points: Tensor, origin: Tensor = origin) -> Tensor:
            # integrate_rays weighs by r^(d-1); a line has no such weight.
            r = (points - origin[:, None]).norm(dim=2).clamp_min(1e-280)
            return log_prob(points) - (dim - 1) * r.log()

        halves = integrate_rays(along, origin, direction, start, 1.0).log_total
        estimates = estimates + (halves.view(number, -1, 2).logsumexp(2) - here[:, None]).sum(1)
    return float(estimates.mean()), float(estimates.std()) / math.sqrt(number)


def end(subject: Subject) -> Check:
    """KL(p_T(.|x0) || prior), averaged over the data: what the prior's ignorance of x0 costs, in nats."""
    field, name = subject.field, "end"
    number = subject.number(5e6, 512, 20_000)
    x0 = subject.rows(number)
    x = subject.sample(x0, field.horizon)
    allowed = max(KL, KL_PER_COORDINATE * subject.dim)
    try:
        ratio = field.log_prob(x, field.horizon, x0) - field.prior_log_prob(x)
    except Unavailable:
        return _end_by_samples(subject, x)
    kl, error = float(ratio.mean()), float(ratio.std()) / math.sqrt(number)
    error = error if math.isfinite(error) else 0.0
    # Negative beyond chance: one of the two densities is not that of the draws.
    return judge(name, abs(kl), allowed + largest_allowed(1) * error, "nats", "KL(p_T(.|x0) || prior)")


def _end_by_samples(subject: Subject, x: Tensor) -> Check:
    """For a field without a density: bounded functions have the same means under x_T and under the prior."""
    prior = subject.field.sample_prior(x.shape, subject.randomness, dtype=x.dtype)
    unit = prior.flatten(1).square().mean(1).median().sqrt()
    phi = bumps(subject)
    one, other = (phi.value(points.flatten(1) / unit) for points in (x, prior))
    spread = (one.var(0) + other.var(0)).div(2).sqrt()
    difference = float(((one.mean(0) - other.mean(0)) / spread).abs().nan_to_num(nan=math.inf).max())
    allowed = math.sqrt(2 * KL) / 2 + largest_allowed(8) * math.sqrt(2 / len(x))
    return judge("end", difference, allowed, "standard deviations", "means of bounded functions, x_T and prior")


def prior_follows_density(subject: Subject) -> Check:
    """Draws of the prior have the radii of the prior's density, and obey its Stein identities."""
    field, name = subject.field, "prior"
    number = subject.number(1.5e6, 256, 100_000)

    def draw(number: int) -> Tensor:
        return field.sample_prior((number, *subject.shape), subject.randomness, dtype=subject.data.dtype)

    def density(x: Tensor, _: Tensor) -> Tensor:
        return field.prior_log_prob(x)

    x = draw(number)

    def log_prob(_: Tensor) -> Density:
        return lambda points: field.prior_log_prob(points.reshape(-1, *subject.shape)).view(points.shape[:2])

    try:
        u, law = quantiles_of_radius(subject, x, torch.zeros_like(x), log_prob)
    except Unavailable as error:
        return skipped(name, str(error))
    statistics, note = [legendre(u)], f"{number:,} draws; radius law"
    if not law.jumps.any():
        more = subject.number(1.5e6, 4000, 100_000)
        statistics.append(stein(subject, more, lambda n: (draw(n), torch.zeros(n, *subject.shape).to(x)), density))
        note += ", Stein"
    z = torch.cat([in_standard_errors(part) for part in statistics])
    figure = float(z.abs().nan_to_num(nan=math.inf).max())
    return judge(name, figure, largest_allowed(len(z)), "standard errors", note)
