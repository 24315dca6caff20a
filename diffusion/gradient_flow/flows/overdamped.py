"""Unadjusted Langevin dynamics: every step is kept, and the law that it ends in is wrong by a power of its length.

For b = -x in one dimension and tau = 1 the variance in the end is 1 / (1 - h / 2) by EulerMaruyama, 1 by
LeimkuhlerMatthews, 1 - h^2 / 4 + O(h^3) by StochasticHeun and 1 + O(h^3) by ThirdOrder.
"""

import math
from dataclasses import dataclass

from diffusion.gradient_flow.flows.dynamics import Integrator, Stepped

KUTTA = 2.5127453266183286
"""The root z of 1 - z + z^2 / 2 - z^3 / 6 = -1, up to which steps of order 3 do not grow."""


@dataclass(frozen=True)
class EulerMaruyama(Integrator):
    """x + h b(x) + sqrt(2 tau h) xi: order 1, one velocity a step."""

    order = 1
    varying = True

    def step(self, dynamics, x, memory, h):
        return Stepped(x + h * dynamics.drift(x) + h**0.5 * dynamics.noise(x))

    def longest(self, curvature):
        return 2 / curvature


@dataclass(frozen=True)
class LeimkuhlerMatthews(Integrator):
    """x + h b(x) + sqrt(2 tau h) (xi + xi') / 2, where xi' is the xi of the next step: one velocity a step.

    Leimkuhler and Matthews 2013 (Applied Mathematics Research eXpress 2013:34), the limit of BAOAB for high friction.
    On the way it has order 1; the law that it ends in has order 2 (Leimkuhler, Matthews and Tretyakov 2014,
    Proceedings of the Royal Society A 470, 20140120), and for a Gaussian target it is exact. Steps of different
    lengths spoil that.
    """

    order = 1

    def step(self, dynamics, x, memory, h):
        before = dynamics.noise(x) if memory is None else memory
        after = dynamics.noise(x)
        return Stepped(x + h * dynamics.drift(x) + h**0.5 / 2 * (before + after), after)

    def longest(self, curvature):
        return 2 / curvature

    def copied(self, memory, origin):
        return None if memory is None else memory[origin]


@dataclass(frozen=True)
class StochasticHeun(Integrator):
    """Order 2, two velocities a step: Kloeden and Platen 1992, section 15.1, for additive noise."""

    order = 2

    def step(self, dynamics, x, memory, h):
        noise, now = h**0.5 * dynamics.noise(x), dynamics.drift(x)
        return Stepped(x + h / 2 * (now + dynamics.drift(x + h * now + noise)) + noise)

    def longest(self, curvature):
        return 2 / curvature


@dataclass(frozen=True)
class ThirdOrder(Integrator):
    """Order 3, four velocities a step: Kutta's third-order rule, its middle evaluated twice.

    A stage at a share a of the step sees noise W_a with E W_a^2 = E W_a W_1 = a in units of the step, as Brownian
    motion. That leaves two of the conditions of weak order 3 for additive noise (Debrabant 2010, BIT 50, 541):
    that the sum of stages has the variance 1/3 of the integral of Brownian motion, which no stages at different times
    on one path have, and E[W_a W_a'] of stages that one builds on the other. Two middles, neither built on the other,
    meet both if their noises W_1 / 2 + (sqrt(3) xi +- xi') / 4 have the covariance 3/8.
    """

    order = 3

    def step(self, dynamics, x, memory, h):
        whole, common, apart = (h**0.5 * dynamics.noise(x) for _ in range(3))
        start = dynamics.drift(x)
        middle = x + h / 2 * start + whole / 2 + math.sqrt(3) / 4 * common
        between = (dynamics.drift(middle + apart / 4) + dynamics.drift(middle - apart / 4)) / 2
        end = dynamics.drift(x + h * (2 * between - start) + whole)
        return Stepped(x + h / 6 * (start + 4 * between + end) + whole)

    def longest(self, curvature):
        return KUTTA / curvature
