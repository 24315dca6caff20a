"""Langevin dynamics with the exact law in the end."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.dynamics import Dynamics, Integrator, Stepped
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.targets import ScorePotential


class Acceptance(NamedTuple):
    """What became of proposals.

    Attributes:
        rate: share accepted, of all particles and steps so far.
        steps: so far.
        last: share accepted in the last step.
        potentials: those of the last step.
        x: particles (N, d) after it.
        energy: U there (N,).
        force: -grad U there (N, d).
    """

    rate: float
    steps: int
    last: float
    potentials: tuple[Functional, ...]
    x: Tensor
    energy: Tensor
    force: Tensor


@dataclass(frozen=True)
class Metropolis(Integrator):
    """The step of EulerMaruyama as a proposal, accepted or not (MALA): Roberts and Tweedie 1996, Bernoulli 2, 341.

    Each particle is a chain of its own with the invariant law exp(-U / tau), whatever the step; for a curvature L of
    P^(1/2) Hess U P^(1/2) and d coordinates a step of the order of 1 / (L d^(1/3)) is best, at which 0.574 are accepted
    for large d (Roberts and Rosenthal 1998). Moment.memory says how many were: see Acceptance. One velocity and one
    value a step.

    Raises:
        UserError: in a run, the functional is not an entropy and potentials, which are known with their log-densities.
    """

    order = 1

    def step(self, dynamics, x, memory, h):
        potentials = tuple(_potentials(dynamics.rest))
        known = memory is not None and len(memory.potentials) == len(potentials) and torch.equal(memory.x, x)
        if known and all(a is b for a, b in zip(memory.potentials, potentials, strict=True)):
            energy, force = memory.energy, memory.force
        else:
            energy, force = self._energy(dynamics, x), dynamics.force(x)
            if bool(energy.isnan().any()) or not bool(force.isfinite().all()):  # from where no proposal is accepted
                return Stepped(torch.full_like(x, torch.nan))
        root, scale = dynamics.root, (2 * dynamics.temperature * h) ** 0.5
        xi = dynamics.normal(x)
        proposal = x + h * root.times(root.transposed(force)) + scale * root.times(xi)
        energy_there, force_there = self._energy(dynamics, proposal), dynamics.force(proposal)
        back = xi + h / scale * root.transposed(force + force_there)  # minus the noise that leads from there to x
        gain = (energy - energy_there) / dynamics.temperature + (xi.square() - back.square()).sum(1) / 2
        taken = (dynamics.uniform(x).log() < gain) & force_there.isfinite().all(1)  # not where the gain is NaN
        rows = taken[:, None]
        last, steps = float(taken.double().mean()), 1 if memory is None else memory.steps + 1
        rate = last if memory is None else memory.rate + (last - memory.rate) / steps
        x = proposal.where(rows, x)
        energy, force = energy_there.where(taken, energy), force_there.where(rows, force)
        return Stepped(x, Acceptance(rate, steps, last, potentials, x, energy, force))

    def longest(self, curvature):
        """Any: proposals that lead too far are refused."""
        return math.inf

    @staticmethod
    @torch.no_grad()
    def _energy(dynamics: Dynamics, x: Tensor) -> Tensor:
        return dynamics.rest.first_variation(x.view(dynamics.shape))


def _potentials(rest: Functional):
    for _, functional in rest.terms():
        if not isinstance(functional, Potential | ScorePotential):
            raise UserError(
                f"Metropolis has to do with {type(functional).__name__}, expected potentials beside the entropy: other "
                "functionals have no law of one particle to be accepted by; take another integrator"
            )
        yield functional
