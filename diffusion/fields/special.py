"""Laws of a radius and their inverses, accurate in both tails.

Hazards are -log(1 - psi): inverses in terms of them resolve both tails of psi in every dtype.
"""

import math
from collections.abc import Callable

import numpy as np
import scipy.special
import torch
from torch import Tensor


def inverse_tanh(hazard: Tensor) -> Tensor:
    """The s at which 1 - tanh(s) = exp(-hazard)."""
    return 0.5 * torch.log1p(2 * torch.expm1(hazard))


class _Scipy(torch.autograd.Function):
    """A function whose value is scipy's, on the CPU, and whose derivative, exp(log_slope(s)), is made of torch's."""

    @staticmethod
    def forward(s: Tensor, value: Callable[[np.ndarray], np.ndarray], log_slope: Callable[[Tensor], Tensor]) -> Tensor:
        return _by_scipy(value, s)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, _, ctx.log_slope = inputs
        ctx.save_for_backward(s)

    @staticmethod
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        return grad * ctx.log_slope(s).exp(), None, None

    @staticmethod
    def vmap(info, in_dims, s, value, log_slope):
        return _Scipy.apply(s, value, log_slope), in_dims[0]


def _by_scipy(function: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """`function` of `x`, in double precision on the CPU, in the dtype and on the device of `x`."""
    return torch.from_numpy(np.asarray(function(x.detach().double().cpu().numpy()))).to(x)


def gaussian_radius(s: Tensor, dim: int) -> Tensor:
    """P(|z| < s) for z ~ N(0, I) in `dim` dimensions: the regularised gamma function P(dim / 2, s^2 / 2).

    By scipy: torch.special.gammainc is wrong from the ninth digit on.
    """
    constant = (dim / 2 - 1) * math.log(2) + math.lgamma(dim / 2)

    def log_slope(s: Tensor) -> Tensor:
        return torch.special.xlogy(dim - 1, s) - s.square() / 2 - constant

    return _Scipy.apply(s, lambda s: scipy.special.gammainc(dim / 2, s**2 / 2), log_slope)


def inverse_gaussian_radius(hazard: Tensor, dim: int) -> Tensor:
    """The s at which P(|z| > s) = exp(-hazard), by scipy."""

    def inverse(h: np.ndarray) -> np.ndarray:
        inner = scipy.special.gammaincinv(dim / 2, -np.expm1(-h))
        outer = scipy.special.gammainccinv(dim / 2, np.exp(-h))
        return np.sqrt(2 * np.where(h < math.log(2), inner, outer))

    return _by_scipy(inverse, hazard)


def cauchy_radius(s: Tensor, dim: int) -> Tensor:
    """P(|z| < s) for z multivariate Cauchy in `dim` dimensions, by scipy.

    It is the regularised beta function I_w(dim / 2, 1 / 2) with w = s^2 / (s^2 + 1).
    """
    constant = math.log(2) - scipy.special.betaln(dim / 2, 0.5)

    def value(s: np.ndarray) -> np.ndarray:
        square, inner = s**2, s**2 < dim / 4  # where psi is small, and where 1 - psi may be
        near, far = np.where(inner, square, 0), np.where(inner, math.inf, square)
        below = scipy.special.betainc(dim / 2, 0.5, near / (1 + near))
        return np.where(inner, below, 1 - scipy.special.betainc(0.5, dim / 2, 1 / (1 + far)))

    def log_slope(s: Tensor) -> Tensor:
        return constant + torch.special.xlogy(dim - 1, s) - 0.5 * (dim + 1) * torch.log1p(s.square())

    return _Scipy.apply(s, value, log_slope)


def inverse_cauchy_radius(hazard: Tensor, dim: int) -> Tensor:
    """The s at which P(|z| > s) = exp(-hazard), by scipy."""

    def inverse(h: np.ndarray) -> np.ndarray:
        below, above, lower = -np.expm1(-h), np.exp(-h), h < math.log(2)
        # w and 1 - w, each of them for whichever of the tails of psi is the smaller.
        w = scipy.special.betaincinv(dim / 2, 0.5, below)
        w = np.where(lower, w, scipy.special.betainccinv(dim / 2, 0.5, above))
        rest = scipy.special.betaincinv(0.5, dim / 2, above)
        rest = np.where(lower, scipy.special.betainccinv(0.5, dim / 2, below), rest)
        with np.errstate(divide="ignore"):
            return np.sqrt(np.where(w < 0.5, w / (1 - w), (1 - rest) / rest))

    return _by_scipy(inverse, hazard)
