"""Gradient flows of functionals of probability laws: particles, and one-step generators, that run downhill.

A *functional* F[q] knows its value, its first variation and the velocity -grad dF/dq at particles of q. A *flow* moves
particles on a functional, in a geometry: Wasserstein (explicitly, as Langevin's SDE, by proximal steps), Stein,
Fisher-Rao, or sums of these. A *one-step generator* is a network that chases where its own samples would flow.

    flow = WassersteinFlow(EnergyDistance(data))
    particles = flow.run(particles, steps=500, step_size=1.0)
"""

from diffusion.gradient_flow.chase import Chase
from diffusion.gradient_flow.flows.annealed import AnnealedLangevin
from diffusion.gradient_flow.flows.base import Alternating, Flow, Moment
from diffusion.gradient_flow.flows.fisher_rao import FisherRaoFlow
from diffusion.gradient_flow.flows.jko import JKO
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama, LeimkuhlerMatthews, StochasticHeun, ThirdOrder
from diffusion.gradient_flow.flows.preconditioners import EnsembleCovariance, Identity, Matrix
from diffusion.gradient_flow.flows.stein import SteinFlow
from diffusion.gradient_flow.flows.tempering import Tempered
from diffusion.gradient_flow.flows.underdamped import Underdamped
from diffusion.gradient_flow.flows.wasserstein import StepControl, WassersteinFlow
from diffusion.gradient_flow.functionals.base import Functional, Sum, Term
from diffusion.gradient_flow.functionals.drifting import Drifting
from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.fdivergence import Divergence, FDivergence, power
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kernels import Gaussian, InverseMultiquadric, Riesz
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.mmd import MMD
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.ratios import ClassifierRatio, Ratio
from diffusion.gradient_flow.functionals.sinkhorn import SinkhornDivergence
from diffusion.gradient_flow.functionals.sliced import SlicedWasserstein
from diffusion.gradient_flow.functionals.targets import ScorePotential
from diffusion.gradient_flow.gaussian_flow import GaussianFlow
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.gradient_flow.scores.base import GaussianScore, ScoreEstimator
from diffusion.gradient_flow.scores.blob import Blob
from diffusion.gradient_flow.scores.network_score import NetworkScore
from diffusion.gradient_flow.scores.stein_score import SteinScore

__all__ = [
    "JKO",
    "KL",
    "MMD",
    "Alternating",
    "AnnealedLangevin",
    "Blob",
    "Chase",
    "ClassifierRatio",
    "Divergence",
    "Drifting",
    "EnergyDistance",
    "EnsembleCovariance",
    "Entropy",
    "EulerMaruyama",
    "FDivergence",
    "FisherRaoFlow",
    "Flow",
    "Functional",
    "Gaussian",
    "GaussianFlow",
    "GaussianScore",
    "Identity",
    "Interaction",
    "InverseMultiquadric",
    "Langevin",
    "LeimkuhlerMatthews",
    "Matrix",
    "Metropolis",
    "Moment",
    "NetworkScore",
    "OneStepGenerator",
    "Potential",
    "Ratio",
    "Riesz",
    "ScoreEstimator",
    "ScorePotential",
    "SinkhornDivergence",
    "SlicedWasserstein",
    "SteinFlow",
    "SteinScore",
    "StepControl",
    "StochasticHeun",
    "Sum",
    "Tempered",
    "Term",
    "ThirdOrder",
    "Underdamped",
    "WassersteinFlow",
    "power",
]
