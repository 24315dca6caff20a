"""Adaptive integration by torchdiffeq."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from diffusion.errors import UserError
from diffusion.samplers.arc import Arc, column, data_std, noise_scales
from diffusion.samplers.base import Model, ODESampler, Velocity, endpoint, finite, whole
from diffusion.samplers.clock import Clock

# All of torchdiffeq's but scipy's, which has options of its own, and explicit_adams, which diverges on these ODEs.
METHODS = sorted(SOLVERS.keys() - {"scipy_solver", "explicit_adams", "fixed_adams"})
LOOSE = 1e-4  # tolerance above which single samples were seen to end in another mode, without a sign


class _Stopped(Exception):
    """The last evaluation that was allowed has been made."""


class _Slope:
    """d(x / radius) / du, with the time going from T to t_min as u goes from 0 to 1."""

    def __init__(self, velocity: Velocity, arc: Arc, clock: Clock, allowed: int):
        self.velocity, self.arc, self.clock, self.left = velocity, arc, clock, allowed
        self.reached: tuple[Tensor, Tensor] | None = None  # u and state where the last step began

    def __call__(self, u: Tensor, state: Tensor) -> Tensor:
        if self.left == 0:
            raise _Stopped
        self.left -= 1
        t = self.clock.times(u)
        at, rate = self.arc.at(t), self.clock.rate(t)
        x = state * column(at.radius, 0, state)
        velocity = finite(self.velocity(x, t[:, 0]), "velocity", t[:, 0])  # what is not would stop the step control
        return (velocity - column(at.drift, 0, x) * x) * column(rate / at.radius, 0, x)

    def callback_step(self, u: Tensor, state: Tensor, step: Tensor) -> None:
        """Called by torchdiffeq at the start of each step."""
        self.reached = (u, state)


@dataclass(frozen=True)
class Adaptive(ODESampler):
    """Any method of torchdiffeq, for x / radius (see diffusion.samplers.arc) in a clock of its own.

    In t itself a field that runs over decades (80 to 0.002) has all its features in the last thousandth: the error
    estimate of the first step sees none of them, and the solver jumps over everything. Here the clock
    log((t + a) / (t + b)) spreads them evenly, between the noise of 0.12 and 1.4 std of the data, and division by the
    radius, at a scale of 5 std, keeps the state bounded, so that tolerances mean the same from the prior to the data.
    The error is controlled in the root mean square over the whole batch: few samples may be further off, and the result
    depends, within the tolerance, on the batch. AdaptiveMultistep controls each sample, with fewer evaluations.

    Args:
        method: of torchdiffeq, such as dopri5, dopri8, bosh3, rk4.
        rtol, atol: tolerances of one step, relative and absolute, of x / radius.
        steps: for torchdiffeq's fixed-step methods.
        max_evaluations: of methods with error control. When these are spent, the field's estimate of the data from
            where the solver is is returned, with a warning.
        std: as for Multistep.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 40
    max_evaluations: int = 1000
    std: float | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}, expected one of torchdiffeq's: {', '.join(METHODS)}")
        if not (math.isfinite(self.rtol + self.atol) and min(self.rtol, self.atol) >= 0 < max(self.rtol, self.atol)):
            raise UserError(f"sampler has rtol={self.rtol} and atol={self.atol}, expected positive numbers")
        if self.std is not None and not self.std > 0:
            raise UserError(f"sampler has std={self.std}, expected a positive number, or null")
        whole(self.steps, "steps", 1)
        whole(self.max_evaluations, "max_evaluations", 4)

    def solve(self, velocity: Velocity, x: Tensor, model: Model) -> Tensor:
        field, std = model.field, self.std or data_std(model)
        noise = noise_scales(field, x)
        clock = Clock.of_noise(field, (0.12 * std, 1.4 * std), noise).to(x)
        arc = Arc(field, 5 * std, noise.to(x))
        slope = _Slope(velocity, arc, clock, self.max_evaluations - 1)
        span = torch.tensor([0, 1], dtype=x.dtype, device=x.device)

        def even_steps(slope, state, u):
            return torch.linspace(0, 1, self.steps + 1, dtype=u.dtype, device=u.device)

        kind, options = SOLVERS[self.method], None
        if issubclass(kind, FixedGridODESolver):
            options, slope.left = {"grid_constructor": even_steps}, math.inf
        elif issubclass(kind, RKAdaptiveStepsizeODESolver):
            options = {"step_t": span[1:]}  # the last step ends there; otherwise it goes beyond
        if slope.left < math.inf and max(self.rtol, self.atol) > LOOSE:
            warnings.warn(
                f"rtol={self.rtol:g} and atol={self.atol:g}: above {LOOSE:g} steps may pass over where paths part, so "
                "that samples end elsewhere; take smaller ones, or AdaptiveMultistep, which controls each sample",
                stacklevel=4,
            )
        state = x / column(arc.at(clock.times(span[0])).radius, 0, x)
        try:
            state = odeint(slope, state, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)[-1]
            u = span[1]
        except (_Stopped, AssertionError) as stopped:
            if slope.reached is None:
                raise
            u, state = slope.reached
            spent = self.max_evaluations - 1 - slope.left
            reason = "all are spent" if isinstance(stopped, _Stopped) else f"the steps became too small, {stopped}"
            warnings.warn(
                f"{self.method} stopped at t={float(clock.times(u)[0]):.4g} after {spent} of {self.max_evaluations} "
                f"evaluations: {reason}; the result is the field's estimate from there. Raise max_evaluations, rtol or "
                "atol",
                stacklevel=4,
            )
        t = clock.times(u)
        return endpoint(velocity, state * column(arc.at(t).radius, 0, x), field, t[:, 0].expand(len(x)))
