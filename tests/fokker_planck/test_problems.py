"""The exact answers of the ready-made problems satisfy their equations; all by automatic differentiation in float64."""

import dataclasses
import math

import pytest
import torch

from diffusion.fokker_planck import GridSolver, problems
from diffusion.fokker_planck.laws import GaussianMixture, gaussian

MOVING = {
    "ornstein_uhlenbeck": problems.ornstein_uhlenbeck,
    "turning": lambda: problems.ornstein_uhlenbeck(3, turn=2.0, noise=0.8),
    "turning_mixture": lambda: problems.ornstein_uhlenbeck(2, turn=2.0, start=problems.two_gaussians(2)),
    "variance_preserving": problems.variance_preserving,
    "variance_preserving_plane": lambda: problems.variance_preserving(dim=2),
    "variance_exploding": problems.variance_exploding,
    "geometric_brownian": problems.geometric_brownian,
}
STATIONARY = {
    "ornstein_uhlenbeck": lambda: problems.ornstein_uhlenbeck(2, rate=0.7, noise=0.8),
    "turning": lambda: problems.ornstein_uhlenbeck(4, turn=2.0),
    "double_well": problems.double_well,
    "double_well_plane": lambda: problems.double_well(2, barrier=2.0, temperature=0.3),
    "banana": problems.banana,
}


def inside(problem, number=40):
    """Points (number, d) of the middle of the box."""
    low, high = torch.tensor(problem.domain, dtype=torch.float64).T
    share = torch.rand(number, problem.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return low + (0.25 + 0.5 * share) * (high - low)


def flux_divergence(problem, log_density, x, t):
    """div J / p (N,), and the sum of its terms' absolute values, with J = (f - 1/2 div a - 1/2 a grad log p) p."""
    x = x.detach().requires_grad_()
    log_p = log_density(x)
    (score,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
    v = problem.equation.velocity(x, t, score)
    terms = [
        torch.autograd.grad(v[:, i].sum(), x, retain_graph=True, materialize_grads=True)[0][:, i]
        for i in range(problem.dim)
    ]
    terms = torch.stack([*terms, *(v * score).T])
    return terms.sum(0).detach(), terms.abs().sum(0).detach()


@pytest.mark.parametrize("name", MOVING)
def test_laws_satisfy_the_equation(name):
    """d_t log p + div v + v . grad log p = 0, the first term by differences of order 4."""
    problem = MOVING[name]()
    for share in (0.1, 0.5, 0.9):
        t, h = share * problem.horizon, 1e-3 * problem.horizon
        x = problem.law_at(t).sample(40, torch.Generator().manual_seed(1))
        values = [problem.law_at(t + k * h).log_prob(x) for k in (-2, -1, 1, 2)]
        rate = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
        flow, size = flux_divergence(problem, problem.law_at(t).log_prob, x, t)
        assert float(((rate + flow).abs() / (size + rate.abs())).max()) < 1e-6


@pytest.mark.parametrize("name", MOVING)
def test_laws_begin_with_the_start(name):
    problem = MOVING[name]()
    x = problem.start.sample(20, torch.Generator().manual_seed(0))
    assert torch.allclose(problem.law_at(0.0).log_prob(x), problem.start.log_prob(x), atol=1e-10)


@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_densities_have_no_residual(name):
    problem = STATIONARY[name]()
    x = inside(problem)
    flow, _ = flux_divergence(problem, problem.log_stationary, x, 0.0)
    assert float((flow.abs() / (1 + problem.equation.drift(x, 0.0).square().sum(1))).max()) < 1e-12


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "turning"])
def test_laws_become_stationary(name):
    problem = STATIONARY[name]()
    x = inside(problem)
    gap = problem.law_at(40.0).log_prob(x) - problem.log_stationary(x)
    assert float(gap.max() - gap.min()) < 1e-9


