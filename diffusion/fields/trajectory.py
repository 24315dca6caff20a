"""Trajectory fields: a map from where a line starts and ends to where it is in between (method of characteristics)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.base import Field, Unavailable, expand_time
from diffusion.fields.inversion import derivative, newton
from diffusion.fields.laws import Gaussian, Law
from diffusion.specs import recorded

Map = Callable[[Tensor, Tensor, Tensor], Tensor]


@recorded
class TrajectoryField(Field):
    """x_t = Phi_t(x0, x_T), invertible in x_T, with Phi_0 = x0 and x_T from a prior of one's own.

    The label of a line is the x_T that it leads to, and with z(x) the label of the line through x

        f_t(x|x0) = d_t Phi_t(x0, z(x)),    p_t(x|x0) = prior(z(x)) / |det d Phi_t / d x_T|:

    a conditional flow (Lipman et al. 2023, arXiv 2210.02747, sec. 4) or stochastic interpolant (Albergo &
    Vanden-Eijnden 2023, arXiv 2209.15571) along lines of any shape. Labels are sought at times > 0 only. They carry
    their derivatives by x, x0 and t, up to the third.

    Args:
        trajectory: Phi(x0, x_T, t) of torch operations with forward-mode derivatives; x0 and x_T are (B, *shape), t is
            (B, 1, ...), and each point moves by itself.
        prior: a Law.
        horizon: T.
        inverse: closed form of the label, inverse(x0, x, t), differentiable. Without it the label is found by Newton's
            method to the rounding of Phi, and whoever uses it needs all coordinates of d Phi / d x_T.
        coordinatewise: each coordinate of Phi depends on the same coordinate of x_T alone (on x0 in any way). Otherwise
            d Phi / d x_T is taken in full, for at most 256 coordinates.
        t_min: where integration ends; 1e-3 of the horizon unless given.
        rho: the field's clock (see Field).

    Raises:
        UserError: when a label is sought, Phi is not invertible there.
        Unavailable: when a density is sought, or a label without `inverse`, in more than 256 coupled coordinates.
    """

    MAX_COUPLED = 256

    def __init__(
        self,
        trajectory: Map,
        prior: Law,
        horizon: float,
        inverse: Map | None = None,
        coordinatewise: bool = False,
        t_min: float | None = None,
        rho: float = 1.0,
    ):
        t_min = 1e-3 * horizon if t_min is None else t_min
        if not 0 < t_min < horizon < math.inf:
            raise UserError(f"t_min is {t_min} and horizon {horizon}, expected 0 < t_min < horizon")
        if not isinstance(prior, Law):
            raise UserError(
                f"prior is {prior!r}, expected a Law such as Gaussian(), uniform() or Product(distribution)"
            )
        for name, function in (("trajectory", trajectory), ("inverse", inverse)):
            if not (callable(function) or (function is None and name == "inverse")):
                raise UserError(f"{name} is {function!r}, expected a function of three tensors")
        self.trajectory, self.prior, self.inverse, self.coordinatewise = trajectory, prior, inverse, coordinatewise
        self.horizon, self.t_min, self.rho = float(horizon), float(t_min), float(rho)

    def draw(self, size, generator=None, dtype=None, device=None):
        return self.prior.draw(size, generator, dtype, device)

    def transport(self, x0, z, t):
        x = self.trajectory(x0, z, _times(t, x0))
        if x.shape != x0.shape:
            raise UserError(f"trajectory has shape {tuple(x.shape)} for points of shape {tuple(x0.shape)}")
        return x

    def velocity(self, x, t, x0):
        t = _times(t, x)
        z = self._label(x, t, x0)
        return derivative(lambda t: self.trajectory(x0, z, t), t, torch.ones_like(t))

    def log_prob(self, x, t, x0):
        t = _times(t, x)
        z = self._label(x, t, x0)
        jacobian = self._jacobian(lambda z: self.trajectory(x0, z, t), z)
        log_det = jacobian.abs().log().flatten(1).sum(1) if self.coordinatewise else torch.linalg.slogdet(jacobian)[1]
        return self.prior.log_prob(z) - log_det

    def label(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """x_T (B, *shape) of the lines from `x0` that pass through `x` at time `t` > 0."""
        return self._label(x, _times(t, x), x0)

    def _label(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        if self.inverse is not None:
            return self.inverse(x0, x, t)
        z = self._root(x.detach(), t.detach(), x0.detach())
        for _ in range(2):  # from the root, k steps give all derivatives of an order below 2^k
            z = z - self._step(lambda z: self.trajectory(x0, z, t), z, self.trajectory(x0, z, t) - x)
        return z

    @torch.no_grad()
    def _root(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The label, near enough to it for Newton's steps to double the digits.

        Raises:
            UserError: Newton's method ends elsewhere.
        """
        rows = (-1, 1) if self.coordinatewise else (len(x), -1)

        def map_(z: Tensor) -> Tensor:
            return self.trajectory(x0, z, t)

        unit = (x.square() + x0.square()).flatten(1).mean(1).sqrt()  # the size of a coordinate
        unit = unit[:, None].expand(-1, x[0].numel()).reshape(rows).norm(dim=1)
        tolerance = 64 * torch.finfo(x.dtype).eps * unit
        z, rest = newton(
            lambda z: (map_(z.view(x.shape)) - x).reshape(rows),
            lambda z, rest: self._step(map_, z.view(x.shape), rest.view(x.shape)).reshape(rows),
            torch.zeros_like(x).reshape(rows),
            tolerance,
        )
        limit = 64 * tolerance  # more than the rounding of any map that is not ill-conditioned
        if not bool((rest <= limit).all()):
            row = int((~(rest <= limit)).to(torch.uint8).argmax())
            sample = row * len(x) // len(rest)
            raise UserError(
                f"trajectory is not invertible at t={float(t[sample].flatten()[0]):g}, sample {sample}: residual "
                f"{float(rest[row]):.2g}, expected at most {float(limit[row]):.2g}; give inverse=, or check that "
                f"x_T -> x_t is one to one{', coordinate by coordinate' if self.coordinatewise else ''}"
            )
        return z.view(x.shape)

    def _step(self, map_: Callable[[Tensor], Tensor], z: Tensor, rest: Tensor) -> Tensor:
        """J^(-1) rest with J the derivative of `map_` at `z`; not finite where J is singular."""
        jacobian = self._jacobian(map_, z)
        if self.coordinatewise:
            return rest / jacobian
        return torch.linalg.solve_ex(jacobian, rest.flatten(1))[0].view(z.shape)

    def _jacobian(self, map_: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """d Phi / d x_T at `z`: its diagonal (B, *shape) where it has no more, otherwise (B, d, d)."""
        if self.coordinatewise:
            return derivative(map_, z, torch.ones_like(z))
        dim = z[0].numel()
        if dim > self.MAX_COUPLED:
            raise Unavailable(
                f"the derivative of this trajectory has {dim} x {dim} entries a point, expected at most "
                f"{self.MAX_COUPLED} coordinates; set coordinatewise=True if each depends on its own x_T alone, "
                f"and do without the density, with inverse=, if not"
            )
        units = torch.eye(dim, dtype=z.dtype, device=z.device).view(dim, 1, *z.shape[1:])
        columns = torch.func.vmap(lambda unit: derivative(map_, z, unit.expand_as(z)))(units)
        return columns.flatten(2).permute(1, 2, 0)


def _times(t: Tensor | float, x: Tensor) -> Tensor:
    """A time for each point, (B, 1, ...)."""
    t = expand_time(t, x)
    return t.expand(len(x), *t.shape[1:]).contiguous()


@recorded
def straight(prior: Law, t_min: float = 1e-3) -> TrajectoryField:
    """x_t = (1 - t) x0 + t x_T, horizon 1: flow matching (Lipman et al. 2023, arXiv 2210.02747) to any prior."""
    return TrajectoryField(
        lambda x0, x_T, t: (1 - t) * x0 + t * x_T,
        prior,
        1.0,
        inverse=lambda x0, x, t: (x - (1 - t) * x0) / t,
        coordinatewise=True,
        t_min=t_min,
    )


@recorded
def curved(prior: Law, bend: float = 1.0, t_min: float = 1e-3) -> TrajectoryField:
    """x_t = cos(pi t / 2) x0 + sin(pi t / 2) x_T + bend sin(pi t) tanh(x_T - x0), horizon 1.

    The trigonometric interpolant (Albergo & Vanden-Eijnden 2023, arXiv 2209.15571), whose lines are circular arcs,
    bowed in proportion to where they go, up to a distance of `bend`: what is near bends in full, what is far hardly.
    d x_t / d x_T = sin(pi t / 2) (1 + 2 bend cos(pi t / 2) / cosh(x_T - x0)^2) is positive for every bend > -1/2.
    """
    if not (bend > -0.5 and math.isfinite(bend)):
        raise UserError(f"bend is {bend}, expected a number above -0.5: below, lines cross")

    def trajectory(x0: Tensor, x_T: Tensor, t: Tensor) -> Tensor:
        angle = 0.5 * math.pi * t
        return angle.cos() * x0 + angle.sin() * x_T + bend * (2 * angle).sin() * (x_T - x0).tanh()

    return TrajectoryField(trajectory, prior, 1.0, coordinatewise=True, t_min=t_min)


@recorded
def drifting(
    mean: Callable[[Tensor, Tensor], Tensor],
    sigma: Callable[[Tensor], Tensor],
    prior: Law | None = None,
    horizon: float = 1.0,
    t_min: float | None = None,
    rho: float = 1.0,
) -> TrajectoryField:
    """x_t = mean(x0, t) + sigma(t) x_T: the centre of the mass moves as it likes while its width grows.

    Args:
        mean: of x0 (B, *shape) and t (B, 1, ...), with mean(x0, 0) = x0; it may be nonlinear and mix coordinates. For
            the prior to hold for all data, mean(x0, T) must hardly depend on x0.
        sigma: of t, with sigma(0) = 0, positive for t > 0.
        prior: the law of x_T; Gaussian() unless given.
    """
    return TrajectoryField(
        lambda x0, x_T, t: mean(x0, t) + sigma(t) * x_T,
        Gaussian() if prior is None else prior,
        horizon,
        inverse=lambda x0, x, t: (x - mean(x0, t)) / sigma(t),
        coordinatewise=True,
        t_min=t_min,
        rho=rho,
    )
