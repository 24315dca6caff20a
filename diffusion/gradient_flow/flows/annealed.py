"""Langevin dynamics annealed over the noise levels of a model."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from diffusion.errors import UserError
from diffusion.fields import AffineField
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.flows.dynamics import Integrator
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.targets import Scored


@dataclass(frozen=True)
class AnnealedLangevin(Flow):
    """Langevin on KL(model, time=t) for falling times t: Song and Ermon 2019 (arXiv 1907.05600), algorithm 1.

    A step at the noise level s = sigma(t) / alpha(t) has length step_size * sigma(t)^2, their eps_i / 2: with step_size
    in (0, 1) it is stable at every level, for there no law is narrower than its noise. In the end the particles have
    the law of the model at the last of the times, if noise is Gaussian: under heavy tails, such as gravity's, the drift
    of particles far out is too weak to bring them back in few steps.

    Args:
        model: a Generator, an EmpiricalField, or what KL takes; of an affine field.
        times: falling, within the model's, such as tuple(LogSNRGrid()(model.field, 10).tolist()) of the samplers, whose
            noise levels fall by one factor.
        repeats: steps at each time; steps beyond len(times) * repeats stay at the last.
        integrator: as for Langevin; what it carries from step to step starts anew at each time.

    Raises:
        UserError: times do not fall or are not the model's, repeats is not positive; the field is not affine.
    """

    model: Scored
    times: tuple[float, ...]
    repeats: int = 10
    integrator: Integrator = field(default=EulerMaruyama())

    def __post_init__(self):
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
        return self._flows[0].functional

    def subject(self):
        return self._flows[0].subject()

    def begin(self, particles):
        return self._flows[0].begin(particles)

    def advance(self, moment, step_size, generator):
        level = min(moment.step // self.repeats, len(self.times) - 1)
        flow = self._flows[level]
        if level and moment.step == level * self.repeats:
            fitted = flow.subject().fitted(moment.particles, generator)
            moment = replace(moment, functional=fitted, memory=flow.begin(moment.particles))
        sigma = float(self.model.field.sigma(torch.tensor(self.times[level], dtype=torch.float64)))
        return flow.advance(moment, step_size * sigma**2, generator)
