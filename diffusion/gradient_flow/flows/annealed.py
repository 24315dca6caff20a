"""Langevin dynamics annealed over the noise levels of a model."""

import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField
from diffusion.gradient_flow.flows.base import Flow, check_particles
from diffusion.gradient_flow.flows.dynamics import Integrator
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.targets import Scored


@runtime_checkable
class Moving(Scored, Protocol):
    """A model with a velocity, such as a Generator or an EmpiricalField."""

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor: ...


@dataclass(frozen=True)
class AnnealedLangevin(Flow):
    """Langevin on KL(model, time=t) for falling times t: Song and Ermon 2019 (arXiv 1907.05600), algorithm 1.

    A step at time t has length step_size * sigma(t)^2, their alpha_i / 2: with step_size in (0, 1) it is stable at each
    level, for there no law is narrower than its noise. From one time to the next particles also move by one Euler step
    of the model's velocity, the predictor of Song et al. 2021 (arXiv 2011.13456): without it the heavy tails of noise
    such as gravity's stay where they are, for their score is too weak. In the end the particles have the law of the
    model at the last of the times: KL to it is the flow's functional, and what is reported along the way.

    Args:
        model: a Generator, an EmpiricalField, or any object with `field`, an affine one, `score(x, t)` and
            `velocity(x, t)`.
        times: falling, within the model's, such as tuple(LogSNRGrid()(model.field, 10).tolist()) of the samplers, whose
            noise levels fall by one factor.
        repeats: steps at each time; steps beyond len(times) * repeats stay at the last.
        integrator: as for Langevin; what it carries from step to step starts anew at each time.

    Raises:
        UserError: times do not fall or are not the model's, repeats is not positive; the model has no velocity, or
            a field that is not affine.
    """

    model: Moving
    times: tuple[float, ...]
    repeats: int = 10
    integrator: Integrator = field(default=EulerMaruyama())

    def __post_init__(self):
        if not isinstance(self.model, Moving):
            raise UserError(
                f"the model is {type(self.model).__name__}, expected one with field, score(x, t) and velocity(x, t)"
            )
        if not self.times or any(a <= b for a, b in zip(self.times[:-1], self.times[1:], strict=True)):
            raise UserError(f"the times of annealing are {self.times}, expected one or more that fall")
        if not isinstance(self.repeats, int) or isinstance(self.repeats, bool) or self.repeats < 1:
            raise UserError(f"annealing has repeats={self.repeats!r}, expected a whole number of 1 or more")
        if self._flows and not isinstance(self.model.field, AffineField):  # a wrong time or model is refused first
            kind = type(self.model.field).__name__
            raise UserError(
                f"the model's field is {kind}, expected an affine one, whose noise gives the lengths of steps"
            )

    @cached_property
    def _flows(self) -> tuple[Langevin, ...]:
        return tuple(Langevin(KL(self.model, time=time), self.integrator) for time in self.times)

    @property
    def functional(self) -> Functional:
        return self._flows[-1].functional

    def subject(self):
        return self._flows[-1].subject()

    def begin(self, particles):
        return self._flows[0].begin(particles)

    def advance(self, moment, step_size, generator):
        level = min(moment.step // self.repeats, len(self.times) - 1)
        flow, x, memory = self._flows[level], moment.particles, moment.memory
        if level and moment.step == level * self.repeats:
            before, now = self.times[level - 1 : level + 1]
            with torch.no_grad():
                x = x + (now - before) * self.model.velocity(x, before).to(x)
            memory = flow.begin(x)
        here = replace(moment, particles=x, functional=flow.subject().fitted(x, generator), memory=memory)
        sigma = float(self.model.field.sigma(torch.tensor(self.times[level], dtype=torch.float64)))
        moved = flow.advance(here, step_size * sigma**2, generator)
        check_particles(moved.particles, here)
        return replace(moved, functional=moment.functional)

    def copied(self, memory, origin):
        return self._flows[0].copied(memory, origin)

    def finish(self, moment, size):
        level = min((moment.step - 1) // self.repeats, len(self.times) - 1)
        flow = self._flows[level]
        flow.finish(replace(moment, functional=flow.subject().fitted(moment.particles)), size)
        if level < len(self.times) - 1:
            warnings.warn(
                f"annealing ended at time {self.times[level]:.4g} after {moment.step} steps, and is done at "
                f"{self.times[-1]:.4g}; take more than {(len(self.times) - 1) * self.repeats} steps",
                stacklevel=3,
            )
