"""The density itself: the Fokker-Planck equation, solved on grids, in test functions and by particles, or tested."""

from diffusion.fokker_planck.equation import FokkerPlanck

__all__ = ["FokkerPlanck"]
