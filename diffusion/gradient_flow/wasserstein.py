"""The Wasserstein flow of particles: dx/dt = -grad dF/dq."""

from dataclasses import dataclass, replace

from diffusion.gradient_flow.flow import Flow
from diffusion.gradient_flow.functional import Functional


@dataclass(frozen=True)
class WassersteinFlow(Flow):
    """Explicit steps x + h velocity(x)."""

    functional: Functional

    def begin(self, particles):
        return None

    def advance(self, moment, step_size, generator):
        x = moment.particles
        moved = x + step_size * moment.functional.velocity(x)
        return replace(moment, particles=moved, time=moment.time + step_size)
