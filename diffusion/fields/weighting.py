"""Sums over data points that are weighted by exp(log-density): one pass, in blocks, without overflow.

The running maximum of the log-densities is taken out of every sum, and sums made before it rose are scaled down
(Milakov & Gimelshein 2018, arXiv 1805.02867; in blocks of bounded memory, Rabe & Staats 2021, arXiv 2112.05682).

Rows of x are taken some at a time, and blocks of data points are made to fit, so that a block of log-densities stays in
the cache of a CPU. Letters: B rows of x, c data points in a block, N in all, d coordinates.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256  # rows of x at a time
PAIRS = 2**18  # pairs of a row and a data point at a time
COORDINATES = 2**20  # coordinates at a time, of data points or of pairs
GPU = 16  # what a GPU takes more of at a time, to be kept busy
FLOOR = -80.0  # log-weights below the largest one by more than this have no weight
NOTHING = math.exp(FLOOR + 1e-3)
NEAR = 1e-3  # distances below this part of the terms they come from are computed again


def wide(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Sums(NamedTuple):
    """Of log-weights l_i and values v_i, for each row."""

    log_total: Tensor  # (B, 1) log sum_i exp(l_i)
    mean: Tensor  # (B, k) sum_i exp(l_i) v_i / sum_i exp(l_i)


class Block(NamedTuple):
    """Some data points, seen from each row of x."""

    logits: Tensor  # (B, c) log-densities, up to a constant of the row
    points: Tensor  # (c, d)
    weigh: Callable[[Tensor], Tensor]  # weights (B, c) -> weighted sums of the values (B, k)


def weighted(blocks: Iterable[Block]) -> Sums:
    """The sums over all blocks, for log-weights anywhere between -inf and the largest number.

    Weights are made in the dtype of the points. Rows without any weight have log_total -inf and a mean of NaN.
    """
    peak = total = sums = None
    for logits, points, weigh in blocks:
        top = logits.detach().amax(1, keepdim=True)
        if peak is None:
            peak = top
        elif bool((top > peak).any()):
            rise = torch.maximum(peak, top)
            decay = (_finite(peak) - _finite(rise)).exp().where(peak > -math.inf, 0.0)  # nothing to scale down yet
            peak, total, sums = rise, total * decay, sums * decay.to(sums.dtype)
        shifted = (logits - _finite(peak)).to(points.dtype).clamp_min(FLOOR)  # exp is slow where it underflows
        weights = torch.threshold(shifted.exp(), NOTHING, 0)
        mass, values = weights.sum(1, keepdim=True).to(wide(points.device)), weigh(weights)
        total, sums = (mass, values) if total is None else (total + mass, sums + values)
    return Sums(_finite(peak) + total.log(), sums / total)


def _finite(peak: Tensor) -> Tensor:
    """What is taken out of the log-weights: their maximum, or nothing where that is infinite."""
    return peak.where(peak.isfinite(), 0)


class Cloud:
    """Data points laid out for distances: |x - a y|^2 = (|g|^2 + 2 a g.m) - 2 a g.y + a^2 |y - m|^2, g = x - a m.

    m is the mean of the points. Everything but the product g.y is kept in float64, and that product has an error of
    |g| |y| units of rounding, which for x far from the data is small beside |g|^2. This is what heavy-tailed kernels of
    many coordinates need: their log-density is the relative change of the squared distance times (D + d) / 2.

    Args:
        points: (N, d).
        log_weights: (N,) float64, or None where all points weigh the same.
    """

    def __init__(self, points: Tensor, log_weights: Tensor | None):
        dtype = wide(points.device)
        self.points, self.log_weights = points, log_weights
        self.mean = sum(part.to(dtype).sum(0) for part in points.split(1024)) / len(points)
        self.spread = torch.cat([(part.to(dtype) - self.mean).square().sum(1) for part in points.split(1024)])
        self.reach = float(self.spread.max().sqrt() + self.mean.norm())  # at least the length of every point

    def parts(self, rows: int, dtype: torch.dtype, copies: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of data points (c, d), of which so many copies will be made, and where they are among all."""
        more = GPU if self.points.is_cuda else 1
        c = max(1, min(more * PAIRS // rows, more * COORDINATES // (copies * self.points.shape[1])))
        for start in range(0, len(self.points), c):
            part = slice(start, min(start + c, len(self.points)))
            yield part, self.points[part].to(dtype)

    def weighted(self, logits: Tensor, part: slice) -> Tensor:
        """Log-densities (B, c) with the weights of the points."""
        return logits if self.log_weights is None else logits + self.log_weights[part].to(logits.dtype)

    def gaussian(self, x: Tensor, alpha: Tensor, sigma: Tensor, dtype: torch.dtype) -> Iterator[Block]:
        """Blocks of -|x - alpha y|^2 / (2 sigma^2), up to a constant of the row, with the points as values.

        Args:
            x: (B, d) float64.
            alpha, sigma: (B, 1) or (1, 1) float64.
            dtype: of the products and the log-densities.
        """
        precision = sigma.square().reciprocal()
        scaled = (precision * alpha * (x - alpha * self.mean)).to(dtype)
        for part, y in self.parts(len(x), dtype):
            bias = (-0.5 * precision * alpha.square() * self.spread[part]).to(dtype)
            yield Block(self.weighted(torch.addmm(bias, scaled, y.T), part), y, lambda w, y=y: w @ y)

    def student_t(self, x: Tensor, alpha: Tensor, sigma: Tensor, dof: float, dtype: torch.dtype) -> Iterator[Block]:
        """Blocks of -(D + d) / 2 log(D sigma^2 + |x - alpha y|^2), up to a constant of the row; as for `gaussian`."""
        gap = x - alpha * self.mean
        core = dof * sigma.square()
        scale = (gap.square().sum(1, keepdim=True) + core).reciprocal()
        offset = 2 * alpha * (gap @ self.mean[:, None]) * scale
        scaled = (-2 * alpha * gap).to(dtype)
        for part, y in self.parts(len(x), dtype):
            change = torch.addmm((alpha.square() * self.spread[part]).to(dtype), scaled, y.T).to(x.dtype)
            ratio = (change * scale).add_(offset).clamp_min_(core * scale - 1)  # distances are not negative
            logits = ratio.log1p() * (-0.5 * (dof + x.shape[1]))
            yield Block(self.weighted(logits, part), y, lambda w, y=y: w @ y)

    def squared(self, x: Tensor, alpha: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Where blocks of points are among all, the points (c, d), and |x - alpha y|^2 (B, c), all in float64.

        Small distances, of which cancellation would leave few digits, are computed from differences.
        """
        gap = x - alpha * self.mean
        constant = (gap * (gap + 2 * alpha * self.mean)).sum(1, keepdim=True)
        bound = NEAR * (gap.norm(dim=1, keepdim=True) + alpha.abs() * self.reach).square()
        for part, y in self.parts(len(x), x.dtype):
            squared = (-2 * alpha * gap) @ y.T + alpha.square() * self.spread[part] + constant
            pairs = (squared.detach() < bound).nonzero()
            for i, j in (some.unbind(1) for some in pairs.split(max(1, COORDINATES // x.shape[1]))):
                direct = x[i] - alpha.expand(len(x), 1)[i] * y[j]
                squared = squared.index_put((i, j), direct.square().sum(1))
            yield part, y, squared
