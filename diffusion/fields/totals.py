"""Checks of whole laws: that their mass is 1, that the last of them is the prior, that the prior is what it says."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.fields.base import Unavailable
from diffusion.fields.checks import (
    Check,
    Subject,
    bumps,
    in_standard_errors,
    judge,
    largest_allowed,
    legendre,
    quantiles_of_radius,
    skipped,
)
from diffusion.fields.rays import integrate_rays, log_sphere_area, spread

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
            return skipped(name, f"no estimate in {subject.dim} dimensions is better than {its_error:.1%}")
        if abs(log_mass) > worst or not how:
            worst, error, how = abs(log_mass), its_error, f"mass {math.exp(log_mass):.4g} at t={t:.3g}, by {its_how}"
    return judge(name, worst, MASS + largest_allowed(3) * error, "|log mass|", how)


class _Rays(NamedTuple):
    """Uniform directions about a centre, in coordinates in which the law is closer to isotropic."""

    log_prob: Density
    centre: Tensor  # (1, d)
    gap: Tensor  # (N, d) draws, from the centre

    def log_totals(self, subject: Subject) -> Tensor:
        """Logarithms (64,) of integrals along rays, whose mean over all directions is the mass."""
        log_r = self.gap.norm(dim=1).log()
        direction = torch.nn.functional.normalize(subject.normal(64, subject.dim), dim=1)
        begin = log_r.median().exp().expand(64)
        law = integrate_rays(self.log_prob, self.centre.expand(64, -1), direction, begin, spread(log_r))
        return law.log_total + log_sphere_area(subject.dim)


def _mass(subject: Subject, x0: Tensor, t: float) -> tuple[float, float, str]:
    """The best estimate of log mass, its standard error and its name."""
    field, dim = subject.field, subject.dim
    number = subject.number(2e6, 512, 32768)
    draws = subject.sample(x0.expand(number, *subject.shape), t).flatten(1)
    log_prob, middle = subject.log_prob_on_rays(x0, t), draws.median(0).values[None]
    centres = {"rays from x0": x0.flatten(1), "rays from the median": middle}
    with contextlib.suppress(Unavailable):
        centres["rays from the label 0"] = field.transport(x0, torch.zeros_like(x0), t).flatten(1)
    ways = {how: _Rays(log_prob, centre, draws - centre) for how, centre in reversed(centres.items())}
    totals = {}
    for how, rays in ways.items():
        totals[how] = rays.log_totals(subject)
        if _mean(totals[how])[1] < GOOD:
            break
    else:
        if 1 < dim <= MOST_WHITENED and number > 16 * dim:
            ways["whitened rays"] = _whitened(log_prob, middle, draws - middle)
            totals["whitened rays"] = ways["whitened rays"].log_totals(subject)
    best = min(totals, key=lambda how: _mean(totals[how])[1])
    values = totals[best]
    while _mean(values)[1] > GOOD and len(values) < MOST_RAYS:
        values = torch.cat([values, ways[best].log_totals(subject)])
    if _mean(values)[1] > RESOLVED and dim <= MOST_LINES:
        return *_mass_by_lines(log_prob, draws[:16], draws - middle), "lines, independent coordinates"
    return *_mean(values), best


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


def _mass_by_lines(log_prob: Density, places: Tensor, gap: Tensor) -> tuple[float, float]:
    """p(x) over the product of its conditional densities along the coordinate axes: the mass of a product law.

    For other laws the estimate differs from place to place, which its standard error shows.
    """
    dim = places.shape[1]
    width = gap.abs().median(0).values
    signs = torch.tensor([1.0, -1.0], dtype=gap.dtype)
    estimates = log_prob(places[:, None])[:, 0]
    both = places.repeat_interleave(2, 0)

    def along(points: Tensor) -> Tensor:
        # integrate_rays weighs by r^(d-1); a line has no such weight.
        r = (points - both[:, None]).norm(dim=2).clamp_min(1e-280)
        return log_prob(points) - (dim - 1) * r.log()

    for axis, scale in zip(torch.eye(dim, dtype=gap.dtype), width, strict=True):
        direction = (signs[:, None] * axis).repeat(len(places), 1)
        halves = integrate_rays(along, both, direction, scale.expand(len(both)), 1.0).log_total
        estimates = estimates + halves.view(-1, 2).logsumexp(1) - log_prob(places[:, None])[:, 0]
    return float(estimates.mean()), float(estimates.std()) / math.sqrt(len(estimates))


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
    figure = abs(kl) if kl < 0 else kl
    return judge(name, figure, allowed + largest_allowed(1) * error, "nats", "KL(p_T(.|x0) || prior)")


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
    """Draws of the prior have the radii of the prior's density."""
    field, name = subject.field, "prior"
    number = subject.number(1.5e6, 256, 100_000)
    x = field.sample_prior((number, *subject.shape), subject.randomness, dtype=subject.data.dtype)

    def log_prob(_: Tensor) -> Density:
        return lambda points: field.prior_log_prob(points.reshape(-1, *subject.shape)).view(points.shape[:2])

    try:
        u, _ = quantiles_of_radius(subject, x, torch.zeros_like(x), log_prob)
    except Unavailable as error:
        return skipped(name, str(error))
    z = in_standard_errors(legendre(u))
    figure = float(z.abs().nan_to_num(nan=math.inf).max())
    return judge(name, figure, largest_allowed(len(z)), "standard errors", f"{number:,} draws; radius law")
