"""Flows: particles that run downhill on a functional. One geometry or one integrator a file; the loop is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, points_of


@dataclass(frozen=True)
class Moment:
    """A flow after some of its steps.

    Attributes:
        particles: (N, *shape).
        functional: fitted to the particles of the step before.
        step: steps done.
        time: the sum of their sizes.
        memory: what the flow itself carries along, such as momenta.
    """

    particles: Tensor
    functional: Functional
    step: int = 0
    time: float = 0.0
    memory: Any = None

    def value(self) -> float:
        """The functional at the particles."""
        return float(self.functional.value(self.particles))


class Flow(ABC):
    """Particles that move on a functional, step by step."""

    functional: Functional

    def subject(self) -> Functional:
        """The functional in the form that is fitted at each step: one that needs less fitting, where the flow can."""
        return self.functional

    @abstractmethod
    def begin(self, particles: Tensor) -> Any:
        """The memory before the first step."""

    @abstractmethod
    def advance(self, moment: Moment, step_size: float, generator: torch.Generator | None) -> Moment:
        """One step. The functional is fitted to the particles; `step` is counted by the loop, time here."""

    def moments(
        self, particles: Tensor, steps: int, step_size: float, generator: torch.Generator | None = None
    ) -> Iterator[Moment]:
        """The flow before its first step and after each of `steps` steps.

        Args:
            particles: (N, *shape); they are not changed.
            step_size: of a step, or the largest, where the flow chooses its own.
            generator: the randomness of the flow, on the device of the particles.

        Raises:
            UserError: steps or step_size are not positive, or particles stop being finite.
        """
        points_of(particles)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise UserError(f"steps is {steps!r}, expected a whole number of 1 or more")
        if not 0 < step_size < float("inf"):
            raise UserError(f"step_size is {step_size}, expected a positive number")
        particles = particles.detach()
        _check(particles, 0)
        moment = Moment(particles, self.subject().fitted(particles, generator), memory=self.begin(particles))
        yield moment
        for step in range(1, steps + 1):
            if step > 1:
                moment = replace(moment, functional=moment.functional.fitted(moment.particles, generator))
            moment = replace(self.advance(moment, step_size, generator), step=step)
            _check(moment.particles, step)
            yield moment

    def run(self, particles: Tensor, steps: int, step_size: float, generator: torch.Generator | None = None) -> Tensor:
        """The particles after `steps` steps; `moments` has those in between, and the functional's values."""
        for moment in self.moments(particles, steps, step_size, generator):
            particles = moment.particles
        return particles

    def __add__(self, other: Flow) -> Alternating:
        return Alternating((self, other))


@dataclass(frozen=True)
class Alternating(Flow):
    """Each step is one of each flow in turn, all on one functional. Write it flow + flow."""

    flows: tuple[Flow, ...]

    def __post_init__(self):
        if any(flow.functional is not self.functional for flow in self.flows):
            raise UserError("the flows of a sum have different functionals, expected one and the same for all")

    @property
    def functional(self) -> Functional:
        return self.flows[0].functional

    def begin(self, particles):
        return tuple(flow.begin(particles) for flow in self.flows)

    def advance(self, moment, step_size, generator):
        memories, start = [], moment.time
        for flow, memory in zip(self.flows, moment.memory, strict=True):
            moment = flow.advance(replace(moment, memory=memory, time=start), step_size, generator)
            memories.append(moment.memory)
        return replace(moment, memory=tuple(memories))


def _check(particles: Tensor, step: int) -> None:
    if not bool(particles.isfinite().all()):
        index = int((~particles.flatten(1).isfinite().all(1)).nonzero()[0])
        place = particles[index].flatten()[:4].tolist()
        when = "before the first step" if step == 0 else f"after step {step}; try a smaller step_size"
        raise UserError(f"particle {index} is {place}, expected finite numbers, {when}")
