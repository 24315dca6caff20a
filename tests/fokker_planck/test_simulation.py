"""Weak orders of the SDE's schemes, by sums over all outcomes of discrete noise instead of draws."""

import itertools
import math
import warnings

import pytest
import torch
from scipy.linalg import expm

from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck
from diffusion.fokker_planck.problems import geometric_brownian, ornstein_uhlenbeck, variance_preserving
from diffusion.fokker_planck.simulation import SCHEMES, Noise
from diffusion.fokker_planck.simulation import _noise as draw_noise

DOUBLE = torch.float64


def outcomes(dim, h):
    """All values of a step's noise, and their probabilities: increments of three points, signs of two."""
    values, chances = torch.tensor([-math.sqrt(3 * h), 0.0, math.sqrt(3 * h)], dtype=DOUBLE), [1 / 6, 2 / 3, 1 / 6]
    pairs = list(itertools.combinations(range(dim), 2))
    increments, signs, weights = [], [], []
    for places in itertools.product(range(3), repeat=dim):
        for coins in itertools.product((-1.0, 1.0), repeat=len(pairs)):
            sign = torch.zeros(dim, dim, dtype=DOUBLE)
            for (i, j), coin in zip(pairs, coins, strict=True):
                sign[i, j], sign[j, i] = coin, -coin
            increments.append(values[list(places)])
            signs.append(sign)
            weights.append(math.prod(chances[p] for p in places) / 2 ** len(pairs))
    return Noise(torch.stack(increments), torch.stack(signs)), torch.tensor(weights, dtype=DOUBLE)


def moments(order, equation, x, horizon, steps):
    """E x (d,) and E x x^T (d, d) after `steps` steps from the point `x` (d,), over all outcomes."""
    h, x, chance = horizon / steps, x[None], torch.ones(1, dtype=DOUBLE)
    noise, weights = outcomes(x.shape[1], h)
    for n in range(steps):
        number, branches = len(x), len(weights)
        repeated = Noise(noise.increments.repeat(number, 1), noise.signs.repeat(number, 1, 1))
        x = SCHEMES[order](equation, x.repeat_interleave(branches, 0), n * h, h, repeated)
        chance = (chance[:, None] * weights).flatten()
    return chance @ x, torch.einsum("n,ni,nj->ij", chance, x, x)


def linear(drift, columns):
    """dx = drift x dt + sum_k columns_k x dw_k, as an equation, and its exact second moments."""

    def diffusion(x, t):
        return torch.stack([x @ matrix.T for matrix in columns], 2)

    dim = len(drift)
    eye = torch.eye(dim, dtype=DOUBLE)
    rate = torch.kron(drift, eye) + torch.kron(eye, drift) + sum(torch.kron(b, b) for b in columns)

    def exact(x, t):
        second = torch.from_numpy(expm(t * rate.numpy())) @ torch.outer(x, x).flatten()
        return torch.matrix_exp(t * drift) @ x, second.reshape(dim, dim)

    return FokkerPlanck(lambda x, t: x @ drift.T, diffusion), exact


def ou_case():
    rate, noise = 1.0, math.sqrt(2.0)

    def exact(x, t):
        mean = math.exp(-rate * t) * x
        return mean, torch.outer(mean, mean) + noise**2 / (2 * rate) * (1 - math.exp(-2 * rate * t))

    return ornstein_uhlenbeck(rate=rate, noise=noise).equation, exact


def gbm_case():
    rate, volatility = 0.6, 0.7

    def exact(x, t):
        return x * math.exp(rate * t), torch.outer(x, x) * math.exp((2 * rate + volatility**2) * t)

    return geometric_brownian(rate, volatility).equation, exact


def vp_case():
    low, high = 1.0, 3.0

    def exact(x, t):
        kept = math.exp(-(low * t + (high - low) * t**2 / 2))
        return math.sqrt(kept) * x, kept * torch.outer(x, x) + 1 - kept

    return variance_preserving(low=low, high=high).equation, exact


def isotropic_case():
    """The same noise in both directions, of a size that depends on the first coordinate only."""
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: 0.8 * x[:, 0])

    def exact(x, t):
        mean, xx = math.exp(-t) * x, x[0] ** 2
        first = xx * math.exp((-2 + 0.64) * t)
        added = first - xx * math.exp(-2 * t)  # int_0^t e^(-2 (t - s)) 0.64 E x_1(s)^2 ds
        second = math.exp(-2 * t) * torch.outer(x, x)
        second[0, 0], second[1, 1] = first, second[1, 1] + added
        return mean, second

    return equation, exact


