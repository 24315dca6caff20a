"""Langevin dynamics: the Wasserstein flow of tau * Entropy + R as an SDE, dx = -grad dR/dq dt + sqrt(2 tau) dW."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Flow, Moment
from diffusion.gradient_flow.flows.dynamics import Dynamics, Integrator
from diffusion.gradient_flow.flows.overdamped import LeimkuhlerMatthews
from diffusion.gradient_flow.flows.preconditioners import Identity, Preconditioner
from diffusion.gradient_flow.flows.stability import warn_of_steps
from diffusion.gradient_flow.functionals.base import Functional, Sum, Term
from diffusion.gradient_flow.functionals.entropy import Entropy


@dataclass(frozen=True)
class Noised(Functional):
    """tau * Entropy + R, whose entropy is left to noise: it is fitted only where it is asked for.

    Attributes:
        entropies: terms that are entropies.
        rest: R; no parts where there is nothing else.
    """

    entropies: tuple[Term, ...]
    rest: Sum

    @property
    def temperature(self) -> float:
        """tau."""
        return sum(term.weight for term in self.entropies)

    def terms(self):
        return self.entropies + self.rest.terms()

    def fitted(self, particles, generator=None):
        return replace(self, rest=self.rest.fitted(particles, generator))

    def value(self, particles):
        return self._whole(particles).value(particles)

    def velocity(self, particles):
        return self._whole(particles).velocity(particles)

    def first_variation(self, particles):
        return self._whole(particles).first_variation(particles)

    def fault(self, particles):
        return self.rest.fault(particles)

    def _whole(self, particles: Tensor) -> Sum:
        return Sum(Sum(self.entropies).fitted(particles).terms() + self.rest.terms())


def split_of(functional: Functional) -> Noised:
    """The entropies of a functional, if any, apart from its other terms."""
    terms = functional.terms()
    entropies = tuple(term for term in terms if isinstance(term.functional, Entropy))
    return Noised(entropies, Sum(tuple(term for term in terms if not isinstance(term.functional, Entropy))))


def noised(functional: Functional) -> Noised:
    """The same of a functional that has noise.

    Raises:
        UserError: there are no entropies, or their weights add up to no positive number.
    """
    split = split_of(functional)
    if not split.entropies:
        raise UserError(
            f"{type(functional).__name__} has no entropy among its terms, expected one for the noise to stand for: add "
            "tau * Entropy(), or take WassersteinFlow"
        )
    if not split.temperature > 0:
        raise UserError(f"the entropy has the weight {split.temperature:g}, expected a positive one, the temperature")
    return split


@dataclass(frozen=True)
class Draws:
    """The random numbers of a step."""

    generator: torch.Generator | None

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def uniform(self, like: Tensor) -> Tensor:
        """In [0, 1), one a row (N,)."""
        return torch.rand(len(like), generator=self.generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Langevin(Flow):
    """Particles that move by a velocity and by noise, each on its own unless the functional makes them interact.

    The noise stands for the entropy, of which no estimate is needed; an Interaction among the other terms makes it a
    mean-field dynamics. Moment.value is an estimate of the functional nevertheless, by the entropy's estimator. A run
    that ends with steps so long that the drift draws the particles no nearer to each other warns.

    Args:
        functional: tau * Entropy + R, such as KL(target).
        integrator: EulerMaruyama (ULA), LeimkuhlerMatthews, StochasticHeun, ThirdOrder, Metropolis (MALA) or
            Underdamped.
        preconditioner: Identity, Matrix, or EnsembleCovariance, for EulerMaruyama only.

    Raises:
        UserError: the functional has no entropy of positive weight; integrator and preconditioner do not go together.
    """

    functional: Functional
    integrator: Integrator = field(default=LeimkuhlerMatthews())
    preconditioner: Preconditioner = field(default=Identity())

    def __post_init__(self):
        noised(self.functional)
        if not (self.preconditioner.constant or self.integrator.varying):
            raise UserError(
                f"{type(self.integrator).__name__} is for a constant preconditioner, and "
                f"{type(self.preconditioner).__name__} moves with the particles; take EulerMaruyama"
            )

    def subject(self):
        return noised(self.functional)

    def begin(self, particles):
        return None

    def advance(self, moment, step_size, generator):
        draws = Draws(generator)
        return self.stepped(moment, step_size, draws.normal, draws.uniform)

    def copied(self, memory, origin):
        return self.integrator.copied(memory, origin)

    def stepped(
        self,
        moment: Moment,
        step_size: float,
        normal: Callable[[Tensor], Tensor],
        uniform: Callable[[Tensor], Tensor],
    ) -> Moment:
        """One step with random numbers of one's own: normal(like) (N, d) and uniform(like) (N,), for like (N, d)."""
        x, shape = moment.particles.flatten(1), moment.particles.shape
        dynamics = self._dynamics(moment, x, normal, uniform)
        x, memory = self.integrator.step(dynamics, x, moment.memory, step_size)
        return replace(moment, particles=x.view(shape), time=moment.time + step_size, memory=memory)

    def finish(self, moment, size):
        if self.integrator.longest(1.0) < math.inf:
            x, draws = moment.particles.flatten(1), Draws(None)
            dynamics = self._dynamics(moment, x, draws.normal, draws.uniform)
            noise = dynamics.temperature * dynamics.root.trace(x.shape[1])
            warn_of_steps(x, dynamics.drift(x), noise, size, self.integrator.longest)

    def _dynamics(self, moment: Moment, x: Tensor, normal: Callable, uniform: Callable) -> Dynamics:
        split, root = noised(moment.functional), self.preconditioner.root(x)
        shape = moment.particles.shape
        return Dynamics(split.rest, split.temperature, self.preconditioner, root, shape, normal, uniform)
