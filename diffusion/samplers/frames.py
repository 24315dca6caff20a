"""One step of the SDEs that share a field's marginals, with its linear part solved exactly.

For every g(t) >= 0 the process that runs from T to 0, with tau = -t,

    dx = [-f_t(x) + (1/2) g^2 s_t(x)] dtau + g dw,        s_t = grad log p_t,

has the marginals p_t of the field (Anderson 1982; Song et al. 2021, arXiv 2011.13456, app. D): g = 0 is the ODE. What g
does over a step is told by its renewal Lambda = integral of g^2 / (2 sigma_t^2) dt: were nothing but noise in x, the
share exp(-Lambda) of it would be kept.

A frame turns what a model says at (x, t) into a `Pair` (a, b) of slow quantities in which every step is linear,

    x' = keep x + first a + second b + noise xi,        xi ~ N(0, I).

Affine fields: with D = E[x0|x], z = E[z|x], l = log(alpha / sigma) and y = x / sigma the process is, in the clock l,

    dy = [e^l D + lambda (e^l D + b - y)] dl + sqrt(2 lambda) dw,    a = D,  b = z + sigma s,  lambda = dLambda / dl.

b vanishes for a Gaussian base, so that the score is not asked for, and is bounded for the others. With a and b held

    x' = (sigma'/sigma) e^-Lambda x + alpha' (1 - e^-(h + Lambda)) a + sigma' (1 - e^-Lambda) b
         + sigma' (1 - e^-2Lambda)^(1/2) xi,        h = l' - l,

whatever g is in between, and for h = infinity too. Lambda = 0 is DDIM, the Lambda with sigma'^2 (1 - e^-2Lambda) = the
variance of q(x'|x, x0) is DDPM. Other fields, in t, with sigma the scale of their noise:

    dx = [-f + Lambda' (b - x)] dtau + g dw,    a = f,  b = x + sigma^2 s.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField, Field, conversions
from diffusion.samplers.base import finite, shaped
from diffusion.samplers.scores import Motion, gaussian, motion

Noise = float | Callable[[Tensor], Tensor]


class Pair(NamedTuple):
    """The slow quantities at (x, t), (B, *shape) each; `second` is 0 where it has no part in the step."""

    first: Tensor
    second: Tensor | float


class Step(NamedTuple):
    """x' = keep x + first a + second b + noise xi. A share of a and of b may be taken at the end of the step."""

    keep: float
    first: float
    second: float
    noise: float
    late_first: float  # share of the later a that makes the step second order
    late_second: float

    def __call__(self, x: Tensor, now: Pair, xi: Tensor | float, later: Pair | None = None) -> Tensor:
        """The state after the step, to first order, or to second with the pair at the end of the first-order step."""
        a, b = now
        if later is not None:
            a = a + self.late_first * (later.first - a)
            b = b + self.late_second * (later.second - b)
        return self.keep * x + self.first * a + self.second * b + self.noise * xi


class Frame(ABC):
    """A model seen as pairs and steps.

    Args:
        model: with `.field`, a velocity and, where the base is not Gaussian, a score.
        x: points like those that will move.
        conditions: passed to the model.

    Attributes:
        stability: of the law of an affine field's noise (Law.stability); None where there is none.
    """

    stability: float | None = None

    def __init__(self, model, x: Tensor, conditions: Mapping[str, Any]):
        self.model, self.conditions = model, conditions

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """f_t(x), checked."""
        return finite(shaped(self.model.velocity(x, t.expand(len(x)), **self.conditions), "velocity", x), "velocity", t)

    def motion(self, x: Tensor, t: Tensor) -> Motion:
        """f_t(x) and the score, checked."""
        velocity, score = motion(self.model, x, t.expand(len(x)), **self.conditions)
        return Motion(*(finite(shaped(v, name, x), name, t) for v, name in ((velocity, "velocity"), (score, "score"))))

    @abstractmethod
    def log_level(self, t: Tensor) -> Tensor:
        """Logarithm of the level of noise (n,), float64: sigma / alpha, of fields that are not affine sigma."""

    @abstractmethod
    def power(self, t: Tensor) -> Tensor:
        """sigma_t^2 (n,), float64."""

    @abstractmethod
    def natural(self, t: Tensor) -> Tensor:
        """g^2 (n,) of strength 1."""

    @abstractmethod
    def pair(self, x: Tensor, t: Tensor, renewal: float) -> Pair:
        """The pair at `x` and the time `t` (0-dimensional), for a step with this renewal."""

    @abstractmethod
    def step(self, t: Tensor, t_next: Tensor, renewal: float) -> Step:
        """From `t` to `t_next`. With t_next = t it is a Langevin step, which keeps p_t.

        Up, to t_next > t, it is one of dx = [f + (1/2) g^2 s] dt + g dw, which has the marginals too.
        """

    def renewals(self, noise: Noise, times: Tensor) -> list[float]:
        """Lambda of each step between `times` (n,), by Gauss's rule in log t.

        Raises:
            UserError: g(t) is not a tensor like t of finite numbers, none of them negative.
        """
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(8))
        log_t = times.double().cpu().log()
        half = (log_t[:-1] - log_t[1:]) / 2
        t = (log_t[1:, None] + half[:, None] * (1 + nodes)).exp().flatten()
        if callable(noise):
            try:
                g = noise(t)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"noise g(t) fails for a tensor t, expected torch operations: {reason}") from error
            if not isinstance(g, Tensor) or g.shape != t.shape:
                raise UserError(f"noise g(t) gives {type(g).__name__} for a tensor of times, expected a tensor like t")
            bad = ~(g.isfinite() & (g >= 0))
            if bool(bad.any()):
                i = int(bad.to(torch.uint8).argmax())
                raise UserError(f"noise g(t) is {float(g[i]):g} at t={float(t[i]):.4g}, expected a number of 0 or more")
            squared = g.double().square()
        else:
            squared = noise * self.natural(t)
        rate = (0.5 * squared / self.power(t) * t).view(len(half), -1)
        return ((rate @ weights) * half).tolist()


