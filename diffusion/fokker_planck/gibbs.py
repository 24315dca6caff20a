"""The root of the Gibbs density pi of a reversible equation: pi has no current, f pi = 1/2 div(a pi).

Then l = grad log sqrt(pi) = a^-1 (f - 1/2 div a), and log sqrt(pi) is its integral along any path.
"""

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Fourier
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.products import Product
from diffusion.fokker_planck.weak_form import gibbs_push

CHECKED = 256  # points where the curl, the time and the path are looked at
CHUNK = 1 << 20


class GibbsRoot:
    """log sqrt(pi) of an equation, up to a constant that makes it 0 at its highest node.

    Args:
        time: at which drift and covariance are taken.

    Raises:
        UserError: the covariance is singular, or the drift has no potential; the message has the figure.
    """

    def __init__(self, equation: FokkerPlanck, product: Product, time: float):
        self._equation, self._time = equation, time
        middles = [basis.rule().nodes.mean() for basis in product.bases]
        self._middle = torch.stack(middles).to(product.points)
        self._some = product.points[:: max(1, len(product.points) // CHECKED)]
        self.slopes = self.slope(product.points)
        self._check_curl()
        self._points = self._enough_points()
        self._highest = torch.zeros((), dtype=torch.float64, device=product.points.device)
        self._highest = self(product.points).max()
        self._check_ends(product)

    def slope(self, x: Tensor) -> Tensor:
        """l (M, d) at `x` (M, d)."""
        return self.slope_at(self._equation, x, self._time)

    @staticmethod
    def slope_at(equation: FokkerPlanck, x: Tensor, time: float) -> Tensor:
        """a^-1 (f - 1/2 div a), (M, d)."""
        push, half = (values[0] for values in gibbs_push(equation, x, [time]))
        if half.dim() == 3:
            slope, info = torch.linalg.solve_ex(2 * half, push)
            singular = bool(info.any())
        else:
            slope, singular = push / (2 * half.reshape(len(x), -1)), bool((half == 0).any())
        if singular or not bool(torch.isfinite(slope).all()):
            raise UserError("the covariance is singular somewhere, expected it positive: the symmetrised form needs it")
        return slope

    def __call__(self, x: Tensor) -> Tensor:
        """log sqrt(pi) (M,) at `x` (M, d)."""
        rows = max(1, CHUNK // self._points)
        return torch.cat([self._integral(part, self._points) for part in x.split(rows)]) - self._highest

    def _integral(self, x: Tensor, points: int) -> Tensor:
        """Of l along the straight line from the middle, by Gauss and Legendre's rule."""
        nodes, weights = (torch.from_numpy(v).to(x) for v in leggauss(points))
        gap = x - self._middle
        path = self._middle + (nodes[:, None, None] + 1) / 2 * gap
        slopes = self.slope(path.reshape(-1, x.shape[1])).reshape(path.shape)
        return torch.einsum("pmd,md,p->m", slopes, gap, weights / 2)

    def _enough_points(self) -> int:
        points, before = 12, self._integral(self._some, 12)
        while points < 800:
            points, after = 2 * points, self._integral(self._some, 2 * points)
            error = float((after - before).abs().max())
            if error < 1e-12 * max(1.0, float(after.abs().max())):
                return points // 2
            before = after
        raise UserError(f"the potential cannot be integrated: {points} points on a line leave an error of {error:.2g}")

    def _check_curl(self) -> None:
        x, dim = self._some, self._some.shape[1]
        if dim == 1:
            return
        self._equation.check_differentiable(x, self._time, drift=True)
        columns = []
        for j in range(dim):
            direction = torch.zeros_like(x)
            direction[:, j] = 1
            columns.append(torch.func.jvp(self.slope, (x,), (direction,))[1])
        slopes = torch.stack(columns, 2)
        curl = 2 * float((slopes - slopes.mT).abs().max())
        if curl > 1e-9 * float(slopes.abs().max()):
            raise UserError(
                f"the drift has no potential: the curl of a^-1 (2 f - div a) is {curl:.3g} somewhere, expected 0; "
                "take symmetrised=False"
            )

    def _check_ends(self, product: Product) -> None:
        """On a periodic axis pi must be the same at both ends, or next to nothing."""
        for i, basis in enumerate(product.bases):
            if not isinstance(basis, Fourier):
                continue
            low, high = self._some.clone(), self._some.clone()
            low[:, i], high[:, i] = basis.low, basis.high
            jump = float(((2 * self(low)).exp() - (2 * self(high)).exp()).abs().max())
            if jump > 1e-6:
                raise UserError(
                    f"the drift has no periodic potential: the Gibbs density jumps by {jump:.3g} of its maximum at the "
                    f"ends of axis {i}, expected 0; take symmetrised=False, or a wider domain"
                )
