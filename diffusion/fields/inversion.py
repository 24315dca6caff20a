"""Labels from places: roots of functions of one variable by bracketing, of many by damped Newton steps."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError

Cdf = Callable[[Tensor, Tensor], Tensor]


class Partials(NamedTuple):
    """psi(r, t) and its two derivatives, elementwise."""

    value: Tensor
    d_r: Tensor
    d_t: Tensor


def partials(cdf: Cdf, r: Tensor, t: Tensor) -> Partials:
    """psi and its derivatives at `r` and `t` of the same shape, in reverse mode, differentiable in turn."""
    value, pull_back = torch.func.vjp(cdf, r, t)
    return Partials(value, *pull_back(torch.ones_like(value)))


class Quantile(torch.autograd.Function):
    """The r at which psi(r, t) = 1 - exp(-h), differentiable any number of times by the implicit function theorem.

    ``Quantile.apply(h, t, cdf, inverse)``: the cumulative hazard h and t > 0 of one shape; `inverse(h, t)` or None.
    """

    @staticmethod
    def forward(h: Tensor, t: Tensor, cdf: Cdf, inverse: Cdf | None) -> Tensor:
        if inverse is not None:
            r = inverse(h, t).to(h)
            if r.shape != h.shape:
                raise UserError(f"inverse(h, t) has shape {tuple(r.shape)} for h and t of shape {tuple(h.shape)}")
            return r
        # 0 is reached nowhere, and next to 1 psi may round to anything: with probability 1e-154 and 4e-16.
        finfo = torch.finfo(h.dtype)
        u = (-torch.expm1(-h)).clamp(finfo.tiny**0.5, 1 - 2 * finfo.eps)
        log_r = rising_root(lambda log_r: cdf(log_r.exp(), t) - u, t.log())
        if bool(log_r.isnan().any()):
            i = int(log_r.isnan().flatten().to(torch.uint8).argmax())
            u, t = float(u.flatten()[i]), float(t.flatten()[i])
            raise UserError(f"psi(r, t={t:g}) has no r at which it is {u:.3g}, expected a CDF, rising in r from 0 to 1")
        return log_r.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, t, ctx.cdf, _ = inputs
        ctx.save_for_backward(h, t, output)
        ctx.save_for_forward(h, t, output)

    @staticmethod
    def backward(ctx, grad):
        h, t, r = ctx.saved_tensors
        psi = partials(ctx.cdf, r, t)
        return grad * (-h).exp() / psi.d_r, -grad * psi.d_t / psi.d_r, None, None

    @staticmethod
    def jvp(ctx, h_dot, t_dot, *_):
        h, t, r = ctx.saved_tensors
        psi = partials(ctx.cdf, r, t)
        return ((-h).exp() * h_dot - psi.d_t * t_dot) / psi.d_r


def rising_root(f: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The x, of the shape of `start`, at which the elementwise, rising `f` crosses 0; NaN where it does not.

    Steps of 1, 2, 4, ... away from `start`, 511 in all, until f changes its sign; then Chandrupatla's method
    (Adv. Eng. Softw. 28, 1997, 145): inverse quadratic interpolation where it is safe, bisection where it is not.
    """
    near, f_near = start, f(start)
    direction = torch.where(f_near < 0, 1.0, -1.0).to(start)
    found = torch.zeros_like(start, dtype=torch.bool)
    far, f_far = near, f_near
    for doubling in range(9):
        far = torch.where(found, far, near + 2.0**doubling * direction)
        f_far = f(far)
        found = f_far * direction >= 0
        if bool(found.all()):
            break
        near, f_near = near.where(found, far), f_near.where(found, f_far)
    return _chandrupatla(f, near, f_near, far, f_far).where(found, torch.nan)


def _chandrupatla(f: Callable[[Tensor], Tensor], b: Tensor, f_b: Tensor, a: Tensor, f_a: Tensor) -> Tensor:
    """The root between `a` and `b`; c is where a or b was before."""
    eps = torch.finfo(a.dtype).eps
    step = torch.full_like(a, 0.5)
    root, done = a, torch.zeros_like(a, dtype=torch.bool)
    for _ in range(200):
        x = torch.lerp(a, b, step)
        f_x = f(x)
        same = (f_x > 0) == (f_a > 0)
        c, f_c = a.where(same, b), f_a.where(same, f_b)
        b, f_b = b.where(same, a), f_b.where(same, f_a)
        a, f_a = x, f_x
        best = a.where(f_a.abs() < f_b.abs(), b)
        root = root.where(done, best)
        least = (eps * best.abs() + eps) / (b - a).abs()  # step as a part of the bracket
        done = done | (least > 0.5) | (f_a == 0)
        if bool(done.all()):
            break
        xi, phi = (a - b) / (c - b), (f_a - f_b) / (f_c - f_b)
        quadratic = f_a / (f_b - f_a) * f_c / (f_b - f_c) + (c - a) / (b - a) * f_a / (f_c - f_a) * f_b / (f_c - f_b)
        safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
        step = torch.minimum(torch.maximum(quadratic.where(safe, 0.5), least), 1 - least)
    return root


def derivative(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """The derivative of `f` at `x` along `direction`, in forward mode, differentiable in turn."""
    with warnings.catch_warnings():  # the first jvp of a process makes torch warn of its own use of torch.jit
        warnings.simplefilter("ignore", FutureWarning)
        return torch.func.jvp(f, (x,), (direction,))[1]


def newton(
    residual: Callable[[Tensor], Tensor], solve: Callable[[Tensor, Tensor], Tensor], z: Tensor, tolerance: Tensor
) -> tuple[Tensor, Tensor]:
    """The roots (B, n) of `residual` by Newton's method from `z`, row by row, and the norm of what is left (B,).

    A step is halved until it lowers the norm of the residual, so that it descends wherever the derivative is regular.
    A row rests when its norm is within `tolerance` (B,) or cannot be lowered any more.

    Args:
        residual: (B, n) of z (B, n).
        solve: the Newton step (B, n) of (z, residual): J^(-1) residual.
    """
    rest = residual(z)
    norm = rest.norm(dim=1)
    active = ~(norm <= tolerance)
    for _ in range(100):
        if not bool(active.any()):
            break
        step, searching = solve(z, rest), active
        for halving in range(30):
            trial = z - 0.5**halving * step
            rest_there = residual(trial)
            norm_there = rest_there.norm(dim=1)
            better = searching & (norm_there < norm)
            z, rest = (torch.where(better[:, None], *pair) for pair in ((trial, z), (rest_there, rest)))
            norm, searching = norm_there.where(better, norm), searching & ~better
            if not bool(searching.any()):
                break
        active = active & ~searching & ~(norm <= tolerance)
    return z, norm
