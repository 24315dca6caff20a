"""The exact field of a data set: what a network would learn from it if nothing were left to learn."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import conversions
from diffusion.fields.affine import AffineField
from diffusion.fields.base import Field, Isotropic, Unavailable, expand_time
from diffusion.fields.laws import Gaussian, StudentT
from diffusion.fields.weighting import COORDINATES, ROWS, Block, Cloud, Sums, weighted, wide

FEW = 32  # coordinates up to which products cost little, and are made in float64


class _Pairs(NamedTuple):
    """Every row of x with every point of a block, (B c, *shape)."""

    x: Tensor
    t: Tensor
    x0: Tensor


Quantity = Callable[[Tensor, Tensor, Tensor], Tensor]


class EmpiricalField:
    """The marginal law and velocity of N data points x_i under a field, by Bayes' rule:

        p_t(x) = sum_i w_i p_t(x|x_i),    E[v | x] = sum_i w_i p_t(x|x_i) v_i / p_t(x),

    with v_i the velocity f_t(x|x_i), the data point itself, or the score grad_x log p_t(x|x_i). It is a model, for any
    sampler. x is (B, *shape) of any floating dtype, t a number or (B,); results have the dtype of x.

    One pass over the data, in blocks (diffusion.fields.weighting): memory does not grow with N. A field that is a
    function of distances costs two matrix products, x @ data.T and weights @ data; any other one is evaluated at each
    pair of a row and a data point. Products are made in the wider of the dtypes of x and data (in float64 up to 32
    coordinates); what belongs to a row of x, the log-densities of log_prob and of fields that are not affine with a
    Gaussian or Student-t base, and what follows from the sums in float64 (float32 on devices without it). So in float32
    the log-density of one data point relative to another has an error of 1e-7 |x| |x_i| d_r log p / r: pass float64 for
    data points that lie closer together than that can tell apart.

    Everything is differentiable in x, in memory that then grows with N; the score of a field that is not a function
    of distances is not.

    On CUDA, where no gradients are asked for, scaled dot-product attention makes the means of affine fields with a
    Gaussian base from float32 data of a multiple of 4 coordinates, without log-densities or weights in memory. Other
    blocks are two products with what lies between them compiled (torch.compile, a few seconds at first; without a
    compiler, step by step). FlexAttention is not used: it has no distance of the nearest point to measure from, without
    which heavy tails lose digits. TF32 must be off, as it is by default.

    Args:
        field: any field with a density.
        data: (N, *shape), floating, on any device.
        weights: (N,) probabilities of the data points, up to a factor; equal unless given.

    Attributes:
        field, data: as given.
        device: of the data.

    Raises:
        UserError: data is empty, not floating or not finite, or weights are not as many, negative, or all 0; later,
            the shape of x is not that of the data, or no data point has a density at x (a mean over none: log_prob is
            -inf there).
        Unavailable: the field has no density.
    """

    def __init__(self, field: Field, data: Tensor, weights: Tensor | None = None):
        if not (isinstance(data, Tensor) and data.is_floating_point()):
            kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise UserError(f"data is {kind}, expected a floating tensor (N, *shape); convert it first")
        if data.dim() < 2 or data.numel() == 0:
            raise UserError(f"data has shape {tuple(data.shape)}, expected (N, *shape) with at least one point")
        for start, part in zip(range(0, len(data), 1024), data.split(1024), strict=False):
            finite = part.isfinite().flatten(1).all(1)
            if not bool(finite.all()):
                raise UserError(f"data[{start + int((~finite).nonzero()[0])}] is not finite; remove or repair it")
        self.field, self.data = field, data
        self._cloud = Cloud(data.detach().flatten(1), None if weights is None else _log_weights(weights, data))
        self._log_mass = math.log(len(data)) if weights is None else 0.0
        one = data[:1].to(torch.promote_types(data.dtype, torch.float32))
        field.log_prob(one, field.horizon, one)  # fields without a density, or of other dimensions, refuse here
        try:
            field.isotropic(one, field.horizon)
            self._isotropic = True
        except Unavailable:
            self._isotropic = False

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def data_std(self) -> float:
        """Standard deviation per coordinate of the data, which samplers ask for."""
        return math.sqrt(float(self._cloud.spread.mean()) / self._cloud.points.shape[1])

    @property
    def data_mean(self) -> Tensor:
        """Mean of the data, of the shape of one point, which samplers ask for."""
        cloud = self._cloud
        if cloud.log_weights is None:
            return cloud.mean.view(self.data.shape[1:])
        return (cloud.log_weights.softmax(0) @ cloud.points.to(cloud.log_weights)).view(self.data.shape[1:])

    def log_prob(self, x: Tensor, t: Tensor | float) -> Tensor:
        """log p_t(x) (B,), in nats; -inf where no data point has a density."""

        def at(x: Tensor, t: Tensor, dtype: torch.dtype) -> Sums:
            if self._isotropic:
                return weighted(self._distances(x, t, lambda block, w, kernel, squared: w[:, :0])[1])
            return weighted(self._paired(x, t, dtype, None))

        totals = torch.cat([x.new_empty(0), *(at(*rows).log_total.flatten() for _, *rows in self._rows(x, t))])
        return (totals - self._log_mass).to(x.dtype)

    def denoised(self, x: Tensor, t: Tensor | float) -> Tensor:
        """E[x0 | x] (B, *shape)."""
        return self._mean(x, t, self._denoised)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        """f_t(x) (B, *shape)."""

        def affine(x: Tensor, t: Tensor, dtype: torch.dtype) -> Sums:
            sums = self._denoised(x, t, dtype)
            return Sums(sums.log_total, self.field.velocity_from_target(x, t, sums.mean))

        def isotropic(x: Tensor, t: Tensor, dtype: torch.dtype) -> Sums:
            def weigh(y: Tensor, w: Tensor, kernel: Isotropic, squared: Tensor) -> Tensor:
                rate = w * kernel.rate(squared).where(w > 0, 0)
                return torch.cat([rate.sum(1, keepdim=True), rate @ y, w @ y], 1)

            kernel, blocks = self._distances(x, t, weigh)
            log_total, mean = weighted(blocks)
            rate, rate_x0, x0 = mean.split([1, x.shape[1], x.shape[1]], 1)
            return Sums(log_total, rate * x - kernel.alpha * rate_x0 + kernel.alpha_dot * x0)

        if isinstance(self.field, AffineField):
            return self._mean(x, t, affine)
        return self._mean(x, t, isotropic if self._isotropic else self._average(self.field.velocity))

    def target(self, x: Tensor, t: Tensor | float) -> Tensor:
        """The mean (B, *shape) of what a network regresses on, field.target(x, t, x0)."""
        if isinstance(self.field, AffineField):
            return self.denoised(x, t)
        if type(self.field).target is Field.target:
            return self.velocity(x, t)
        return self._mean(x, t, self._average(self.field.target))

    def score(self, x: Tensor, t: Tensor | float) -> Tensor:
        """grad_x log p_t(x) (B, *shape)."""

        def gaussian(x: Tensor, t: Tensor, dtype: torch.dtype) -> Sums:
            log_total, denoised = self._denoised(x, t, dtype)
            schedule = self.field.schedule(x, t)
            noise = conversions.from_denoised(schedule, x, denoised).noise
            return Sums(log_total, conversions.score_from_noise(schedule, noise))

        def isotropic(x: Tensor, t: Tensor, dtype: torch.dtype) -> Sums:
            def weigh(y: Tensor, w: Tensor, kernel: Isotropic, squared: Tensor) -> Tensor:
                slope = w * _derivative(kernel.log_prob, squared).where(w > 0, 0)
                return torch.cat([slope.sum(1, keepdim=True), slope @ y], 1)

            kernel, blocks = self._distances(x, t, weigh)
            log_total, mean = weighted(blocks)
            slope, slope_x0 = mean.split([1, x.shape[1]], 1)
            return Sums(log_total, 2 * (slope * x - kernel.alpha * slope_x0))

        def gradient(x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
            return _derivative(lambda x: self.field.log_prob(x, t, x0), x.detach())

        if isinstance(self.field, AffineField) and isinstance(self.field.base, Gaussian):
            return self._mean(x, t, gaussian)
        return self._mean(x, t, isotropic if self._isotropic else self._average(gradient))

    def _denoised(self, x: Tensor, t: Tensor, dtype: torch.dtype) -> Sums:
        """E[x0 | x] (B, d) of x (B, d) at times (B,), float64 both."""
        if not self._isotropic:
            return self._average(lambda x, t, x0: x0)(x, t, dtype)
        if isinstance(self.field, AffineField) and isinstance(self.field.base, Gaussian | StudentT):
            alpha, sigma = (_one(c) for c in self.field.schedule(x, t)[:2])
            if isinstance(self.field.base, Gaussian):
                return weighted(self._cloud.gaussian(x, alpha, sigma, dtype))
            return weighted(self._cloud.student_t(x, alpha, sigma, self.field.base.dof, dtype))
        return weighted(self._distances(x, t, lambda y, w, kernel, squared: w @ y)[1])

    def _distances(self, x: Tensor, t: Tensor, weigh) -> tuple[Isotropic, Iterator[Block]]:
        """The field as a function of distances, and blocks of its log-densities with what is to be summed of each."""
        kernel = self.field.isotropic(x.view(-1, *self.data.shape[1:]), t)

        def blocks() -> Iterator[Block]:
            for part, y, squared in self._cloud.squared(x, _one(kernel.alpha)):
                logits = self._cloud.weighted(kernel.log_prob(squared), part)
                yield Block(logits, y, lambda w, y=y, squared=squared: weigh(y, w, kernel, squared))

        return kernel, blocks()

    def _average(self, quantity: Quantity) -> Callable[[Tensor, Tensor, torch.dtype], Sums]:
        """The mean of quantity(x, t, x0), pair by pair."""
        return lambda x, t, dtype: weighted(self._paired(x, t, dtype, quantity))

    def _paired(self, x: Tensor, t: Tensor, dtype: torch.dtype, quantity: Quantity | None) -> Iterator[Block]:
        x, t, shape = x.to(dtype), t.to(dtype), self.data.shape[1:]
        for part, y in self._cloud.parts(len(x), dtype, copies=len(x)):
            pairs = _Pairs(
                x[:, None].expand(-1, len(y), -1).reshape(-1, *shape),
                t.repeat_interleave(len(y)),
                y.expand(len(x), -1, -1).reshape(-1, *shape),
            )
            logits = self.field.log_prob(*pairs).view(len(x), len(y))

            def weigh(w: Tensor, pairs: _Pairs = pairs) -> Tensor:
                if quantity is None:
                    return w[:, :0]
                values = quantity(*pairs).view(*w.shape, -1)
                return torch.einsum("bc,bcd->bd", w, values.where(w[:, :, None] > 0, 0))

            yield Block(self._cloud.weighted(logits, part), y, weigh)

    def _rows(self, x: Tensor, t: Tensor | float) -> Iterator[tuple[int, Tensor, Tensor, torch.dtype]]:
        """Some rows at a time: the first of them, points (b, d) and times (b,) in float64, the dtype of products."""
        if x.shape[1:] != self.data.shape[1:] or not x.is_floating_point():
            expected = ", ".join(["B", *map(str, self.data.shape[1:])])
            raise UserError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected floating ({expected}) like the data")
        dtype, at_a_time = self._dtype(x), ROWS
        t = expand_time(t, torch.empty(len(x), dtype=wide(x.device), device=x.device)).expand(len(x))
        if not self._isotropic:
            at_a_time = max(1, min(ROWS, COORDINATES // self._cloud.points.shape[1]))
        for start in range(0, len(x), at_a_time):
            rows = slice(start, start + at_a_time)
            yield start, x[rows].flatten(1).to(t.dtype), t[rows], dtype

    def _dtype(self, x: Tensor) -> torch.dtype:
        if self._isotropic and self.data[0].numel() <= FEW:
            return wide(x.device)
        return torch.promote_types(torch.promote_types(x.dtype, self.data.dtype), torch.float32)

    def _mean(self, x: Tensor, t: Tensor | float, at: Callable[[Tensor, Tensor, torch.dtype], Sums]) -> Tensor:
        means = [x.new_empty(0, self._cloud.points.shape[1])]
        for start, *rows in self._rows(x, t):
            log_total, mean = at(*rows)
            if not bool(log_total.isfinite().all()):
                row = int((~log_total.isfinite()).nonzero()[0, 0])
                raise UserError(
                    f"log-density of x[{start + row}] is {float(log_total[row]):g} at t={float(rows[1][row]):.4g}, "
                    "expected a finite one; no mean over the data is defined there, move x to where the field has mass"
                )
            means.append(mean.to(x.dtype))
        return torch.cat(means).view(x.shape)


def _log_weights(weights: Tensor, data: Tensor) -> Tensor:
    weights = torch.as_tensor(weights, dtype=wide(data.device), device=data.device)
    if weights.shape != data.shape[:1]:
        raise UserError(f"weights have shape {tuple(weights.shape)}, expected ({len(data)},), one for each data point")
    if not (bool((weights >= 0).all()) and 0 < float(weights.sum()) < math.inf):
        raise UserError(
            f"weights go from {float(weights.min()):g} to {float(weights.max()):g}, expected finite numbers, none "
            "negative and not all 0"
        )
    return weights.log() - weights.sum().log()


def _one(coefficient: Tensor) -> Tensor:
    """A coefficient (B, 1) as (1, 1) where all rows agree, which spares passes over all pairs."""
    return coefficient[:1] if bool((coefficient == coefficient[:1]).all()) else coefficient


def _derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of each output in its own input; with a graph where `at` has one."""
    graph = at.requires_grad
    with torch.enable_grad():
        at = at if graph else at.detach().requires_grad_()
        value = function(at).sum()
        if not value.requires_grad:  # a piecewise constant density
            return torch.zeros_like(at)
        return torch.autograd.grad(value, at, create_graph=graph, materialize_grads=True)[0]
