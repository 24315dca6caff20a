"""Sums over data points that are weighted by exp(log-density): one pass, in blocks, without overflow.

The running maximum of the log-densities is taken out of every sum, and sums made before it rose are scaled down
(Milakov & Gimelshein 2018, arXiv 1805.02867; in blocks of bounded memory, Rabe & Staats 2021, arXiv 2112.05682).

Rows of x are taken some at a time, and blocks of data points are made to fit, so that a block of log-densities stays in
the cache of a CPU. Letters: B rows of x, c data points in a block, N in all, d coordinates.

On CUDA, where nothing is to be differentiated, a block is fused: of Gaussian kernels a kernel of attention makes sums
and normalisers (`attention`); of other ones torch.compile joins what lies between the two products (`fuse`).
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 256  # rows of x at a time
PAIRS = 2**18  # pairs of a row and a data point at a time
COORDINATES = 2**20  # coordinates at a time, of data points or of pairs
GPU = 8  # what a GPU takes more of at a time, to be kept busy
PIECE = 512  # data points that a GPU attends to at a time, which are as many heads
ALIGNED = 4  # float32 numbers, of 16 bytes: rows of data points start at multiples of it, as kernels of attention ask
FLOOR = -80.0  # log-weights below the largest one by more than this have no weight
NOTHING = math.exp(FLOOR + 1e-3)
NEAR = 1e-3  # distances below this part of the terms they come from are computed again


def wide(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def fused(x: Tensor) -> bool:
    """Whether blocks seen from x are fused."""
    return x.is_cuda and torch.version.hip is None and not (torch.is_grad_enabled() and x.requires_grad)


def fuse(function: Callable, *tensors: Tensor | None):
    """function(*tensors), compiled where the first of them asks for it."""
    return (_compiled(function) if fused(tensors[0]) else function)(*tensors)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """The function compiled, or as it is where there is no compiler."""
    compiled = torch.compile(function, dynamic=True)

    def call(*tensors: Tensor | None):
        nonlocal compiled
        try:
            return compiled(*tensors)
        except torch._dynamo.exc.TorchDynamoException as problem:
            reason = str(problem).strip().splitlines()[0]
            warnings.warn(f"torch.compile failed ({reason}); exact fields run slower without it", stacklevel=2)
            compiled = function
            return function(*tensors)

    return call


class Sums(NamedTuple):
    """Of log-weights l_i and values v_i, for each row."""

    log_total: Tensor  # (B, 1) log sum_i exp(l_i)
    mean: Tensor  # (B, k) sum_i exp(l_i) v_i / sum_i exp(l_i)


class Block(NamedTuple):
    """Some data points, seen from each row of x."""

    logits: Tensor  # (B, c) log-densities, up to the origin
    points: Tensor  # (c, d)
    weigh: Callable[[Tensor], Tensor]  # weights (B, c) -> weighted sums of the values (B, k)
    origin: Tensor | None = None  # (B, 1) what is to be added to the logits, up to a constant of the row; else nothing


def weighted(blocks: Iterable[Block]) -> Sums:
    """The sums over all blocks, for log-weights anywhere between -inf and the largest number.

    Weights are made in the dtype of the points. Rows without any weight have log_total -inf and a mean of NaN.
    """
    peak = total = sums = None
    for logits, points, weigh, origin in blocks:
        rise, weights, mass = fuse(_exponentials, logits, origin, peak)
        if peak is not None and bool((rise > peak).any()):
            decay = (_finite(peak) - _finite(rise)).exp().where(peak > -math.inf, 0.0)  # nothing to scale down yet
            total, sums = total * decay, sums * decay.to(sums.dtype)
        peak, mass, values = rise, mass.to(wide(points.device)), weigh(weights.to(points.dtype))
        total, sums = (mass, values) if total is None else (total + mass, sums + values)
    return Sums(_finite(peak) + total.log(), sums / total)


def _exponentials(logits: Tensor, origin: Tensor | None, peak: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The largest log-weight so far (B, 1), the weights (B, c) relative to it, and their sum (B, 1)."""
    top = logits.detach().amax(1, keepdim=True)
    top = top if origin is None else top + origin.detach()
    peak = top if peak is None else torch.maximum(peak, top)
    shift = _finite(peak) if origin is None else _finite(peak) - origin
    shifted = (logits - shift.to(logits.dtype)).clamp_min_(FLOOR)  # exp is slow where it underflows
    weights = torch.threshold(shifted.exp_(), NOTHING, 0)
    return peak, weights, weights.sum(1, keepdim=True)


