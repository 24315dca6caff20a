"""The density at the horizon: that of the prior, and by how much it is not."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.divergence import Flow, Slope
from diffusion.fields import AffineField, Field, Unavailable
from diffusion.samplers.arc import times_of_noise

EVEN, OTHER = (1.0, -1.0, 2.0, -2.0), (1.0, 2.0, 3.0)  # nodes, in units of w_T; without the last 2 or 1, the error


class End(NamedTuple):
    log_prob: Tensor  # (B, P)
    error: Tensor  # (B,)


class _Node(NamedTuple):
    """Where D(y, w) is known: at the time `t` and x = sigma y."""

    t: float
    sigma: float
    w: float


def log_end(flow: Flow, x: Tensor, data: Tensor) -> End:
    """log p_T at `x` (B, *shape), from the prior and from what the velocity tells of the data near the horizon.

    In w = alpha / sigma and y = x / sigma a field line x = alpha x0 + sigma z is y = w x0 + z, and where w = 0 the law
    of y is that of z, the prior. The change of variables that holds along the model's lines up to the horizon goes on,

        dy / dw = D(y, w) = E[x0|y],    log p_T(x) = log prior(sigma_T y_0) - integral from 0 to w_T of div_y D dw,

    with y_0 the place at w = 0. There D is the mean of the data, and its divergence 0, whatever y. From w_T on the
    model knows D, and if the prior is even it knows it from -w_T down, too: D(y, -w) = D(-y, w). Between, D is the
    polynomial in w through four such values, at w_T and 2 w_T, or through three if the prior is not even. The integrals
    are Simpson's; the error is the difference from polynomials of fewer values.

    For fields whose velocity does not tell D, the prior stands for p_T, and the error is what `data` would make of the
    difference.
    """
    field = flow.model.field
    log_prior = field.prior_log_prob(x)
    w = _signal(field, x, data)
    if w is None:
        return End(log_prior[:, None], _mismatch(field, x, data, log_prior))
    if w < torch.finfo(x.dtype).eps:
        return End(log_prior[:, None], torch.zeros_like(log_prior))
    even = _near(field.prior_log_prob(-x), log_prior)
    nodes, fewer = _nodes(field, w, EVEN if even else OTHER), 2 if even else 1
    ws, index = [node.w for node in nodes], torch.arange(len(x), device=x.device)

    def denoised(y: Tensor, node: _Node, copies: int = 1) -> Tensor:
        x, times = node.sigma * y, torch.full((len(index),), node.t, dtype=y.dtype, device=y.device)
        return field.endpoint(x, node.t, flow.velocity(x, times, index, copies))

    def slope(y: Tensor, node: _Node) -> Slope:
        return flow.slope(lambda y, copies: denoised(y, node, copies), y, index)

    y = x / nodes[0].sigma
    first = slope(y, nodes[0])
    here = [first.velocity, *(denoised(y, node) for node in nodes[1:])]
    halfway = y - 0.5 * w * _combine(here, _lagrange(ws, 0.75 * w))
    slopes = [slope(halfway, node) for node in nodes]

    def log_prob(number: int) -> Tensor:
        last, middle = (_combine([s.velocity for s in slopes], _lagrange(ws[:number], at)) for at in (0.0, 0.5 * w))
        spread = _combine([s.divergence for s in slopes], _lagrange(ws[:number], 0.5 * w, zero=True))
        end = y - w / 6 * (first.velocity + 4 * middle + last)
        return field.prior_log_prob(nodes[0].sigma * end)[:, None] - w / 6 * (first.divergence + 4 * spread)

    best, less = log_prob(len(nodes)), log_prob(len(nodes) - fewer)
    return End(best, (best - less).mean(1).abs())


def _combine(values: list[Tensor], weights: list[float]) -> Tensor:
    """Of the first values, as many as there are weights."""
    return sum(weight * value for weight, value in zip(weights, values, strict=False))


def _lagrange(nodes: list[float], at: float, zero: bool = False) -> list[float]:
    """Of values at `nodes`, so that their sum is the polynomial through them, `at` a place; with `zero`, 0 at 0."""
    weights = (math.prod((at - b) / (a - b) for b in nodes if b != a) for a in nodes)
    return [weight * at / a if zero else weight for weight, a in zip(weights, nodes, strict=True)]


def _signal(field: Field, x: Tensor, data: Tensor) -> float | None:
    """alpha / sigma at the horizon, for fields with an endpoint that is E[x0|x] near it; None for others."""
    T = field.horizon
    if isinstance(field, AffineField):
        return float((-field.log_noise_to_signal(torch.tensor([T], dtype=torch.float64))).exp())
    x0 = data.roll(1, 0)
    try:
        log_prob = field.log_prob(x, T, x0)
        if _near(log_prob, field.prior_log_prob(x)):
            return 0.0
        told = all(_near(field.endpoint(x, T / k, field.velocity(x, T / k, x0)) - x0 + x, x) for k in OTHER)
    except Unavailable:
        return None
    return 1 / T if told and _near(log_prob, field.prior_log_prob(x - x0)) else None


def _nodes(field: Field, w: float, multiples: Sequence[float]) -> list[_Node]:
    """At these multiples of `w`, closer if t_min is. Not affine: alpha = 1 and sigma = t."""
    multiples = torch.tensor(multiples, dtype=torch.float64)
    signs, beyond = multiples.sign(), multiples.abs() - 1
    first, farthest = torch.tensor([field.t_min], dtype=torch.float64), float(beyond.max())
    most = float((-field.log_noise_to_signal(first)).exp()) if isinstance(field, AffineField) else 1 / field.t_min
    ws = w * (1 + beyond * min(1.0, (most / w - 1) / farthest))
    if isinstance(field, AffineField):
        times = times_of_noise(field, 1 / ws)
        alpha, sigma = field.alpha(times), field.sigma(times) * signs
    else:
        times, alpha, sigma = 1 / ws, torch.ones_like(ws), signs / ws
    return [_Node(*row) for row in torch.stack([times, sigma, alpha / sigma], 1).tolist()]


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
