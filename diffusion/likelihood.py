"""Log-likelihoods by the instantaneous change of variables.

Along a field line dx/dt = f_t(x) the density of the model obeys d log p_t(x_t) / dt = -div f_t(x_t), so that

    log p_t(x) = log p_T(x_T) + integral from t to T of div f_s(x_s) ds

(Chen et al. 2018, arXiv 1806.07366, theorem 1; Song et al. 2021, arXiv 2011.13456, eq. 39). Both are integrated
together, forward in time. Two ends need care. Below t_min the model is not defined: the velocity is extrapolated from
t_min, 2 t_min and 3 t_min. And p_T is not quite the prior: how it differs is in the velocity (see diffusion.horizon).

Letters: B points of d coordinates, P probes; everything is float64 (float32 on devices without it), in nats.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchdiffeq._impl.dopri8 import _DOPRI8_TABLEAU as TABLEAU

from diffusion.conditions import of_points
from diffusion.divergence import Flow, Slope
from diffusion.errors import UserError
from diffusion.fields import Field
from diffusion.horizon import log_end
from diffusion.samplers.base import Model, state_dtype

EXACT_DIVERGENCE = 128  # coordinates up to which the divergence is exact
ORDER, SAFETY, GROWTH, MEMORY = 8, 0.9, 2.0, 0.02  # of the control of steps (Hairer et al. 1993, sec. II.4 and IV.2)


@dataclass(frozen=True)
class Likelihood:
    """Log-densities of points, and how far they can be trusted.

    Attributes:
        nats: (B,) log p_t(x).
        error: (B,) estimate of its error: of integration, of a stochastic divergence (one standard error), of the
            extrapolation below t_min, and of taking p_T for the prior. Errors of the model are no part of it.
        evaluations: (B,) of the velocity with its divergence.
        dim: d.
    """

    nats: Tensor
    error: Tensor
    evaluations: Tensor
    dim: int

    def bits_per_dim(self, levels: int = 256) -> Tensor:
        """Bits per coordinate (B,) of images in [-1, 1] of so many levels, if `nats` is at dequantised images.

        In the mean over the noise it bounds -log2 of the probability of the image, over d, from above (Theis et al.
        2016, arXiv 1511.01844, sec. 3.1).
        """
        return -self.nats / (self.dim * math.log(2)) - math.log2(2 / (levels - 1))


def dequantise(x: Tensor, generator: torch.Generator, levels: int = 256) -> Tensor:
    """Images (B, *shape) in [-1, 1] of so many even levels with uniform noise as wide as a level, centred on it."""
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device) - 0.5
    return x + noise * (2 / (levels - 1))


@torch.no_grad()
def likelihood(
    model: Model,
    x: Tensor,
    t: float = 0.0,
    *,
    tolerance: float = 5e-4,
    exact_dim: int = EXACT_DIVERGENCE,
    probes: int = 4,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    max_evaluations: int = 5000,
    **conditions: Any,
) -> Likelihood:
    """log p_t(x) of the law that `model` generates.

    Args:
        model: any object with `field` and `velocity`, continuous in x and differentiable by reverse mode. (A velocity
            with jumps, as of few points under a law with jumps, has a divergence that no derivative shows; with kinks,
            as of few points under Laplace noise, one that jumps, which steps hardly see: errors were up to a hundred
            times what is estimated, and a hundredth of the tolerance is right there.)
        x: (B, *shape).
        t: time of the law. At 0 it is that of the data, which must then have a density: where t_min resolves the
            data, the extrapolation from there is good. At field.t_min it is the law of samples before their last step.
        tolerance: of each step, in nats; beyond 128 coordinates d / 128 times as much.
        exact_dim: coordinates up to which the divergence is exact, by d derivatives. Beyond, it is Hutchinson's
            estimate with `probes` vectors of random signs for each point, the same all along its line
            (Grathwohl et al. 2019, arXiv 1810.01367).
        probes: 1 or more; their scatter is part of the error, which 1 does not show.
        generator: of the probes; seed 0 unless given.
        batch_size: points at a time.
        max_evaluations: for a point.
        conditions: passed to ``model.velocity``, such as ``label``; tensors (B, ...) go with their points.

    Raises:
        UserError: x or the options are not usable, the velocity is not finite or not differentiable, or a point does
            not arrive within max_evaluations.
    """
    horizon = model.field.horizon
    if x.dim() < 2 or x.numel() == 0 or not x.is_floating_point() or not bool(x.isfinite().all()):
        raise UserError(f"x is {x.dtype} of shape {tuple(x.shape)}, expected finite floating points (B, *shape)")
    if not 0 <= t < horizon:
        raise UserError(f"t is {t}, expected a time from 0 to below the horizon, {horizon:g}")
    if not tolerance > 0 or probes < 1 or batch_size < 1:
        got = f"tolerance is {tolerance}, probes {probes} and batch_size {batch_size}"
        raise UserError(f"{got}; expected positive numbers")
    x, dim = x.to(state_dtype(x.device)), x[0].numel()
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    tolerance *= max(1.0, dim / EXACT_DIVERGENCE)
    done = []
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        some = of_points(conditions, torch.arange(len(x))[part], len(x))
        if exact := dim <= exact_dim:
            directions = torch.eye(dim, dtype=x.dtype, device=x.device).unsqueeze(1).expand(-1, len(x[part]), -1)
        else:
            signs = torch.randint(2, (len(x[part]), probes, dim), generator=generator, device=generator.device)
            directions = (2 * signs - 1).to(x).transpose(0, 1)
        flow = Flow(model, directions, exact, some)
        done.append(_likelihood(flow, x[part], t, tolerance, max_evaluations))
    return Likelihood(*(torch.cat(parts) for parts in zip(*done, strict=True)), dim)


def _likelihood(flow: Flow, x: Tensor, t: float, tolerance: float, max_evaluations: int) -> tuple[Tensor, ...]:
    """Log-densities, errors and evaluations, (B,) each."""
    start, gain, error = _before(flow, x, t, torch.arange(len(x), device=x.device))
    state = _integrate(flow, start, max(t, flow.model.field.t_min), tolerance, max_evaluations)
    end = log_end(flow, state.x, x)
    nats = end.log_prob + gain + state.gain
    if not flow.exact and nats.shape[1] > 1:
        error = error + nats.std(1) / math.sqrt(nats.shape[1])
    return nats.mean(1), error + state.error + end.error, flow.evaluations


def _before(flow: Flow, x: Tensor, t: float, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the time `t` to t_min, in one step: the places, the integrated divergence (B, P), and its error (B,).

    The velocity of a smooth density is smooth in t down to 0, in every family, while the model knows it from t_min
    on. So the midpoint rule is applied to the parabola in time through its values at 1, 2 and 3 t_min; the error is
    the difference from the straight line through the first two.
    """
    t_min = flow.model.field.t_min
    if t >= t_min:
        return x, torch.zeros(len(x), 1, dtype=x.dtype, device=x.device), torch.zeros_like(x.flatten(1)[:, 0])

    def at(x: Tensor, node: int) -> Slope:
        return flow(x, torch.full_like(x.flatten(1)[:, 0], node * t_min), index)

    a = t / t_min
    first, second = (flow.velocity(x, torch.full_like(x.flatten(1)[:, 0], k * t_min), index) for k in (1, 2))
    middle = x + 0.5 * (t_min - t) * ((2 - a) * first + (a - 1) * second)
    slopes = [at(middle, node) for node in (1, 2, 3)]
    line, parabola = (_weights(a, nodes) for nodes in (2, 3))
    gains = [t_min * sum(w * s.divergence for w, s in zip(ws, slopes, strict=False)) for ws in (line, parabola)]
    moved = x + t_min * sum(w * s.velocity for w, s in zip(parabola, slopes, strict=True))
    return moved, gains[1], (gains[1] - gains[0]).mean(1).abs()


