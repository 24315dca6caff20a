"""Sums of Gaussian kernels in whitened coordinates, and the linear equations of their score matching."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.fields.weighting import wide
from diffusion.gradient_flow.functionals.base import chunks, points_of
from diffusion.gradient_flow.scores.base import factor

JITTER = 1e-9  # relative, on the diagonal of the equations


class Frame(NamedTuple):
    """Whitened coordinates u = root^-1 (x - mean) of N particles."""

    mean: Tensor  # (d,)
    root: Tensor  # (d, d), lower
    spread: float  # root of the mean variance of a coordinate
    u: Tensor  # (N, d)

    @classmethod
    def of(cls, particles: Tensor) -> Frame:
        points = points_of(particles)
        points = points.to(wide(points.device))
        mean = points.mean(0)
        gaps = points - mean
        root = factor(gaps)
        return cls(mean, root, float(gaps.square().mean().sqrt()), _solve(root, gaps))

    def whitened(self, points: Tensor) -> Tensor:
        return _solve(self.root, points - self.mean)

    def unwhitened(self, score: Tensor) -> Tensor:
        """The gradient in x (N, d) of what has the gradient `score` in u."""
        return torch.linalg.solve_triangular(self.root.T, score.T, upper=True).T


class Moments(NamedTuple):
    """Of kernels k_m over particles: E grad k_m . grad k_n (M, M), and E [lap k_m - u . grad k_m] (M,), gradients in u.

    With the score -u + sum_m a_m grad k_m the loss E |s|^2 / 2 + div s is a^T gram a / 2 + means . a + constant.
    """

    gram: Tensor
    means: Tensor


class Kernels(NamedTuple):
    """k_m(u) = exp(-|B (u - c_m)|^2 / (2 h^2)), and the matrix <k_m, k_n> of their space."""

    matrix: Tensor  # B, (d, d)
    centres: Tensor  # B c_m, (M, d)
    bandwidth: float  # h

    @classmethod
    def of(cls, frame: Frame, places: Tensor, round: bool, scale: float) -> Kernels:
        """With B the unit matrix, or `round` in x; and h = scale times the median distance of the centres (M, d)."""
        matrix = frame.root / frame.spread if round else torch.eye(len(frame.root)).to(frame.root)
        centres = frame.whitened(places) @ matrix.T
        median = torch.pdist(centres).median() if len(centres) > 1 else torch.ones(())
        return cls(matrix, centres, scale * float(median))

    def at(self, u: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of k_m(u_i), some at a time, (n, M)."""
        centres, y = self.centres / self.bandwidth, u @ self.matrix.T / self.bandwidth
        halves = 0.5 * centres.square().sum(1)
        for part in chunks(len(u), len(centres)):
            exponents = y[part] @ centres.T - halves - 0.5 * y[part].square().sum(1, keepdim=True)
            yield part, exponents.clamp_max(0).exp()

    def moments(self, u: Tensor, group: Tensor, groups: int) -> list[Moments]:
        """Sums over the particles of each group (N,), divided by all their number N: they add up to the moments of all.

        With p = B^T B u and q = B^T B c, the gradient of k_m is -k_m (p - q_m) / h^2, and all of gram are products of
        matrices: no gradients of pairs are made.
        """
        number, square = len(u), self.bandwidth**2
        p, q = u @ (self.matrix.T @ self.matrix), self.centres @ self.matrix
        both, q_lengths = q @ q.T, q.square().sum(1)
        trace = float(self.matrix.square().sum())
        found = [Moments(torch.zeros_like(both), torch.zeros_like(q_lengths)) for _ in range(groups)]
        for part, kernel in self.at(u):
            for index, moments in enumerate(found):
                mine = group[part] == index
                k, here, at = kernel[mine], p[part][mine], u[part][mine]
                products, lengths = here @ q.T, here.square().sum(1, keepdim=True)
                cross = (k * products).T @ k
                moments.gram.add_(
                    (lengths * k).T @ k - cross - cross.T + (k.T @ k) * both, alpha=1 / (number * square**2)
                )
                lap = (lengths - 2 * products + q_lengths) / square**2 - trace / square
                drift = ((here * at).sum(1, keepdim=True) - at @ q.T) / square
                moments.means.add_((k * (lap + drift)).sum(0), alpha=1 / number)
        return found

    def solve(self, moments: Moments, ridge: float, share: float = 1.0) -> Tensor:
        """The weights (M,) of the lowest loss plus ridge times their norm, of moments that are this share of all."""
        if ridge == math.inf:
            return torch.zeros_like(moments.means)
        square = self.bandwidth**2
        norm = (-torch.cdist(self.centres, self.centres).square() / (2 * square)).exp() / square
        norm = norm * (self.matrix.square().sum() / len(self.matrix))
        gram = moments.gram / share + ridge * norm
        gram.diagonal().add_(JITTER * moments.gram.diagonal().mean() / share)
        return -torch.linalg.solve(gram, moments.means / share)

    def losses(self, u: Tensor, weights: Tensor) -> Tensor:
        """|g|^2 / 2 + div g - u . g at each u, with g = sum_m a_m grad k_m, for several weights (M, R): (N, R)."""
        square, dim, q = self.bandwidth**2, u.shape[1], self.centres @ self.matrix
        p, trace = u @ (self.matrix.T @ self.matrix), float(self.matrix.square().sum())
        first = (weights[:, :, None] * q[:, None]).flatten(1)
        second, rows = weights * q.square().sum(1, keepdim=True), []
        for part, kernel in self.at(u):
            here, at, sums = p[part][:, None], u[part][:, None], (kernel @ weights)[:, :, None]
            means = (kernel @ first).view(len(kernel), -1, dim)
            gradient = (means - here * sums) / square
            squares = (here * (here * sums - 2 * means)).sum(2) + kernel @ second
            lap = squares / square**2 - trace / square * sums[:, :, 0]
            rows.append(0.5 * gradient.square().sum(2) + lap - (at * gradient).sum(2))
        return torch.cat(rows)

    def sums(self, u: Tensor, weights: Tensor) -> Tensor:
        """sum_m a_m k_m at u, (N,)."""
        return torch.cat([kernel @ weights for _, kernel in self.at(u)])

    def gradient(self, u: Tensor, weights: Tensor) -> Tensor:
        """Its gradient in u, (N, d)."""
        rows = []
        for part, kernel in self.at(u):
            terms = kernel * weights
            rows.append(terms @ self.centres - terms.sum(1, keepdim=True) * (u[part] @ self.matrix.T))
        return torch.cat(rows) @ self.matrix / self.bandwidth**2


def _solve(root: Tensor, gaps: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, gaps.T, upper=False).T
