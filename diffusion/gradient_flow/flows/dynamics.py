"""What integrators of Langevin dynamics have in common.

dx = [P b(x) + tau div P(x)] dt + sqrt(2 tau P) dW moves the law of x as the Wasserstein flow of tau * Entropy + R does,
in the metric P, with b = -grad dR/dq (Jordan, Kinderlehrer and Otto 1998). Particles are points x (N, d), P = L L^T.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from diffusion.gradient_flow.flows.preconditioners import Preconditioner, Root
from diffusion.gradient_flow.functionals.base import Functional


@dataclass(frozen=True)
class Dynamics:
    """The equation, for one step.

    Attributes:
        rest: R.
        temperature: tau.
        preconditioner: P.
        root: L at the start of the step.
        shape: of the particles, (N, *shape).
        normal: standard normal numbers like given points (N, d).
        uniform: numbers from 0 to 1, one for each of given points, (N,).
    """

    rest: Functional
    temperature: float
    preconditioner: Preconditioner
    root: Root
    shape: Size
    normal: Callable[[Tensor], Tensor]
    uniform: Callable[[Tensor], Tensor]

    def force(self, x: Tensor) -> Tensor:
        """b (N, d)."""
        if not self.rest.terms():
            return torch.zeros_like(x)
        return self.rest.velocity(x.view(self.shape)).flatten(1)

    def drift(self, x: Tensor) -> Tensor:
        """P b + tau div P, with P of the start of the step."""
        pushed = self.root.times(self.root.transposed(self.force(x)))
        return pushed + self.temperature * self.preconditioner.divergence(x)

    def noise(self, x: Tensor) -> Tensor:
        """sqrt(2 tau) L xi with new normal numbers xi (N, d): the noise of a step of length 1."""
        return (2 * self.temperature) ** 0.5 * self.root.times(self.normal(x))


class Stepped(NamedTuple):
    """Particles (N, d) after a step, and what the integrator carries to the next, None before the first."""

    x: Tensor
    memory: Any = None


class Integrator(ABC):
    """A discretisation of the dynamics."""

    order: int
    """Weak order of convergence: of means of smooth functions at a fixed time."""

    varying: bool = False
    """Whether P may depend on the particles."""

    @abstractmethod
    def step(self, dynamics: Dynamics, x: Tensor, memory: Any, h: float) -> Stepped:
        """One step of length h from x (N, d)."""

    @abstractmethod
    def longest(self, curvature: float) -> float:
        """The longest stable step where the drift P b is linear, of the rates up to `curvature`."""

    def copied(self, memory: Any, origin: Tensor) -> Any:
        """The memory where each particle has become a copy of the one at `origin` (N,)."""
        return memory