def _weights(a: float, nodes: int) -> list[float]:
    """Of values at 1, 2, .. `nodes`, so that their sum is the integral from `a` to 1 of the polynomial through them."""
    powers = torch.arange(nodes, dtype=torch.float64)
    matrix = torch.arange(1, nodes + 1, dtype=torch.float64) ** powers[:, None]
    return torch.linalg.solve(matrix, (1 - a ** (powers + 1)) / (powers + 1)).tolist()


class _State(NamedTuple):
    x: Tensor  # (B, *shape) at the horizon
    gain: Tensor  # (B, P) integral of the divergence
    error: Tensor  # (B,)


def _integrate(flow: Flow, x: Tensor, t: float, tolerance: float, max_evaluations: int) -> _State:
    """From the time `t` to the horizon, in the field's clock u = time^(1/rho): Dormand-Prince 8(7), torchdiffeq's.

    Every point has its own steps. The error of a step is that of its log-density, or d times that of the point in
    units of how far it has come and a hundredth of its size: what a radial error of that size changes.
    """
    field, shape, dim = flow.model.field, x.shape, x[0].numel()
    rho, start, probes = field.rho, x.flatten(1), 1 if flow.exact else len(flow.directions)
    unit = 0.01 * _size(start) + 1e-6 * _prior_size(field, shape).to(x)
    y = torch.cat([start, x.new_zeros(len(x), probes)], 1)
    first, last = t ** (1 / rho), field.horizon ** (1 / rho)
    u = torch.full_like(y[:, 0], first)
    h, error, before = torch.full_like(u, (last - first) / 10), torch.zeros_like(u), torch.ones_like(u)
    nodes, rows = TABLEAU.alpha.tolist(), [row.to(y) for row in TABLEAU.beta]
    weights, differences = TABLEAU.c_sol.to(y), TABLEAU.c_error.to(y)

    def slope(u: Tensor, y: Tensor, index: Tensor) -> Tensor:
        time = u.pow(rho).clamp(field.t_min, field.horizon)
        velocity, divergence = flow(y[:, :dim].view(-1, *shape[1:]), time, index)
        return torch.cat([velocity.flatten(1), divergence], 1) * (rho * u.pow(rho - 1))[:, None]

    index = torch.arange(len(x), device=x.device)
    known = slope(u, y, index)
    _check(known, u, index, rho)
    while len(index):
        step = torch.minimum(h[index], last - u[index])
        slopes = known[index][None]
        for node, row in zip(nodes[:-1], rows[:-1], strict=True):
            place = y[index] + step[:, None] * torch.einsum("k,kbi->bi", row, slopes)
            slopes = torch.cat([slopes, slope(u[index] + node * step, place, index)[None]])
        new = y[index] + step[:, None] * torch.einsum("k,kbi->bi", weights[:-1], slopes)
        off = step[:, None] * torch.einsum("k,kbi->bi", differences[:-1], slopes)
        reach = unit[index] + _size(new[:, :dim] - start[index])
        of_place, of_gain = dim * _size(off[:, :dim]) / reach, off[:, dim:].mean(1).abs()
        off, both = torch.maximum(of_place, of_gain), of_gain.square() + of_place.square() / dim
        ratio = (off / tolerance).nan_to_num(nan=math.inf).clamp_min(1e-8)
        fine = (ratio <= 1) & new.isfinite().all(1)
        factor = SAFETY * ratio ** (0.75 * MEMORY - 1 / ORDER) * before[index] ** MEMORY
        h[index] = step * factor.clamp(0.2, GROWTH).where(fine, factor.clamp(0.2, SAFETY))
        done = index[fine]
        y[done], before[done] = new[fine], ratio[fine].clamp_min(1e-4)
        error[done] += both[fine]
        u[done] = torch.where(step[fine] < last - u[done], u[done] + step[fine], last)
        done = done[u[done] < last]
        if len(done):
            known[done] = slope(u[done], y[done], done)
            _check(known[done], u[done], done, rho)
        index = (u < last).nonzero()[:, 0]
        late = index[flow.evaluations[index] > max_evaluations]
        if len(late):
            raise UserError(
                f"the line of point {int(late[0])} is at t={float(u[late[0]]) ** rho:.4g} after {max_evaluations} "
                f"evaluations ({len(late)} such points), expected the horizon, {field.horizon:g}; raise "
                f"tolerance={tolerance:g} nats a step, or max_evaluations"
            )
    return _State(y[:, :dim].view(shape), y[:, dim:], error.sqrt())


def _size(x: Tensor) -> Tensor:
    """Root mean square coordinate (B,) of rows."""
    return x.square().mean(1).sqrt()


def _prior_size(field: Field, shape: torch.Size) -> Tensor:
    """The median size of a coordinate under the prior."""
    draws = field.sample_prior((64, *shape[1:]), torch.Generator().manual_seed(0), dtype=torch.float64)
    return _size(draws.flatten(1)).median()


def _check(slopes: Tensor, u: Tensor, index: Tensor, rho: float) -> None:
    bad = (~slopes.isfinite()).any(1).nonzero()[:, 0]
    if len(bad):
        time = float(u[bad[0]]) ** rho
        raise UserError(
            f"velocity or divergence of point {int(index[bad[0]])} is not finite at t={time:.4g} ({len(bad)} such); "
            "expected finite ones: is the point where the model has mass?"
        )