def _student_t(change: Tensor, constant: Tensor, core: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """The logits and the origin of a block of log-densities -power log(core + |x - alpha y|^2).

    The origin is that of the nearest point: where a log-density is less by a few nats, its error is as many units of
    rounding, whatever the power, and no logarithm of (B, c) numbers is made in float64.

    Args:
        change: (B, c) |x - alpha y|^2 but for the constant of the row.
        constant, core: (B, 1) float64, core also (1, 1).
        power: () float64.
    """
    least = change.detach().amin(1, keepdim=True)
    nearest = torch.maximum(constant + least + core, core)  # distances are not negative
    farther = (change - least).mul_(nearest.reciprocal().to(change.dtype))
    return farther.log1p_().mul_(-power), -power * nearest.log()


def _finite(peak: Tensor) -> Tensor:
    """What is taken out of the log-weights: their maximum, or nothing where that is infinite."""
    return peak.where(peak.isfinite(), 0)


class Cloud:
    """Data points laid out for distances: |x - a y|^2 = (|g|^2 + 2 a g.m) - 2 a g.y + a^2 |y - m|^2, g = x - a m.

    m is the mean of the points. What is in brackets is kept in float64, and the rest has an error of |g| |y| units of
    rounding, which for x far from the data is small beside |g|^2. This is what heavy-tailed kernels of many coordinates
    need: their log-density is the relative change of the squared distance times (D + d) / 2.

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
            bias = self.weighted(-0.5 * precision * alpha.square() * self.spread[part], part).to(dtype)
            whole = len(y) // PIECE * PIECE if fused(scaled) and _attended(y) else 0
            if whole:
                yield attention(scaled, y[:whole], bias[:, :whole])
            if whole < len(y):
                y = y[whole:]
                yield Block(torch.addmm(bias[:, whole:], scaled, y.T), y, lambda w, y=y: w @ y)

    def student_t(self, x: Tensor, alpha: Tensor, sigma: Tensor, dof: float, dtype: torch.dtype) -> Iterator[Block]:
        """Blocks of -(D + d) / 2 log(D sigma^2 + |x - alpha y|^2), up to a constant of the row; as for `gaussian`."""
        gap = x - alpha * self.mean
        constant = (gap * (gap + 2 * alpha * self.mean)).sum(1, keepdim=True)
        core, power = dof * sigma.square(), x.new_tensor(0.5 * (dof + x.shape[1]))
        scaled = (-2 * alpha * gap).to(dtype)
        for part, y in self.parts(len(x), dtype):
            change = torch.addmm((alpha.square() * self.spread[part]).to(dtype), scaled, y.T)
            logits, origin = fuse(_student_t, change, constant, core, power)
            yield Block(self.weighted(logits, part), y, lambda w, y=y: w @ y, origin)

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


def _attended(y: Tensor) -> bool:
    """Whether kernels of attention take data points (c, d) as they lie."""
    aligned = y.shape[1] % ALIGNED == y.stride(0) % ALIGNED == y.data_ptr() % (4 * ALIGNED) == 0
    return aligned and y.dtype == torch.float32 and y.stride(1) == 1


def attention(query: Tensor, points: Tensor, bias: Tensor) -> Block:
    """A block of log-densities query @ points.T + bias, every PIECE data points made one: their mean and log-sum-exp.

    Scaled dot-product attention with pieces as heads, so that neither log-densities nor weights are kept, and a GPU is
    busy for a few rows. Of its kernels, memory-efficient attention makes float32 products and takes rows of any length;
    it is called by its own name because what chooses among them would not return the log-sum-exp.

    Args:
        query: (B, d).
        points: (c, d), c a multiple of PIECE.
        bias: (B, c) or (1, c).
    """
    pieces = points.unflatten(0, (-1, PIECE))[None]
    size = (1, pieces.shape[1], len(query), PIECE)
    mask = bias.clamp_min(-1e30).unflatten(1, (-1, PIECE)).transpose(0, 1)[None].expand(size)  # -inf makes NaN
    query = query.expand(1, pieces.shape[1], -1, -1)
    if points.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        means, log_totals = kernel(query, pieces, pieces, attn_mask=mask, scale=1.0)
    else:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        means, log_totals, *_ = kernel(query, pieces, pieces, mask, True, scale=1.0)
    logits = log_totals[0, :, : query.shape[2]].T  # the second kernel pads rows
    return Block(logits, points, lambda w: torch.einsum("bn,nbd->bd", w, means[0]))