def matrix_case():
    """Noise that does not commute."""
    drift = torch.tensor([[-0.5, 1.0], [-1.0, -0.3]], dtype=DOUBLE)
    columns = [torch.tensor([[0.4, 0.5], [0.0, 0.3]]), torch.tensor([[0.2, 0.0], [0.6, -0.3]])]
    return linear(drift, [c.to(DOUBLE) for c in columns])


CASES = {
    "ou": (ou_case, [0.7], 0.3, (1, 2, 4, 8)),
    "geometric": (gbm_case, [0.7], 0.3, (2, 4, 8)),
    "variance_preserving": (vp_case, [2.0], 0.5, (2, 4, 8)),
    "isotropic": (isotropic_case, [0.7, -0.4], 0.3, (1, 2, 4)),
    "matrix": (matrix_case, [0.7, -0.4], 0.3, (1, 2, 4)),
}


@pytest.mark.parametrize("order", sorted(SCHEMES))
@pytest.mark.parametrize("case", CASES)
def test_weak_order(case, order):
    make, start, horizon, counts = CASES[case]
    equation, exact = make()
    x = torch.tensor(start, dtype=DOUBLE)
    errors = []
    for steps in counts:
        got, wanted = moments(order, equation, x, horizon, steps), exact(x, horizon)
        errors.append([float((a - b).norm()) for a, b in zip(got, wanted, strict=True)])
    for column in zip(*errors, strict=True):
        slope = math.log2(column[-2] / column[-1])
        assert abs(slope - order) < 0.15, column


def test_outcomes_have_the_moments_of_gaussian_noise():
    noise, weights = outcomes(2, 0.3)
    w = noise.increments[:, 0]
    assert weights.sum() == pytest.approx(1)
    assert [float(weights @ w**k) for k in (1, 2, 3, 4, 5)] == pytest.approx([0, 0.3, 0, 3 * 0.3**2, 0], abs=1e-14)
    assert float(weights @ noise.signs[:, 0, 1]) == 0


@pytest.mark.parametrize("order", sorted(SCHEMES))
def test_drawn_paths_have_the_exact_moments(order):
    problem = variance_preserving(low=0.5, high=2.0, dim=2)
    generator = torch.Generator().manual_seed(0)
    x = problem.start.sample(20_000, generator)
    paths = problem.equation.simulate(x, [0.0, 0.5, 1.0], {1: 60, 2: 6}[order], generator, order=order)
    assert paths.shape == (3, 20_000, 2)
    assert torch.equal(paths[0], x)
    for path, t in zip(paths[1:], (0.5, 1.0), strict=True):
        law = problem.law_at(t)
        error = (law.covariance.diagonal() / len(x)).sqrt()
        assert bool(((path.mean(0) - law.mean).abs() < 4 * error).all())
        assert torch.allclose(path.T.cov(), law.covariance, atol=0.04)


def test_drawn_noise():
    noise = draw_noise(torch.zeros(4000, 3, dtype=DOUBLE), 0.25, 2, torch.Generator().manual_seed(0))
    assert torch.equal(noise.signs, -noise.signs.mT)
    assert torch.equal(noise.signs.abs(), (1 - torch.eye(3, dtype=DOUBLE)).expand(4000, 3, 3))
    assert float(noise.signs.mean(0).abs().max()) < 4 / 4000**0.5
    assert torch.allclose(noise.increments.T.cov(), 0.25 * torch.eye(3, dtype=DOUBLE), atol=0.025)


def test_drawn_signs_matter():
    """Draws of the noise that does not commute have the exact second moments, off the diagonal too."""
    equation, exact = matrix_case()
    x = torch.tensor([0.7, -0.4], dtype=DOUBLE)
    paths = equation.simulate(x.expand(40_000, -1), [0, 0.6], 10, torch.Generator().manual_seed(0), order=2)[-1]
    wanted = exact(x, 0.6)[1]
    products = paths[:, :, None] * paths[:, None]
    error = products.std(0) / len(paths) ** 0.5
    assert bool(((products.mean(0) - wanted).abs() < 4 * error).all())


