"""Gaussian mixtures under affine fields with their exact probability-flow ODE: the problems of benchmarks/samplers.py.

With y = x / alpha and s = sigma / alpha every affine field has one ODE, dy/ds = (y - E[x0|y, s]) / s. Its solution from
x_T to t_min is found here to about 1e-9 and is what samplers are measured against.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion import fields
from diffusion.fields import AffineField, conversions

FIELDS = {
    "variance_exploding": fields.variance_exploding,
    "variance_preserving": fields.variance_preserving,
    "linear": fields.linear,
    "gravity": fields.gravity,
    "pfgmpp": lambda dim: fields.pfgmpp(dim, 64.0),
}
DIMS = (2, 64)


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians as data under an affine field: a model with exact answers, float64.

    Student-t noise is Gaussian noise of random precision, Gamma(D/2, rate D/2); over the logarithm of the precision the
    trapezoidal rule converges exponentially.

    Args:
        field: affine, with a Gaussian or a Student-t base.
        means: (K, d).
        stds: (K,) per coordinate.
        weights: (K,), summing to 1.
    """

    field: AffineField
    means: Tensor
    stds: Tensor
    weights: Tensor

    @property
    def device(self) -> torch.device:
        return self.means.device

    @property
    def data_mean(self) -> Tensor:
        """(d,): E[x0]."""
        return self.weights @ self.means

    def denoised(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[x0|x_t = x] (B, d) at the time `t`, a number or (B,)."""
        t = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
        t = t[:1] if bool((t == t[0]).all()) else t
        return self.posterior_mean(x, self.field.alpha(t), self.field.sigma(t))

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The velocity (B, d) of the ODE at `x` (B, d) and the time `t`, a number or (B,)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        return conversions.from_denoised(self.field.schedule(x, t), x, self.denoised(x, t)).velocity

    def posterior_mean(self, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """E[x0 | alpha x0 + sigma z = x], (B, d); alpha and sigma are numbers, (1,) or (B,)."""
        alpha, sigma = (torch.as_tensor(a, dtype=torch.float64).reshape(-1, 1) for a in (alpha, sigma))  # (B or 1, 1)
        gap = x[:, None] - alpha[:, :, None] * self.means  # (B, K, d)
        squared, signal = gap.square().sum(2), (alpha * self.stds).square()
        if not bool(squared.isfinite().all()):
            raise ArithmeticError("the state is not finite")
        log_precision, log_weight = self._nodes(x.shape[1], squared, signal, sigma)
        variance = signal[:, None] + sigma.square()[:, :, None] * (-log_precision).exp()[:, None]  # (B or 1, N, K)
        constant = self.weights.log() + log_weight[:, None] - 0.5 * x.shape[1] * variance.log()
        log_joint = torch.addcmul(constant, squared[:, None], 0.5 / variance, value=-1)  # (B, N, K)
        joint = (log_joint - log_joint.amax((1, 2), keepdim=True)).exp()
        share, shrink = joint.sum(1), alpha * self.stds.square() * (joint / variance).sum(1)
        return (share @ self.means + torch.einsum("bk,bkd->bd", shrink, gap)) / share.sum(1, keepdim=True)

    def _nodes(self, d: int, squared: Tensor, signal: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Log-precisions (N,) and the logarithms of their weights, up to a constant."""
        if isinstance(self.field.base, fields.Gaussian):
            return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        D = self.field.base.dof

        def reach(shape: float) -> float:  # how far a Gamma law reaches down in the logarithm, to 1e-12
            return 56 / shape + 10.5 / math.sqrt(shape) + 0.5

        farthest = math.log((D + d) / (D + float((squared / sigma.square()).max().detach())))  # where all is noise
        covered = min(0.0, float((sigma.square() / signal).min().log()))  # above this the signal hides the noise
        low = min(farthest - reach(D + d), max(-reach(D), covered - reach(D + d)))
        high = math.log((D + d + 11 * math.sqrt(D + d) + 56) / D)
        u = torch.arange(low, high, min(0.85 * math.sqrt(2 / (D + d)), 0.3), dtype=torch.float64)
        return u, 0.5 * D * (u - u.exp())


def mixture(field: AffineField, dim: int, seed: int) -> Mixture:
    """Five to nine modes of unequal weights and widths, the same data for every field.

    d = 2: at a radius of 1 to 2, widths 0.05 to 0.3. Beyond: means of unit scale per coordinate in a space of few
    dimensions plus a little in all, widths 0.1 to 0.5.
    """
    randomness = torch.Generator().manual_seed(1000 * (seed + 1) + dim)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=randomness, dtype=torch.float64)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=randomness, dtype=torch.float64)

    modes = int(torch.randint(5, 10, (), generator=randomness))
    weights = uniform(modes) + 0.25
    if dim == 2:
        angle, radius = math.tau * (torch.arange(modes) + 0.8 * uniform(modes)) / modes, 1 + uniform(modes)
        means = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
        stds = 0.05 * 6 ** uniform(modes)
    else:
        rank = 4
        means = normal(modes, rank) @ normal(rank, dim) / math.sqrt(rank) + 0.1 * normal(modes, dim)
        stds = 0.1 * 5 ** uniform(modes)
    return Mixture(field, means, stds, weights / weights.sum())


