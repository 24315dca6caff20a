"""The Galerkin solver: exponential accuracy, mass, order in time, stationary states, the two forms."""

import math
import warnings

import pytest
import torch
from galerkin_cases import CASES, Case, l1, log_well

from diffusion.fokker_planck.bases import Fourier, Hermite, Legendre
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.galerkin import GalerkinSolver
from diffusion.fokker_planck.laws import GaussianMixture, gaussian
from diffusion.fokker_planck.problems import banana, double_well, ornstein_uhlenbeck, variance_preserving
from diffusion.fokker_planck.products import hyperbolic_cross, total_degree

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def forms(case: Case) -> list[bool]:
    """The forms that resolve a case: two coordinates without a potential have one, a wide start the other."""
    return [True] if case.problem.dim > 1 and case.symmetrised else [False, True] if case.symmetrised else [False]


RUNS = [(name, form) for name, case in CASES.items() for form in forms(case)]
IDS = [f"{name}-{'symmetrised' if form else 'plain'}" for name, form in RUNS]


@pytest.mark.parametrize(("name", "symmetrised"), RUNS, ids=IDS)
def test_errors_fall_exponentially_and_mass_is_kept(name, symmetrised):
    case, errors = CASES[name], []
    for order in case.orders:
        solution = case.solve(order, symmetrised=symmetrised)
        assert float(solution.mass_error.max()) < 1e-12
        errors.append(l1(case, solution))
    limit = 3e-8 if name == "vp_fourier" and symmetrised else case.error  # sqrt(pi) at the ends is 5e-6
    assert errors[-1] < limit
    for (n, before), (m, after) in zip(
        zip(case.orders, errors, strict=True), zip(case.orders[1:], errors[1:], strict=True), strict=False
    ):
        assert after < max(before * math.exp(-0.08 * (m - n)), limit)
    assert errors[0] > 30 * errors[-1]


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_itself_loses_no_mass(name):
    case = CASES[name]
    solver = GalerkinSolver(case.problem.equation, case.bases(case.orders[0])[:1] * case.problem.dim)
    if solver.product.size > 500:
        solver = GalerkinSolver(case.problem.equation, [Hermite(15, 0.0, 0.8)] * 2)
    matrix, (_, tilt) = solver.matrix(0.0), solver._expansion([0.0])
    leak = (tilt.mass @ matrix).abs().max() / (matrix.norm() * tilt.mass.norm())
    assert float(leak) < 1e-14


