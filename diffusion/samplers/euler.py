"""Euler's method."""

from dataclasses import dataclass

from diffusion.samplers.base import FixedStep


@dataclass(frozen=True)
class Euler(FixedStep):
    """First order, `steps` evaluations in all."""

    order = 1

    def step(self, velocity, x, t, t_next):
        return x + (t_next - t) * velocity(x, t)
