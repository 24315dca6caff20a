"""Estimates of grad log q, and of the entropy E log q, from the particles of q alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.weighting import wide
from diffusion.gradient_flow.functionals.base import points_of


class ScoreEstimator(ABC):
    """What of the law q can be told from particles (N, *shape) of it. Results have their dtype."""

    @abstractmethod
    def score(self, particles: Tensor) -> Tensor:
        """grad log q at the particles, (N, *shape), without a graph."""

    @abstractmethod
    def value(self, particles: Tensor) -> Tensor:
        """E log q (), in nats.

        Raises:
            UserError: the estimator has a score only.
        """

    @abstractmethod
    def log_density(self, particles: Tensor) -> Tensor:
        """The first variation of the value, log q at the particles (N,), up to a constant.

        Raises:
            UserError: as `value`.
        """

    def fitted(self, particles: Tensor, generator: torch.Generator | None = None) -> ScoreEstimator:
        """This estimator with its bandwidth, or its network, made for `particles`, from what it was on."""
        return self


@dataclass(frozen=True)
class GaussianScore(ScoreEstimator):
    """The score of the Gaussian with the particles' mean m and covariance S, -S^-1 (x - m).

    It is what Stein's identity E[f(x) s(x)^T] = -E[grad f(x)] says of the score for f = 1 and f = x, with s linear: the
    best linear fit of the true score. The value -1/2 log det(2 pi e S) is the entropy of that Gaussian, the lowest
    E log q of all laws with that mean and covariance. With it the Wasserstein flow of KL between Gaussians is exact for
    every number of particles above d: it moves their mean and covariance as those of the laws.

    Raises:
        UserError: the particles span no volume, as when they are no more than d.
    """

    def score(self, particles):
        y, root = self._whitened(particles.detach())
        score = -torch.linalg.solve_triangular(root.T, y.T, upper=True).T
        return score.to(particles.dtype).view(particles.shape)

    def value(self, particles):
        _, root = self._whitened(particles)
        return (-0.5 * root.shape[0] * (1 + math.log(math.tau)) - _log_det(root)).to(particles.dtype)

    def log_density(self, particles):
        y, root = self._whitened(particles)
        constant = -0.5 * root.shape[0] * math.log(math.tau) - _log_det(root)
        return (constant - 0.5 * y.square().sum(1)).to(particles.dtype)

    @staticmethod
    def _whitened(particles: Tensor) -> tuple[Tensor, Tensor]:
        """root^-1 (x - m) (N, d) and root (d, d), lower, with root root^T = S."""
        points = points_of(particles)
        points = points.to(wide(points.device))
        gaps = points - points.mean(0)
        root = factor(gaps)
        return torch.linalg.solve_triangular(root, gaps.T, upper=False).T, root


def factor(gaps: Tensor) -> Tensor:
    """The Cholesky factor (d, d) of the covariance of points less their mean, (N, d).

    Raises:
        UserError: the points span no volume.
    """
    number, dim = gaps.shape
    root, info = torch.linalg.cholesky_ex(gaps.T @ gaps / number)
    least = 1e2 * torch.finfo(gaps.dtype).eps ** 0.5
    sizes = gaps.detach().square().mean(0).sqrt()
    if int(info) or not bool((root.detach().diagonal() > least * sizes).all()):
        raise UserError(
            f"the {number} particles span no volume in their {dim} coordinates, expected more than {dim} in general "
            "places; take more particles, or another estimator of their score"
        )
    return root


def _log_det(root: Tensor) -> Tensor:
    return root.diagonal().log().sum()
