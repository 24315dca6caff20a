"""Velocities together with their divergence: exact, or by Hutchinson's estimate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from diffusion.conditions import of_points
from diffusion.errors import UserError
from diffusion.samplers.base import Model

ROWS = 256  # copies of points at a time, for several directions at once


class Slope(NamedTuple):
    velocity: Tensor  # (b, *shape)
    divergence: Tensor  # (b, P), exact: (b, 1)


class Flow:
    """Velocity and divergence of a model at some of the points; counts its evaluations.

    Args:
        directions: (K, B, d): the unit vectors, or probes.
        exact: whether contributions of the directions are to be added, or are estimates each.
    """

    def __init__(self, model: Model, directions: Tensor, exact: bool, conditions: dict[str, Any]):
        self.model, self.directions, self.exact, self.conditions = model, directions, exact, conditions
        self.evaluations = torch.zeros(directions.shape[1], dtype=torch.int64, device=directions.device)

    def velocity(self, x: Tensor, t: Tensor, index: Tensor, copies: int = 1) -> Tensor:
        """f_t (copies b, *shape) at `x` (copies b, *shape) of the points `index` (b,) and the times `t` (b,)."""
        self.evaluations[index] += 1
        conditions = of_points(self.conditions, index.repeat(copies), self.directions.shape[1])
        return self.model.velocity(x, t.repeat(copies), **conditions).to(x)

    def __call__(self, x: Tensor, t: Tensor, index: Tensor) -> Slope:
        return self.slope(lambda x, copies: self.velocity(x, t, index, copies), x, index)

    def slope(self, function: Callable[[Tensor, int], Tensor], x: Tensor, index: Tensor) -> Slope:
        """A vector field function(copies of x, copies) and its divergence at `x`: e . (e . grad) f over directions."""
        directions, number = self.directions[:, index], len(x)
        copies = min(len(directions), max(1, ROWS // number))
        parts = []
        # A compiled network would otherwise give up its buffers at the first of many derivatives.
        with torch.enable_grad(), torch._functorch.config.patch(donated_buffer=False):
            many = x.repeat(copies, *[1] * (x.dim() - 1)).requires_grad_()
            value = function(many, copies)
            if not value.requires_grad:
                raise UserError("the velocity has no derivative in x; expected torch operations, not under no_grad")
            for e in directions.split(copies):
                e = torch.nn.functional.pad(e, (0, 0, 0, 0, 0, copies - len(e))).reshape(value.shape)
                (product,) = torch.autograd.grad(value, many, e, retain_graph=True, materialize_grads=True)
                parts.append((product * e).flatten(1).sum(1).view(copies, number))
        parts = torch.cat(parts)[: len(directions)].T
        return Slope(value.detach()[:number], parts.sum(1, keepdim=True) if self.exact else parts)
