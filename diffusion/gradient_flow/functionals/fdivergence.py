"""f-divergences: functionals of the ratio r = p / q of the target's density to that of the particles."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, points_of
from diffusion.gradient_flow.functionals.ratios import GivenRatio, Ratio


class Divergence(NamedTuple):
    """A convex f with f(1) = 0, by three functions of y = log r, each (N,) -> (N,) in torch operations.

    With g(y) = f(e^y): h = g - g' and s = -h' = g'' - g'. Near r = 1 every divergence is f''(1) times KL, to second
    order, and f''(1) = speed(0); a flow slows down by as much where it is small.

    Attributes:
        value: f(r).
        variation: h = f(r) - r f'(r), the first variation of E_q f(p / q) at x.
        speed: s = r^2 f''(r), which multiplies grad log r in the velocity.
    """

    value: Callable[[Tensor], Tensor]
    variation: Callable[[Tensor], Tensor]
    speed: Callable[[Tensor], Tensor]


def power(order: float) -> Divergence:
    """f(r) = (r^a - 1 - a (r - 1)) / (a (a - 1)) of order a, with s = r^a (Cressie and Read 1984).

    Normed, f''(1) = 1: of order 0 it is the reverse, of order 1 the forward KL, 2 and -1 are half of Pearson and of
    Neyman, and 1/2 is 4 times the squared Hellinger distance. Where the target has little mass, r near 0, particles
    hardly move at orders above 0, and fastest at orders below 0.

    Raises:
        UserError: the order is not finite.
    """
    if not math.isfinite(order):
        raise UserError(f"the order of a power divergence is {order}, expected a finite number")
    if order == 0:
        return Divergence(lambda y: y.expm1() - y, lambda y: -y, torch.ones_like)
    if order == 1:
        return Divergence(lambda y: y * y.exp() - y.expm1(), lambda y: -y.expm1(), torch.exp)
    return Divergence(
        lambda y: ((order * y).expm1() - order * y.expm1()) / (order * (order - 1)),
        lambda y: -(order * y).expm1() / order,
        lambda y: (order * y).exp(),
    )


LOG_2 = math.log(2)

KINDS = {
    # KL(q || p): f = -log r. Seeks modes.
    "reverse_kl": Divergence(torch.neg, lambda y: 1 - y, torch.ones_like),
    # KL(p || q): f = r log r. Covers mass.
    "forward_kl": Divergence(lambda y: y * y.exp(), lambda y: -y.exp(), torch.exp),
    # The sum of both: f = (r - 1) log r; f''(1) = 2.
    "jeffreys": Divergence(lambda y: y * y.expm1(), lambda y: -y - y.expm1(), lambda y: 1 + y.exp()),
    # Integral of (p - q)^2 / q: f = (r - 1)^2; f''(1) = 2.
    "pearson": Divergence(lambda y: y.expm1().square(), lambda y: -(2 * y).expm1(), lambda y: 2 * (2 * y).exp()),
    # Integral of (p - q)^2 / p: f = (r - 1)^2 / r; f''(1) = 2.
    "neyman": Divergence(lambda y: y.expm1() * -(-y).expm1(), lambda y: 2 * (-y).expm1(), lambda y: 2 * (-y).exp()),
    # Half of KL(p || m) + KL(q || m), m = (p + q) / 2, at most log 2: f = (r log r - (1 + r) log((1 + r) / 2)) / 2;
    # f''(1) = 1/4.
    "jensen_shannon": Divergence(
        lambda y: (y.exp() * (LOG_2 + logsigmoid(y)) + LOG_2 - softplus(y)) / 2,
        lambda y: (LOG_2 - softplus(y)) / 2,
        lambda y: y.sigmoid() / 2,
    ),
    # Half the integral of (sqrt p - sqrt q)^2, at most 1: f = (sqrt r - 1)^2 / 2; f''(1) = 1/4.
    "squared_hellinger": Divergence(
        lambda y: (y / 2).expm1().square() / 2, lambda y: -(y / 2).expm1() / 2, lambda y: (y / 2).exp() / 4
    ),
}
"""Divergences by name. f'' and all constants are as the integrals say."""


@dataclass(frozen=True)
class FDivergence(Functional):
    """F[q] = E_q f(r), r = p / q, for a convex f with f(1) = 0 (Csiszar 1967).

    The first variation is h = f(r) - r f'(r) and the velocity -grad h(x) = r^2 f''(r) grad log r. F depends on q
    through r as well: fitted to particles of a law q0, with r0 = p / q0, the value at others is that of the tangent

        E_q h(r0) + E_q0[r0 f'(r0)] = E_q h(r0) + E_p f'(r0) <= F[q],

    the variational bound (Nguyen, Wainwright and Jordan 2010, lemma 1), which is F at q0 and has its first variation
    there. So the values of two laws are compared by fitting to each. Where nothing was fitted, the ratio is taken to be
    that to the law of the particles at hand, and the value is E_q f(r).

    Args:
        kind: a name in `KINDS`, or a Divergence.
        ratio: log p/q, (N, *shape) -> (N,) in torch operations: a Ratio, such as ClassifierRatio(data), which follows
            the particles of a flow; or a callable, which stays that to the law q for which it was given.
        level: E_q0[r0 f'(r0)]; None: nothing was fitted.

    Raises:
        UserError: an unknown name; a divergence whose functions do not belong together, or with f(1) not 0 or f not
            convex; from a ratio that was never fitted, see ClassifierRatio.
    """

    kind: str | Divergence
    ratio: Ratio | Callable[[Tensor], Tensor]
    level: float | None = None

    def __post_init__(self):
        if isinstance(self.kind, Divergence):
            _check(self.kind)
        elif not isinstance(self.kind, str) or self.kind not in KINDS:
            raise UserError(f"kind is {self.kind!r}, expected one of {', '.join(KINDS)}, or a Divergence")
        if not isinstance(self.ratio, Ratio):
            if not callable(self.ratio):
                raise UserError(f"ratio is {self.ratio!r}, expected a Ratio or a callable, particles -> log p/q (N,)")
            object.__setattr__(self, "ratio", GivenRatio(self.ratio))

    @property
    def divergence(self) -> Divergence:
        return self.kind if isinstance(self.kind, Divergence) else KINDS[self.kind]

    def value(self, particles):
        log_ratio = self._log_ratio(particles)
        if self.level is None:
            return self.divergence.value(log_ratio).mean()
        return self.divergence.variation(log_ratio).mean() + self.level

    def first_variation(self, particles):
        return self.divergence.variation(self._log_ratio(particles))

    @torch.enable_grad()
    def velocity(self, particles):
        points_of(particles)
        x = particles.detach().requires_grad_()
        log_ratio = self._log_ratio(x)
        if not log_ratio.requires_grad:
            raise UserError("the log ratio has no derivative in x; expected torch operations, not under no_grad")
        (slope,) = torch.autograd.grad(log_ratio.sum(), x)
        return slope * self.divergence.speed(log_ratio.detach()).view(-1, *[1] * (x.dim() - 1))

    def fitted(self, particles, generator=None):
        fitted = replace(self, ratio=self.ratio.fitted(particles, generator), level=None)
        with torch.no_grad():
            level = fitted.value(particles.detach()) - fitted.first_variation(particles.detach()).mean()
        return replace(fitted, level=float(level))

    def _log_ratio(self, particles: Tensor) -> Tensor:
        points_of(particles)
        log_ratio = self.ratio.log_ratio(particles)
        if not isinstance(log_ratio, Tensor) or log_ratio.shape != particles.shape[:1]:
            found = tuple(log_ratio.shape) if isinstance(log_ratio, Tensor) else type(log_ratio).__name__
            raise UserError(f"the log ratio has shape {found}, expected ({len(particles)},): one number a particle")
        return log_ratio


def _check(kind: Divergence) -> None:
    """Refuse a divergence that is none, by autograd at some ratios from e^-2 to e^2."""
    y = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        value, variation = kind.value(y), kind.variation(y)
        (slope,) = torch.autograd.grad(value.sum(), y, allow_unused=True, materialize_grads=True)
        (fall,) = torch.autograd.grad(variation.sum(), y, allow_unused=True, materialize_grads=True)
    at_one, speed = float(value[4].detach()), kind.speed(y.detach())
    if not abs(at_one) < 1e-9:
        raise UserError(f"the divergence has f(1) = {at_one:.6g}, expected 0; its functions are of log r, not of r")
    for name, found, expected in (("variation", variation, value - slope), ("speed", speed, -fall)):
        found, expected = found.detach(), expected.detach()
        gap = found - expected
        if name == "variation":  # known up to a constant
            gap = gap - gap.mean()
        if not bool((gap.abs() < 1e-6 * (1 + expected.abs())).all()):
            worst = int(gap.abs().argmax())
            raise UserError(
                f"the divergence has {name} {float(found[worst]):.6g} at log r = {float(y.detach()[worst]):.3g}, "
                f"expected {float(expected[worst]):.6g} from its {'value' if name == 'variation' else 'variation'}"
            )
    if not bool((speed >= 0).all()):
        raise UserError(f"the divergence has r^2 f''(r) = {float(speed.min()):.6g}, expected a convex f")
