"""The Fokker-Planck equation, stated once by the drift f and the diffusion g of dx = f dt + g dw (Ito):

    d_t p = -div(f p) + 1/2 sum_ij d_i d_j (a_ij p),    a = g g^T,

which is d_t p + div J = 0 with the current J = (f - 1/2 div a) p - 1/2 a grad p, where (div a)_i = sum_j d_j a_ij.
Time runs forward, points are (B, d), everything is computed in the dtype of the points.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.asking import Asked, Function, shown

STEPS = 1e-5, 1e-3  # of differences that derivatives are compared with; the longer is for functions in float32


def act(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product (B, d) of a matrix, given as (B,), (B, d) or (B, d, d), with a vector (B, d)."""
    if matrix.dim() == 3:
        return (matrix @ vector[:, :, None])[:, :, 0]
    return matrix.reshape(len(matrix), -1) * vector


def _semidefinite(a: Tensor, x: Tensor) -> Tensor:
    """The covariance `a` itself, (B,), (B, d) or (B, d, d).

    Raises:
        UserError: it is not symmetric, or not positive semi-definite, at some point.
    """
    checked = a.detach()
    if a.dim() < 3:
        if not bool((checked >= 0).all()):
            raise UserError(f"the covariance has {float(checked.min()):.3g} somewhere, expected 0 or more")
        return a
    skew = float((checked - checked.mT).abs().max())
    if skew > 1e-8 * float(checked.abs().max()):
        raise UserError(f"the covariance is not symmetric: it differs by {skew:.3g}")
    least = torch.linalg.eigvalsh(checked)[:, 0]
    if float(least.min()) < -1e-10 * float(checked.abs().max()):
        at = x[int(least.argmin())].tolist()
        raise UserError(
            f"the covariance has the eigenvalue {float(least.min()):.3g} at x={at}, expected it to be positive "
            "semi-definite"
        )
    return a


def checked(equation: "FokkerPlanck") -> "FokkerPlanck":
    """The same; a UserError if it is none."""
    if not isinstance(equation, FokkerPlanck):
        raise UserError(f"the equation is {shown(equation)}, expected a FokkerPlanck(drift, diffusion)")
    return equation


