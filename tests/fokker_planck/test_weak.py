"""The weak residual: its quadrature, its formula, honest standard errors, power, and what it says to bad input."""

import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck import problems
from diffusion.fokker_planck import test_functions as families
from diffusion.fokker_planck.snapshots import Snapshots, quadrature
from diffusion.fokker_planck.weak import quadratic_form, weak_residual

TIMES = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()
UNEVEN = [0.0, 0.1, 0.15, 0.4, 0.6, 0.65, 1.0]


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(problem, number, seed=0, times=TIMES):
    g = randomness(seed)
    return torch.stack([problem.law_at(t).sample(number, g) for t in times])


def smooth(samples, seed=0, number=24):
    return families.RandomFourier.adapted(samples, number, randomness(seed))


def ou_path(problem, number, seed, times=TIMES):
    """Paths by the exact transition x' = exp(-h A) x + noise."""
    g, matrix = randomness(seed), -problem.equation.drift(torch.eye(problem.dim, dtype=torch.float64), 0.0).T
    x = problem.start.sample(number, g)
    path = [x]
    for h in np.diff(times):
        decay = torch.matrix_exp(-h * matrix)
        x = x @ decay.T + (1 - math.exp(-2 * h)) ** 0.5 * torch.randn(x.shape, generator=g, dtype=x.dtype)
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("degree", range(6))
def test_quadrature_is_exact_for_polynomials_of_its_degree(degree):
    times = torch.tensor(UNEVEN, dtype=torch.float64) + 5
    weights = quadrature(times.tolist(), degree)
    for power in range(degree + 1):
        exact = (6.0 ** (power + 1) - 5.0 ** (power + 1)) / (power + 1)
        assert float(weights @ times**power) == pytest.approx(exact, rel=1e-11)
    if degree == 1:
        assert float(weights @ times) == pytest.approx(float(torch.trapezoid(times, times)), rel=1e-14)


@pytest.mark.parametrize(("degree", "order"), [(1, 2), (2, 3), (3, 4), (5, 6)])
def test_quadrature_has_the_order_of_its_degree(degree, order):
    def error(number):
        times = torch.linspace(0, 1, number + 1, dtype=torch.float64)
        times = times + 0.1 * times * (1 - times)
        return abs(float(quadrature(times.tolist(), degree) @ (3 * times).exp()) - math.expm1(3.0) / 3)

    slope = math.log2(error(64) / error(128))
    assert slope > order - 0.15


def test_it_is_the_formula():
    g, times = randomness(), UNEVEN[:5]
    samples = [torch.randn(20 + 3 * k, 2, generator=g, dtype=torch.float64) for k in range(5)]
    phi = smooth(samples, number=3)

    def drift(x, t):
        return torch.stack([x[:, 1] * t, x[:, 0] ** 2], 1)

    def diffusion(x, t):
        return torch.eye(2, dtype=x.dtype) * (1 + t)[:, None, None] + x[:, :, None] * x[:, None] / 2

    expected = []
    for k in range(3):

        def one(y, k=k):
            return phi.value(y[None])[0, k]

        totals, weights = [], quadrature(times, 4).tolist()
        for i, (t, x) in enumerate(zip(times, samples, strict=True)):
            moments = torch.full((len(x),), t, dtype=torch.float64)
            f, s = drift(x, moments), diffusion(x, moments)
            slope, bend = torch.func.vmap(torch.func.grad(one))(x), torch.func.vmap(torch.func.hessian(one))(x)
            rate = (f * slope).sum(1) + ((s @ s.mT) * bend).sum((1, 2)) / 2
            sign = {0: -1.0, 4: 1.0}.get(i, 0.0)
            totals.append(sign * phi.value(x)[:, k] - weights[i] * rate)
        expected.append((sum(v.mean() for v in totals), sum(v.var() / len(v) for v in totals)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = weak_residual(samples, times, drift, diffusion, phi)
        assert got.points == 20
        assert torch.allclose(got.residual, torch.stack([e[0] for e in expected]), atol=1e-12)
        assert torch.allclose(got.standard_error**2, torch.stack([e[1] for e in expected]), rtol=1e-10)
        other = weak_residual(samples, times, drift, diffusion, phi, degree=2)
        half = weak_residual(samples[::2], times[::2], drift, diffusion, phi)
    assert not torch.allclose(other.residual, got.residual, atol=1e-6)
    assert torch.allclose((half.residual - got.residual).abs() / 4, got.quadrature_error, atol=1e-12)


def test_chunks_do_not_change_it(monkeypatch):
    problem = problems.ornstein_uhlenbeck(2, turn=0.5)
    x = draws(problem, 500)
    for paths in (False, True):
        whole = weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, smooth(x), paths)
        monkeypatch.setattr("diffusion.fokker_planck.snapshots.ELEMENTS", 5000)
        parts = weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, smooth(x), paths)
        monkeypatch.undo()
        assert torch.allclose(whole.residual, parts.residual, atol=1e-13)
        assert torch.allclose(whole.covariance, parts.covariance, rtol=1e-9, atol=1e-16)


