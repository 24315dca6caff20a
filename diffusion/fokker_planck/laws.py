"""Laws at the start of a problem: densities that can be drawn from."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.asking import shown


class Law(Protocol):
    """A law on points (d,)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density (N,) in nats at `x` (N, d)."""

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent points (number, d), float64."""


def log_density(law: Law, x: Tensor, name: str = "start") -> Tensor:
    """The log density (N,) of any law at `x` (N, d), checked.

    Raises:
        UserError: it has no log_prob, or that fails, or gives another shape.
    """
    if not hasattr(law, "log_prob"):
        raise UserError(f"{name} is {type(law).__name__}, expected a law with log_prob")
    try:
        values = law.log_prob(x)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{name}.log_prob(x) fails for x {tuple(x.shape)}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, Tensor) or tuple(values.shape) != (len(x),):
        raise UserError(f"{name}.log_prob(x) gives {shown(values)} for x {tuple(x.shape)}, expected {(len(x),)}")
    return values.to(x)


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of Gaussians.

    Args:
        weights: (K,), summing to 1.
        means: (K, d).
        covariances: (K, d, d).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        gaps = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + gaps[:, :, None] * gaps[:, None])

    @property
    def _roots(self) -> Tensor:
        """(K, d, d), of Cholesky."""
        return torch.linalg.cholesky(self.covariances)

    def log_prob(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.dim:
            raise UserError(f"points have shape {tuple(x.shape)}, expected (N, {self.dim})")
        gaps = x.T - self.means.to(x)[:, :, None]
        roots = self._roots
        distances = torch.linalg.solve_triangular(roots.to(x), gaps, upper=False).square().sum(1)
        scales = roots.diagonal(dim1=1, dim2=2).log().sum(1) + self.dim * math.log(math.tau) / 2
        logs = (self.weights.log() - scales).to(x)[:, None] - distances / 2
        return logs.logsumexp(0) if len(logs) > 1 else logs[0]

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        part = torch.multinomial(self.weights, number, replacement=True, generator=generator)
        noise = torch.randn(number, self.dim, generator=generator, dtype=self.means.dtype)
        return self.means[part] + (self._roots[part] @ noise[:, :, None])[:, :, 0]

    def moved(self, matrix: Tensor, added: Tensor) -> "GaussianMixture":
        """The law of `matrix` x + z, with z a Gaussian of covariance `added` (d, d)."""
        return GaussianMixture(self.weights, self.means @ matrix.T, matrix @ self.covariances @ matrix.T + added)


def gaussian(mean, std: float, dim: int | None = None) -> GaussianMixture:
    """The isotropic Gaussian of a mean (d,), or of one number in `dim` dimensions."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    mean = mean.expand(dim or 1) if mean.dim() == 0 else mean
    eye = torch.eye(len(mean), dtype=torch.float64)
    return GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], std**2 * eye[None])
