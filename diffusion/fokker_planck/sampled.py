"""The matrix of the weak form from samples, where drift and covariance are known at points only.

With test functions psi = phi / chi and the generator L psi = f . grad psi + 1/2 tr(a Hess psi), d_t E[psi] = E[L psi].
Least squares over the points gives L psi_j as a sum of psi_k, which closes the equation (generator EDMD: Klus et al.
2020, arXiv 1909.10638); it is exact where L maps the span to itself, as for an Ornstein-Uhlenbeck process and
polynomials. Otherwise its error is `residual` over the root of the number of points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Basis
from diffusion.fokker_planck.evolution import Operator
from diffusion.fokker_planck.expansion import Expansion
from diffusion.fokker_planck.galerkin import WeakSolver
from diffusion.fokker_planck.products import Product
from diffusion.fokker_planck.stepping import Means
from diffusion.fokker_planck.weak_form import Tilt, plain_tilt


class _Matrix(Operator):
    """State -> K state."""

    def __init__(self, matrix: Tensor):
        self.values = matrix

    def advance(self, state: Tensor, duration: float) -> Tensor:
        return state @ torch.linalg.matrix_exp(duration * self.values).mT


class SampledGalerkinSolver(WeakSolver):
    """Solves an equation that does not change in time from its drift and covariance at sample points.

    Args:
        bases: of the d coordinates. The points should cover the density with weight: the fit is as good as they do.
        points: x (M, d), of any law.
        drift: f at the points, (M, d).
        covariance: a = g g^T there, (M,), (M, d) or (M, d, d).
        keep: mask of the modes to keep.
        lost: mass outside the domain above which there is a warning.

    Attributes:
        matrix: K of dc/dt = K c, (size, size).
        residual: the part of L psi that the fit leaves, relative, root mean square.

    Raises:
        UserError: shapes do not agree, or the points are too few for the functions or do not tell them apart.
    """

    def __init__(
        self,
        bases: Sequence[Basis],
        points: Tensor,
        drift: Tensor,
        covariance: Tensor,
        keep: Tensor | None = None,
        lost: float = 1e-6,
    ):
        bases = [bases] if isinstance(bases, Basis) else list(bases)
        shape = tuple(basis.order for basis in bases)
        self.product = Product(bases, torch.ones(shape, dtype=torch.bool) if keep is None else keep, points.device)
        self.lost = lost
        number, dim, size = len(points), self.product.dim, self.product.size
        if tuple(points.shape) != (number, dim) or tuple(drift.shape) != (number, dim):
            raise UserError(f"points {tuple(points.shape)} and drift {tuple(drift.shape)}, expected both (M, {dim})")
        if tuple(covariance.shape) not in [(number,), (number, dim), (number, dim, dim)]:
            raise UserError(
                f"covariance has shape {tuple(covariance.shape)}, expected (M,), (M, {dim}) or (M, {dim}, {dim})"
            )
        if number < size:
            raise UserError(f"{number} points do not determine {size} functions, expected more points than functions")
        if not bool(self.product.holds(points).all()):
            raise UserError("some points are outside the domain, expected all inside; leave them out")
        values, images = self._images(*(v.to(self.product.points) for v in (points, drift, covariance)))
        norms = values.norm(dim=0)
        q, r = torch.linalg.qr(values / norms)
        pivots = r.diagonal().abs()
        if not float(pivots.min()) > 1e-10:
            raise UserError(
                f"the points do not tell the functions apart (a pivot is {float(pivots.min()):.2g}); "
                "take fewer functions, or points that cover the domain"
            )
        fitted = torch.linalg.solve_triangular(r, q.mT @ images, upper=True)
        self.matrix = (fitted / norms[:, None]).mT.contiguous()
        left = images - q @ (q.mT @ images)
        self.residual = float(left.norm() / images.norm().clamp_min(1e-300))

    def _images(self, x: Tensor, drift: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """psi_k and L psi_k at the points, (M, size) each."""
        modes, dim = self.product.keep.nonzero(), self.product.dim
        axes = []  # for each axis: psi, psi', psi''
        for i, basis in enumerate(self.product.bases):
            rule = basis.rule()
            tilted = rule.modes.mT @ (basis.tilt_slope(rule.nodes)[:, None] * rule.modes)
            slopes = (rule.slopes - tilted).to(x)
            values = basis.functions(x[:, i]) * (-basis.log_tilt(x[:, i])).exp()[:, None]
            axes.append([values, values @ slopes, values @ slopes @ slopes])

        def derivative(*along: int) -> Tensor:
            factors = [axes[i][along.count(i)][:, modes[:, i]] for i in range(dim)]
            return torch.stack(factors).prod(0)

        half = covariance.reshape(len(x), -1, *covariance.shape[2:]) / 2
        images = 0
        for i in range(dim):
            images = images + drift[:, i, None] * derivative(i)
            if half.dim() == 2:
                images = images + half[:, min(i, half.shape[1] - 1), None] * derivative(i, i)
            else:
                images = images + sum(half[:, i, j, None] * derivative(i, j) for j in range(dim))
        return derivative(), images

    def _expansion(self, times: list[float]) -> tuple[Expansion, Tilt]:
        return Expansion(self.product, self.product.log_tilt), plain_tilt(self.product)

    def _means(self, tilt: Tilt, times: list[float]) -> tuple[Means, Sequence[float]]:
        operator = _Matrix(self.matrix)
        return lambda rules: [operator] * len(rules), ()

    def _cut_axes(self, times: list[float]) -> list[int]:
        return []

    def _look_at_equation(self, solution):
        """Nothing is known of it but at the samples."""
