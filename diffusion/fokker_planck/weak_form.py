"""The weak form in a product of bases, as a matrix.

With p = chi u, trial functions chi phi_k and test functions phi_j / chi, d_t E[phi] = int grad phi . J becomes

    d_t u = sum_i G_i^T [(F - D l) u - D grad u]_i,    G_i = d_i - l_i,  l = grad log chi,  D = a / 2,  F = f - div D,

diagonal at the nodes but for a derivative along each axis. The function 1 is among the tests: the mass c . u is kept.
Where chi is the root of a Gibbs density, F = 2 D l, this is -sum_ij G_i^T D_ij G_j: symmetric, and never growing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.evolution import Operator, chebyshev, krylov, largest
from diffusion.fokker_planck.products import Product, along

SAME = 1e-9  # relative, up to which two drifts are
DENSE = 400  # unknowns up to which the matrix is formed


@dataclass(frozen=True)
class Tilt:
    """chi at the nodes of a product.

    Attributes:
        log: log chi (n,).
        slope: l (n, d).
        mass: the state c (size,) with c . u the mass.
        symmetrised: whether chi is the root of a Gibbs density. States are then orthogonal to c.
    """

    log: Tensor
    slope: Tensor
    mass: Tensor
    symmetrised: bool

    @classmethod
    def of(cls, product: Product, log: Tensor, slope: Tensor, symmetrised: bool = False) -> "Tilt":
        ones = (product.roots * log.exp()).reshape(1, *product.shape)
        return cls(log, slope, product.state(ones)[0], symmetrised)


def plain_tilt(product: Product) -> Tilt:
    """That of the bases themselves."""
    return Tilt.of(product, product.log_tilt(product.points), product.tilt_slope(product.points))


def gibbs_push(equation: FokkerPlanck, x: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """F (K, n, d) at K times, and D as the equation gives it, (K, n), (K, n, d) or (K, n, d, d)."""
    push, a = equation.over(x, times)
    if not bool((a == a[:, :1]).all()):
        push = push - torch.stack([equation.covariance_divergence(x, t) for t in times]) / 2
    return push, a / 2


def coefficients(equation: FokkerPlanck, product: Product, tilt: Tilt, times: Sequence[float]) -> Tensor:
    """F - D l and D at the nodes at K times, (K, n, d + 1), (K, n, 2 d) or (K, n, d + d^2).

    Raises:
        UserError: chi is not the root of the Gibbs density at this time, as the symmetrised form takes it to be.
    """
    push, half = gibbs_push(equation, product.points, times)
    full = half.dim() == 4
    turned = (half @ tilt.slope[:, :, None])[..., 0] if full else half.reshape(*half.shape[:2], -1) * tilt.slope
    if tilt.symmetrised:
        gap, size, kept = (values.abs().amax((1, 2)) for values in (push - 2 * turned, push, 2 * turned))
        moved = ~(gap <= SAME * torch.maximum(size, kept))
        if bool(moved.any()):
            k = int(moved.int().argmax())
            raise UserError(
                f"the Gibbs density changes in time: at t={times[k]:.4g} the drift differs by {float(gap[k]):.3g} from "
                f"what would keep that of the first time, where it is {float(size[k]):.3g} at most; take "
                "symmetrised=False"
            )
    else:
        turned = push - turned
    return torch.cat([turned, half.reshape(*half.shape[:2], -1)], 2)


class WeakOperator(Operator):
    """The map of states at one time, or a mean of such maps.

    Args:
        values: see `coefficients`.
    """

    def __init__(self, product: Product, tilt: Tilt, values: Tensor):
        self.product, self.tilt, self.values = product, tilt, values
        d, grid = product.dim, (-1, *product.shape)
        self._push = values[:, :d].T.reshape(grid)
        self._half = values[:, d:].T.reshape(grid).contiguous()
        self._slope = tilt.slope.T.reshape(grid)
        self._matrix: Tensor | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None
        self._bound: float | None = None
        self._exponentials: dict[float, Tensor] = {}

    def apply(self, state: Tensor) -> Tensor:
        """A state, (B, size)."""
        u, total = self.product.numbers(state), 0
        gradient = [along(matrix, u, i) for i, matrix in enumerate(self.product.derivatives)]
        for i, matrix in enumerate(self.product.derivatives):
            flux = self._push[i] * u - self._spread(i, gradient)
            total = total + along(matrix.mT, flux, i) - self._slope[i] * flux
        return self._projected(self.product.state(total))

    def _spread(self, i: int, gradient: list[Tensor]) -> Tensor:
        """(D grad u)_i."""
        d = self.product.dim
        if len(self._half) <= d:
            return self._half[min(i, len(self._half) - 1)] * gradient[i]
        return sum(self._half[d * i + j] * gradient[j] for j in range(d))

    def _projected(self, state: Tensor) -> Tensor:
        """Without its part along c, where states have none."""
        return self._with_mass(state, 0.0) if self.tilt.symmetrised else state

    def _with_mass(self, state: Tensor, mass: Tensor | float) -> Tensor:
        c = self.tilt.mass
        return state + ((mass - state @ c) / (c @ c)).reshape(-1, 1) * c

    def matrix(self) -> Tensor:
        """A, (size, size), that of the projected map where states are projected."""
        if self._matrix is None:
            eye = torch.eye(self.product.size, dtype=self.values.dtype, device=self.values.device)
            self._matrix = self.apply(self._projected(eye)).mT
            if self.tilt.symmetrised:
                self._matrix = (self._matrix + self._matrix.mT) / 2
        return self._matrix

    def advance(self, state: Tensor, duration: float) -> Tensor:
        """exp(duration A) state; what rounding does to the mass is taken back."""
        if self.product.size > DENSE:
            after = self._by_products(state, duration)
        elif self.tilt.symmetrised:
            if self._spectrum is None:
                self._spectrum = torch.linalg.eigh(self.matrix())
            rates, vectors = self._spectrum
            after = ((state @ vectors) * (duration * rates.clamp_max(0)).exp()) @ vectors.mT
        else:
            if duration not in self._exponentials:
                self._exponentials = {duration: torch.linalg.matrix_exp(duration * self.matrix())}
            after = state @ self._exponentials[duration].mT
        return self._with_mass(after, state @ self.tilt.mass)

    def _by_products(self, state: Tensor, duration: float) -> Tensor:
        if not self.tilt.symmetrised:
            return krylov(self.apply, state, duration)
        if self._bound is None:
            self._bound = largest(self.apply, state[:1])
        return chebyshev(self.apply, state, duration, self._bound)