def turned():
    return problems.ornstein_uhlenbeck(2, turn=0.5)


CASES = {
    "ou": (turned, draws, False),
    "ou in 20 dimensions": (lambda: problems.ornstein_uhlenbeck(20), draws, False),
    "paths of ou": (turned, ou_path, True),
    "vp": (lambda: problems.variance_preserving(high=4.0, dim=2), draws, False),
    "geometric": (lambda: problems.geometric_brownian(), draws, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_right_equation_is_within_its_standard_errors(case):
    make, sample, paths = CASES[case]
    problem = make()
    z, passed = [], []
    for seed in range(40):
        x = sample(problem, 1000, seed)
        got = weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, smooth(x, seed, 12), paths)
        z.append(got.z)
        passed.append(got.passed)
    z = torch.cat(z)
    assert float((z.abs() < 3).double().mean()) >= 0.99
    assert 0.88 < float(z.square().mean().sqrt()) < 1.13
    assert sum(passed) >= 39


def test_the_right_nonlinear_equation_is_within_its_standard_errors():
    problem = problems.double_well(temperature=0.5)
    g = randomness()
    paths = problem.equation.simulate(problem.start.sample(40 * 500, g), TIMES, 60, g)
    z = []
    for seed in range(40):
        x = paths[:, seed * 500 : (seed + 1) * 500]
        z.append(
            weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, smooth(x, seed, 12), True).z
        )
    z = torch.cat(z)
    assert float((z.abs() < 3).double().mean()) >= 0.99
    assert 0.88 < float(z.square().mean().sqrt()) < 1.13


def test_the_chance_of_paths_is_that_of_the_noise():
    """phi(x_T) - phi(x_0) - int L phi dt = int grad phi . g dw: for phi = x / scale its variance is 2 T / scale^2."""
    problem = turned()
    for horizon, less in [(0.1, True), (1.0, False)]:
        times = [horizon * t for t in TIMES]
        x = ou_path(problem, 20_000, 0, times)
        phi = families.HermitePolynomials.adapted(x, 1)
        arguments = (x, times, problem.equation.drift, problem.equation.diffusion, phi)
        alone, together = weak_residual(*arguments), weak_residual(*arguments, paths=True)
        exact = math.sqrt(2 * horizon / 20_000) / phi.scale
        assert torch.allclose(together.standard_error.sort().values, exact.sort().values, rtol=0.02)
        assert torch.allclose(alone.residual, together.residual, atol=1e-12)
        assert bool((together.standard_error < alone.standard_error).all()) is less


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("what", ["drift", "diffusion"])
@pytest.mark.parametrize("dim", [2, 20])
def test_five_per_cent_is_seen_in_a_hundred_thousand_samples(dim, what, factor):
    problem = problems.ornstein_uhlenbeck(dim, turn=0.5)
    x = draws(problem, 100_000 // len(TIMES), 1)
    phi = families.Together(smooth(x, 1, 32), families.HermitePolynomials.adapted(x, 1))
    drift, diffusion = problem.equation.drift, problem.equation.diffusion
    right = weak_residual(x, TIMES, drift, diffusion, phi)
    wrong = {
        "drift": lambda x, t: (factor if what == "drift" else 1) * drift(x, t[0]),
        "diffusion": lambda x, t: (factor if what == "diffusion" else 1) * diffusion(x, t[0]),
    }
    got = weak_residual(x, TIMES, wrong["drift"], wrong["diffusion"], phi)
    assert right.passed and not got.passed
    assert float(got.z.abs().max()) > got.limit


def test_the_joint_test_sees_what_no_single_function_shows():
    problem = problems.ornstein_uhlenbeck(20)
    x = draws(problem, 6000, 3)
    phi = families.HermitePolynomials.adapted(x, 1)
    got = weak_residual(x, TIMES, lambda x, t: -1.03 * x, problem.equation.diffusion, phi)
    assert float(got.z.abs().max()) < got.limit and got.p_value < 5e-4 and not got.passed


def test_the_joint_test_needs_more_points_than_functions():
    problem = problems.ornstein_uhlenbeck(20)
    x = draws(problem, 30, 3)
    phi = families.HermitePolynomials.adapted(x, 1)
    assert weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, phi).p_value == 1.0


def test_the_quadratic_form_leaves_out_what_is_empty():
    a = torch.randn(3, 5, generator=randomness(), dtype=torch.float64)
    value = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact = float(value @ torch.linalg.solve(a @ a.T, value))
    assert quadratic_form(value, a @ a.T) == (pytest.approx(exact), 3)
    doubled = torch.cat([torch.eye(3), torch.eye(3)[:1], torch.zeros(1, 3)]).double()
    assert quadratic_form(doubled @ value, doubled @ a @ a.T @ doubled.T) == (pytest.approx(exact), 3)


