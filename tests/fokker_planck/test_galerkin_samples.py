"""The Galerkin solver fed by samples: the start, and the matrix."""

import math

import pytest
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Fourier, Hermite, Legendre
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.galerkin import GalerkinSolver
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.problems import ornstein_uhlenbeck, ratchet
from diffusion.fokker_planck.products import total_degree
from diffusion.fokker_planck.sampled import SampledGalerkinSolver

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("symmetrised", [False, True], ids=["plain", "symmetrised"])
@pytest.mark.parametrize("dim", [1, 2])
def test_coefficients_of_samples_are_within_their_standard_errors(dim, symmetrised):
    problem = ornstein_uhlenbeck(dim, start=gaussian(0.4, 0.7, dim))
    solver = GalerkinSolver(problem.equation, [Hermite(20)] * dim, symmetrised)
    exact, scores = solver.solve(problem.start, [0.0, 1.0]), []
    low = (sum(torch.meshgrid(*[torch.arange(20)] * dim, indexing="ij")) <= 8).reshape(-1)[1:]
    for seed in range(6):
        found = solver.solve(problem.start.sample(20_000, generator(seed)), [0.0, 1.0])
        gaps = (found.coefficients - exact.coefficients)[0].reshape(-1)[1:]
        scores.append((gaps / found.standard_errors.reshape(-1)[1:])[low])
        assert float(found.mass_error.max()) < 1e-12
        assert float(((found.values - exact.values).abs() * exact.weights)[-1].sum()) < 0.02
    scores = torch.stack(scores)
    assert float(scores.abs().max()) < 4
    assert 0.6 < float(scores.square().mean()) ** 0.5 < 1.5


def test_samples_on_an_interval():
    problem = ratchet()
    solver = GalerkinSolver(problem.equation, Fourier(25, 0.0, math.tau))
    found = solver.solve(problem.start.sample(50_000, generator()), [0.0, 1.0])
    exact = solver.solve(problem.start, [0.0, 1.0])
    gap = float(((found.values - exact.values).abs() * exact.weights)[-1].sum())
    assert 1e-5 < gap < 0.02


def test_samples_outside_the_domain_are_left_out():
    problem = ornstein_uhlenbeck()
    solver = GalerkinSolver(problem.equation, Legendre(20, -4.0, 4.0))
    inside = problem.start.sample(1000, generator()).clamp(-3.9, 3.9)
    outlier = torch.full((1, 1), 4.5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="hold 0.999001"):
        found = solver.solve(torch.cat([inside, outlier]), [0.0, 0.1])
    torch.testing.assert_close(found.values, solver.solve(inside, [0.0, 0.1]).values)


def matrix_of(problem, bases, points, **options):
    drift, covariance = problem.equation.drift(points, 0.0), problem.equation.covariance(points, 0.0)
    return SampledGalerkinSolver(bases, points, drift, covariance, **options)


def test_matrix_from_samples_is_exact_where_the_span_is_closed():
    problem = ornstein_uhlenbeck(start=gaussian(0.5, 0.7))
    basis = Hermite(20, 0.0, 0.9)
    solver = matrix_of(problem, basis, torch.randn(400, 1, dtype=torch.float64, generator=generator()))
    assert solver.residual < 1e-12
    formula = GalerkinSolver(problem.equation, basis)
    modes = formula.product.modes[0]
    torch.testing.assert_close(solver.matrix, modes.mT @ formula.matrix() @ modes, rtol=0, atol=1e-7)
    solution = solver.solve(problem.start, [0.0, 0.6])
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)[:, None]
    torch.testing.assert_close(solution.density(x), problem.law_at(0.6).log_prob(x).exp(), rtol=0, atol=1e-6)
    assert float(solution.mass_error.max()) < 1e-12


@pytest.mark.parametrize("full", [False, True], ids=["isotropic", "full"])
def test_matrix_from_samples_in_the_plane(full):
    problem = ornstein_uhlenbeck(2, turn=1.5, start=gaussian([0.5, 0.2], 0.8))
    bases = [Hermite(12, 0.0, 0.95)] * 2
    points = torch.randn(3000, 2, dtype=torch.float64, generator=generator())
    covariance = problem.equation.covariance(points, 0.0)
    if full:
        covariance = covariance[:, None, None] * torch.tensor([[1.0, 0.2], [0.2, 0.9]], dtype=torch.float64)
    drift, keep = problem.equation.drift(points, 0.0), total_degree(bases)
    solver = SampledGalerkinSolver(bases, points, drift, covariance, keep=keep)
    assert solver.residual < 1e-12 and len(solver.matrix) == 78
    if full:
        noise = covariance[0]
        equation = FokkerPlanck.from_covariance(problem.equation.drift, lambda x, t: noise.expand(len(x), 2, 2))
        formula = GalerkinSolver(equation, bases, keep=keep).matrix()
        torch.testing.assert_close(solver.matrix, formula, rtol=0, atol=1e-7)
    else:
        solution = solver.solve(problem.start, [0.0, 0.6])
        x = torch.randn(50, 2, dtype=torch.float64, generator=generator(1))
        torch.testing.assert_close(solution.density(x), problem.law_at(0.6).log_prob(x).exp(), rtol=0, atol=2e-4)


def test_matrix_from_samples_converges_as_the_root_of_their_number():
    problem, errors = ratchet(), []
    exact = GalerkinSolver(problem.equation, Fourier(33, 0.0, math.tau)).solve(problem.start, [0.0, 1.0])
    for number in (1_000, 100_000):
        points = math.tau * torch.rand(number, 1, dtype=torch.float64, generator=generator())
        solution = matrix_of(problem, Fourier(33, 0.0, math.tau), points).solve(problem.start, [0.0, 1.0])
        errors.append(float(((solution.values - exact.values).abs() * exact.weights)[-1].sum()))
    assert errors[0] < 0.02 and errors[1] < errors[0] / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drift": torch.zeros(50, 2)}, r"\(50, 2\)"),
        ({"covariance": torch.ones(49)}, r"\(49,\)"),
        ({"bases": Hermite(51)}, "50 points"),
        ({"bases": Legendre(5, -1.0, 0.4)}, "outside"),
        ({"points": torch.zeros(50, 1)}, "pivot"),
    ],
    ids=["drift", "covariance", "few", "outside", "same"],
)
def test_bad_samples_are_refused(change, message):
    points = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
    given = {"bases": Hermite(5), "points": points, "drift": -points, "covariance": torch.ones(50), **change}
    with pytest.raises(UserError, match=message):
        SampledGalerkinSolver(**given)