def test_symmetrised_matrix_is_symmetric_never_grows_and_keeps_the_gibbs_state():
    problem = log_well()
    solver = GalerkinSolver(problem.equation, Legendre(48, 0.1, 8.0), symmetrised=True)
    rates = torch.linalg.eigvalsh(solver.matrix())
    assert float(rates.max()) < 1e-9 * float(-rates.min())
    coarse = GalerkinSolver(problem.equation, Legendre(12, 0.1, 8.0), symmetrised=True)
    matrix, (_, tilt) = coarse.matrix(), coarse._expansion([0.0])
    assert float((matrix @ tilt.mass).norm()) < 1e-12 * float(matrix.norm() * tilt.mass.norm())

    class Gibbs:
        @staticmethod
        def log_prob(x):
            return problem.log_stationary(x) + 8 * math.log(4.0) - math.lgamma(8.0)

    solution = solver.solve(Gibbs(), [0.0, 0.1, 10.0])
    x = torch.linspace(0.2, 7.9, 97, dtype=torch.float64)[:, None]
    for k in range(3):
        torch.testing.assert_close(solution.density(x, k), solution.density(x, 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.density(x), Gibbs.log_prob(x).exp(), rtol=0, atol=2e-7)


def test_noise_that_depends_on_the_state_relaxes_to_the_gibbs_density():
    problem = log_well()
    x = torch.linspace(0.2, 7.9, 97, dtype=torch.float64)[:, None]
    gibbs = (problem.log_stationary(x) + 8 * math.log(4.0) - math.lgamma(8.0)).exp()
    for symmetrised in (False, True):
        solver = GalerkinSolver(problem.equation, Legendre(64, 0.1, 8.0), symmetrised=symmetrised)
        solution = solver.solve(problem.start, [0.0, 0.7, 40.0])
        torch.testing.assert_close(solution.density(x), gibbs, rtol=0, atol=2e-7)
    other = GalerkinSolver(problem.equation, Legendre(64, 0.1, 8.0)).solve(problem.start, [0.0, 0.7])
    torch.testing.assert_close(solution.density(x, 1), other.density(x), rtol=0, atol=2e-7)


def test_symmetrised_agrees_with_plain_on_the_banana():
    problem = banana(0.5)
    bases = [Fourier(45, -3.2, 3.2), Fourier(57, -2.4, 6.5)]
    plain, symmetrised = (
        GalerkinSolver(problem.equation, bases, symmetrised=form).solve(problem.start, [0.0, 0.2])
        for form in (False, True)
    )
    gap = float(((plain.values - symmetrised.values).abs() * plain.weights)[-1].sum())
    assert gap < 1e-4
    coarse = GalerkinSolver(problem.equation, [b.of_order(b.order - 12) for b in bases], symmetrised=True)
    far = coarse.solve(problem.start, [0.0, 0.2])
    points = symmetrised.expansion.product.points
    further = (far.density(points) - plain.values[-1].reshape(-1)).abs() @ plain.weights.reshape(-1)
    assert float(further) > 5 * gap


@pytest.mark.parametrize("dim", [1, 2])
def test_symmetrised_density_is_right_between_the_nodes(dim):
    """At the start too, where p / sqrt(pi) is 1e13 far out, and its expansion of no use between the nodes."""
    problem = double_well(dim)
    bases = [Fourier(97, -2.6, 2.6), Fourier(65, -6.0, 6.0)][:dim]
    solution, plain = (
        GalerkinSolver(problem.equation, bases, symmetrised=form).solve(problem.start, [0.0, 0.5])
        for form in (True, False)
    )
    x = 2 * torch.rand(200, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1.5
    torch.testing.assert_close(solution.density(x, 0), problem.start.log_prob(x).exp(), rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.density(x, 1), plain.density(x, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.positive().scale, torch.ones(2, dtype=torch.float64), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("n", "dim"), [(16, 1), (24, 1), (20, 2)])
def test_symmetrised_hermite_functions_lose_nothing_between_the_nodes(n, dim):
    """The Gibbs state is their first function squared, which few of them cannot hold without the tilt of their own."""
    problem = ornstein_uhlenbeck(dim)
    pi = gaussian(0.0, 1.0, dim)
    solution = GalerkinSolver(problem.equation, [Hermite(n)] * dim, symmetrised=True).solve(pi, [0.0, 0.5])
    x = 2 * torch.randn(100, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(2):
        torch.testing.assert_close(solution.density(x, k), pi.log_prob(x).exp(), rtol=0, atol=1e-13)
    torch.testing.assert_close(solution.positive().negative, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-13)


def swinging() -> tuple:
    """A drift and a noise that swing: operators at different times do not commute."""
    equation = FokkerPlanck(
        lambda x, t: -(1 + 0.5 * torch.sin(5 * t)[:, None]) * x + 2 * torch.cos(4 * t)[:, None],
        lambda x, t: (1 + 0.5 * torch.sin(3 * t)).expand(len(x)),
    )
    return GalerkinSolver(equation, Hermite(32, 0.0, 0.9)), gaussian(0.5, 0.7), 16


def pushed_well() -> tuple:
    equation = FokkerPlanck(
        lambda x, t: -4 * x * (x * x - 1) + 0.5 * torch.sin(4 * t)[:, None], lambda x, t: torch.ones_like(x[:, 0])
    )
    return GalerkinSolver(equation, Fourier(55, -2.6, 2.6)), double_well().start, 16


@pytest.mark.parametrize("make", [swinging, pushed_well])
def test_order_in_time_is_the_declared_one(make):
    solver, start, steps = make()
    runs = [solver.solve(start, [0.0, 0.8], 1.0, steps=number) for number in (steps, 2 * steps, 8 * steps)]
    weights, exact = runs[0].weights, runs[-1].values[-1]
    coarse, fine = (float(((run.values[-1] - exact).abs() * weights).sum()) for run in runs[:2])
    assert math.log2(coarse / fine) == pytest.approx(GalerkinSolver.order, abs=0.15)
    assert max(float(run.mass_error.max()) for run in runs) < 1e-12


def test_steps_chosen_by_the_tolerance_meet_it():
    solver, start, _ = swinging()
    chosen = solver.solve(start, [0.0, 0.5], 1e-5)
    fine = solver.solve(start, [0.0, 0.5], 1.0, steps=64)
    assert float(((chosen.values - fine.values).abs() * fine.weights)[-1].sum()) < 1e-5
    assert chosen.steps > 3 and chosen.error <= 1e-5


def test_a_change_of_time_takes_one_step_between_times():
    problem = variance_preserving()
    solution = GalerkinSolver(problem.equation, Fourier(97, -7.0, 7.0)).solve(problem.start, [0.0, 0.2, 1.0])
    assert solution.steps == 2


def test_moments_and_times():
    problem = ornstein_uhlenbeck(2, turn=2.0)
    solution = GalerkinSolver(problem.equation, [Hermite(30, 0.0, 0.9)] * 2).solve(problem.start, [0.0, 0.4, 1.0])
    mean, covariance = solution.moments()
    for k, time in enumerate(solution.times):
        law = problem.law_at(time)
        torch.testing.assert_close(mean[k], law.mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(covariance[k], law.covariance, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("keep", "error"), [(total_degree, 1e-6), (hyperbolic_cross, 1e-2)], ids=["total", "cross"])
@pytest.mark.parametrize("symmetrised", [False, True], ids=["plain", "symmetrised"])
def test_sparse_products(keep, error, symmetrised):
    problem = ornstein_uhlenbeck(2, turn=0.0 if symmetrised else 2.0)
    bases = [Hermite(24, 0.0, 1.0 if symmetrised else 0.9)] * 2
    full = GalerkinSolver(problem.equation, bases, symmetrised).solve(problem.start, [0.0, 1.0])
    solver = GalerkinSolver(problem.equation, bases, symmetrised, keep=keep(bases))
    sparse = solver.solve(problem.start, [0.0, 1.0])
    assert solver.product.size <= 300 < math.prod(solver.product.shape)
    assert float(sparse.mass_error.max()) < 1e-12
    gap = ((sparse.values - full.values).abs() * full.weights).sum((1, 2))
    assert float(gap[-1]) < error
    assert not bool(sparse.coefficients[:, ~keep(bases)].any())


def test_three_coordinates():
    problem = ornstein_uhlenbeck(3, turn=1.0, start=gaussian([0.3, 0.0, -0.2], 0.8))
    solution = GalerkinSolver(problem.equation, [Hermite(10, 0.0, 0.95)] * 3).solve(problem.start, [0.0, 0.5])
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(solution.density(x), problem.law_at(0.5).log_prob(x).exp(), rtol=0, atol=1e-6)
    assert float(solution.mass_error.max()) < 1e-12


@pytest.mark.parametrize(
    ("keep", "order", "said"), [(hyperbolic_cross, 16, True), (hyperbolic_cross, 32, True), (total_degree, 40, False)]
)
def test_what_a_sparse_product_leaves_out_is_told(keep, order, said):
    """A correlated Gaussian lives on mixed degrees, which a hyperbolic cross leaves out first."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    start = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 2).double(), covariance[None])
    problem, bases = ornstein_uhlenbeck(2, turn=1.0, start=start), [Hermite(order, 0.0, 1.0)] * 2
    solver = GalerkinSolver(problem.equation, bases, keep=keep(bases))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        solution = solver.solve(start, [0.0, 0.2])
    exact = problem.law_at(0.2).log_prob(solver.product.points).exp()
    error = float(((solution.values[-1].reshape(-1) - exact).abs() * solution.weights.reshape(-1)).sum())
    assert error < 2 * float(solution.truncation[-1].max())
    assert any("the expansion has not decayed" in str(one.message) for one in found) == said
