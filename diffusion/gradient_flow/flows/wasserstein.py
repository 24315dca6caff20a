"""The Wasserstein flow of particles: dx/dt = -grad dF/dq, by explicit steps."""

import math
import warnings
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.functionals.base import Functional, check_finite
from diffusion.samplers.runge_kutta import TABLEAUS

ORDERS = (1, 2, 4)


@dataclass(frozen=True)
class StepControl:
    """Steps so short that the functional falls at each (Armijo 1966).

    With v the velocity, d the direction of the step and h its size, F must fall by at least `least` h E[v.d], the part
    of what it falls by for small h; else h is halved. It is doubled, for the next step, where F has fallen by at least
    `most` h E[v.d]. (Gradient descent on a quadratic function of curvature L falls by 1 - h L / 2 of h |v|^2: the
    longest step that is kept has h L = 2 (1 - least), and steps grow while h L < 2 (1 - most). Functionals of samples
    are rough on the scale of the distance between particles: to ask for more than a fall at all makes short steps.)

    Args:
        least: from 0 to 1, not 1.
        most: from `least` to 1.
        halvings: of the largest step, at which a step is given up.
    """

    least: float = 1e-4
    most: float = 0.75
    halvings: int = 30

    def __post_init__(self):
        if not 0 <= self.least <= self.most <= 1 or self.least == 1:
            raise UserError(
                f"step control has least={self.least} and most={self.most}, expected 0 <= least <= most <= 1, least < 1"
            )
        if not isinstance(self.halvings, int) or isinstance(self.halvings, bool) or self.halvings < 1:
            raise UserError(f"step control has halvings={self.halvings!r}, expected a whole number of 1 or more")


class Measured(NamedTuple):
    """A value of the functional, and what it was measured of."""

    functional: Functional
    particles: Tensor
    value: float


class Pace(NamedTuple):
    """What a flow carries from step to step.

    Attributes:
        scale: size of the next step to try, over the largest.
        momentum: (N, *shape), the direction of the last step.
        measured: of the particles where the last step ended; None without control.
        resting: steps that left the particles where they were, because no length made the functional fall.
    """

    scale: float
    momentum: Tensor
    measured: Measured | None = None
    resting: int = 0


@dataclass(frozen=True)
class WassersteinFlow(Flow):
    """Explicit Runge-Kutta steps, or heavy-ball steps, with step-size control.

    A step of order 1 is x + h velocity(x). With momentum b it is x + h m, m <- b m + velocity(x) (Polyak 1964). Under
    control a step that would climb first forgets its momentum (O'Donoghue and Candes 2015, arXiv 1204.3982), then is
    halved; one that climbs at every length leaves the particles where they are, and a warning says so once. Where a
    functional is drawn anew for each step, such as by slices in many dimensions, it falls for the draw of each step:
    what long steps with momentum gain there they lose in the next, so take momentum with short steps only.

    Args:
        functional: what falls.
        order: 1, 2 (Ralston) or 4 (Kutta): of accuracy in time, and velocities a step.
        momentum: b, from 0 up to 1, not 1; above 0 for order 1 only.
        control: None takes every step at full length. Values are those of the functional as fitted for the step.

    Raises:
        UserError: a bad option; in a run with control, the value of the functional cannot be computed.
    """

    functional: Functional
    order: int = 1
    momentum: float = 0.0
    control: StepControl | None = field(default=StepControl())

    def __post_init__(self):
        if self.order not in ORDERS:
            raise UserError(f"the flow has order={self.order!r}, expected 1, 2 or 4")
        if not 0 <= self.momentum < 1:
            raise UserError(f"the flow has momentum={self.momentum}, expected a number from 0 up to 1, not 1")
        if self.momentum and self.order > 1:
            raise UserError(
                f"the flow has momentum={self.momentum} and order={self.order}: with momentum it follows another path, "
                "to no order; take order=1"
            )

    def begin(self, particles):
        return Pace(1.0, torch.zeros_like(particles))

    def advance(self, moment, step_size, generator):
        x, functional, pace = moment.particles, moment.functional, moment.memory
        v = functional.velocity(x)
        heavy = v + self.momentum * pace.momentum if self.momentum else v
        if self.control is None:
            moved = self._moved(functional, x, heavy, step_size)
            return replace(moment, particles=moved, time=moment.time + step_size, memory=Pace(1.0, heavy))
        start = self._value(functional, x, pace.measured)
        if not (math.isfinite(start) and bool(v.isfinite().all())):
            check_finite(functional, x, moment.step)
        kept = _mean_product(v, heavy) > 0
        scale, smallest = pace.scale, 0.5**self.control.halvings
        while True:
            direction, h = heavy if kept else v, scale * step_size
            slope = _mean_product(v, direction)
            moved = self._moved(functional, x, direction, h)
            value = float(functional.value(moved)) if bool(moved.isfinite().all()) else math.nan
            if start - value >= self.control.least * h * slope and (value < start or slope == 0):
                break
            if kept and self.momentum:
                kept = False
            elif scale / 2 >= smallest:
                scale /= 2
            else:
                return self._rest(moment, start, v, scale, step_size)
        grown = min(1.0, 2 * scale) if start - value >= self.control.most * h * slope else scale
        memory = Pace(grown, direction, Measured(functional, moved, value), pace.resting)
        return replace(moment, particles=moved, time=moment.time + h, memory=memory)

    def copied(self, memory, origin):
        return memory._replace(momentum=memory.momentum[origin])

    def _moved(self, functional: Functional, x: Tensor, direction: Tensor, h: float) -> Tensor:
        """x after a step whose first slope is `direction`."""
        tableau, slopes = TABLEAUS[self.order], [direction]
        for weights in tableau.stages[1:]:
            change = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
            slopes.append(functional.velocity(x + h * change))
        return x + h * sum(weight * slope for weight, slope in zip(tableau.step, slopes, strict=True))

    @staticmethod
    def _value(functional: Functional, x: Tensor, measured: Measured | None) -> float:
        if measured is not None and measured.functional is functional and measured.particles is x:
            return measured.value
        try:
            return float(functional.value(x))
        except UserError as error:
            raise UserError(
                f"{error}; step-size control needs the value: with control=None the flow goes without"
            ) from None

    @staticmethod
    def _rest(moment, start: float, v: Tensor, scale: float, step_size: float):
        pace = moment.memory
        if not pace.resting:
            speed = math.sqrt(_mean_product(v, v))
            warnings.warn(
                f"the functional, {start:.6g}, falls at no step down to {scale * step_size:.2g}, with velocities of "
                f"{speed:.2g}: the particles stay (at a minimum to rounding, at a kink, or value and velocity differ)",
                stacklevel=4,
            )
        measured = Measured(moment.functional, moment.particles, start)
        memory = Pace(scale, torch.zeros_like(v), measured, pace.resting + 1)
        return replace(moment, memory=memory)


def _mean_product(a: Tensor, b: Tensor) -> float:
    """The mean over particles of a.b."""
    return float((a * b).flatten(1).sum(1).mean())
