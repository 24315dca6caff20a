"""The matrices P of preconditioned Langevin dynamics dx = P b(x) dt + sqrt(2 tau P) dW."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError


class Root(ABC):
    """L of P = L L^T, as it acts on rows."""

    @abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """L v of each row of v (N, d)."""

    @abstractmethod
    def transposed(self, v: Tensor) -> Tensor:
        """L^T v of each row of v (N, d)."""

    @abstractmethod
    def trace(self, dim: int) -> float:
        """tr P, of `dim` coordinates."""


class Preconditioner(ABC):
    """P, one matrix for all particles, which may depend on them."""

    constant: bool
    """Whether P is the same wherever the particles are."""

    @abstractmethod
    def root(self, x: Tensor) -> Root:
        """L of P = L L^T for particles x (N, d)."""

    @abstractmethod
    def divergence(self, x: Tensor) -> Tensor | float:
        """div P at each particle of x (N, d), by its own coordinates: what P(x) must add to the drift, over tau."""


@dataclass(frozen=True)
class Identity(Preconditioner, Root):
    """P = 1."""

    constant = True

    def root(self, x):
        return self

    def times(self, v):
        return v

    def transposed(self, v):
        return v

    def trace(self, dim):
        return dim

    def divergence(self, x):
        return 0.0


@dataclass(frozen=True)
class Diagonal(Root):
    """L = diag(scales), (d,)."""

    scales: Tensor

    def times(self, v):
        return self.scales * v

    def transposed(self, v):
        return self.scales * v

    def trace(self, dim):
        return float(self.scales.square().sum())


@dataclass(frozen=True)
class Lower(Root):
    """L is a lower triangular matrix (d, d)."""

    matrix: Tensor

    def times(self, v):
        return v @ self.matrix.T

    def transposed(self, v):
        return v @ self.matrix

    def trace(self, dim):
        return float(self.matrix.square().sum())


@dataclass(frozen=True, eq=False)
class Matrix(Preconditioner):
    """A constant P. The best is the covariance of the target, or the inverse of the Hessian of its -log p.

    Args:
        matrix: P symmetric and positive (d, d), or its diagonal (d,); d counts the coordinates of a particle.

    Raises:
        UserError: it is neither; later, d is not that of the particles.
    """

    matrix: Tensor
    constant = True

    def __post_init__(self):
        matrix = self.matrix
        square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1]
        if not matrix.is_floating_point() or not (matrix.dim() == 1 or square):
            raise UserError(
                f"the preconditioner is {matrix.dtype} of shape {tuple(matrix.shape)}, expected floating (d, d) or (d,)"
            )
        lowest = float(torch.linalg.eigvalsh(matrix).min() if square else matrix.min())
        if not lowest > 0 or (square and not torch.allclose(matrix, matrix.T)):
            raise UserError(
                f"the preconditioner has the lowest eigenvalue {lowest:.3g}, expected a symmetric positive matrix"
            )

    def root(self, x):
        if len(self.matrix) != x.shape[1]:
            raise UserError(f"the preconditioner has d={len(self.matrix)}, expected {x.shape[1]}, as the particles")
        if self.matrix.dim() == 1:
            return Diagonal(self.matrix.sqrt().to(x))
        return Lower(torch.linalg.cholesky(self.matrix).to(x))

    def divergence(self, x):
        return 0.0


@dataclass(frozen=True)
class EnsembleCovariance(Preconditioner):
    """P is the covariance of the particles themselves (by 1/N): they move as well in any coordinates that are affine
    in the first, and need no scale of the target.

    With div P = (d + 1) (x - m) / N the law under which all N particles are independent draws stays as it is:
    Garbuno-Inigo, Nuesken and Reich 2020 (arXiv 1912.02859); without it that holds for N to infinity only. It takes
    more than d + 1 particles to be ergodic (ibid.).

    Raises:
        UserError: in a run, there are fewer.
    """

    constant = False

    def root(self, x):
        number, dim = x.shape
        if number <= dim + 1:
            raise UserError(
                f"there are {number} particles in {dim} coordinates, expected more than {dim + 1}, whose covariance "
                "spans them all"
            )
        upper = torch.linalg.qr((x - x.mean(0)) / number**0.5, mode="r").R
        return Lower(upper.T)

    def divergence(self, x):
        return (x.shape[1] + 1) / len(x) * (x - x.mean(0))
