"""Test functions of the weak continuity equation and of Stein's identity, with their derivatives in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bumps(NamedTuple):
    """phi(y) = h(q) cos(w . y + b) with h(q) = 1 / (1 + q / length^2) and q = |y|^2 / d: bounded, for every tail.

    K functions of points y (N, d). Where the wave w is zero, phi depends on |y| alone.
    """

    length: Tensor  # (K,)
    wave: Tensor  # (K, d)
    phase: Tensor  # (K,)

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h, dh/dq, cos and sin, (N, K) each."""
        h = 1 / (1 + y.square().mean(1)[:, None] / self.length.square())
        angle = y @ self.wave.T + self.phase
        return h, -h.square() / self.length.square(), angle.cos(), angle.sin()

    def value(self, y: Tensor) -> Tensor:
        """phi (N, K)."""
        h, _, cos, _ = self._parts(y)
        return h * cos

    def slope(self, y: Tensor, v: Tensor) -> Tensor:
        """v . grad phi (N, K), for v (N, d)."""
        h, h_dot, cos, sin = self._parts(y)
        return h_dot * (2 * (v * y).mean(1))[:, None] * cos - h * sin * (v @ self.wave.T)

    def fields(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Vector fields u (N, K, d) and their divergences (N, K), for Stein's identity.

        u = h y without a wave, and u = h (1 - h) cos(w . y + b) w with one. The latter vanishes at the origin, where
        the score of a law with a finite density of the radius grows like 1 / |y|.
        """
        h, h_dot, cos, sin = self._parts(y)
        g, g_dot = h * (1 - h), h_dot * (1 - 2 * h)
        waves = self.wave.any(1)
        u = torch.where(waves[:, None], (g * cos)[..., None] * self.wave, h[..., None] * y[:, None])
        radial = y.shape[1] * h + 2 * y.square().mean(1)[:, None] * h_dot
        along = 2 * g_dot * cos * (y @ self.wave.T) / y.shape[1] - g * sin * self.wave.square().sum(1)
        return u, torch.where(waves, along, radial)
