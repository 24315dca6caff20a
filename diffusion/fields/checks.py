"""The checks that a field must pass, each on its own; `validate` runs them and reports.

Statistical checks average bounded test statistics over independent draws, so that their means are normal to good
accuracy; each compares its largest mean, in standard errors, with the quantile that m such means together exceed with
probability FALSE_ALARM (Bonferroni). There are six of them, so one fails by chance in 6e-4 of runs if the means are
normal. With few draws and skewed statistics they are so only roughly; therefore `validate` repeats a check that fails
on fresh draws, and a correct field is refused only if chance strikes twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from diffusion.fields.base import Field, Unavailable, expand_time
from diffusion.fields.bumps import Bumps

FALSE_ALARM = 1e-4
STRONG, LINES, START, STOP = 1e-9, 1e-6, 1e-3, 0.2
EXACT_DIVERGENCE = 128  # dimensions up to which the divergence is exact
PROBES = 8


@dataclass(frozen=True)
class Check:
    """One statement about a field.

    Attributes:
        figure: what was measured; passes if it is at most `tolerance`.
        unit: of both.
        passed: None where the check does not apply; `note` says why.
    """

    name: str
    figure: float
    tolerance: float
    unit: str
    passed: bool | None
    note: str = ""


def judge(name: str, figure: float, tolerance: float, unit: str, note: str = "") -> Check:
    """A check that passes if the figure is at most the tolerance; a figure that is not a number fails."""
    return Check(name, figure, tolerance, unit, bool(figure <= tolerance), note)


def skipped(name: str, why: str) -> Check:
    return Check(name, math.nan, math.nan, "", None, why)


def largest_allowed(statistics: int) -> float:
    """The number of standard errors that the largest of so many normal means exceeds with probability FALSE_ALARM."""
    return float(-ndtri(FALSE_ALARM / (2 * statistics)))


def in_standard_errors(values: Tensor) -> Tensor:
    """Means over the rows of `values` (N, K), in units of their standard errors, (K,)."""
    error = values.std(0) / math.sqrt(len(values))
    return values.mean(0) / error.clamp_min(torch.finfo(values.dtype).tiny)


class Subject:
    """A field under test: data to start from, randomness, and points as rows of d coordinates.

    Args:
        x0: (N, *shape) data points, float64.
        effort: multiplies the number of draws.
    """

    def __init__(self, field: Field, x0: Tensor, seed: int, effort: float):
        self.field, self.data, self.shape, self.effort = field, x0, x0.shape[1:], effort
        self.dim, self.randomness = x0[0].numel(), torch.Generator(x0.device).manual_seed(seed)
        self.std = float((x0 - x0.mean(0)).square().mean().sqrt()) or float(x0.square().mean().sqrt()) or 1.0

    def number(self, elements: float, least: int, most: int) -> int:
        """How many draws of `dim` numbers make `elements`, within limits."""
        return int(min(max(self.effort * elements / self.dim, least), max(self.effort * most, least)))

    def rows(self, number: int) -> Tensor:
        """`number` data points, drawn with replacement."""
        return self.data[torch.randint(len(self.data), (number,), generator=self.randomness)]

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.randomness, dtype=self.data.dtype)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.randomness, dtype=self.data.dtype)

    def time(self, u: Tensor) -> Tensor:
        """Times at the fractions `u` of the clock from t_min to the horizon."""
        rho = self.field.rho
        first, last = self.field.t_min ** (1 / rho), self.field.horizon ** (1 / rho)
        return (first + u * (last - first)).pow(rho).clamp(self.field.t_min, self.field.horizon)

    def sample(self, x0: Tensor, t: Tensor | float) -> Tensor:
        return self.field.sample(x0, t, self.randomness)

    def log_prob_on_rays(self, x0: Tensor, t: float) -> Callable[[Tensor], Tensor]:
        """The density of the field as `integrate_rays` wants it, for rays of one data point or of one each."""

        def log_prob(points: Tensor) -> Tensor:
            rays, places = points.shape[:2]
            start = x0.expand(rays, *self.shape).repeat_interleave(places, 0)
            return self.field.log_prob(points.reshape(-1, *self.shape), t, start).reshape(rays, places)

        return log_prob


def gradient(output: Tensor, x: Tensor) -> Tensor:
    """Gradient of each output (B,) in its own row of x; zeros where it does not depend on x."""
    if not output.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(output.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def divergence(f: Tensor, x: Tensor) -> Tensor:
    """Divergence (B,) of f (B, d), a function of each row of x, exactly."""
    return torch.stack([gradient(f[:, i], x)[:, i] for i in range(x.shape[1])], 1).sum(1)


def strong_continuity(subject: Subject) -> tuple[Check, Tensor, Tensor]:
    """d_t log p + f . grad log p + div f = 0, relative to the size of the terms; with times and residuals."""
    name, field = "continuity (strong)", subject.field
    number = subject.number(2e5, 32, 128)
    x0 = subject.rows(number)
    t = subject.time(torch.arange(number, dtype=x0.dtype) / (number - 1))
    x = subject.sample(x0, t).flatten(1)
    with torch.enable_grad():
        x, t = x.detach().requires_grad_(), t.requires_grad_()
        points = x.view(x0.shape)
        log_p = field.log_prob(points, t, x0)
        f = field.velocity(points, t, x0).flatten(1)
        d_t, transport = gradient(log_p, t), (f * gradient(log_p, x)).sum(1)
        exact = subject.dim <= EXACT_DIVERGENCE
        if exact:
            estimates = divergence(f, x)[None]
        else:
            signs = subject.normal(PROBES, *x.shape).sign()
            estimates = torch.stack([(gradient((f * e).sum(1), x) * e).sum(1) for e in signs])
    t, d_t, transport = t.detach(), d_t.detach(), transport.detach()
    scale = d_t.abs() + transport.abs() + estimates.mean(0).abs()
    scale = scale.clamp_min(1e-6 * float(scale.nanmedian()) or 1.0)  # all terms vanish where a field is at rest
    residual = ((d_t + transport + estimates) / scale).detach()
    worst = float(residual.mean(0).abs().nan_to_num(nan=math.inf).max())
    if exact or worst <= STRONG or not math.isfinite(worst):
        return judge(name, worst, STRONG, "relative"), t, residual.mean(0)
    # At single points, by Student's t of the probes, which for many fields agree to rounding;
    limit = float(stdtrit(PROBES - 1, 1 - FALSE_ALARM / (2 * number)))
    error = residual.std(0) / math.sqrt(PROBES) + STRONG / limit
    largest = float((residual.mean(0).abs() / error).max())
    if largest > limit:
        return judge(name, largest, limit, "standard errors", f"Hutchinson, {PROBES} probes"), t, residual.mean(0)
    # and over all points: the product of two independent estimates has mean residual^2, zero for a correct field.
    first, second = residual[: PROBES // 2].mean(0), residual[PROBES // 2 :].mean(0)
    z = float(in_standard_errors((first * second)[:, None]))
    note = f"Hutchinson, {PROBES} probes; mean square residual"
    return judge(name, max(z, 0.0), largest_allowed(1), "standard errors", note), t, residual.mean(0)


def field_lines(subject: Subject) -> Check:
    """The time derivative of transport(x0, z, t) is the velocity there: central differences of order 6."""
    name, field, number = "field lines", subject.field, 64
    x0 = subject.rows(number)
    try:
        z = field.draw(x0.shape, subject.randomness, dtype=x0.dtype)
        t = subject.time(0.02 + 0.95 * subject.uniform(number))
        h = 2e-3 * torch.minimum(t, field.horizon - t)
        moved = [field.transport(x0, z, t + k * h) - field.transport(x0, z, t - k * h) for k in (1, 2, 3)]
        x = field.transport(x0, z, t)
    except Unavailable as error:
        return skipped(name, str(error))
    slope = (45 * moved[0] - 9 * moved[1] + moved[2]) / (60 * expand_time(h, x))
    v = field.velocity(x, t, x0)
    size = (x - x0).flatten(1).norm(dim=1) / t + v.flatten(1).norm(dim=1)
    error = (v - slope).flatten(1).norm(dim=1) / size
    return judge(name, float(error.nan_to_num(nan=math.inf).max()), LINES, "relative")


def bumps(subject: Subject) -> Bumps:
    """Three without waves, of lengths 1/2, 1 and 2, and five waves of random direction."""
    length = torch.tensor([0.5, 1, 2, 1, 1, 1, 1, 1], dtype=torch.float64)
    wave = torch.cat([torch.zeros(3, subject.dim, dtype=torch.float64), subject.normal(5, subject.dim)])
    phase = torch.cat([torch.zeros(3, dtype=torch.float64), subject.uniform(5) * math.tau])
    return Bumps(length, wave / math.sqrt(subject.dim), phase)


def weak_continuity(subject: Subject) -> Check:
    """E[phi(x_b)] - E[phi(x_a)] = integral of E[f . grad phi] dt over many short intervals (a, b): samples alone.

    All places on an interval come from the same random numbers, which costs no bias and, where these are the label of
    a line, leaves little variance; the two inner times mirror each other.
    """
    cells, groups = 32, 4
    field, phi = subject.field, bumps(subject)
    number = subject.number(1e7, 4000, 100_000) // cells * cells
    x0 = subject.rows(number)
    cell = torch.arange(number) % cells
    middle = (torch.arange(cells, dtype=x0.dtype) + 0.5) / cells
    pilot = subject.rows(100 * cells)
    reached = subject.sample(pilot, subject.time(middle.repeat(100))) - pilot
    unit = reached.flatten(1).square().mean(1).sqrt().view(100, cells).median(0).values[cell, None]
    state = subject.randomness.get_state()

    def at(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = subject.time(u)
        x = field.sample(x0, t, subject.randomness.set_state(state))
        return (x - x0).flatten(1) / unit, x, t

    low, shift = cell.to(x0) / cells, subject.uniform(number) / cells
    state = subject.randomness.get_state()
    (start, *_), (end, *_) = at(low), at(low + 1 / cells)
    flow = torch.zeros_like(phi.value(start))
    for u in (low + shift, low + 1 / cells - shift):
        y, x, t = at(u)
        rho = field.rho
        speed = rho * t ** (1 - 1 / rho) * (field.horizon ** (1 / rho) - field.t_min ** (1 / rho))  # dt / du
        v = field.velocity(x, t, x0).flatten(1) / unit * speed[:, None]
        flow += phi.slope(y, v) / (2 * cells)
    residual = phi.value(end) - phi.value(start) - flow
    # x0 stays on its line, so any function of it may weigh the residual, and shows what would cancel over the data.
    wave = subject.normal(subject.dim, residual.shape[1]) / math.sqrt(subject.dim)
    angle = (x0 - subject.data.mean(0)).flatten(1) / subject.std @ wave + math.tau * subject.uniform(residual.shape[1])
    residual = torch.cat([residual, residual * angle.cos()], 1).unflatten(0, (-1, groups, cells // groups))
    z = torch.stack([in_standard_errors(residual[:, k].flatten(0, 1)) for k in range(groups)])
    figure = float(z.abs().nan_to_num(nan=math.inf).max())
    return judge("continuity (weak)", figure, largest_allowed(z.numel()), "standard errors", f"{number:,} draws")


def start(subject: Subject) -> Check:
    """x_t -> x0: displacements, in units of the data's std, at t_min / 10^4; and they scatter little at t_min."""
    field, name = subject.field, "start"
    x0 = subject.rows(512)
    t_min = field.t_min
    gap = (subject.sample(x0, t_min) - x0).flatten(1)
    scatter = (gap - gap.median(0).values).square().mean(1).sqrt().nan_to_num(nan=math.inf)
    stop = float(scatter.median()) / subject.std
    if not stop <= STOP:
        return judge(name, stop, STOP, "std of the data", f"median scatter about x0 at t_min={t_min:g}: lower it")
    gap = (subject.sample(x0, 1e-4 * t_min) - x0).flatten(1).square().mean(1).sqrt().nan_to_num(nan=math.inf)
    near = float(gap.quantile(0.95)) / subject.std
    return judge(name, near, START, "std of the data", f"distance from x0, 95 % of draws, at t={1e-4 * t_min:g}")
