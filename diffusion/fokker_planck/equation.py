"""The Fokker-Planck equation, stated once by the drift f and the diffusion g of dx = f dt + g dw (Ito):

    d_t p = -div(f p) + 1/2 sum_ij d_i d_j (a_ij p),    a = g g^T,

which is d_t p + div J = 0 with the current J = (f - 1/2 div a) p - 1/2 a grad p, where (div a)_i = sum_j d_j a_ij.
Time runs forward, points are (B, d), everything is computed in the dtype of the points.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError

Function = Callable[[Tensor, Tensor], Tensor]


def act(matrix: Tensor, vector: Tensor) -> Tensor:
    """The product (B, d) of a matrix, given as (B,), (B, d) or (B, d, d), with a vector (B, d)."""
    if matrix.dim() == 3:
        return (matrix @ vector[:, :, None])[:, :, 0]
    return matrix.reshape(len(matrix), -1) * vector


def _shown(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


class FokkerPlanck:
    """The equation of dx = drift dt + diffusion dw; from it come its solvers, the SDE and the probability-flow ODE.

    Args:
        drift: f(x, t) -> (B, d), for points x (B, d), by torch operations.
        diffusion: g(x, t) -> (B,), the same in all directions; (B, d), one for each coordinate; or (B, d, d), a matrix.
            A number does for a constant.

    Both get the time t as a tensor (B,), the same for all points; functions of one number, such as
    ``lambda x, t: -beta(t) * x``, get it 0-dimensional instead.

    Raises:
        UserError: a function returns another shape, or numbers that are not finite; when it is first called.
    """

    def __init__(self, drift: Function, diffusion: Function):
        self._drift, self._diffusion = drift, diffusion
        self._of_number: dict[str, bool] = {}

    @classmethod
    def from_covariance(cls, drift: Function, covariance: Function) -> "FokkerPlanck":
        """The equation of a given a = g g^T: (B,), (B, d) or (B, d, d), the rate at which covariance grows.

        Raises:
            UserError: a is not symmetric, or not positive semi-definite, at some point; the message has the figure.
        """

        def diffusion(x: Tensor, t: Tensor) -> Tensor:
            a = torch.as_tensor(covariance(x, t), dtype=x.dtype, device=x.device)
            if a.dim() < 3:
                if not bool((a >= 0).all()):
                    raise UserError(f"the covariance has {float(a.min()):.3g} somewhere, expected 0 or more")
                return a.sqrt()
            if float((a - a.mT).abs().max()) > 1e-8 * float(a.abs().max()):
                raise UserError(f"the covariance is not symmetric: it differs by {float((a - a.mT).abs().max()):.3g}")
            values, vectors = torch.linalg.eigh(a)
            if float(values.min()) < -1e-10 * float(values.abs().max()):
                at = x[int(values[:, 0].argmin())].tolist()
                raise UserError(
                    f"the covariance has the eigenvalue {float(values.min()):.3g} at x={at}, expected it to be "
                    "positive semi-definite"
                )
            return (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT

        return cls(drift, diffusion)

    def drift(self, x: Tensor, t: Tensor | float) -> Tensor:
        """f (B, d) at `x` (B, d) and the time `t`, a number."""
        return self._call("drift", self._drift, x, t)

    def diffusion(self, x: Tensor, t: Tensor | float) -> Tensor:
        """g as the function gives it: (B,), (B, d) or (B, d, d)."""
        return self._call("diffusion", self._diffusion, x, t)

    def covariance(self, x: Tensor, t: Tensor | float) -> Tensor:
        """a = g g^T, (B,) or (B, d) where it is isotropic or diagonal, otherwise (B, d, d)."""
        g = self.diffusion(x, t)
        return g @ g.mT if g.dim() == 3 else g.square()

    def covariance_divergence(self, x: Tensor, t: Tensor | float) -> Tensor:
        """div a (B, d), by forward-mode differentiation along each coordinate; 0 where a does not depend on x."""
        total = torch.zeros_like(x)
        for j in range(x.shape[1]):
            direction = torch.zeros_like(x)
            direction[:, j] = 1
            _, slope = torch.func.jvp(lambda x: self.covariance(x, t), (x,), (direction,))
            if slope.dim() == 3:
                total = total + slope[:, :, j]
            else:
                total[:, j] = slope if slope.dim() == 1 else slope[:, j]
        return total

    def velocity(self, x: Tensor, t: Tensor | float, score: Tensor) -> Tensor:
        """That of the probability-flow ODE (B, d), which has the same densities: f - 1/2 div a - 1/2 a grad log p.

        Args:
            score: grad log p_t(x), (B, d).
        """
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
        """
        from diffusion.fokker_planck.simulation import simulate  # it needs this class

        return simulate(self, x, times, steps, generator, order)

    def _call(self, name: str, function: Function, x: Tensor, t: Tensor | float) -> Tensor:
        if x.dim() != 2:
            raise UserError(f"points have shape {tuple(x.shape)}, expected (B, d)")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(())
        if name not in self._of_number:
            self._of_number[name] = self._takes_number(name, function, x, t)
        value = function(x, t if self._of_number[name] else t.expand(len(x)))
        return self._checked(name, value, x)

    def _takes_number(self, name: str, function: Function, x: Tensor, t: Tensor) -> bool:
        """Whether the function wants the time as one number: asked with a number of points that is no dimension."""
        probe, reasons = x[:1].detach().repeat(x.shape[1] + 2, 1), []
        for of_number in (False, True):
            try:
                self._checked(name, function(probe, t if of_number else t.expand(len(probe))), probe)
                return of_number
            except UserError as error:
                reasons.append(error)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                reasons.append(UserError(f"{name}(x, t) fails for x {tuple(probe.shape)}: {error}"))
        raise reasons[0]

    @staticmethod
    def _checked(name: str, value: object, x: Tensor) -> Tensor:
        number, dim = x.shape
        allowed = [(number, dim)] if name == "drift" else [(number,), (number, dim), (number, dim, dim)]
        if name == "diffusion" and (isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)):
            value = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(number)
        if not isinstance(value, Tensor) or tuple(value.shape) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UserError(f"{name}(x, t) gives {_shown(value)} for x {tuple(x.shape)}, expected {expected}")
        value = value.to(x)
        if not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).reshape(number, -1).any(1).nonzero()[0])
            raise UserError(f"{name}(x, t) is not finite at x={x[bad].tolist()}")
        return value