@pytest.mark.parametrize("name", sorted({*MOVING, *STATIONARY} - {"turning"}))
def test_box_holds_the_start(name):
    problem = {**MOVING, **STATIONARY}[name]()
    x = problem.start.sample(10_000, torch.Generator().manual_seed(0))
    low, high = torch.tensor(problem.domain, dtype=torch.float64).T
    assert bool(((x > low) & (x < high)).all())


def test_a_narrow_start_on_the_usual_cells_of_three_dimensions():
    """Its standard deviation is 0.6 of a cell."""
    problem = problems.variance_exploding(dim=3)
    density = GridSolver(problem.equation, problem.domain).density(problem.start)
    assert tuple(density.shape) == (48, 48, 48)


@pytest.mark.parametrize("domain", [(-4.0, 4.0), [], "abc", ((0.0, 1.0, 2.0),), None], ids=str)
def test_domains_are_pairs(domain, user_error):
    with user_error("domain=", "(low, high) of each coordinate"):
        dataclasses.replace(problems.ornstein_uhlenbeck(), domain=domain)


def test_variance_preserving_ends_in_the_standard_normal():
    law = problems.variance_preserving().law_at(1.0)
    assert float(law.mean.abs()) < 0.01
    assert float(law.covariance) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_variance_exploding_has_the_stated_scale(t):
    """sigma(t) = low (high / low)^t, less what it was at 0."""
    problem = problems.variance_exploding(low=0.01, high=5.0)
    sigma = 0.01 * (5.0 / 0.01) ** t
    added = problem.law_at(t).covariance - problem.start.covariance
    assert float(added) == pytest.approx(sigma**2 - 1e-4, abs=1e-12)


@pytest.mark.parametrize("force", [0.0, 1.0, 2.5])
def test_ratchet(force):
    """Its density has mass 1 and is periodic; its current (f p - T p') is constant and is the one that it states."""
    x = (math.tau * (torch.arange(64, dtype=torch.float64) + 0.5) / 64).requires_grad_()
    density, current = problems.ratchet_stationary(x, force=force)
    assert float(density.sum()) * math.tau / 64 == pytest.approx(1, abs=1e-12)
    shifted, _ = problems.ratchet_stationary(x.detach() + math.tau, force=force)
    assert torch.allclose(shifted, density, atol=1e-12)
    (slope,) = torch.autograd.grad(density.sum(), x)
    problem = problems.ratchet(force=force)
    drift = problem.equation.drift(x.detach()[:, None], 0.0)[:, 0]
    flux = drift * density.detach() - 0.5 * problem.equation.covariance(x.detach()[:, None], 0.0) * slope
    assert torch.allclose(flux, torch.full_like(flux, current), atol=1e-12)
    assert (current > 1e-3) == (force > 0)


def test_ratchet_without_force_is_at_equilibrium():
    x = torch.linspace(0, 6, 20, dtype=torch.float64)
    density, _ = problems.ratchet_stationary(x, force=0.0)
    gibbs = (-(x.sin() + (2 * x).sin() / 4) / 0.5).exp()
    assert torch.allclose(density / density[0], gibbs / gibbs[0], rtol=1e-12)


def test_gradient_flow_moves_down_the_potential():
    for name in ("double_well", "double_well_plane", "banana"):
        problem = STATIONARY[name]()
        x = inside(problem).requires_grad_()
        (slope,) = torch.autograd.grad(problem.log_stationary(x).sum(), x)
        a = problem.equation.covariance(x.detach(), 0.0)
        assert torch.allclose(problem.equation.drift(x.detach(), 0.0), 0.5 * a[:, None] * slope, rtol=1e-12)


