"""Problems with exact answers, and the list of fields that every law is checked on. Everything is float64.

A field that joins `FIELDS` inherits the laws of tests/fields and those of the time grids; an affine one also those of
the conversions, the preconditioning and the training times.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from own_fields import cosine_laplace, coupled, half_uniform, narrowing, principal, quadratic_logistic, swirling
from torch import Tensor

from diffusion.fields import (
    AffineField,
    Field,
    Gaussian,
    RadialField,
    StudentT,
    curved,
    gravity,
    laplace,
    linear,
    pfgmpp,
    radial_exponential,
    radial_gaussian,
    radial_gravity,
    radial_stretched,
    radial_tanh,
    straight,
    uniform,
    variance_exploding,
    variance_preserving,
)


class FieldCase(NamedTuple):
    """A field and what the laws must know of it."""

    name: str
    build: Callable[[], Field]
    dim: int
    isotropic: bool = False  # p_t(x|x0) depends on the distance from `centre(field, x0, t)` alone
    has_jumps: bool = False  # p_t(x|x0) is not continuous in x: integration by parts leaves boundary terms
    has_pole: bool = False  # p_t(x|x0) is infinite at x0, and the square of its score has no mean


FIELDS = [
    FieldCase("gravity", lambda: gravity(2), 2, isotropic=True),
    FieldCase("gravity_64", lambda: gravity(64), 64, isotropic=True),
    FieldCase("pfgmpp", lambda: pfgmpp(2, 128.0), 2, isotropic=True),
    FieldCase("pfgmpp_64", lambda: pfgmpp(64, 128.0), 64, isotropic=True),
    FieldCase("pfgmpp_3.5", lambda: pfgmpp(3, 3.5), 3, isotropic=True),
    FieldCase("variance_exploding", variance_exploding, 2, isotropic=True),
    FieldCase("variance_exploding_64", variance_exploding, 64, isotropic=True),
    FieldCase("variance_preserving", variance_preserving, 3, isotropic=True),
    FieldCase("linear", linear, 2, isotropic=True),
    FieldCase("cosine_laplace", cosine_laplace, 3),
    FieldCase("half_uniform", half_uniform, 2, has_jumps=True),
    FieldCase("quadratic_logistic", quadratic_logistic, 2),
    FieldCase("radial_text", lambda: RadialField("1 - exp(-(r/t)^2 / 2)", 2, 80.0), 2, isotropic=True),
    FieldCase("radial_gravity", lambda: radial_gravity(2), 2, isotropic=True),
    FieldCase("radial_gaussian_64", lambda: radial_gaussian(64), 64, isotropic=True),
    FieldCase("radial_tanh", lambda: radial_tanh(2), 2, isotropic=True, has_pole=True),
    FieldCase("radial_exponential", lambda: radial_exponential(3), 3, isotropic=True, has_pole=True),
    FieldCase("radial_stretched", lambda: radial_stretched(2), 2, isotropic=True, has_pole=True),
    FieldCase("radial_stretched_64", lambda: radial_stretched(64), 64, isotropic=True, has_pole=True),
    FieldCase("radial_narrowing", narrowing, 3, isotropic=True),
    FieldCase("straight_uniform", lambda: straight(uniform()), 2, has_jumps=True),
    FieldCase("straight_principal", principal, 3),
    FieldCase("curved", lambda: curved(laplace(), 2.0), 3),
    FieldCase("curved_the_other_way", lambda: curved(Gaussian(), -0.4), 2),
    FieldCase("coupled", coupled, 2),
    FieldCase("swirling", swirling, 2),
]
AFFINE = [case for case in FIELDS if isinstance(case.build(), AffineField)]
CLOSED_FORM = [case for case in AFFINE if isinstance(case.build().base, Gaussian | StudentT)]


def names(cases) -> dict:
    """Arguments for pytest.mark.parametrize("case", ...)."""
    return {"argvalues": cases, "ids": [case.name for case in cases]}


def centre(field: Field, x0: Tensor, t: Tensor | float) -> Tensor:
    """Where p_t(.|x0) of an isotropic field has its centre."""
    if not isinstance(field, AffineField):
        return x0
    return field.alpha(torch.as_tensor(t, dtype=x0.dtype)).reshape(-1, *[1] * (x0.dim() - 1)) * x0


def times(field: Field, points: int) -> Tensor:
    """`points` times from t_min to the horizon, both included, even in the field's clock; (points,)."""
    u = torch.linspace(field.t_min ** (1 / field.rho), field.horizon ** (1 / field.rho), points, dtype=torch.float64)
    return u.pow(field.rho).clamp(field.t_min, field.horizon)