def test_same_generator_same_paths():
    problem = ornstein_uhlenbeck(2)
    x = problem.start.sample(5, torch.Generator().manual_seed(0))
    first, second = (
        problem.equation.simulate(x, [0, 1], 3, torch.Generator().manual_seed(1), order=2) for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"times": [0.0, 1.0, 1.0]}, "expected rising finite numbers"),
        ({"times": [0.0, 1.0], "steps": 0}, "steps=0"),
        ({"times": [0.0, 1.0], "order": 3}, "order=3, expected a weak order of 1 or 2"),
    ],
    ids=["times", "steps", "order"],
)
def test_bad_options(options, words):
    with pytest.raises(UserError, match=words):
        ornstein_uhlenbeck().equation.simulate(torch.zeros(3, 1, dtype=DOUBLE), **options)


@pytest.mark.parametrize("order", sorted(SCHEMES))
def test_paths_that_leave_for_infinity(order):
    equation = FokkerPlanck(lambda x, t: x**9, lambda x, t: 1.0)
    with pytest.raises(UserError, match="not finite"):
        equation.simulate(torch.full((4, 1), 50.0, dtype=DOUBLE), [0.0, 1.0], 50, order=order)


def decay(rate, steps, order=1, number=2000, start=1.0):
    """Paths of dx = -rate x dt + dw from normal places, in two coordinates of which the second is at rest."""
    equation = FokkerPlanck(lambda x, t: -rate * x * torch.tensor([1.0, 0.0]).to(x), 1.0)
    x = start + torch.randn(number, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    return equation.simulate(x, [0.0, 1.0], steps, torch.Generator().manual_seed(2), order)


@pytest.mark.parametrize("number", [1, 50, 2000])
@pytest.mark.parametrize(("order", "steps"), [(1, 1), (1, 2), (1, 8), (2, 1), (2, 2), (2, 8)])
def test_steps_that_are_too_long_are_warned_of(order, steps, number):
    words = (
        rf"at t=1 is off by at least [\d.e+]+ standard deviations, because {steps} steps .* take {2 * steps} or more"
    )
    with pytest.warns(RuntimeWarning, match=words) as found:
        decay(20.0, steps, order, number)
    assert found[0].filename == __file__


@pytest.mark.parametrize(("order", "steps", "true"), [(1, 12, 1.44), (1, 16, 0.63), (2, 12, 0.56), (2, 16, 0.31)])
def test_the_error_that_is_warned_of(order, steps, true):
    """Of the standard deviation at rest, from the closed forms of the schemes' variances; what is named is less."""
    z = 20.0 / steps
    kept, added = ((1 - z) ** 2, 2 * z) if order == 1 else ((1 - z + z * z / 2) ** 2, 2 * z * (1 - z / 2) ** 2)
    assert abs((added / (1 - kept)) ** 0.5 - 1) == pytest.approx(true, abs=0.01)
    with pytest.warns(RuntimeWarning, match="standard deviations") as found:
        decay(20.0, steps, order)
    named = float(str(found[0].message).split("at least ")[1].split()[0])
    assert 0.4 * true < named < 1.1 * true


RIGHT = {
    "decay": lambda order, number: decay(20.0, 200 if order == 1 else 40, order, number),
    "far": lambda order, number: decay(20.0, 200 if order == 1 else 40, order, number, start=50.0),
    "well": lambda order, number: right(lambda x: 4 * (x - x**3), 1.0, order, number),
    "langevin": lambda order, number: right(
        lambda x: torch.stack([x[:, 1], -x.sum(1)], 1), lambda x, t: torch.tensor([0.0, 1.0]).to(x), order, number
    ),
    "geometric": lambda order, number: right(lambda x: 0.3 * x, lambda x, t: 0.5 * x, order, number),
    "still": lambda order, number: right(lambda x: 0 * x, 0.0, order, number),
    "certain": lambda order, number: right(lambda x: -x, 0.0, order, number),
}


def right(drift, diffusion, order, number):
    equation = FokkerPlanck(
        lambda x, t: drift(x), lambda x, t: (diffusion(x, t) if callable(diffusion) else x * 0 + diffusion).expand_as(x)
    )
    x = torch.ones(number, 2, dtype=DOUBLE)
    return equation.simulate(x, [0.0, 0.5, 2.0], 100, torch.Generator().manual_seed(0), order)


@pytest.mark.parametrize("number", [1, 50, 2000])
@pytest.mark.parametrize("order", sorted(SCHEMES))
@pytest.mark.parametrize("name", RIGHT)
def test_steps_that_are_short_enough_are_not(name, order, number):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        RIGHT[name](order, number)


def test_cost_of_the_check():
    """Two more drifts a step for each path that is followed: at most 1024, and an eighth of many."""
    asked = []

    def drift(x, t):
        asked.append(len(x))
        return -x

    for number, most in ((800, 128), (4000, 500), (20_000, 1024)):
        equation = FokkerPlanck(drift, 1.0)
        x = torch.ones(number, 1, dtype=DOUBLE)
        equation.drift(x, 0.0)
        asked.clear()
        equation.simulate(x, [0.0, 1.0], 10, torch.Generator().manual_seed(0))
        assert 10 * number < sum(asked) <= 10 * (number + 2 * most)


FLOWS = {
    "ornstein_uhlenbeck": ornstein_uhlenbeck,
    "turning": lambda: ornstein_uhlenbeck(2, turn=1.0),
    "variance_preserving": lambda: variance_preserving(horizon=0.4),
    "geometric_brownian": geometric_brownian,
}


def followed(problem, x, times):
    def score(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(problem.law_at(t).log_prob(x).sum(), x)[0]

    return problem.equation.follow(x, times, score)


@pytest.mark.parametrize("name", FLOWS)
def test_the_probability_flow_comes_back(name):
    problem = FLOWS[name]()
    x = problem.start.sample(7, torch.Generator().manual_seed(0))
    path = followed(problem, x, [0.0, problem.horizon / 2, problem.horizon])
    assert path.shape == (3, *x.shape) and float((path[-1] - x).abs().max()) > 0.1
    assert torch.allclose(followed(problem, path[-1], [problem.horizon, 0.0])[-1], x, atol=1e-6)


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "variance_preserving", "geometric_brownian"])
def test_the_probability_flow_keeps_the_share_of_the_mass_below(name):
    problem = FLOWS[name]()
    x = problem.start.sample(7, torch.Generator().manual_seed(0))
    moved = followed(problem, x, [0.0, problem.horizon])[-1]

    def below(law, points):
        shares = []
        for point in points[:, 0].tolist():
            y = torch.linspace(-8, point, 20001, dtype=torch.float64)
            shares.append(float(torch.trapezoid(law.log_prob(y[:, None]).exp(), y)))
        return shares

    assert below(problem.law_at(problem.horizon), moved) == pytest.approx(below(problem.start, x), abs=1e-5)


