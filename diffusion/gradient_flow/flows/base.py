"""Flows: particles that run downhill on a functional. One geometry or one integrator a file; the loop is here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, check_finite, points_of


@dataclass(frozen=True)
class Moment:
    """A flow after some of its steps.

    Attributes:
        particles: (N, *shape).
        functional: fitted to the particles of the step before.
        step: steps done.
        time: the sum of their sizes.
        memory: what the flow itself carries along, such as momenta.
        origin: where the last step let particles die and others double, which of those before it each is a copy of
            (N,); else None.
    """

    particles: Tensor
    functional: Functional
    step: int = 0
    time: float = 0.0
    memory: Any = None
    origin: Tensor | None = None

    def value(self) -> float:
        """The flow's functional at the particles, fitted to them with a generator that is the same at every moment.

        So the values of a run are those of one functional, whatever the steps in between followed.

        Raises:
            UserError: it cannot be computed from what is known, or is NaN because of what is not finite at a particle.
        """
        same = torch.Generator(self.particles.device).manual_seed(0)
        functional = self.functional.fitted(self.particles, same)
        value = float(functional.value(self.particles))
        if math.isnan(value):
            check_finite(functional, self.particles, self.step)
        return value


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

    def copied(self, memory: Any, origin: Tensor) -> Any:
        """The memory after another flow made each particle a copy of the one at `origin` (N,), before it moves."""
        return memory

    def finish(self, moment: Moment, size: float) -> None:
        """After the last step of a run, of this size: warns where the flow has not reached its end, or never will."""
        return

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
        check_particles(particles)
        moment = Moment(particles, self.subject().fitted(particles, generator), memory=self.begin(particles))
        yield moment
        for step in range(1, steps + 1):
            if step > 1:
                moment = replace(moment, functional=moment.functional.fitted(moment.particles, generator))
            before, moment = moment, replace(self.advance(moment, step_size, generator), step=step)
            check_particles(moment.particles, before)
            yield moment
        self.finish(moment, moment.time - before.time)

    def run(self, particles: Tensor, steps: int, step_size: float, generator: torch.Generator | None = None) -> Tensor:
        """The particles after `steps` steps; `moments` has those in between, and the functional's values."""
        for moment in self.moments(particles, steps, step_size, generator):
            particles = moment.particles
        return particles

    def __add__(self, other: Flow) -> Alternating:
        return Alternating((self, other))


@dataclass(frozen=True)
class Alternating(Flow):
    """Each step is one of each flow in turn, all on one functional. Write it flow + flow.

    A flow takes a step of the size that the one before it took, such as a WassersteinFlow under control, which goes
    first for that reason; `step_size` itself where that one stayed in its place. Where one copies particles, the copies
    have what the others remember of the particle copied.
    """

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
        memories, start, origin, size = list(moment.memory), moment.time, None, step_size
        for k, flow in enumerate(self.flows):
            before = replace(moment, memory=memories[k], time=0.0, origin=None)
            moment = flow.advance(before, size, generator)
            check_particles(moment.particles, before)
            memories[k], size = moment.memory, moment.time or size
            if moment.origin is not None:
                origin = moment.origin if origin is None else origin[moment.origin]
                for other in set(range(len(self.flows))) - {k}:
                    memories[other] = self.flows[other].copied(memories[other], moment.origin)
        return replace(moment, memory=tuple(memories), time=start + moment.time, origin=origin)

    def copied(self, memory, origin):
        return tuple(flow.copied(part, origin) for flow, part in zip(self.flows, memory, strict=True))

    def finish(self, moment, size):
        for flow, memory in zip(self.flows, moment.memory, strict=True):
            flow.finish(replace(moment, memory=memory), size)


def check_particles(particles: Tensor, before: Moment | None = None) -> None:
    """Refuse particles that are not finite, by what of the functional was not, where the step began.

    Args:
        before: the moment from which the step led to them; None: they are the first.
    """
    if bool(particles.isfinite().all()):
        return
    if before is not None:
        check_finite(before.functional, before.particles, before.step)
    index = int((~particles.flatten(1).isfinite().all(1)).nonzero()[0])
    place = particles[index].flatten()[:4].tolist()
    when = f"after step {before.step + 1}; try a smaller step_size" if before else "before the first step"
    raise UserError(f"particle {index} is {place}, expected finite numbers, {when}")
