"""Radial fields: a law of one's own for the distance that data points travel, in any direction alike."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import functions
from diffusion.errors import UserError
from diffusion.expressions import Expression
from diffusion.fields import special
from diffusion.fields.base import Field, Isotropic, expand_time
from diffusion.fields.inversion import Partials, Quantile, partials
from diffusion.fields.laws import Gaussian, check_dim
from diffusion.specs import recorded


@recorded
class RadialField(Field):
    """The field of a law of force: psi_t(r) is the share of x0's mass within the distance r = |x - x0| at time t.

    What flows outward through the sphere of radius r is what psi loses there, so that

        f_t(x|x0) = -(d_t psi / d_r psi) (x - x0) / r,    p_t(x|x0) = d_r psi / (S_{d-1} r^(d-1))

    solve the continuity equation, with S_{d-1} the area of the unit sphere in d dimensions (the force of a point mass
    in Xu et al. 2022, arXiv 2209.11178, is one such law). A line keeps its direction and its psi. Its label z is a
    vector in that direction whose length, -log(1 - psi), is a standard exponential variate: so the far tail is
    resolved in every dtype.

    Radii are handled in float64 whatever the dtype of the points (in float32 on devices without it). Where d_r psi is
    0, or underflows, log_prob is -inf and the velocity, 0 / 0, is NaN, which is to be left out where it has no weight.
    At x0 itself the velocity is 0 and log_prob that at a distance of 1e-8 t (0.8 t in 3072 dimensions; NaN if d_r psi
    underflows there), since psi does not say whether the density has a pole.

    Args:
        cdf: psi(r, t), of torch operations, elementwise on r and t of one shape: rising in r from 0 to 1, falling in
            t, and for t -> 0 a step at r = 0. Or text such as "tanh((r/t)^2)", with T and d for the horizon and the
            dimension (diffusion.expressions). Where 1 - psi is beneath the rounding of psi, its derivative should
            still have digits: those of diffusion.functions have, and they are what text means.
        dim: d, number of data coordinates.
        horizon: T. The prior is the law around x0 = 0, so psi_T must hardly tell x0 from 0.
        inverse: closed form of the radius, inverse(h, t) of the cumulative hazard h = -log(1 - psi), which resolves
            both tails. Without it the radius is found by bracketing, to the rounding of psi.
        t_min: where integration ends; 2.5e-5 of the horizon unless given, as for gravity.
        rho: the field's clock (see Field).

    Raises:
        UserError: psi is not usable: of another shape, outside [0, 1], falling in r, constant, not differentiable; or,
            when a radius is asked for, psi does not reach the value that it should have there.
    """

    def __init__(
        self,
        cdf: Callable[[Tensor, Tensor], Tensor] | str,
        dim: int,
        horizon: float,
        inverse: Callable[[Tensor, Tensor], Tensor] | None = None,
        t_min: float | None = None,
        rho: float = 7.0,
    ):
        t_min = 2.5e-5 * horizon if t_min is None else t_min
        if not 0 < t_min < horizon < math.inf:
            raise UserError(f"t_min is {t_min} and horizon {horizon}, expected 0 < t_min < horizon")
        if dim < 1:
            raise UserError(f"radial field has dim {dim}, expected the number of data coordinates, at least 1")
        if isinstance(cdf, str):
            cdf = Expression(cdf, ("r", "t"), {"T": float(horizon), "d": float(dim)})
        for name, function in (("cdf", cdf), ("inverse", inverse)):
            if not (callable(function) or (function is None and name == "inverse")):
                raise UserError(f"{name} is {function!r}, expected a function of two tensors")
        self.cdf, self.inverse, self.dim = cdf, inverse, int(dim)
        self.horizon, self.t_min, self.rho = float(horizon), float(t_min), float(rho)
        self._check_cdf()

    def _check_cdf(self) -> None:
        """Refuse what cannot be used; whether psi is the right law is for `validate` to say."""
        times = torch.tensor([self.t_min, math.sqrt(self.t_min * self.horizon), self.horizon], dtype=torch.float64)
        r = (times[:, None] * torch.logspace(-8, 8, 161, dtype=torch.float64)).flatten()
        t = times.repeat_interleave(161)
        try:
            psi, d_r, _ = partials(self.cdf, r, t)
        except (TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"cdf(r, t) fails on two tensors: {reason}; expected torch operations") from error
        if psi.shape != r.shape:
            raise UserError(f"cdf(r, t) has shape {tuple(psi.shape)} for r and t of shape {tuple(r.shape)}")
        psi, d_r = psi.detach(), d_r.detach()
        for bad, what in (
            (~((psi >= -1e-9) & (psi <= 1 + 1e-9)), "expected a share between 0 and 1"),
            (torch.nn.functional.pad(psi.view(3, -1).diff(), (1, 0)).flatten() < -1e-9, "falls where r rises"),
        ):
            if bool(bad.any()):
                i = int(bad.to(torch.uint8).argmax())
                raise UserError(f"cdf(r={r[i]:g}, t={t[i]:g}) is {psi[i]:g}: {what}")
        if not bool((psi.view(3, -1)[:, -1] - psi.view(3, -1)[:, 0] > 0).all()):
            raise UserError(f"cdf(r, t) does not change with r, it is {psi[0]:g}; expected a rise from 0 to 1")
        if not bool((d_r > 0).any()):
            raise UserError("cdf(r, t) has no derivative in r; expected differentiable torch operations")
        self._radius(torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64), times)

    def draw(self, size, generator=None, dtype=None, device=None):
        z = Gaussian(self.dim).draw(size, generator, dtype, device)
        length = z.new_empty(size[0], *[1] * (len(size) - 1)).exponential_(generator=generator)
        return z * (length / _length(z).view_as(length)).to(z.dtype)

    def transport(self, x0, z, t):
        length = _length(z)
        ratio = self._radius(length, _times(t, x0)) / length.where(length > 0, 1)
        return x0 + z * ratio.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))

    def velocity(self, x, t, x0):
        gap = x - x0
        rate = self._rate(_length(gap), _times(t, x)).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        defined = ~rate.isnan()
        return (rate.where(defined, 0) * gap).where(defined, math.nan)

    def log_prob(self, x, t, x0):
        check_dim(x.shape, self.dim)
        return self._log_density(_length(x - x0), _times(t, x)).to(x.dtype)

    def isotropic(self, x, t):
        t = _times(t, x)[:, None]

        def at(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda squared: function(_root(squared.to(t.dtype)), t).to(squared.dtype)

        one = torch.ones_like(x.flatten(1)[:, :1])
        return Isotropic(one, torch.zeros_like(one), at(self._log_density), at(self._rate))

    def _partials(self, r: Tensor, t: Tensor) -> Partials:
        return partials(self.cdf, r, t.expand_as(r).contiguous())

    def _log_density(self, r: Tensor, t: Tensor) -> Tensor:
        log_area = math.log(2) + 0.5 * self.dim * math.log(math.pi) - math.lgamma(0.5 * self.dim)
        start = r == 0
        r = r.where(~start, t * 10.0 ** -min(8.0, 250 / self.dim))  # so near that r^(d-1) does not underflow
        density = self._partials(r, t).d_r
        some = density > 0
        log_density = density.where(some, 1).log() - log_area - (self.dim - 1) * r.log()
        return log_density.where(some, -math.inf).where(some | ~start, math.nan)

    def _rate(self, r: Tensor, t: Tensor) -> Tensor:
        """The velocity in units of x - x0; NaN where it is not defined, with derivatives of 0; anything at x0."""
        start = r == 0
        r = r.where(~start, t)
        psi = self._partials(r, t)
        scaled = psi.d_r * r
        defined = scaled > 0
        rate = -psi.d_t / scaled.where(defined, 1)
        return rate.where(defined, math.nan).where(defined | ~start, 0)

    def _radius(self, length: Tensor, t: Tensor) -> Tensor:
        """Distance from x0, (B,), of the lines with labels of this `length` (B,); 0 at t = 0."""
        moved = t > 0
        return Quantile.apply(length, t.where(moved, self.horizon), self.cdf, self.inverse).where(moved, 0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _length(x: Tensor) -> Tensor:
    """Euclidean norm (B,) of each point."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=_wide(x))


