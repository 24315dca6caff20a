"""The energy of particles that attract or repel each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, chunks, points_of


@dataclass(frozen=True)
class Interaction(Functional):
    """F[q] = 1/2 E W(x - x'), x and x' ~ q independent (McCann 1997).

    Of particles it is the mean over all N^2 pairs. Only the even part of W counts.

    Args:
        kernel: W, differences (..., *shape) -> (...), in torch operations, twice the energy of a pair.
        singular: W is infinite or has no derivative at 0, as -log |x| or |x|: the N pairs of a particle with itself
            are left out, and particles in one place have no energy together.

    Raises:
        UserError: W answers in another shape, or is not finite at 0 without `singular`.
    """

    kernel: Callable[[Tensor], Tensor]
    singular: bool = False

    def value(self, particles):
        return sum(energies.sum() for _, energies in self._energies(particles)) / (2 * len(particles) ** 2)

    @torch.enable_grad()
    def velocity(self, particles):
        points_of(particles)
        x = particles.detach().requires_grad_()
        gradient = torch.zeros_like(particles)
        for _, energies in self._energies(x):
            if not energies.requires_grad:
                raise UserError("the kernel has no derivative; expected torch operations, not under no_grad")
            gradient += torch.autograd.grad(energies.sum(), x)[0]
        return gradient / (-2 * len(x))

    def first_variation(self, particles):
        rows, columns = [], 0
        for _, energies in self._energies(particles):
            rows.append(energies.sum(1))
            columns = columns + energies.sum(0)
        return (torch.cat(rows) + columns) / (2 * len(particles))

    def _energies(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of W(x_i - x_j), some at a time, (n, N)."""
        points = points_of(x)
        for part in chunks(len(x), points.numel()):
            gaps = x[part, None] - x
            together = None
            if self.singular:
                together = (gaps == 0).flatten(2).all(2)
                gaps = torch.where(together.view(*together.shape, *[1] * (x.dim() - 1)), 1.0, gaps)
            energies = self.kernel(gaps)
            if not isinstance(energies, Tensor) or energies.shape != gaps.shape[:2]:
                found = tuple(energies.shape) if isinstance(energies, Tensor) else type(energies).__name__
                raise UserError(
                    f"the kernel's answer for differences {tuple(gaps.shape)} has shape {found}, expected "
                    f"{tuple(gaps.shape[:2])}: one number a pair"
                )
            if together is not None:
                energies = energies.masked_fill(together, 0.0)
            yield part, energies
