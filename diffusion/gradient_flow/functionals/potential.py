"""The potential energy E[U(x)]."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, not_finite, points_of


@dataclass(frozen=True)
class Potential(Functional):
    """F[q] = E[U(x)], x ~ q. With q a point mass its flow is gradient descent on U.

    Args:
        energy: U, (N, *shape) -> (N,), in torch operations.
        name: of U, in errors.
    """

    energy: Callable[[Tensor], Tensor]
    name: str = "energy"

    def value(self, particles):
        return self.first_variation(particles).mean()

    @torch.enable_grad()
    def velocity(self, particles):
        points_of(particles)
        x = particles.detach().requires_grad_()
        energy = self.first_variation(x)
        if not energy.requires_grad:
            raise UserError(f"the {self.name} has no derivative in x; expected torch operations, not under no_grad")
        velocity = -torch.autograd.grad(energy.sum(), x)[0]
        undefined = energy.detach().isnan().view(-1, *[1] * (x.dim() - 1))  # log has a derivative below 0
        return velocity.masked_fill_(undefined, torch.nan)

    def first_variation(self, particles):
        points_of(particles)
        energy = self.energy(particles)
        if not isinstance(energy, Tensor) or energy.shape != particles.shape[:1]:
            found = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise UserError(f"the {self.name} has shape {found}, expected ({len(particles)},): one number a particle")
        return energy

    def fault(self, particles):
        fault = not_finite(f"the {self.name}", self.first_variation(particles), particles)
        return fault or not_finite(f"the gradient of the {self.name}", self.velocity(particles), particles)
