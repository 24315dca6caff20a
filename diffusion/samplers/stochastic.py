"""Samplers of the SDEs that share a field's marginals, for any noise level g(t): see diffusion.samplers.frames."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField, Field
from diffusion.samplers.base import Model, Randomness, Sampler, started, state_dtype, whole
from diffusion.samplers.frames import AffineFrame, Frame, Noise, PlainFrame
from diffusion.samplers.grids import Grid, PowerGrid, a_grid


@dataclass(frozen=True)
class Draws:
    """Random numbers for the samples of a batch, from one generator or from one for each of them."""

    generator: Randomness

    def __call__(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        """draw(size, generator=...), for points `like` (B, *shape).

        Raises:
            UserError: there are not as many generators as samples.
        """
        if self.generator is None or isinstance(self.generator, torch.Generator):
            device = like.device if self.generator is None else self.generator.device
            return draw(like.shape, generator=self.generator, dtype=state_dtype(device), device=device).to(like)
        if len(self.generator) != len(like):
            raise UserError(f"there are {len(self.generator)} generators, expected one for each of {len(like)} samples")
        one = (1, *like.shape[1:])
        dtype = like.dtype
        return torch.cat([draw(one, generator=g, dtype=dtype, device=g.device) for g in self.generator]).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers."""
        return self(torch.randn, like)


def own_noise(frame: Frame, x: Tensor, t: Tensor, renewal: float, draws: Draws) -> Tensor:
    """What makes noise at `t` of the share exp(-renewal) of it, for an affine field whose base is stable."""
    field, a = frame.model.field, frame.stability
    return float(field.sigma(t)) * (-math.expm1(-a * renewal)) ** (1 / a) * draws(field.base.draw, x)


@dataclass(frozen=True)
class RenewalGrid(Grid):
    """PowerGrid with rho of at least `rho`.

    Near the data noise is renewed in a time of the order of t: of steps even in t the last would renew all of it many
    times over.
    """

    rho: float = 3.0

    def __post_init__(self):
        PowerGrid(self.rho)  # raises if it is no positive number

    def __call__(self, field: Field, points: int) -> Tensor:
        return PowerGrid(max(self.rho, field.rho))(field, points)


@dataclass(frozen=True)
class StochasticSampler(Sampler):
    """The loop of the stochastic samplers. They end with the field's endpoint, as the samplers of the ODE do.

    Args:
        steps: number of times from T to t_min; there are steps - 1 steps of the method.
        grid: rule that lays the times.
    """

    steps: int = 50
    grid: Grid = field(default_factory=RenewalGrid, kw_only=True)
    order = 0  # weak order of convergence: of means of smooth functions

    def __post_init__(self):
        whole(self.steps, "steps", 2)
        a_grid(self.grid)

    @abstractmethod
    def integrate(self, frame: Frame, x: Tensor, times: Tensor, draws: Draws) -> Tensor:
        """The state at the last of `times` from the state `x` at the first."""

    @torch.no_grad()
    def __call__(self, model: Model, x_T: Tensor, generator: Randomness = None, **conditions: Any) -> Tensor:
        x = started(x_T)
        frame = (AffineFrame if isinstance(model.field, AffineField) else PlainFrame)(model, x, conditions)
        x = self.integrate(frame, x, self.grid(model.field, self.steps), Draws(generator))
        t_min = torch.tensor(model.field.t_min, dtype=x.dtype, device=x.device)
        return model.field.endpoint(x, t_min, frame.velocity(x, t_min)).to(x_T.dtype)


@dataclass(frozen=True)
class SDESampler(StochasticSampler):
    """A sampler of the SDE with noise level g.

    Args:
        noise: a number, the strength, in units of the field's own rate (frames.AffineFrame, frames.PlainFrame), in
            which 1 is the time-reversed diffusion for variance_exploding and 0 is the ODE; or g(t), a function of a
            tensor of times.
    """

    noise: Noise = 1.0

    def __post_init__(self):
        super().__post_init__()
        number = isinstance(self.noise, int | float)
        if not callable(self.noise) and not (number and 0 <= self.noise < math.inf):
            raise UserError(f"noise is {self.noise!r}, expected a strength of 0 or more, or a function g(t)")

    def integrate(self, frame, x, times, draws):
        for (t, t_next), renewal in zip(
            itertools.pairwise(times.to(x)), frame.renewals(self.noise, times), strict=True
        ):
            x = self.step(frame, x, t, t_next, renewal, draws)
        return x

    @abstractmethod
    def step(self, frame: Frame, x: Tensor, t: Tensor, t_next: Tensor, renewal: float, draws: Draws) -> Tensor:
        """The state at `t_next` from the state `x` at `t`."""


@dataclass(frozen=True)
class EulerMaruyama(SDESampler):
    """First order, `steps` evaluations in all. The linear part is exact: for strength 0 it is DDIM."""

    order = 1

    def step(self, frame, x, t, t_next, renewal, draws):
        step = frame.step(t, t_next, renewal)
        return step(x, frame.pair(x, t, renewal), draws.normal(x) if renewal else 0.0)


@dataclass(frozen=True)
class Stochastic(SDESampler):
    """Second order, 2 steps - 1 evaluations in all: Heun's method for an SDE with additive noise.

    The noise of the step is in the prediction already (Kloeden and Platen 1992, eq. 15.1.3), and the linear part is
    exact, as in exponential integrators (Lu et al. 2022, arXiv 2211.01095; Gonzalez et al. 2023, arXiv 2305.14267).
    """

    order = 2

    def step(self, frame, x, t, t_next, renewal, draws):
        step, xi = frame.step(t, t_next, renewal), draws.normal(x) if renewal else 0.0
        now = frame.pair(x, t, renewal)
        return step(x, now, xi, frame.pair(step(x, now, xi), t_next, renewal))


@dataclass(frozen=True)
class PredictorCorrector(SDESampler):
    """First order: a step of the ODE, then steps of Langevin at the new time (Song et al. 2021, algorithms 2 and 3).

    Each of the two keeps the marginals by itself, so that nothing is lost in taking turns. 1 + corrections evaluations
    a step, and one more.

    Args:
        corrections: steps of Langevin, which share the renewal that g has over the step.
    """

    corrections: int = 1
    order = 1

    def __post_init__(self):
        super().__post_init__()
        whole(self.corrections, "corrections", 1)

    def step(self, frame, x, t, t_next, renewal, draws):
        x = frame.step(t, t_next, 0.0)(x, frame.pair(x, t, 0.0), 0.0)
        if renewal:
            each = renewal / self.corrections
            langevin = frame.step(t_next, t_next, each)
            for _ in range(self.corrections):
                x = langevin(x, frame.pair(x, t_next, each), draws.normal(x))
        return x