def test_the_probability_flow_of_turning_gaussians_keeps_their_distance():
    problem = FLOWS["turning"]()
    x, end = problem.start.sample(7, torch.Generator().manual_seed(0)), problem.law_at(problem.horizon)
    moved = followed(problem, x, [0.0, problem.horizon])[-1] - end.mean
    ratio = end.covariance[0, 0] / problem.start.covariance[0, 0]
    assert torch.allclose(moved.square().sum(1), ratio * (x - problem.start.mean).square().sum(1), atol=1e-6)


def narrow(x, t):
    return -x[:, :1]


def flat(x, t):
    return -x[:, 0]


@pytest.mark.parametrize(
    ("score", "options", "words"),
    [
        (narrow, {}, r"the score is shape \(8, 1\) for x \(8, 2\)"),
        (flat, {}, r"the score is shape \(8,\) for x \(8, 2\)"),
        (lambda x, t: x * math.nan, {}, "the score is not finite at t=0"),
        (lambda x, t: -1e3 * x**3, {}, "cannot be followed beyond t=.*underflow"),
        (lambda x, t: -x, {"tolerance": 0.0}, "tolerance is 0.0"),
        (lambda x, t: -x, {"times": []}, "times are"),
    ],
    ids=["narrow", "flat", "nan", "explosive", "tolerance", "times"],
)
def test_scores_that_the_probability_flow_cannot_follow(score, options, words):
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=words):
        FokkerPlanck(lambda x, t: -x, 1.0).follow(x, **{"times": [0.0, 1.0], "score": score} | options)
