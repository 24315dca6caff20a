"""The functionals that every law is checked on. One that joins `FUNCTIONALS` inherits all of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.fields import EmpiricalField, variance_exploding
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.fdivergence import FDivergence
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kernels import Gaussian, InverseMultiquadric, Riesz
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.mmd import MMD
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.sinkhorn import SinkhornDivergence
from diffusion.gradient_flow.functionals.sliced import SlicedWasserstein
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.gradient_flow.scores.blob import Blob


class Case(NamedTuple):
    """A functional, in 2 and in 5 dimensions.

    Attributes:
        build: data (M, d) -> functional.
        rest: whether particles that are the data themselves do not move.
        tolerance: of velocities against autograd, relative.
        copies: of the particles to which one is added, four numbers, each twice the one before; none
            where the derivative in a weight has two sides.
    """

    name: str
    build: Callable[[Tensor], Functional]
    rest: bool = False
    tolerance: float = 1e-6
    copies: tuple[int, ...] = (2, 4, 8, 16)

    def __str__(self) -> str:
        return self.name


FUNCTIONALS = [
    Case("potential", lambda data: Potential(lambda x: (x**4).sum(1) / 4 + x[:, 0] * x[:, 1])),
    Case(
        "sum",
        lambda data: 0.5 * Potential(lambda x: x.square().sum(1)) + 2.0 * Potential(lambda x: x.cos().prod(1)),
    ),
    Case("entropy_blob", lambda data: Entropy(Blob())),
    Case("entropy_blob_fixed", lambda data: Entropy(Blob(bandwidth=0.8))),
    Case("entropy_gaussian", lambda data: Entropy(GaussianScore())),
    Case(
        "interaction", lambda data: Interaction(lambda gaps: 1 - (-gaps.square().sum(-1) / 2).exp() + gaps[..., 0] ** 3)
    ),
    Case("interaction_singular", lambda data: Interaction(lambda gaps: -gaps.norm(dim=-1).log(), singular=True)),
    Case("kl", lambda data: KL(lambda x: -(x**4).sum(1) / 4 + x[:, 0] * x[:, 1])),
    Case("kl_gaussian", lambda data: KL(lambda x: -x.square().sum(1), Entropy(GaussianScore()))),
    Case("kl_model", lambda data: KL(EmpiricalField(variance_exploding(), data), time=0.7)),
    Case("mmd_gaussian", lambda data: MMD(Gaussian(), data), rest=True),
    Case("mmd_multiquadric", lambda data: MMD(InverseMultiquadric(1.5, (0.5, 1, 2)), data), rest=True),
    Case("mmd_riesz", lambda data: MMD(Riesz(1.3), data), rest=True),
    Case("mmd_function", lambda data: MMD(lambda x, y: (1 + x @ y.T) ** 3, data), rest=True),
    Case("energy", lambda data: EnergyDistance(data), rest=True),
    # Sliced W_p^p is piecewise smooth in the weights, with kinks where a quantile i/N is some j/M: 23 and many copies
    # keep clear of them.
    Case("sliced", lambda data: SlicedWasserstein(data[:23], 20), copies=(32, 64, 128, 256)),
    Case("sliced_cubic", lambda data: SlicedWasserstein(data[:23], 20, p=3), copies=(32, 64, 128, 256)),
    Case("sliced_even", lambda data: SlicedWasserstein(data), rest=True, copies=()),
    Case("sinkhorn", lambda data: SinkhornDivergence(data, 1.0, tolerance=1e-12), rest=True),
    Case("sinkhorn_distance", lambda data: SinkhornDivergence(data, 0.7, p=1, tolerance=1e-12), rest=True),
    Case("sinkhorn_relative", lambda data: SinkhornDivergence(data, 1.0, tolerance=1e-12).relative()),
    Case("reverse_kl", lambda data: FDivergence("reverse_kl", lambda x: x.cos().sum(1) - x.square().sum(1) / 4)),
    Case("pearson", lambda data: FDivergence("pearson", lambda x: x.cos().sum(1) - x.square().sum(1) / 4)),
]


def draws(number: int, dim: int, seed: int, spread: float = 1.0) -> Tensor:
    """Normal points (number, dim), float64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(number, dim, generator=generator, dtype=torch.float64)
