"""The functionals that every law is checked on. One that joins `FUNCTIONALS` inherits all of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from numpy.polynomial.polynomial import polyfit
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
from diffusion.gradient_flow.functionals.ratios import Ratio
from diffusion.gradient_flow.functionals.sinkhorn import SinkhornDivergence
from diffusion.gradient_flow.functionals.sliced import SlicedWasserstein
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.gradient_flow.scores.blob import Blob
from diffusion.metrics import GaussianLaw


@dataclass(frozen=True)
class GaussianRatio(Ratio):
    """log p/q of a Gaussian p to the Gaussian q that has the mean and covariance of the particles fitted to.

    The flow of reverse KL keeps q Gaussian, and its value is KL between the two.
    """

    target: GaussianLaw
    law: GaussianLaw | None = None

    def log_ratio(self, particles):
        x = particles.double()
        p, q = (torch.distributions.MultivariateNormal(*law, validate_args=False) for law in (self.target, self.law))
        return (p.log_prob(x) - q.log_prob(x)).to(particles.dtype)

    def fitted(self, particles, generator=None):
        return replace(self, law=GaussianLaw.of(particles))


@dataclass(frozen=True)
class LineRatio(Ratio):
    """log p/q on a line, of the law q whose quantiles the particles are, as they stay while they keep their order.

    The normal scores z of the quantiles are a smooth function of their places, here a polynomial, which a Gaussian law
    makes linear: log q = log N(z) + log z'.

    Args:
        log_p: (N,) -> (N,).
        scores: coefficients of z, the constant first.
    """

    log_p: Callable[[Tensor], Tensor]
    scores: tuple[float, ...] = ()

    def log_ratio(self, particles):
        x = particles[:, 0]
        z = sum(c * x**k for k, c in enumerate(self.scores))
        slope = sum(k * c * x ** (k - 1) for k, c in enumerate(self.scores) if k)
        return self.log_p(x) + z.square() / 2 + math.log(math.tau) / 2 - slope.log()

    def fitted(self, particles, generator=None):
        x, z = particles[:, 0].sort().values, quantiles(len(particles))[:, 0]
        return replace(self, scores=tuple(polyfit(x.numpy(), z.numpy(), 5)))


def quantiles(number: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Of a normal law at the middles of equal shares, (number, 1): the mean over them is an integral against it."""
    levels = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    return mean + std * torch.special.ndtri(levels)[:, None]


class Case(NamedTuple):
    """A functional, in 2 and in 5 dimensions.

    Attributes:
        build: data (M, d) -> functional.
        rest: whether particles that are the data themselves do not move, and no value is below theirs, 0.
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


def ratio_of(kind: str, data: Tensor) -> FDivergence:
    """From the Gaussian with the mean and covariance of the data."""
    return FDivergence(kind, GaussianRatio(GaussianLaw.of(data)))


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
    Case(
        "kl_gaussian",
        lambda data: KL(lambda x: -(x.square() + math.log(math.pi) / 2).sum(1), Entropy(GaussianScore())),
    ),
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
    Case("reverse_kl", lambda data: ratio_of("reverse_kl", data), rest=True),
    Case("neyman", lambda data: ratio_of("neyman", data), rest=True),
]


def draws(number: int, dim: int, seed: int, spread: float = 1.0) -> Tensor:
    """Normal points (number, dim), float64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(number, dim, generator=generator, dtype=torch.float64)