class Lines(NamedTuple):
    field: Field
    x0: Tensor  # (B, dim) data points
    z: Tensor  # (B, dim) labels
    t: Tensor  # (B,) times
    x: Tensor  # (B, dim) places on the lines at these times


def lines(case: FieldCase, number: int = 32, seed: int = 0) -> Lines:
    """Field lines of different data points at times from t_min to the horizon."""
    randomness, field = torch.Generator().manual_seed(seed), case.build()
    x0 = torch.randn(number, case.dim, generator=randomness, dtype=torch.float64)
    z = field.draw((number, case.dim), randomness, dtype=torch.float64)
    t = times(field, number)
    return Lines(field, x0, z, t, field.transport(x0, z, t))


def gradient(output: Tensor, x: Tensor) -> Tensor:
    """Gradient of each output (B,) in its own row of x; zeros where it does not depend on x."""
    (grad,) = torch.autograd.grad(output.sum(), x, create_graph=True, materialize_grads=True)
    return grad


def divergence(f: Tensor, x: Tensor) -> Tensor:
    """Divergence (B,) of f (B, d), a function of each row of x, exactly."""
    rows = [
        torch.autograd.grad(f[:, i].sum(), x, retain_graph=True, materialize_grads=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    return torch.stack(rows, 1).sum(1)


def continuity_residual(log_prob, velocity, x: Tensor, t: Tensor) -> Tensor:
    """|d_t log p + f . grad log p + div f| as a part of its terms, (B,), for functions of (x, t)."""
    x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
    log_p, f = log_prob(x, t), velocity(x, t)
    terms = torch.stack([gradient(log_p, t), (f * gradient(log_p, x)).sum(1), divergence(f, x)])
    return (terms.sum(0).abs() / terms.abs().sum(0)).detach()


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of isotropic Gaussians as data, and its marginal law under an affine field.

    The base must be Gaussian or StudentT. Student-t noise is Gaussian noise of random precision, Gamma(D/2, rate D/2);
    given the precision everything is a Gaussian mixture, and over the logarithm of the precision the trapezoidal rule
    converges exponentially. Points are (B, *shape) with d coordinates, times numbers or (B,).

    Args:
        field: affine, with a Gaussian or a Student-t base.
        means: (K, d).
        stds: (K,) per coordinate, 0 for a point mass.
        weights: (K,), summing to 1.
    """

    field: AffineField
    means: Tensor
    stds: Tensor
    weights: Tensor

    @property
    def device(self) -> torch.device:
        return self.means.device

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """(number, d) data points."""
        k = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        noise = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * noise

    def log_prob(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._at(x, t).log_prob

    def denoised(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._at(x, t).denoised.view(x.shape)

    def noise(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._at(x, t).noise.view(x.shape)

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._at(x, t).score.view(x.shape)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._at(x, t).velocity.view(x.shape)

    def _at(self, x: Tensor, t: Tensor | float) -> "_Marginal":
        x = x.double().flatten(1)
        return _Marginal(self, x, torch.as_tensor(t, dtype=torch.float64).expand(len(x)).contiguous())


class _Marginal:
    """A mixture at (x, t): a sum over nodes n of the precision and over components k."""

    def __init__(self, mixture: GaussianMixture, x: Tensor, t: Tensor):
        self.mixture, self.t = mixture, t
        self.alpha, self.sigma = mixture.field.alpha(t), mixture.field.sigma(t)
        self.gap = x[:, None] - self.alpha[:, None, None] * mixture.means  # (B, K, d)
        self.squared = self.gap.square().sum(2)  # (B, K)
        self.log_precision, log_weight = self._nodes(x.shape[1])
        self.spread = self.sigma[:, None].square() / self.log_precision.exp()  # (B, N): variance of the noise
        signal = (self.alpha[:, None] * mixture.stds).square()  # (B, K)
        self.variance = signal[:, None] + self.spread[:, :, None]  # (B, N, K)
        gaussian = -0.5 * (x.shape[1] * (math.tau * self.variance).log() + self.squared[:, None] / self.variance)
        self.log_joint = mixture.weights.log() + log_weight[:, None] + gaussian

    def _nodes(self, d: int) -> tuple[Tensor, Tensor]:
        """Log-precisions (N,) and the logarithms of their weights: all that holds more than 1e-15 of any integral."""
        base = self.mixture.field.base
        if isinstance(base, Gaussian):
            return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        D = base.dof
        # The integrand is between Gamma(D/2, rate D/2), where the signal hides the noise, and
        # Gamma((D+d)/2, rate (D + |z|^2)/2), where all is noise; `reach` bounds the tails of both.
        radius = float((self.squared.detach() / self.sigma.detach()[:, None].square()).max())

        def reach(shape: float) -> float:
            return 72 / shape + 12 / math.sqrt(shape) + 0.5

        low = min(-reach(D), math.log((D + d) / (D + radius)) - reach(D + d))
        high = math.log((D + d) / D) + math.log1p(reach(D + d)) + math.log1p(reach(D))
        step = min(0.6 * math.sqrt(2 / (D + d)), 0.15)
        u = torch.arange(low, high, step, dtype=torch.float64)
        constant = 0.5 * D * math.log(0.5 * D) - math.lgamma(0.5 * D) + math.log(step)
        return u, constant + 0.5 * D * (u - u.exp())

    @property
    def log_prob(self) -> Tensor:
        return self.log_joint.flatten(1).logsumexp(1)

    @cached_property
    def share(self) -> Tensor:
        """(B, N, K): probability of each node and component given x."""
        return self.log_joint.flatten(1).softmax(1).view(self.log_joint.shape)

    def _gaps(self, coefficient: Tensor) -> Tensor:
        return torch.einsum("bk,bkd->bd", (self.share * coefficient).sum(1), self.gap)

    @property
    def denoised(self) -> Tensor:
        shrink = self.alpha[:, None, None] * self.mixture.stds.square() / self.variance
        return self.share.sum(1) @ self.mixture.means + self._gaps(shrink)

    @property
    def noise(self) -> Tensor:
        return self._gaps(self.spread[:, :, None] / self.sigma[:, None, None] / self.variance)

    @property
    def score(self) -> Tensor:
        return -self._gaps(self.variance.reciprocal())

    @property
    def velocity(self) -> Tensor:
        one = torch.ones_like(self.t)
        _, alpha_dot = torch.func.jvp(self.mixture.field.alpha, (self.t,), (one,))
        _, sigma_dot = torch.func.jvp(self.mixture.field.sigma, (self.t,), (one,))
        return alpha_dot[:, None] * self.denoised + sigma_dot[:, None] * self.noise


@dataclass(frozen=True)
class PointMasses:
    """Finitely many data points under any field: Bayes' rule over its conditional densities.

    Args:
        field: any field.
        points: (K, d).
        weights: (K,), summing to 1.
    """

    field: Field
    points: Tensor
    weights: Tensor

    @property
    def device(self) -> torch.device:
        return self.points.device

    def _pairs(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Each x with each data point: x, t and x0, (B K, ...)."""
        b, k = len(x), len(self.points)
        t = torch.as_tensor(t, dtype=x.dtype).expand(b)
        return x.repeat_interleave(k, 0), t.repeat_interleave(k), self.points.repeat(b, 1)

    def _log_joint(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.field.log_prob(*self._pairs(x, t)).view(len(x), -1) + self.weights.log()

    def log_prob(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._log_joint(x, t).logsumexp(1)

    def average(self, quantity, x: Tensor, t: Tensor | float) -> Tensor:
        """The mean (B, d) of quantity(x, t, x0) over x0 given x."""
        values = quantity(*self._pairs(x, t)).view(len(x), len(self.points), -1)
        share = self._log_joint(x, t).softmax(1)
        values = values.where(share[:, :, None] > 0, 0)  # a velocity is not defined where there is no mass
        return torch.einsum("bk,bkd->bd", share, values)

    def denoised(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.average(lambda x, t, x0: x0, x, t)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self.average(self.field.velocity, x, t)


def mixture(field: AffineField, dim: int = 2) -> GaussianMixture:
    """Three modes of different weights and widths, well apart: what a sampler must resolve."""
    means = torch.zeros(3, dim, dtype=torch.float64)
    means[:, :2] = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.3, -1.1]])
    stds, weights = torch.tensor([0.3, 0.2, 0.25]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    return GaussianMixture(field, means, stds, weights)


def point_masses(field: Field, dim: int = 2) -> PointMasses:
    """Three data points of different weights."""
    data = mixture(field, dim)
    return PointMasses(field, data.means, data.weights)
