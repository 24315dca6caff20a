"""Problems for the Galerkin solver, each with bases that resolve it and what its density is known to be."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from diffusion.fokker_planck import problems
from diffusion.fokker_planck.bases import Basis, Fourier, Hermite, Legendre
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.galerkin import GalerkinSolver
from diffusion.fokker_planck.problems import Problem


@dataclass(frozen=True)
class Case:
    """A problem up to `time`.

    Attributes:
        bases: order -> bases.
        orders: at which the error falls exponentially, the last of them enough.
        error: L1 error that the last order stays below.
        symmetrised: whether that form is to be had.
        density: the exact one at `time`, unless the problem has a law.
    """

    problem: Problem
    bases: Callable[[int], list[Basis]]
    orders: tuple[int, ...]
    error: float
    time: float = 1.0
    symmetrised: bool = False
    density: Callable[[Tensor], Tensor] | None = None

    def solve(self, order: int | None = None, **options):
        solver = GalerkinSolver(self.problem.equation, self.bases(order or self.orders[-1]), **options)
        return solver.solve(self.problem.start, [0.0, self.time])

    def exact(self, x: Tensor) -> Tensor:
        return self.density(x) if self.density else self.problem.law_at(self.time).log_prob(x).exp()


def l1(case: Case, solution, points: int = 91) -> float:
    """The L1 error on an even grid of the domain that has nothing to do with the nodes."""
    axes = []
    for basis in solution.expansion.product.bases:
        low, high = (basis.low, basis.high) if math.isfinite(basis.low) else (-6.0, 6.0)
        axes.append(torch.linspace(low, high, points if len(solution.nodes) > 1 else 1201, dtype=torch.float64)[1:-1])
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    return float((solution.density(x) - case.exact(x)).abs().sum()) * cell


@functools.cache
def _double_well_differences(time: float) -> tuple[np.ndarray, np.ndarray]:
    """The transient double well by finite differences of order 10 and scipy's exponential; good to 1e-9 in L1."""
    m, number = 5, 481
    x = np.linspace(-3.4, 3.4, number)
    stencil = np.vander(np.arange(-m, m + 1.0), increasing=True).T
    first, second = (np.linalg.solve(stencil, np.eye(2 * m + 1)[k] * k) for k in (1, 2))

    def banded(weights):
        return sum(np.diag(np.full(number - abs(j), weights[j + m]), j) for j in range(-m, m + 1))

    h = x[1] - x[0]
    generator = -banded(first) / h * (-4 * x * (x * x - 1)) + banded(second) / h**2 / 2
    start = np.exp(-((x + 1) ** 2) / 0.18) / math.sqrt(0.18 * math.pi)
    return x, scipy.linalg.expm(time * generator) @ start


def double_well_at(time: float) -> Callable[[Tensor], Tensor]:
    """Its density, by interpolation of what is far finer than the cases need."""
    x, p = _double_well_differences(time)
    h = x[1] - x[0]

    def density(points: Tensor) -> Tensor:
        q = points[:, 0].numpy()[:, None]
        return torch.from_numpy(np.sinc((q - x) / h) @ p)

    return density


def _well_in_the_plane(x: Tensor) -> Tensor:
    across = problems.ornstein_uhlenbeck(1, noise=1.0, start=problems.gaussian(0.0, 0.3)).law_at(1.0)
    return double_well_at(1.0)(x[:, :1]) * across.log_prob(x[:, 1:]).exp()


def _ratchet(x: Tensor) -> Tensor:
    return problems.ratchet_stationary(x[:, 0])[0]


def _full(x: Tensor, t: Tensor) -> Tensor:
    root = torch.tensor([[1.0, 0.0], [0.3, 1.0]], dtype=x.dtype)
    return root.expand(len(x), 2, 2)


def correlated() -> Problem:
    """dx = -x dt + L dw with a full matrix L: an Ornstein-Uhlenbeck process of covariance L L^T / 2."""
    base = problems.ornstein_uhlenbeck(2)
    final = _full(torch.zeros(1, 2, dtype=torch.float64), torch.tensor(0.0))[0]
    final = final @ final.mT / 2

    def law_at(t: float):
        kept = math.exp(-t) * torch.eye(2, dtype=torch.float64)
        return base.start.moved(kept, (1 - math.exp(-2 * t)) * final)

    return Problem(FokkerPlanck(lambda x, t: -x, _full), base.start, base.domain, 1.0, law_at=law_at)


def log_well() -> Problem:
    """Noise proportional to the state, and a drift that keeps the Gamma density of shape 8 and scale 1/4."""
    a = 0.4
    equation = FokkerPlanck(lambda x, t: a * x * (8 - 4 * x) / 2 + a * x / 2, lambda x, t: math.sqrt(a) * x)
    start = problems.LogNormal(0.3, 0.2)
    return Problem(equation, start, ((0.1, 8.0),), 1.0, log_stationary=lambda x: 7 * x[:, 0].log() - 4 * x[:, 0])


CASES = {
    "ou_hermite": Case(
        problems.ornstein_uhlenbeck(), lambda n: [Hermite(n)], (12, 20, 28, 36, 60), 1e-10, symmetrised=True
    ),
    "ou_legendre": Case(
        problems.ornstein_uhlenbeck(), lambda n: [Legendre(n, -7.0, 7.0)], (28, 38, 48, 80), 1e-10, symmetrised=True
    ),
    "vp_fourier": Case(
        problems.variance_preserving(), lambda n: [Fourier(n, -7.0, 7.0)], (33, 45, 57, 97), 1e-8, 0.1, symmetrised=True
    ),
    "double_well": Case(
        problems.double_well(),
        lambda n: [Fourier(n, -3.0, 3.0)],
        (57, 69, 81, 97),
        1e-8,
        symmetrised=False,
        density=double_well_at(1.0),
    ),
    "ratchet": Case(
        problems.ratchet(), lambda n: [Fourier(n, 0.0, math.tau)], (9, 13, 17, 41), 1e-10, 60.0, density=_ratchet
    ),
    "geometric": Case(
        problems.geometric_brownian(),
        lambda n: [Legendre(n, 0.1, 8.5)],
        (32, 48, 64, 96),
        1e-8,
        0.3,
        symmetrised=True,
    ),
    "ou_turn": Case(
        problems.ornstein_uhlenbeck(2, turn=2.0), lambda n: [Hermite(n, 0.0, 0.9)] * 2, (10, 16, 22, 34), 3e-9
    ),
    "correlated": Case(correlated(), lambda n: [Hermite(n, 0.0, 0.72), Hermite(n, 0.05, 0.75)], (12, 18, 26), 1e-8),
    "double_well_2d": Case(
        problems.double_well(2),
        lambda n: [Fourier(n, -2.6, 2.6), Fourier(45, -6.0, 6.0)],
        (33, 41, 49, 65),
        1e-6,
        symmetrised=True,
        density=_well_in_the_plane,
    ),
}
SMOOTH = [name for name in CASES if name != "double_well_2d"]