class Case(NamedTuple):
    """A problem and its answers."""

    name: str
    model: Mixture
    x_T: Tensor  # (N, d) draws from the prior
    state: Tensor  # (N, d) x / alpha at t_min on the exact ODE
    denoised: Tensor  # (N, d) E[x0|x] there: where samplers with a denoising step end
    limit: Tensor  # (N, d) the exact ODE followed on to t = 0
    uncertainty: float  # largest difference of `denoised` to a solution a hundred times less accurate

    def noise_to_signal(self, t: float) -> float:
        t = torch.tensor(t, dtype=torch.float64)
        return float(self.model.field.sigma(t) / self.model.field.alpha(t))

    def start(self, before: float = 0.0) -> tuple[Tensor, float]:
        """(y, s) at the horizon, for fields with alpha_T = 0 at the horizon - `before`, where y = s z + E[x0]."""
        return start(self.model, self.x_T, before)


def start(model: Mixture, x_T: Tensor, before: float) -> tuple[Tensor, float]:
    t = torch.tensor(model.field.horizon, dtype=torch.float64)
    alpha, sigma = float(model.field.alpha(t)), float(model.field.sigma(t))
    if alpha > 0:
        return x_T / alpha, sigma / alpha
    s = float(model.field.sigma(t - before) / model.field.alpha(t - before))
    return s * (x_T / sigma) + model.data_mean, s  # to the order of 1 / s^2


def follow(model: Mixture, y: Tensor, first: float, last: float, rtol: float) -> Tensor:
    """y = x / alpha (N, d) at s = `last` on the exact ODE from `y` at s = `first`.

    Integrates w = y / sqrt(1 + s^2) over log s by an eighth-order method: w hardly moves while all is noise.
    """

    def slope(log_s: float, w):
        s = math.exp(log_s)
        scale, w = math.hypot(1, s), torch.from_numpy(w).view(y.shape)
        return (w / scale**2 - model.posterior_mean(scale * w, 1, s) / scale).flatten().numpy()

    span, w = (math.log(first), math.log(last)), (y / math.hypot(1, first)).flatten().numpy()
    solution = solve_ivp(slope, span, w, "DOP853", rtol=rtol, atol=0.1 * rtol, t_eval=span[1:])
    if not solution.success:
        raise ArithmeticError(f"the reference stopped: {solution.message}")
    return torch.from_numpy(solution.y[:, -1]).view(y.shape) * math.hypot(1, last)


@cache
def case(field: str, dim: int, number: int = 256, seed: int = 0) -> Case:
    """The case `field` in `dim` dimensions: `number` draws, mixture and draws of `seed`."""
    model = mixture(FIELDS[field](dim), dim, seed)
    randomness = torch.Generator().manual_seed(seed)
    x_T = model.field.sample_prior((number, dim), randomness, dtype=torch.float64)
    t_min = torch.tensor(model.field.t_min, dtype=torch.float64)
    last = float(model.field.sigma(t_min) / model.field.alpha(t_min))
    y, first = start(model, x_T, before=1e-8)
    rough, state = (follow(model, y, first, last, rtol) for rtol in (1e-8, 1e-10))
    rough, denoised = (model.posterior_mean(y, 1, last) for y in (rough, state))
    least = 1e-6 * last
    limit = model.posterior_mean(follow(model, state, last, least, 1e-8), 1, least)
    return Case(f"{field}_{dim}", model, x_T, state, denoised, limit, float((denoised - rough).abs().max()))


NAMES = [f"{field}_{dim}" for field in FIELDS for dim in DIMS]


def named(name: str, number: int = 256, seed: int = 0) -> Case:
    """The case called `name`, such as "variance_exploding_2"."""
    field, _, dim = name.rpartition("_")
    return case(field, int(dim), number, seed)
