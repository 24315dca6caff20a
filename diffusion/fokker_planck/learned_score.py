"""Scores learned from particles: that of their Gaussian, corrected by a network in whitened coordinates."""

import copy
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.fokker_planck.correction import Correction
from diffusion.objectives import Batch
from diffusion.trainer import Trainer


@dataclass(frozen=True)
class LearnedScore:
    """s(x) = W^T (n(y) - y) with y = W (x - m): a Gaussian's of mean m and inverse covariance W^T W where n is 0.

    Attributes:
        time: at which it was learned.
        mean: m, (d,).
        whitening: W, (d, d).
        correction: n.
        own_share: by how much the points' own places told it, instead of the scores that they carry.
    """

    time: float
    mean: Tensor
    whitening: Tensor
    correction: Correction
    own_share: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The score (B, d) at `x` (B, d)."""
        y = self.whitened(x)
        return (self.correction(y) - y) @ self.whitening

    def traced(self, x: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The score s (B, d), and tr(a ds/dx) (B,) for a = `covariance`, (B,), (B, d) or (B, d, d)."""
        y, scale = self.whitened(x), 1.0
        if covariance.dim() == 1:
            scale, matrix = covariance, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        elif bool((covariance == covariance[:1]).all()):
            matrix = covariance[0].diag() if covariance.dim() == 2 else covariance[0]
        else:
            matrix = covariance.diag_embed() if covariance.dim() == 2 else covariance
        matrix = self.whitening @ matrix @ self.whitening.T
        value, trace = self.correction.traced(y, matrix)
        return (value - y) @ self.whitening, scale * (trace - matrix.diagonal(dim1=-2, dim2=-1).sum(-1))

    def whitened(self, x: Tensor) -> Tensor:
        """y (B, d)."""
        return (x - self.mean) @ self.whitening.T


@dataclass(frozen=True)
class Pairs:
    """Data of the regression: (N, 2, d), whitened points and the scores there less the Gaussian's."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> "Pairs":
        return replace(self, values=self.values.to(device))

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, None]]:
        for indices in order:
            yield self.values[indices.to(self.values.device)], None


def regression(network: nn.Module, batch: Batch) -> Tensor:
    """The objective: squared error (B, d) of the network against the scores that the particles carry."""
    y, target = batch.x.unbind(1)
    return (network(y) - target).square()


def learn(
    x: Tensor, scores: Tensor, time: float, correction: Correction, trainer: Trainer | None, near: Tensor | None = None
) -> LearnedScore:
    """The score that fits `scores` (N, d) at `x` (N, d) best, from the network `correction` on.

    All weights are trained; the last, whose best values are known in closed form, are set to these at the end.

    Args:
        trainer: without one only the last weights are set.
        near: where the points were in whitened coordinates (N, d); the new ones are turned to be near, so that what the
            network knows turns with the particles.

    Raises:
        UserError: the particles span no volume.
    """
    mean, number = x.mean(0), len(x)
    gaps = x - mean
    root, info = torch.linalg.cholesky_ex(gaps.T @ gaps / number)
    if int(info) or not bool((root.diagonal() > 1e-12 * root.diagonal().max()).all()):
        raise UserError(
            f"the {number} particles span no volume at t={time:.6g}; take more, or more steps, or give it "
            "noise in all directions"
        )
    whitening = torch.linalg.inv(root)
    if near is not None:
        left, _, right = torch.linalg.svd(near.T @ gaps @ whitening.T)  # Schoenemann 1966
        whitening = left @ right @ whitening
    score = LearnedScore(time, mean, whitening, correction)
    y = score.whitened(x)
    target = torch.linalg.solve(whitening.T, scores.T).T + y
    if trainer is not None:
        network = copy.deepcopy(correction).train().requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            correction = trainer.fit(network, regression, Pairs(torch.stack([y, target], 1)), folder, progress=False)
    else:
        correction = copy.deepcopy(correction)
    share = correction.requires_grad_(False).solve_last(y, target)
    return replace(score, correction=correction, own_share=share)
