"""Samplers: from the prior at the horizon to data."""

from diffusion.samplers.adaptive import Adaptive
from diffusion.samplers.base import Counted, FixedStep, Model, Sampler, generate
from diffusion.samplers.euler import Euler
from diffusion.samplers.grids import Grid, LogGrid, PowerGrid
from diffusion.samplers.heun import Heun

__all__ = [
    "Adaptive", "Counted", "Euler", "FixedStep", "Grid", "Heun", "LogGrid", "Model", "PowerGrid", "Sampler", "generate",
]  # fmt: skip