@pytest.mark.parametrize(
    ("problem", "bad", "text"),
    [
        ("double_well", {"temperature": 0}, "temperature is 0, expected a positive number"),
        ("double_well", {"dim": 0}, "dim is 0, expected a whole number, 1 or more"),
        ("double_well", {"dim": 2.0}, "dim is 2.0, expected a whole number"),
        ("double_well", {"barrier": "high"}, "barrier is 'high', expected a positive number"),
        ("banana", {"bend": None}, "bend is None, expected a number"),
        ("banana", {"temperature": math.nan}, "temperature is nan, expected a positive number"),
        ("ratchet", {"temperature": -1.0}, "temperature is -1.0, expected a positive number"),
        ("ratchet", {"force": True}, "force is True, expected a number"),
        ("ornstein_uhlenbeck", {"rate": 0.0}, "rate is 0.0, expected a positive number"),
        ("ornstein_uhlenbeck", {"noise": "a"}, "noise is 'a', expected a number"),
        ("variance_exploding", {"low": 0.0}, "low is 0.0, expected a positive number"),
        ("variance_preserving", {"high": "1"}, "high is '1', expected a number"),
        ("geometric_brownian", {"volatility": -0.4}, "volatility is -0.4, expected a positive number"),
    ],
)
def test_bad_parameters(problem, bad, text, user_error):
    with user_error(text):
        getattr(problems, problem)(**bad)


def test_moments_of_mixtures():
    law = problems.two_gaussians(2)
    x = law.sample(200_000, torch.Generator().manual_seed(0))
    assert torch.allclose(x.mean(0), law.mean, atol=0.01)
    assert torch.allclose(x.T.cov(), law.covariance, atol=0.01)


def test_moved_law():
    """The law of A x + z, from draws."""
    law, generator = problems.two_gaussians(2), torch.Generator().manual_seed(0)
    matrix = torch.tensor([[0.5, 1.0], [0.0, 2.0]], dtype=torch.float64)
    moved = law.moved(matrix, torch.diag(torch.tensor([0.3, 0.1], dtype=torch.float64)))
    x = law.sample(200_000, generator) @ matrix.T
    x = x + torch.randn(x.shape, generator=generator, dtype=x.dtype) * torch.tensor([0.3, 0.1]).double().sqrt()
    assert torch.allclose(x.mean(0), moved.mean, atol=0.02)
    assert torch.allclose(x.T.cov(), moved.covariance, atol=0.03)


@pytest.mark.parametrize("t", [0.0, 0.7])
def test_densities_have_mass_1(t):
    for make in (problems.geometric_brownian, problems.ornstein_uhlenbeck, problems.variance_preserving):
        problem = make()
        ((low, high),) = problem.domain
        x = torch.linspace(low, high, 20_001, dtype=torch.float64)
        mass = torch.trapezoid(problem.law_at(t).log_prob(x[:, None]).exp(), x)
        assert float(mass) == pytest.approx(1, abs=1e-6)


def test_log_normal_is_0_below_0():
    law = problems.LogNormal(0.1, 0.4)
    assert law.log_prob(torch.tensor([[-1.0], [0.0]])).tolist() == [-math.inf, -math.inf]
    x = law.sample(100_000, torch.Generator().manual_seed(0))
    assert float(x.log().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(x.log().std()) == pytest.approx(0.4, abs=0.01)


def test_gaussian():
    for law in (gaussian(1.5, 0.5, 2), gaussian([1.5, 1.5], 0.5)):
        assert isinstance(law, GaussianMixture)
        assert law.mean.tolist() == [1.5, 1.5]
        assert torch.equal(law.covariance, 0.25 * torch.eye(2, dtype=torch.float64))
    assert gaussian(0.0, 1.0).dim == 1


def test_the_parameters_of_a_mixture_can_be_learned():
    """Nothing is kept from one call to the next."""
    x = torch.tensor([[0.3, -0.2], [1.0, 2.0]], dtype=torch.float64)
    law = gaussian(0.5, 0.6, 2)
    covariances = torch.nn.Parameter(law.covariances.clone())
    learned = GaussianMixture(law.weights, law.means, covariances)
    for scale in (1.0, 2.0):
        with torch.no_grad():
            covariances.copy_(scale * law.covariances)
        found = learned.log_prob(x)
        found.sum().backward()
        exact = torch.distributions.MultivariateNormal(law.means[0], scale * law.covariances[0]).log_prob(x)
        torch.testing.assert_close(found.detach(), exact)
