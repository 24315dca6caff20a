"""Langevin dynamics with inertia."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.dynamics import Integrator, Stepped


class Swing(NamedTuple):
    """Momenta in the middle of things.

    Attributes:
        momentum: (N, d) in the coordinates L^-1 x, before the half kick that ends a step.
        owed: length of the step whose half kick that is.
    """

    momentum: Tensor
    owed: float


@dataclass(frozen=True)
class Underdamped(Integrator):
    """BAOAB (Leimkuhler and Matthews 2013, Applied Mathematics Research eXpress 2013:34), order 2, one velocity a step.

    With x = L y: dy = (p / m) dt, dp = L^T b dt - gamma p dt + sqrt(2 gamma m tau) dW. Kicks (B), drifts (A) and the
    exact Ornstein-Uhlenbeck step of p (O) take turns; the second half kick of a step is given with the first of the
    next, at the same place. For a Gaussian target the positions have exactly its covariance in the end, at every stable
    step, which is one with h < 2 sqrt(m / L) for a curvature L of P^(1/2) Hess P^(1/2). Momenta start in equilibrium.

    Args:
        friction: gamma, in units of 1 / time.
        mass: m; with P it makes the mass matrix m P^-1.
    """

    friction: float = 1.0
    mass: float = 1.0
    order = 2

    def __post_init__(self):
        if not (0 < self.friction < math.inf and 0 < self.mass < math.inf):
            raise UserError(
                f"underdamped dynamics has friction={self.friction} and mass={self.mass}, expected positive numbers"
            )

    def step(self, dynamics, x, memory, h):
        spread = (self.mass * dynamics.temperature) ** 0.5
        momentum, owed = memory if memory is not None else Swing(spread * dynamics.normal(x), 0.0)
        momentum = momentum + (owed + h) / 2 * dynamics.root.transposed(dynamics.force(x))
        x = x + h / 2 / self.mass * dynamics.root.times(momentum)
        fresh = -math.expm1(-2 * self.friction * h)
        momentum = (1 - fresh) ** 0.5 * momentum + spread * fresh**0.5 * dynamics.normal(x)
        x = x + h / 2 / self.mass * dynamics.root.times(momentum)
        return Stepped(x, Swing(momentum, h))

    def longest(self, curvature):
        return 2 * (self.mass / curvature) ** 0.5

    def copied(self, memory, origin):
        return None if memory is None else memory._replace(momentum=memory.momentum[origin])
