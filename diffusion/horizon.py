"""The density at the horizon: that of the prior, and by how much it is not."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.divergence import Flow
from diffusion.fields import AffineField, Field, Unavailable

RELIABLE = 0.5  # terms of the expansion of p_T about the prior up to which it is used


class End(NamedTuple):
    log_prob: Tensor  # (B,)
    error: Tensor  # (B,)


def log_end(flow: Flow, x: Tensor, data: Tensor) -> End:
    """log p_T at `x` (B, *shape), from the prior and from what the velocity tells of the data at the horizon.

    Where p_T(x|x0) = q(x - alpha x0) with q the prior, s and H the score and the Hessian of log q, and m and C the mean
    and the covariance of the data, to second order in alpha x0

        log p_T(x) - log q(x) = -alpha s.m + alpha^2 (s'C s + tr(H C) + m'H m) / 2,    D(x) = E[x0|x] = m - alpha C s,

    and so, as the derivative of D is -alpha C H,

        log p_T(x) - log q(x) = -alpha s.(m + D(x)) / 2 - alpha div D(x) / 2 + alpha^2 m'H m / 2    with m = D(0).

    The error is o^3 / 6, with o^k the largest of the terms of order k. Where o is not small, and for fields whose
    velocity does not tell D, the prior stands for p_T, and the error is what `data` would make of the difference.
    """
    model, field, T = flow.model, flow.model.field, flow.model.field.horizon
    log_prior = field.prior_log_prob(x)
    alpha = _alpha(field, x, data)
    if alpha is None:
        return End(log_prior, _mismatch(field, x, data, log_prior))
    if abs(alpha) < torch.finfo(x.dtype).eps:
        return End(log_prior, torch.zeros_like(log_prior))
    index = torch.arange(len(x), device=x.device)
    times = torch.full((len(x),), T, dtype=x.dtype, device=x.device)

    def denoised(x: Tensor, copies: int = 1) -> Tensor:
        return model.field.endpoint(x, T, flow.velocity(x, times, index, copies))

    at_x, mean = flow.slope(denoised, x, index), denoised(torch.zeros_like(x))
    with torch.enable_grad():
        place = x.detach().requires_grad_()
        score = _gradient(field.prior_log_prob(place), place)
        bent = _gradient((score * mean).flatten(1).sum(1), place).detach()  # H m
    first, spread, curve = (
        (a.detach() * b).flatten(1).sum(1)
        for a, b in ((-alpha * score, mean), (-alpha * score, at_x.velocity - mean), (alpha**2 * bent, mean))
    )
    second = [spread, curve, -alpha * at_x.divergence.mean(1)]
    order = torch.stack([first.abs(), *(term.abs().sqrt() for term in second)]).amax(0)
    small = order < RELIABLE
    log_prob, error = log_prior + (first + sum(second) / 2).where(small, 0), order**3 / 6
    return End(log_prob, error if bool(small.all()) else error.where(small, _mismatch(field, x, data, log_prior)))


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(at)
    return torch.autograd.grad(value.sum(), at, create_graph=True, materialize_grads=True)[0]


def _alpha(field: Field, x: Tensor, data: Tensor) -> float | None:
    """The alpha of p_T(x|x0) = q(x - alpha x0) for fields whose endpoint is E[x0|x] at T; None for others."""
    if isinstance(field, AffineField):
        return float(field.alpha(torch.tensor(field.horizon, dtype=torch.float64)))
    T, x0 = field.horizon, data.roll(1, 0)
    try:
        log_prob, end = field.log_prob(x, T, x0), field.endpoint(x, T, field.velocity(x, T, x0))
    except Unavailable:
        return None
    if _near(log_prob, field.prior_log_prob(x)):
        return 0.0
    return 1.0 if _near(log_prob, field.prior_log_prob(x - x0)) and _near(end - x0 + x, x) else None


def _near(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= 1e-9 * (1 + other.abs())).all())


def _mismatch(field: Field, x: Tensor, data: Tensor, log_prior: Tensor) -> Tensor:
    """How log p_T differs from the prior (B,) if up to 64 of `data` are what it is the law of; 0 without a density."""
    try:
        ratios = torch.stack([field.log_prob(x, field.horizon, one.expand_as(x)) for one in data[:64]]) - log_prior
    except Unavailable:
        return torch.zeros_like(log_prior)
    scatter = ratios.std(0) / math.sqrt(len(ratios)) if len(ratios) > 1 else torch.zeros_like(log_prior)
    return ((ratios.logsumexp(0) - math.log(len(ratios))).abs() + scatter).nan_to_num(nan=0.0)
