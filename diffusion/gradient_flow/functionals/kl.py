"""The Kullback-Leibler divergence from a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, Sum, Term
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.targets import Scored, potential_of


@dataclass(frozen=True)
class KL(Functional):
    """F[q] = KL(q || p) = E log q - E log p in nats, up to the constant that log p is known up to.

    It is the sum of the entropy and of the potential -log p. Its velocity grad log p - grad log q makes the particles
    follow the Fokker-Planck equation of Langevin dynamics (Jordan, Kinderlehrer and Otto 1998); a flow that has noise
    instead of grad log q takes the two terms apart.

    Args:
        target: log p up to a constant, (N, *shape) -> (N,), in torch operations; or grad log p, (N, *shape) ->
            (N, *shape), told apart by the shape of the answer (in one dimension a score must be given as
            ScorePotential(score)); or a model at a `time`: a Generator, an EmpiricalField,
            or any object with `field`, `score(x, t)` and, for a value, `log_prob(x, t)`; or -log p as a functional.
        entropy: how E log q is told from particles. The default has a value, but a good score in few dimensions only
            (see Blob); Entropy(SteinScore()) has a better score, and no value.
        time: of the model, from its t_min to its horizon.

    Raises:
        UserError: there is no such target or time; value and first_variation, where log p, or log q, is known by its
            score alone.
    """

    target: Callable[[Tensor], Tensor] | Scored | Functional
    entropy: Entropy = field(default_factory=Entropy)
    time: float | None = None

    def __post_init__(self):
        if not isinstance(self.entropy, Entropy):
            raise UserError(f"entropy is {self.entropy!r}, expected an Entropy(estimator)")
        potential_of(self.target, self.time)

    def terms(self):
        return (Term(1.0, self.entropy), Term(1.0, potential_of(self.target, self.time)))

    def value(self, particles):
        return Sum(self.terms()).value(particles)

    def velocity(self, particles):
        return Sum(self.terms()).velocity(particles)

    def first_variation(self, particles):
        return Sum(self.terms()).first_variation(particles)

    def fault(self, particles):
        return Sum(self.terms()).fault(particles)

    def fitted(self, particles, generator=None):
        entropy, potential = (term.functional.fitted(particles, generator) for term in self.terms())
        if potential is self.target and entropy is self.entropy:
            return self
        return replace(self, target=potential, entropy=entropy, time=None)
