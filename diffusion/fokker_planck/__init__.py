"""The density itself: the Fokker-Planck equation, solved on grids, in test functions and by particles, or tested."""

from diffusion.fokker_planck import test_functions
from diffusion.fokker_planck.bases import Fourier, Hermite, Legendre
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.galerkin import GalerkinSolver
from diffusion.fokker_planck.grid import GridSolution, GridSolver
from diffusion.fokker_planck.inverse import Fit, fit
from diffusion.fokker_planck.matching import WeakMatching, paired
from diffusion.fokker_planck.particles import ParticleSolution, ParticleSolver
from diffusion.fokker_planck.products import hyperbolic_cross, total_degree
from diffusion.fokker_planck.sampled import SampledGalerkinSolver
from diffusion.fokker_planck.weak import WeakResidual, weak_residual

__all__ = [
    "Fit",
    "FokkerPlanck",
    "Fourier",
    "GalerkinSolver",
    "GridSolution",
    "GridSolver",
    "Hermite",
    "Legendre",
    "ParticleSolution",
    "ParticleSolver",
    "SampledGalerkinSolver",
    "WeakMatching",
    "WeakResidual",
    "fit",
    "hyperbolic_cross",
    "paired",
    "test_functions",
    "total_degree",
    "weak_residual",
]
