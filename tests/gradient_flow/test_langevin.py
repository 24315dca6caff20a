"""Langevin dynamics: weak orders and stationary laws without sampling noise, and what only sampling can show."""

import itertools
import math

import numpy as np
import pytest
import torch
from cases import draws
from numpy.polynomial.polynomial import polyder, polyval2d
from scipy.signal import convolve2d
from torch import Tensor

from diffusion.gradient_flow.flows.base import Moment
from diffusion.gradient_flow.flows.langevin import Langevin, noised
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama, LeimkuhlerMatthews, StochasticHeun, ThirdOrder
from diffusion.gradient_flow.flows.preconditioners import Identity, Matrix
from diffusion.gradient_flow.flows.underdamped import Underdamped
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.responses import gaussian_laws
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.metrics.gaussians import GaussianLaw, gaussian_wasserstein

COVARIANCE = torch.tensor([[1.5, 0.6, 0.0], [0.6, 1.0, -0.2], [0.0, -0.2, 0.7]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
END = GaussianLaw(MEAN, COVARIANCE)
START = GaussianLaw(torch.zeros(3, dtype=torch.float64), 0.3 * torch.eye(3, dtype=torch.float64))
PRECONDITIONER = torch.tensor([[0.8, 0.3, 0.1], [0.3, 0.9, 0.0], [0.1, 0.0, 0.5]], dtype=torch.float64)
OVERDAMPED = [EulerMaruyama(), LeimkuhlerMatthews(), StochasticHeun(), ThirdOrder()]
PRECONDITIONERS = {"plain": Identity(), "matrix": Matrix(PRECONDITIONER), "diagonal": Matrix(PRECONDITIONER.diagonal())}


def name(value) -> str:
    return type(value).__name__


def quadratic(x: Tensor) -> Tensor:
    centred = x - MEAN
    return -(torch.linalg.solve(COVARIANCE, centred.T).T * centred).sum(1) / 2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(matrix: Tensor, function) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (function(values)[:, None] * vectors.T)


def ornstein_uhlenbeck(matrix: Tensor, time: float, temperature: float = 1.0) -> GaussianLaw:
    """The law after `time` of dx = -P C^-1 (x - m) dt + sqrt(2 tau P) dW from START, in coordinates P^(-1/2) x."""
    root = symmetric(matrix, torch.sqrt)
    back = torch.linalg.inv(root)
    decay = symmetric(root @ torch.linalg.inv(COVARIANCE) @ root, lambda values: torch.exp(-time * values))
    end, start = temperature * back @ COVARIANCE @ back, back @ START.covariance @ back
    covariance = root @ (end + decay @ (start - end) @ decay) @ root
    return GaussianLaw(MEAN + root @ decay @ back @ (START.mean - MEAN), covariance)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("integrator", OVERDAMPED, ids=name)
def test_the_weak_order_on_the_way_to_a_gaussian(integrator, preconditioner):
    matrix = {"plain": torch.eye(3).double(), "matrix": PRECONDITIONER, "diagonal": PRECONDITIONER.diagonal().diag()}
    exact, errors = ornstein_uhlenbeck(matrix[preconditioner], 1.0, temperature=0.7), []
    functional = 0.7 * Entropy() + Potential(lambda x: -quadratic(x))
    for steps in (16, 32):
        flow = Langevin(functional, integrator, PRECONDITIONERS[preconditioner])
        errors.append(gaussian_wasserstein(gaussian_laws(flow, START, steps, 1 / steps)[-1], exact))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(integrator.order, abs=0.15)


def coefficients(*terms: tuple[int, int, float]) -> np.ndarray:
    """Of a polynomial in x and y, by their powers."""
    array = np.zeros((5, 5))
    for i, j, weight in terms:
        array[i, j] = weight
    return array


ENERGY = coefficients((4, 0, 1 / 4), (2, 2, 1 / 2), (0, 2, 1 / 2), (1, 1, 1 / 2), (0, 3, 1 / 6))
TESTED = {
    "x": coefficients((1, 0, 1)),
    "y": coefficients((0, 1, 1)),
    "x y": coefficients((1, 1, 1)),
    "x^2 + y^3": coefficients((2, 0, 1), (0, 3, 1)),
    "x^2 y": coefficients((2, 1, 1)),
}


def generated(f: np.ndarray, order: int, x0: tuple[float, float], temperature: float) -> list[float]:
    """L^k f / k! at x0 for k = 0 ... order, L = -grad U . grad + tau tr Hess, of polynomials."""
    terms = []
    for k in range(order + 1):
        terms.append(float(polyval2d(*x0, f)) / math.factorial(k))
        parts = [-convolve2d(polyder(ENERGY, axis=axis), polyder(f, axis=axis)) for axis in (0, 1)]
        parts += [temperature * polyder(f, 2, axis=axis) for axis in (0, 1) if f.shape[axis] > 2]
        f = np.zeros(np.max([part.shape for part in parts], axis=0))
        for part in parts:
            f[: part.shape[0], : part.shape[1]] += part
    return terms


def anharmonic(z: Tensor) -> Tensor:
    x, y = z.T
    return x**4 / 4 + x**2 * y**2 / 2 + y**2 / 2 + x * y / 2 + y**3 / 6


@pytest.mark.parametrize(
    "integrator, normals, nodes", [(EulerMaruyama(), 1, 8), (StochasticHeun(), 1, 12), (ThirdOrder(), 3, 8)], ids=name
)
def test_the_weak_order_of_a_step_in_an_anharmonic_potential(integrator, normals, nodes):
    """Means of polynomials after one step, over all normal numbers by Gauss-Hermite quadrature, against their Taylor
    series in the generator of the diffusion. Nothing is random, and the noise couples two coordinates."""
    places, weights = np.polynomial.hermite_e.hermegauss(nodes)
    grid = torch.tensor(list(itertools.product(places, repeat=2 * normals)), dtype=torch.float64)
    pairs = itertools.product(weights / weights.sum(), repeat=2 * normals)
    weight = torch.tensor(list(pairs), dtype=torch.float64).prod(1)
    flow, x0 = Langevin(0.8 * Entropy() + Potential(anharmonic), integrator), (0.6, -0.4)
    expansions = [generated(f, 7, x0, 0.8) for f in TESTED.values()]
    errors = []
    for h in (0.02, 0.01):
        calls = iter(grid.view(len(grid), normals, 2).unbind(1))
        start = torch.tensor(x0, dtype=torch.float64).expand(len(grid), 2)
        moment = flow.stepped(Moment(start, flow.functional), h, lambda like, calls=calls: next(calls), None)
        assert next(calls, None) is None
        x, y = moment.particles.T
        exact = [sum(term * h**k for k, term in enumerate(terms)) for terms in expansions]
        found = [float(weight.numpy() @ polyval2d(x.numpy(), y.numpy(), f)) for f in TESTED.values()]
        errors.append(max(abs(a - b) for a, b in zip(exact, found, strict=True)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(integrator.order + 1, abs=0.15)


@pytest.mark.parametrize(
    "integrator, exponent", [(EulerMaruyama(), 1), (StochasticHeun(), 2), (ThirdOrder(), 3)], ids=name
)
def test_the_bias_of_the_law_in_the_end_is_a_power_of_the_step(integrator, exponent):
    errors = []
    for h in (0.1, 0.05):
        last = gaussian_laws(Langevin(KL(quadratic), integrator), END, int(8 / h), h)[-1]
        errors.append(gaussian_wasserstein(last, END))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(exponent, abs=0.15)


def test_the_bias_of_the_plain_scheme_in_the_end_is_known():
    """S = (1 - h C^-1)^2 S + 2 h, which is C (1 - h C^-1 / 2)^-1 (Wibisono 2018, arXiv 1802.08089)."""
    h = 0.2
    last = gaussian_laws(Langevin(KL(quadratic), EulerMaruyama()), START, 150, h)[-1]
    expected = torch.linalg.inv(torch.linalg.inv(COVARIANCE) @ (torch.eye(3) - h / 2 * torch.linalg.inv(COVARIANCE)))
    torch.testing.assert_close(last.covariance, expected)
    torch.testing.assert_close(last.mean, MEAN)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize(
    "integrator, step_size",
    [
        (LeimkuhlerMatthews(), 0.25),
        (Underdamped(2.0), 0.5),
        (Underdamped(1.0, mass=0.5), 0.4),
        (Underdamped(20.0), 1.0),
    ],
    ids=["limit", "underdamped", "light", "high_friction"],
)
def test_the_covariance_in_the_end_is_exact_for_a_gaussian(integrator, step_size, preconditioner):
    steps = 400 if integrator == Underdamped(20.0) else 80
    flow = Langevin(KL(quadratic), integrator, PRECONDITIONERS[preconditioner])
    before, last = gaussian_laws(flow, START, 2 * steps, step_size)[:: 2 * steps]
    assert gaussian_wasserstein(before, START) < 1e-12
    assert gaussian_wasserstein(last, END) < 1e-6


def test_inertia_has_order_two_on_the_way():
    """To the law at time 1 of dx = p / m dt, dp = -C^-1 (x - mean) dt - friction p dt + sqrt(2 friction m) dW, linear
    in (x, p); momenta start in equilibrium, positions do not."""
    friction, mass, identity = 1.3, 0.7, torch.eye(3, dtype=torch.float64)
    rows = [[0 * identity, identity / mass], [-torch.linalg.inv(COVARIANCE), -friction * identity]]
    decay = torch.linalg.matrix_exp(torch.cat([torch.cat(row, 1) for row in rows]))
    start, end = (torch.block_diag(c, mass * identity) for c in (START.covariance, COVARIANCE))
    mean, covariance = MEAN + decay[:3, :3] @ (START.mean - MEAN), end + decay @ (start - end) @ decay.T
    exact = GaussianLaw(mean, covariance[:3, :3])
    flow = Langevin(KL(quadratic), Underdamped(friction, mass))
    coarse, fine = (gaussian_wasserstein(gaussian_laws(flow, START, n, 1 / n)[-1], exact) for n in (10, 20))
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15) and fine < 2e-3


def test_an_underdamped_step_costs_one_velocity():
    calls = []

    def score(x):
        calls.append(len(x))
        return -x

    Langevin(KL(score), Underdamped()).run(draws(4, 2, 0), 9, 0.1, seeded(0))
    assert len(calls) == 9 + 2  # one to tell a score from a log-density, one for how long the steps were


def test_steps_of_a_potential_that_is_not_quadratic_have_no_law_in_closed_form(user_error):
    flow = Langevin(KL(lambda x: -(x**4).sum(1)), EulerMaruyama())
    with user_error("not affine"):
        gaussian_laws(flow, START, 2, 0.01)


def logistic(x: Tensor) -> Tensor:
    return -(x + 2 * torch.nn.functional.softplus(-x)).sum(1)


def test_noise_has_the_strength_of_all_entropies():
    split = noised(0.5 * KL(logistic) + 0.25 * Entropy() + Potential(anharmonic))
    assert split.temperature == 0.75 and [term.weight for term in split.rest.terms()] == [0.5, 1.0]


def test_without_a_drift_particles_diffuse():
    x = torch.zeros(20000, 2, dtype=torch.float64)
    spread = Langevin(0.5 * Entropy(), EulerMaruyama()).run(x, 4, 0.5, seeded(0)).square().mean(0)
    assert ((spread - 2).abs() < 4 * 2 * math.sqrt(2 / 20000)).all()


def test_interacting_particles_follow_their_mean_field():
    """W(z) = |z|^2 / 2 about the mean and U = |x|^2 / 2: the law is N(0, 1/2) in the limit."""
    functional = Entropy() + Potential(lambda x: x.square().sum(1) / 2) + Interaction(lambda z: z.square().sum(-1) / 2)
    x = Langevin(functional).run(draws(1000, 1, 1, spread=2.0), 40, 0.15, seeded(2))
    assert float(x.var()) == pytest.approx(0.5, abs=4 * 0.5 * math.sqrt(2 / 1000))


def test_a_functional_without_noise_of_positive_strength_is_refused(user_error):
    with user_error("Potential has no entropy", "WassersteinFlow"):
        Langevin(Potential(anharmonic))
    with user_error("weight -1"):
        Langevin(-1.0 * Entropy() + Potential(anharmonic))


def test_the_entropy_is_estimated_only_where_the_value_is_asked_for():
    x = torch.zeros(5, 2, dtype=torch.float64)  # of which no estimator can tell an entropy
    functional = KL(logistic, Entropy(GaussianScore()))
    *_, moment = Langevin(functional).moments(x, 3, 0.1, seeded(0))
    assert moment.value() == pytest.approx(float(functional.fitted(moment.particles).value(moment.particles)))


@pytest.mark.parametrize("integrator", [*OVERDAMPED, Metropolis(), Underdamped()], ids=name)
def test_all_randomness_is_the_generators(integrator):
    x, flow = draws(6, 2, 0).view(6, 1, 2).float(), Langevin(KL(lambda x: logistic(x.flatten(1))), integrator)
    torch.manual_seed(0)
    first = flow.run(x, 4, 0.2, seeded(1))
    torch.manual_seed(99)
    assert torch.equal(first, flow.run(x, 4, 0.2, seeded(1)))
    assert not torch.equal(first, flow.run(x, 4, 0.2, seeded(2)))
    assert first.shape == x.shape and first.dtype == x.dtype


@pytest.mark.parametrize("options", [{"friction": 0.0}, {"mass": -1.0}, {"friction": math.inf}], ids=str)
def test_bad_inertia_is_refused(options, user_error):
    with user_error("friction", "positive"):
        Underdamped(**options)
