"""Samplers: from the prior at the horizon to data."""

from diffusion.samplers.adaptive import Adaptive
from diffusion.samplers.adaptive_multistep import AdaptiveMultistep
from diffusion.samplers.ancestral import Ancestral
from diffusion.samplers.base import Counted, FixedStep, Model, ODESampler, PlannedSampler, Sampler, generate
from diffusion.samplers.capture import Captured
from diffusion.samplers.churn import Churn
from diffusion.samplers.euler import Euler
from diffusion.samplers.grids import BandGrid, Grid, LogSNRGrid, PowerGrid, SigmaGrid
from diffusion.samplers.heun import Heun
from diffusion.samplers.multistep import Multistep
from diffusion.samplers.runge_kutta import RungeKutta
from diffusion.samplers.scores import Joint, Motion, Scored, motion
from diffusion.samplers.stochastic import (
    EulerMaruyama,
    PredictorCorrector,
    RenewalGrid,
    Stochastic,
    StochasticSampler,
)
from diffusion.samplers.tuned import Tuned, store_tuned, tuned_sampler
from diffusion.samplers.tuning import tune

__all__ = [
    "Adaptive",
    "AdaptiveMultistep",
    "Ancestral",
    "BandGrid",
    "Captured",
    "Churn",
    "Counted",
    "Euler",
    "EulerMaruyama",
    "FixedStep",
    "Grid",
    "Heun",
    "Joint",
    "LogSNRGrid",
    "Model",
    "Motion",
    "Multistep",
    "ODESampler",
    "PlannedSampler",
    "PowerGrid",
    "PredictorCorrector",
    "RenewalGrid",
    "RungeKutta",
    "Sampler",
    "Scored",
    "SigmaGrid",
    "Stochastic",
    "StochasticSampler",
    "Tuned",
    "generate",
    "motion",
    "store_tuned",
    "tune",
    "tuned_sampler",
]
