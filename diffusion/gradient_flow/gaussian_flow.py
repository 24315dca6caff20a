"""KL to a Gaussian, from a Gaussian: the flow and its proximal (JKO) steps in closed form, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.metrics.gaussians import GaussianLaw, gaussian_kl


@dataclass(frozen=True)
class GaussianFlow:
    """The Wasserstein flow of F[q] = KL(q || N(b, C)), which keeps Gaussians q = N(m, S) Gaussian.

    Args:
        target: N(b, C), or the pair (b, C).

    Raises:
        UserError: the target's covariance is singular, or see `GaussianLaw.checked`.
    """

    target: GaussianLaw

    def __post_init__(self):
        target = GaussianLaw(*self.target).checked("the target")
        target.root("the target")
        object.__setattr__(self, "target", target)

    def value(self, law: GaussianLaw) -> float:
        """F[law] in nats."""
        return gaussian_kl(law, self.target)

    def at(self, start: GaussianLaw, time: float) -> GaussianLaw:
        r"""The law at `time`, 0 or more, of the flow that starts from `start`: an Ornstein-Uhlenbeck process.

        .. math:: m(t) = b + E (m - b),\quad S(t) = C + E (S - C) E,\quad E = e^{-t C^{-1}}

        (Risken 1989, sec. 6.5, for dx = -C^-1 (x - b) dt + sqrt(2) dw, which has the same laws). S may be singular.

        Raises:
            UserError: `start` is of another dimension, or see `GaussianLaw.checked`; time is below 0 or not finite.
        """
        start = self._started(start)
        if not 0 <= time < float("inf"):
            raise UserError(f"time is {time}, expected a number of 0 or more")
        mean, covariance = self.target
        decay = _function(covariance, lambda values: (-time / values).exp())
        grown = _function(covariance, lambda values: -values * torch.expm1(-2 * time / values))
        return GaussianLaw(mean + decay @ (start.mean - mean), grown + decay @ start.covariance @ decay)

    def proximal(self, start: GaussianLaw, step_size: float) -> GaussianLaw:
        r"""The JKO step: the law q that minimises W2(q, start)^2 / (2 tau) + F[q], with tau = `step_size`.

        .. math:: m' = M^{-1} (m + \tau C^{-1} b),\quad S' = M^{-1/2} Y M^{-1/2},\quad M = 1 + \tau C^{-1}
        .. math:: Y = \tfrac12 (K + 2 \tau + \sqrt{K^2 + 4 \tau K}),\quad K = M^{-1/2} S M^{-1/2}

        The optimal map A back from S' to S makes (x - A x) / tau + C^-1 x - S'^-1 x vanish (Ambrosio, Gigli and Savare
        2008, lemma 10.1.2), so A = M - tau S'^-1; and A S' A = S is Y - 2 tau + tau^2 Y^-1 = K, of whose two roots this
        one makes A positive. S may be singular; S' is not.

        Raises:
            UserError: `start` is of another dimension, or see `GaussianLaw.checked`; step_size is not positive.
        """
        start = self._started(start)
        if not 0 < step_size < float("inf"):
            raise UserError(f"step_size is {step_size}, expected a positive number")
        mean, covariance = self.target
        half = _function(covariance, lambda values: (values / (values + step_size)).sqrt())
        inner = half @ start.covariance @ half
        grown = _function(
            (inner + inner.T) / 2,
            lambda k: (k.clamp_min(0) + 2 * step_size + (k.clamp_min(0) * (k.clamp_min(0) + 4 * step_size)).sqrt()) / 2,
        )
        return GaussianLaw(mean + half @ half @ (start.mean - mean), half @ grown @ half)

    def _started(self, start: GaussianLaw) -> GaussianLaw:
        start = GaussianLaw(*start).checked("the start")
        if len(start.mean) != len(self.target.mean):
            raise UserError(
                f"the start has {len(start.mean)} dimensions, expected {len(self.target.mean)}, as many as the target"
            )
        return start


def _function(matrix: Tensor, function) -> Tensor:
    """A function of the eigenvalues of a symmetric matrix (d, d)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T