class AffineFrame(Frame):
    """See the module; g^2 of strength 1 is 2 alpha^2 sigma^2 d/dt log(sigma / alpha).

    For variance_exploding that is d sigma^2/dt, the time-reversed diffusion. The factor alpha^2 keeps g finite where
    alpha = 0, and spends no noise on times at which x says nothing of the data.
    """

    def __init__(self, model, x, conditions):
        super().__init__(model, x, conditions)
        self.field: AffineField = model.field
        self.gaussian, self.stability = gaussian(model.field), model.field.base.stability
        self.schedule_at = functools.cache(lambda t: self.field.schedule(x[:1], t))

    def _schedule(self, t: Tensor):
        schedule = self.field.schedule(torch.empty(t.numel(), 1, dtype=torch.float64), t.double().cpu().flatten())
        return [c.flatten() for c in schedule]

    def log_level(self, t):
        return self.field.log_noise_to_signal(t.double().cpu())

    def power(self, t):
        return self._schedule(t)[1].square()

    def natural(self, t):
        alpha, sigma, alpha_dot, sigma_dot = self._schedule(t)
        return 2 * alpha * sigma * (alpha * sigma_dot - sigma * alpha_dot)

    def pair(self, x, t, renewal):
        schedule = self.schedule_at(float(t))
        if self.gaussian or renewal == 0:
            return Pair(conversions.from_velocity(schedule, x, self.velocity(x, t)).denoised, 0.0)
        velocity, score = self.motion(x, t)
        estimate = conversions.from_velocity(schedule, x, velocity)
        return Pair(estimate.denoised, estimate.noise + schedule.sigma * score)

    def step(self, t, t_next, renewal):
        ends = torch.stack([t, t_next]).double().cpu()
        (alpha, alpha_next), (sigma, sigma_next) = (c(ends).tolist() for c in (self.field.alpha, self.field.sigma))
        h = math.log(alpha_next * sigma / sigma_next) - math.log(alpha) if alpha > 0 else math.inf
        return Step(
            sigma_next / sigma * math.exp(-renewal),
            -alpha_next * math.expm1(-h - renewal),
            -sigma_next * math.expm1(-renewal),
            sigma_next * math.sqrt(-math.expm1(-2 * renewal)),
            late(h + renewal),
            late(renewal),
        )


class PlainFrame(Frame):
    """Fields that are not affine; g^2 of strength 1 is 2 sigma^2 / t.

    sigma^2 is the median power per coordinate of x_t from a data point at the origin, about its centre, in units of
    what that is for N(0, I); from 256 lines at 64 times.
    """

    def __init__(self, model, x, conditions):
        super().__init__(model, x, conditions)
        field: Field = model.field
        times = field.clock(64)
        origin = torch.zeros(256, *x.shape[1:], dtype=torch.float64)
        powers = []
        for t in times.tolist():
            draws = field.sample(origin, t, torch.Generator().manual_seed(0)).flatten(1)
            powers.append((draws - draws.median(0).values).square().mean(1).median())
        unit = (1 - 2 / (9 * x[0].numel())) ** 3  # Wilson and Hilferty's median of chi^2_d / d
        self.log_times, self.log_powers = times.log(), (torch.stack(powers) / unit).log()

    def log_level(self, t):
        return self.power(t).log() / 2

    def power(self, t):
        at = t.double().cpu().log().flatten()
        return torch.from_numpy(np.interp(at.numpy(), self.log_times.numpy(), self.log_powers.numpy())).exp()

    def natural(self, t):
        return 2 * self.power(t) / t.double().cpu().flatten()

    def pair(self, x, t, renewal):
        if renewal == 0:
            return Pair(self.velocity(x, t), 0.0)
        velocity, score = self.motion(x, t)
        return Pair(velocity, x + float(self.power(t)) * score)

    def step(self, t, t_next, renewal):
        covered, share = -math.expm1(-renewal), late(2 * renewal)
        before, after = self.power(torch.stack([t, t_next])).tolist()
        return Step(
            math.exp(-renewal),
            float(t_next - t) * (covered / renewal if renewal > 0 else 1.0),
            covered,
            math.sqrt(-math.expm1(-2 * renewal) * ((1 - share) * before + share * after)),
            late(renewal),
            late(renewal),
        )


def late(length: float) -> float:
    """The share of the later value in the integral of exp(u) over a step of this length, of what is linear in u."""
    if length < 1e-4:
        return 0.5 + length / 12
    covered = -math.expm1(-length)
    return 1 / covered - 1 / length
