"""Affine fields, x_t = alpha_t x0 + sigma_t z: gravity, PFGM++, Gaussian diffusion, flow matching."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import conversions
from diffusion.fields.base import Field, Isotropic, expand_time
from diffusion.fields.laws import Gaussian, IsotropicLaw, Law, StudentT
from diffusion.specs import recorded


class Schedule(NamedTuple):
    """The coefficients of an affine field and their time derivatives, each shaped to broadcast against x."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


@recorded
class AffineField(Field):
    """x_t = alpha_t x0 + sigma_t z with z from any base law; the velocity is alpha'_t x0 + sigma'_t z.

    Args:
        alpha: callable of t (a tensor), with alpha(0) = 1; differentiated by forward-mode autodiff.
        sigma: callable of t, with sigma(0) = 0 and sigma / alpha rising.
        base: law of z; Gaussian(), StudentT(dof, dim), Product(distribution) or a Law of your own.
        horizon: T. The prior is the law of sigma_T z, so alpha_T x0 must be small beside sigma_T.
        t_min: where integration ends; 1e-3 of the horizon unless given.
        rho: the field's clock (see Field).

    Raises:
        UserError: sigma / alpha does not rise from t_min to the horizon.
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        base: Law,
        horizon: float,
        t_min: float | None = None,
        rho: float = 1.0,
    ):
        t_min = 1e-3 * horizon if t_min is None else t_min
        if not 0 < t_min < horizon:
            raise UserError(f"t_min is {t_min} and horizon {horizon}, expected 0 < t_min < horizon")
        if not isinstance(base, Law):
            raise UserError(f"base is {base!r}, expected a Law such as Gaussian(), or Product(distribution)")
        for name, schedule in (("alpha", alpha), ("sigma", sigma)):
            value = schedule(torch.tensor([t_min, horizon], dtype=torch.float64))
            if not isinstance(value, torch.Tensor) or value.shape != (2,):
                raise UserError(f"{name}(t) gives {value!r} for two times, expected a tensor like t")
        self.alpha, self.sigma, self.base = alpha, sigma, base
        self.horizon, self.t_min, self.rho = float(horizon), float(t_min), float(rho)
        ratio = self.log_noise_to_signal(self.clock(256))
        if not bool((ratio.diff() > 0).all()):
            raise UserError("sigma(t) / alpha(t) does not rise from t_min to the horizon; check alpha and sigma")

    def log_noise_to_signal(self, t: Tensor) -> Tensor:
        """log(sigma_t / alpha_t), in the shape of `t`; infinite where alpha is 0."""
        return self.sigma(t).log() - self.alpha(t).log()

    def schedule(self, x: Tensor, t: Tensor | float) -> Schedule:
        """alpha, sigma and their derivatives at `t`, shaped to broadcast against `x`."""
        t = expand_time(t, x).contiguous()  # jvp writes to the memory of an expanded time
        one = torch.ones_like(t)
        with warnings.catch_warnings():  # the first jvp of a process makes torch warn of its own use of torch.jit
            warnings.simplefilter("ignore", FutureWarning)
            alpha, alpha_dot = torch.func.jvp(self.alpha, (t,), (one,))
            sigma, sigma_dot = torch.func.jvp(self.sigma, (t,), (one,))
        return Schedule(alpha, sigma, alpha_dot, sigma_dot)

    def draw(self, size, generator=None, dtype=None, device=None):
        return self.base.draw(size, generator, dtype, device)

    def transport(self, x0, z, t):
        t = expand_time(t, x0)
        return self.alpha(t) * x0 + self.sigma(t) * z

    def velocity(self, x, t, x0):
        return conversions.from_denoised(self.schedule(x, t), x, x0).velocity

    def log_prob(self, x, t, x0):
        t = expand_time(t, x)
        sigma = self.sigma(t)
        z = (x - self.alpha(t) * x0) / sigma
        return self.base.log_prob(z) - x[0].numel() * sigma.flatten().log()

    def target(self, x, t, x0):
        """x0 itself: for every base law the velocity is linear in E[x0|x], which does not blow up as t -> 0."""
        return x0

    def velocity_from_target(self, x, t, target):
        return conversions.from_denoised(self.schedule(x, t), x, target).velocity

    def endpoint(self, x, t, velocity):
        """E[x0|x], exactly."""
        return conversions.from_velocity(self.schedule(x, t), x, velocity).denoised

    def isotropic(self, x, t):
        """The field as a function of distances.

        Raises:
            Unavailable: the base law is not isotropic.
        """
        if not isinstance(self.base, IsotropicLaw):
            return super().isotropic(x, t)
        dim, one = x[0].numel(), x.flatten(1)[:, :1]
        alpha, sigma, alpha_dot, sigma_dot = (c.expand_as(one) for c in self.schedule(one, t))

        def log_prob(squared: Tensor) -> Tensor:
            return self.base.log_prob_at(squared / sigma.square(), dim) - dim * sigma.log()

        return Isotropic(alpha, alpha_dot, log_prob, lambda squared: (sigma_dot / sigma).expand_as(squared))


@recorded
def gravity(dim: int, horizon: float = 80.0, t_min: float = 0.002) -> AffineField:
    """Poisson flow: the field of a point mass in the d + 1 dimensions of space and time; pfgmpp with D = 1.

    x_t = x0 + t z with z Student-t of one degree of freedom (multivariate Cauchy), so that p_t(x|x0) is the Poisson
    kernel of the half-space, Gamma((d+1)/2) / pi^((d+1)/2) t / (t^2 + |x - x0|^2)^((d+1)/2), and (p, p f) is the force
    law (t, x - x0) / (|x - x0|^2 + t^2)^((d+1)/2) up to a constant (Xu et al. 2022, arXiv 2209.11178, eq. 3-5).

    The law has no mean and no variance. Nothing is clipped; three things are made for it instead:

    - The horizon follows from information, not from variances. The prior ignores x0; what that costs is
      KL(p_T(.|x0) || prior), to second order |x0|^2 / (2 T^2) (d + D) / (d + D + 2) for every D: heavy tails do not
      change it. T = 80 costs 3e-3 nats at |x0|^2 = 40 (8x8 images), 0.06 at 770 (32x32 colour images in [-1, 1]).
    - What the network sees, its skip connection and the unit of its loss come from the noise level that x itself
      reveals: the noise has scale t R with R drawn anew for each point, and t alone is wrong by the factor R, which
      exceeds 100 in about 1 % of draws (Law.scales, preconditioning.Preconditioner).
    - The loss weight is a function of (x, t) only, never of z. Given (x, t), a weight that knew R would favour some
      x0 over others, and the regression would not end at E[x0|x].

    Args:
        dim: number of data coordinates.
    """
    return pfgmpp(dim, 1.0, horizon, t_min)


@recorded
def pfgmpp(dim: int, D: float = 128.0, horizon: float = 80.0, t_min: float = 0.002) -> AffineField:
    """PFGM++ (Xu et al. 2023, arXiv 2302.04265): x_t = x0 + t z with z Student-t of D degrees of freedom.

    t is the scale per coordinate; the paper's r is t sqrt(D). Small D tolerates errors far from the data, large D is
    easier to learn; D = 1 is gravity, D -> infinity is variance_exploding.

    Args:
        dim: number of data coordinates.
        D: number of augmented dimensions, any positive number.
    """
    return AffineField(torch.ones_like, torch.clone, StudentT(D, dim), horizon, t_min, rho=7.0)


@recorded
def variance_exploding(dim: int | None = None, horizon: float = 80.0, t_min: float = 0.002) -> AffineField:
    """x_t = x0 + t z with Gaussian z: EDM's choice of scaling (Karras et al. 2022, arXiv 2206.00364, table 1)."""
    return AffineField(torch.ones_like, torch.clone, Gaussian(dim), horizon, t_min, rho=7.0)


@recorded
def variance_preserving(
    dim: int | None = None, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3
) -> AffineField:
    """DDPM in continuous time (Song et al. 2021, arXiv 2011.13456, eq. 11): alpha^2 + sigma^2 = 1, horizon 1.

    alpha_t = exp(-1/2 B_t) with B_t = integral of beta from 0 to t, beta rising linearly from beta_min to beta_max.
    """
    if not 0 < beta_min <= beta_max:
        raise UserError(f"beta_min is {beta_min} and beta_max {beta_max}, expected 0 < beta_min <= beta_max")

    def integral(t: Tensor) -> Tensor:
        return beta_min * t + 0.5 * (beta_max - beta_min) * t.square()

    return AffineField(
        lambda t: (-0.5 * integral(t)).exp(), lambda t: (-torch.expm1(-integral(t))).sqrt(), Gaussian(dim), 1.0, t_min
    )


@recorded
def linear(dim: int | None = None, t_min: float = 1e-3) -> AffineField:
    """Flow matching along straight lines (Lipman et al. 2023, arXiv 2210.02747): x_t = (1 - t) x0 + t z, horizon 1."""
    return AffineField(lambda t: 1 - t, torch.clone, Gaussian(dim), 1.0, t_min)