def _root(squared: Tensor) -> Tensor:
    """The square root, with a derivative of 0 at 0."""
    return squared.where(squared > 0, 1).sqrt().where(squared > 0, 0)


def _times(t: Tensor | float, x: Tensor) -> Tensor:
    """A time (B,) for each point."""
    return expand_time(t, x).flatten().to(_wide(x)).expand(len(x)).contiguous()


@recorded
def radial_tanh(dim: int, horizon: float | None = None, t_min: float | None = None) -> RadialField:
    """psi = tanh(r / t): exponential tails, and a density with a pole r^(1-d) at x0.

    The pole makes the prior expensive: near x0, where a share |x0| / T of the mass is, p_T(.|x0) is unlike p_T(.|0).
    KL(p_T(.|x0) || prior) is close to 1.6 d |x0| / T nats, so the horizon is 16000 sqrt(d): at |x0|^2 = d it costs
    1e-4 d nats, as gravity does at 80.

    Args:
        dim: d, number of data coordinates.
        horizon: T, in the unit of the distance |x - x0|; 16000 sqrt(d) unless given.
        t_min: 0.002 sqrt(d) unless given.
    """
    inverse = _scaled(special.inverse_tanh)
    return RadialField(
        lambda r, t: functions.tanh(r / t), dim, _ends(dim, 16000.0, horizon), inverse, _ends(dim, 0.002, t_min)
    )