def test_too_few_times_give_a_warning_with_the_figure():
    problem = turned()
    times = [0.0, 1.0, 2.0]
    x = draws(problem, 20_000, times=times)
    with pytest.warns(UserWarning, match=r"3 times may be off by [\d.e+]+ standard errors") as caught:
        weak_residual(x, times, problem.equation.drift, problem.equation.diffusion, smooth(x))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = torch.linspace(0, 2, 17).tolist()
        x = draws(problem, 20_000, times=fine)
        assert weak_residual(x, fine, problem.equation.drift, problem.equation.diffusion, smooth(x)).passed


def test_two_times_are_enough_for_short_steps():
    problem = turned()
    x = draws(problem, 2000, times=[0.0, 0.02])
    got = weak_residual(x, [0.0, 0.02], problem.equation.drift, problem.equation.diffusion, smooth(x))
    assert got.passed and got.quadrature_share < 0.5


def test_the_report_is_plain_data():
    problem = turned()
    x = draws(problem, 1000)
    got = weak_residual(
        x, TIMES, lambda x, t: 2 * problem.equation.drift(x, t[0]), problem.equation.diffusion, smooth(x)
    )
    plain = json.loads(json.dumps(got.to_dict()))
    assert plain["passed"] is False and plain["max_z"] == pytest.approx(float(got.z.abs().max()))
    assert 2 * 24 * scipy.stats.t(999).sf(got.limit) == pytest.approx(5e-4)  # Bonferroni
    lines = got.table(rows=5).splitlines()
    assert len(lines) == 8 and "refused" in lines[-1] and "24 test functions" in lines[-2]
    assert lines[1].split()[-1] == f"{float(got.z[got.z.abs().argmax()]):.2f}"


def test_float32_samples_are_computed_in_float64():
    problem = turned()
    x = draws(problem, 300).float()
    arguments = (TIMES, problem.equation.drift, problem.equation.diffusion, smooth(x))
    got = weak_residual(x, *arguments)
    assert got.residual.dtype == torch.float64
    assert torch.equal(got.residual, weak_residual(x.double(), *arguments).residual)


POINTS = torch.zeros(3, 4, 2)
BAD = {
    "shape": (lambda: Snapshots(torch.zeros(3, 4), [0, 1, 2]), r"\(4,\)"),
    "count": (lambda: Snapshots(POINTS, [0, 1]), "3 snapshots and 2 times"),
    "single": (lambda: Snapshots(POINTS[:1], [0.0]), "1 snapshots"),
    "rising": (lambda: Snapshots(POINTS, [0.0, 2.0, 1.0]), "rise"),
    "dimension": (lambda: Snapshots([POINTS[0], POINTS[1, :, :1]], [0, 1]), r"\(4, 1\)"),
    "paths": (lambda: Snapshots([POINTS[0], POINTS[0, :3]], [0, 1], True), "equal numbers"),
    "finite": (lambda: Snapshots(POINTS + torch.tensor([0.0, math.inf]), [0, 1, 2]), "row 0, is"),
    "degree": (lambda: Snapshots(POINTS, [0, 1, 2]).integral(3), "degree is 3 with 3 times"),
    "drift": (lambda: weak_residual(POINTS, [0, 1, 2], lambda x, t: x[:, 0], 1.0, smooth(POINTS)), "drift"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(UserError, match=message):
        call()


def test_few_points_do_not_refuse_the_right_equation():
    """Standard errors from three points are small by chance: by the normal law 6 of 100 were refused."""
    problem, refused = turned(), 0
    for seed in range(60):
        x = draws(problem, 3, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refused += not weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, smooth(x)).passed
    assert refused == 0


@pytest.mark.parametrize(("waves", "said"), [(8, True), (1, False)])
def test_a_drift_that_swings_between_the_times_is_named(waves, said):
    """x = y + 0.05 sin(2 pi waves t): with 8 of them, the eight steps between nine times are one wave each."""
    problem, rate = problems.ornstein_uhlenbeck(1), math.tau * waves

    def drift(x, t):
        return -(x - 0.05 * torch.sin(rate * t)[:, None]) + 0.05 * rate * torch.cos(rate * t)[:, None]

    x = draws(problem, 500) + 0.05 * torch.sin(rate * torch.tensor(TIMES).double())[:, None, None]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        weak_residual(x, TIMES, drift, problem.equation.diffusion, smooth(x))
    assert any("between the times the drift is" in str(one.message) for one in found) == said


def test_a_drift_that_is_known_at_the_times_of_the_samples_only():
    problem = turned()
    known = {time: -1.0 for time in TIMES}
    x = draws(problem, 300)
    weak_residual(x, TIMES, lambda x, t: known[float(t[0])] * x, problem.equation.diffusion, smooth(x))
