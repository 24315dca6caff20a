"""Heun's method, the trapezoidal rule with an Euler predictor."""

from dataclasses import dataclass

from diffusion.samplers.base import FixedStep


@dataclass(frozen=True)
class Heun(FixedStep):
    """Second order, 2 steps - 1 evaluations in all (Karras et al. 2022, algorithm 1)."""

    order = 2

    def step(self, velocity, x, t, t_next):
        h, slope = t_next - t, velocity(x, t)
        return x + 0.5 * h * (slope + velocity(x + h * slope, t_next))
