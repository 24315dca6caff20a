"""Ancestral sampling: DDPM and DDIM, and the same for every other field."""

import math
from dataclasses import dataclass

from diffusion.errors import UserError
from diffusion.samplers.stochastic import StochasticSampler, own_noise


@dataclass(frozen=True)
class Ancestral(StochasticSampler):
    """DDPM (Ho et al. 2020) for eta = 1, DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16) for eta = 0.

    First order, `steps` evaluations in all. With a Gaussian base x' is drawn from q(x'|x, x0) with x0 replaced by its
    mean given x. That is a step of the ODE to a level below that of x', and noise up to it, which is what is done for
    every stable base, gravity's among them; no score is needed. Elsewhere as much is renewed by Gaussian noise, in a
    step of the SDE of `EulerMaruyama`.

    Args:
        eta: scale of the noise in units of that which renews all but the share level' / level, from 0 to 1; the level
            is sigma / alpha, of fields that are not affine sigma.
    """

    eta: float = 1.0
    order = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}, expected a number from 0 to 1")

    def integrate(self, frame, x, times, draws):
        a, drops = frame.stability or 2.0, frame.log_level(times).diff().clamp_max(0).tolist()
        for t, t_next, drop in zip(times.to(x)[:-1], times.to(x)[1:], drops, strict=True):
            renewal = -math.log1p(self.eta**a * math.expm1(a * drop)) / a if self.eta < 1 else -drop
            step = frame.step(t, t_next, renewal)
            if renewal and frame.stability is not None:
                x = step(x, frame.pair(x, t, 0.0), 0.0) + own_noise(frame, x, t_next, renewal, draws)
            else:
                x = step(x, frame.pair(x, t, renewal), draws.normal(x) if renewal else 0.0)
        return x
