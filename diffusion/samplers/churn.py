"""EDM's stochastic sampler, for every field."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.samplers.frames import Frame
from diffusion.samplers.stochastic import Draws, StochasticSampler, own_noise


@dataclass(frozen=True)
class Churn(StochasticSampler):
    """EDM's sampler (Karras et al. 2022, algorithm 2): noise is added up to a higher level, then Heun's step goes down.

    Second order. The level is sigma / alpha, of fields that are not affine sigma. Where the base is stable, Gaussian or
    gravity's, noise of its own law takes one marginal to another: 2 steps - 1 evaluations in all, and no score.
    Elsewhere Gaussian noise does, with the score's help: `Stochastic`'s step, upwards, two evaluations more each time.

    Args:
        churn: EDM's S_churn: the level is raised by the factor 1 + churn / steps, at most by sqrt(2), but not beyond
            that of the horizon.
        lowest, highest: levels between which it is raised; EDM's S_min and S_max.
        inflate: EDM's S_noise, a factor of the scale of the noise; 1 is right for an exact model.
    """

    churn: float = 20.0
    lowest: float = 0.0
    highest: float = math.inf
    inflate: float = 1.0
    order = 2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.churn < math.inf:
            raise UserError(f"churn is {self.churn}, expected a number of 0 or more")
        levels = (self.lowest, self.highest, self.inflate)
        numbers = all(isinstance(level, int | float) for level in levels)
        if not (numbers and 0 <= self.lowest < self.highest and 0 <= self.inflate < math.inf):
            raise UserError(
                f"churn has lowest={self.lowest}, highest={self.highest} and inflate={self.inflate}, expected numbers "
                "with 0 <= lowest < highest, and inflate of 0 or more"
            )

    def integrate(self, frame, x, times, draws):
        log_level = frame.log_level(times)
        gain = math.log1p(min(self.churn / self.steps, math.sqrt(2) - 1))
        churned = (log_level >= math.log(max(self.lowest, 1e-300))) & (log_level <= math.log(self.highest))
        raised = times.where(~churned, self._time_at(frame, log_level + gain, times))
        for t, t_up, t_next in zip(times.to(x)[:-1], raised.to(x)[:-1], times.to(x)[1:], strict=True):
            if t_up > t:
                x = self._raise(frame, x, t, t_up, draws)
            h, slope = t_next - t_up, frame.velocity(x, t_up)
            x = x + 0.5 * h * (slope + frame.velocity(x + h * slope, t_next))
        return x

    def _raise(self, frame: Frame, x: Tensor, t: Tensor, t_up: Tensor, draws: Draws) -> Tensor:
        renewal = max(0.0, float(frame.log_level(torch.stack([t, t_up])).diff()))
        step = frame.step(t, t_up, renewal)
        if frame.stability is not None:
            return step.keep * x + self.inflate * own_noise(frame, x, t_up, renewal, draws)
        now, xi = frame.pair(x, t, renewal), self.inflate * draws.normal(x)
        return step(x, now, xi, frame.pair(step(x, now, xi), t_up, renewal))

    @staticmethod
    def _time_at(frame: Frame, log_level: Tensor, times: Tensor) -> Tensor:
        """The times (n,) of these levels, at most the horizon, by bisection from `times` up."""
        low, high = times.clone(), torch.full_like(times, frame.model.field.horizon)
        for _ in range(60):
            middle = (low + high) / 2
            above = frame.log_level(middle) > log_level
            low, high = low.where(above, middle), middle.where(above, high)
        return high