@recorded
def radial_exponential(dim: int, horizon: float | None = None, t_min: float | None = None) -> RadialField:
    """psi = 1 - exp(-r / t): the distance is exponential. Pole, cost of the horizon and defaults are radial_tanh's."""
    return RadialField(
        lambda r, t: -functions.expm1(-r / t),
        dim,
        _ends(dim, 16000.0, horizon),
        _scaled(torch.clone),
        _ends(dim, 0.002, t_min),
    )


@recorded
def radial_stretched(dim: int, horizon: float | None = None, t_min: float | None = None) -> RadialField:
    """psi = tanh((r / t)^(1 + t / T)): not a scale family, its shape sharpens from tanh(s) to tanh(s^2) on the way.

    The velocity is (1 - log(r / t) (t / T) / (1 + t / T)) (x - x0) / t.

    Args:
        dim: d, number of data coordinates.
        horizon: T, in the unit of the distance |x - x0|; 320 sqrt(d) unless given, where KL(p_T(.|x0) || prior) is
            at most 6e-5 d nats at |x0|^2 = d.
        t_min: 0.002 sqrt(d) unless given.
    """
    T = _ends(dim, 320.0, horizon)
    return RadialField(
        lambda r, t: functions.tanh((r / t) ** (1 + t / T)),
        dim,
        T,
        lambda h, t: t * special.inverse_tanh(h) ** (1 / (1 + t / T)),
        _ends(dim, 0.002, t_min),
    )


@recorded
def radial_gravity(dim: int, horizon: float = 80.0, t_min: float = 0.002) -> RadialField:
    """The field of affine.gravity by its law of distances: psi = I_w(d/2, 1/2), w = r^2 / (r^2 + t^2)."""
    inverse = _scaled(lambda h: special.inverse_cauchy_radius(h, dim))
    return RadialField(lambda r, t: special.cauchy_radius(r / t, dim), dim, horizon, inverse, t_min)


@recorded
def radial_gaussian(dim: int, horizon: float = 80.0, t_min: float = 0.002) -> RadialField:
    """The field of affine.variance_exploding by its law of distances: psi = P(d/2, r^2 / (2 t^2))."""
    inverse = _scaled(lambda h: special.inverse_gaussian_radius(h, dim))
    return RadialField(lambda r, t: special.gaussian_radius(r / t, dim), dim, horizon, inverse, t_min)


def _scaled(inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The radius at h, t where psi is a function of r / t."""
    return lambda h, t: t * inverse(h)


def _ends(dim: int, per_coordinate: float, given: float | None) -> float:
    return per_coordinate * math.sqrt(max(dim, 1)) if given is None else given