class FokkerPlanck:
    """The equation of dx = drift dt + diffusion dw; from it come its solvers, the SDE and the probability-flow ODE.

    Args:
        drift: f(x, t) -> (B, d), for points x (B, d), by torch operations.
        diffusion: g(x, t) -> (B,), the same in all directions; (B, d), one for each coordinate; or (B, d, d), a matrix.
            A number does for a constant, as what it returns or in its place.

    Both get the time t as a tensor (B,), the same for all points; functions of one number, such as
    ``lambda x, t: -beta(t) * x``, get it 0-dimensional instead. They are to depend on (x, t) alone: where they allow
    it, they are asked at many times at once, by torch.func.vmap.

    Raises:
        UserError: a function returns another shape, or numbers that are not finite; when it is first called.
    """

    def __init__(self, drift: Function, diffusion: Function | float):
        if not callable(drift) or not (callable(diffusion) or isinstance(diffusion, int | float)):
            raise UserError(
                f"drift is {shown(drift)} and diffusion is {shown(diffusion)}, expected functions of (x, t), or a "
                "number for the diffusion"
            )
        self._drift = Asked("drift", drift)
        self._diffusion = Asked("diffusion", diffusion if callable(diffusion) else lambda x, t: float(diffusion))
        self._covariance: Asked | None = None
        self._differentiable: set[str] = set()  # what has been checked

    @classmethod
    def from_covariance(cls, drift: Function, covariance: Function) -> "FokkerPlanck":
        """The equation of a given a = g g^T: (B,), (B, d) or (B, d, d), the rate at which covariance grows.

        Raises:
            UserError: a is not symmetric, or not positive semi-definite, at some point; the message has the figure.
        """

        def diffusion(x: Tensor, t: Tensor) -> Tensor:
            a = _semidefinite(torch.as_tensor(covariance(x, t), dtype=x.dtype, device=x.device), x)
            if a.dim() < 3:
                return a.sqrt()
            values, vectors = torch.linalg.eigh(a)
            return (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT

        equation = cls(drift, diffusion)
        equation._covariance = Asked("covariance", covariance)
        return equation

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """f (B, d) at `x` (B, d) and the time `t`, a number."""
        return self._drift(x, t)

    def diffusion(self, x: Tensor, t: Tensor | float) -> Tensor:
        """g as the function gives it: (B,), (B, d) or (B, d, d)."""
        return self._diffusion(x, t)

    def covariance(self, x: Tensor, t: Tensor | float) -> Tensor:
        """a = g g^T, (B,) or (B, d) where it is isotropic or diagonal, otherwise (B, d, d)."""
        if self._covariance is None:
            g = self.diffusion(x, t)
            return g @ g.mT if g.dim() == 3 else g.square()
        return _semidefinite(self._covariance(x, t), x)

    def over(self, x: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        """f and a at each of K times, (K, B, d) and (K, B), (K, B, d) or (K, B, d, d)."""
        if len(times) == 1:
            return self.drift(x, times[0])[None], self.covariance(x, times[0])[None]
        moments = torch.tensor(times, dtype=x.dtype, device=x.device)
        drift = self._drift.over(x, moments)
        if self._covariance is not None:
            return drift, torch.stack([_semidefinite(a, x) for a in self._covariance.over(x, moments)])
        g = self._diffusion.over(x, moments)
        return drift, g @ g.mT if g.dim() == 4 else g.square()

    def covariance_divergence(self, x: Tensor, t: Tensor | float) -> Tensor:
        """div a (B, d), by forward-mode differentiation along each coordinate; 0 where a does not depend on x.

        Raises:
            UserError: see `check_differentiable`; or the derivative is not finite somewhere.
        """
        self.check_differentiable(x, t)
        total = torch.zeros_like(x)
        for j in range(x.shape[1]):
            direction = torch.zeros_like(x)
            direction[:, j] = 1
            _, slope = torch.func.jvp(lambda x: self.covariance(x, t), (x,), (direction,))
            if slope.dim() == 3:
                total = total + slope[:, :, j]
            else:
                total[:, j] = slope if slope.dim() == 1 else slope[:, j]
        if not bool(torch.isfinite(total).all()):
            bad = int((~torch.isfinite(total)).any(1).nonzero()[0])
            raise UserError(f"g g^T has no finite derivative at x={x[bad].tolist()}; expected a smooth function there")
        return total

    def check_differentiable(self, x: Tensor, t: Tensor | float, drift: bool = False) -> None:
        """Check, once for an equation, that torch sees how what is to be differentiated changes with `x` (B, d).

        That is g g^T, or the drift.

        Raises:
            UserError: its derivatives are not those of differences, as under no_grad or after detach.
        """
        name, function = ("drift", self.drift) if drift else ("g g^T", self.covariance)
        if name in self._differentiable or x.dtype != torch.float64:
            return
        x = x.detach()
        direction = (1 + torch.arange(x.shape[1])).sqrt().sin().to(x)  # no combination of few coordinates is constant
        direction = (direction / direction.norm()).expand_as(x)
        try:
            _, slope = torch.func.jvp(lambda x: function(x, t), (x,), (direction,))
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{name} is not made of torch operations on x: {str(error).splitlines()[0]}") from error
        with torch.enable_grad():
            followed = function(x.clone().requires_grad_(), t).requires_grad
        if not any(self._agrees(function, x, t, step * direction, step * slope, followed) for step in STEPS):
            raise UserError(
                f"torch does not see how {name} changes with x; expected torch operations on x, not under no_grad, "
                "without detach or numpy"
            )
        self._differentiable.add(name)

    @staticmethod
    def _agrees(function: Function, x: Tensor, t: Tensor | float, step: Tensor, rise: Tensor, followed: bool) -> bool:
        """Whether a step changes the function as its derivative says, at most of the points at which it does."""
        change = (function(x + step, t) - function(x - step, t)) / 2
        gap, size = (value.reshape(len(x), -1).abs().amax(1) for value in (change - rise, change))
        moving = size > 1e-6 * float(step.norm(dim=1).max()) * function(x, t).abs().max().clamp_min(1e-12)
        return not bool(moving.any()) or (followed and float((gap > 0.01 * size)[moving].double().mean()) <= 0.5)

    def velocity(self, x: Tensor, t: Tensor | float, score: Tensor) -> Tensor:
        """That of the probability-flow ODE (B, d), which has the same densities: f - 1/2 div a - 1/2 a grad log p.

        Args:
            score: grad log p_t(x), (B, d).

        Raises:
            UserError: the score has another shape.
        """
        if not isinstance(score, Tensor) or score.shape != x.shape:
            raise UserError(f"the score is {shown(score)} for x {tuple(x.shape)}, expected {tuple(x.shape)}")
        return self.drift(x, t) - 0.5 * (self.covariance_divergence(x, t) + act(self.covariance(x, t), score))

    def simulate(
        self,
        x: Tensor,
        times: Sequence[float] | Tensor,
        steps: int = 100,
        generator: torch.Generator | None = None,
        order: int = 1,
    ) -> Tensor:
        """Paths (len(times), B, d) of the SDE from `x` (B, d) at the first of the rising `times`.

        Args:
            steps: between each two times.
            order: weak order: 1 for Euler and Maruyama's scheme (strong order 1/2), 2 for Platen's, for which g is
                taken at 4 d + 1 places a step.

        Raises:
            UserError: a path stops being finite, for instance because the steps are too large for the drift; the
                times do not rise, or there is no scheme of that order.

        Warns:
            RuntimeWarning: steps of half the length, of up to 1024 of the paths, have another mean or deviation.
        """
        from diffusion.fokker_planck.simulation import simulate  # it needs this class

        return simulate(self, x, times, steps, generator, order)

    def follow(
        self,
        x: Tensor,
        times: Sequence[float] | Tensor,
        score: Callable[[Tensor, float], Tensor],
        tolerance: float = 1e-8,
    ) -> Tensor:
        """Paths (len(times), B, d) of the probability-flow ODE from `x` (B, d), which have the densities of the SDE.

        Args:
            times: rising or falling: the flow goes both ways.
            score: (x (B, d), t) -> grad log p_t(x), (B, d).
            tolerance: relative and absolute, of a step of torchdiffeq's dopri5.

        Raises:
            UserError: the score has another shape or is not finite; the steps become too small to go on.
        """
        from diffusion.fokker_planck.simulation import follow  # it needs this class

        return follow(self, x, times, score, tolerance)
