"""The weak form as an objective: unbiased, zero for the right equation, well conditioned, and equations are learned."""

import math
import warnings

import pytest
import torch

from diffusion import specs
from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck import test_functions as families
from diffusion.fokker_planck.matching import ACCURACY, WeakMatching, paired
from diffusion.fokker_planck.snapshots import quadrature
from diffusion.fokker_planck.weak import weak_residual
from diffusion.networks.drift import DriftNetwork, ProcessNetwork
from diffusion.objectives import Batch
from diffusion.trainer import Trainer

TIMES = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def ou(number, seed=0, dim=1):
    problem, g = problems.ornstein_uhlenbeck(dim, start=problems.gaussian(2.0, 0.5, dim)), randomness(seed)
    return torch.stack([problem.law_at(t).sample(number, g) for t in TIMES])


def noise(x, t):
    return torch.full_like(x[:, 0], math.sqrt(2.0))


def waves(x, number=16, seed=0, longest=4.0):
    return families.RandomFourier.adapted(x, number, randomness(seed), 0.5, longest)


def examples(x):
    return Batch(x.transpose(0, 1), None, randomness())


@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
@pytest.mark.parametrize("dim", [1, 3])
def test_only_the_right_equation_has_no_loss(dim, learned):
    x = ou(4000, dim=dim)

    def loss(drift, g):
        objective = WeakMatching(x, TIMES, waves(x), None if learned else g)
        network = (lambda x, t: (drift(x, t), g(x, t))) if learned else drift
        return float(objective(network, examples(x)).mean())

    assert abs(loss(lambda x, t: -x, noise)) < 0.2
    for drift, g in [
        (lambda x, t: -0.7 * x, noise),
        (lambda x, t: x, noise),
        (lambda x, t: -x, lambda x, t: 1.15 * noise(x, t)),
        (lambda x, t: -x * (0.6 + 0.8 * t[:, None]), noise),
    ]:
        assert loss(drift, g) > 0.8


def test_the_mean_is_the_square_without_the_variance():
    """Over small batches it agrees with the square of the mean."""
    x = ou(6000)
    objective, data = WeakMatching(x, TIMES, waves(x, 8), noise), x.transpose(0, 1)
    for factor in (1.0, -1.0):
        drift = lambda x, t, factor=factor: -factor * x  # noqa: E731
        whole = objective.residuals(drift, data).mean(0).square()
        small = torch.stack([objective(drift, Batch(data[i : i + 10], None, randomness())) for i in range(0, 6000, 10)])
        assert small.shape == (600, 10, len(whole))
        each = small.mean(1)
        error = each.std(0) / math.sqrt(len(each))
        assert bool(((each.mean(0) - whole).abs() < 4 * error + 1e-6).all())
        assert float(whole.sum()) > 10 or factor == 1.0


def test_it_is_the_product_of_the_residuals_of_two_examples():
    x = ou(2, dim=2)
    objective = WeakMatching(x, TIMES, waves(x, 5), lambda x, t: (1 + t)[:, None] * torch.ones_like(x))
    r = objective.residuals(lambda x, t: x**2 - t[:, None], x.transpose(0, 1))
    got = objective(lambda x, t: x**2 - t[:, None], examples(x))
    assert r.shape == (2, len(objective.white)) and torch.allclose(got, (r[0] * r[1]).expand_as(got), atol=1e-12)


def matrix(x, t):
    return torch.stack([torch.stack([1 + x[:, 0] ** 2, t], 1), torch.stack([t / 2, 2 + 0 * t], 1)], 1)


@pytest.mark.parametrize("learned", [False, True], ids=["given", "learned"])
@pytest.mark.parametrize("g", [noise, lambda x, t: 1 + x**2 * t[:, None], matrix], ids=["number", "diagonal", "matrix"])
def test_residuals_are_those_of_the_weak_form(g, learned):
    """For psi = 1 those of `weak_residual`, for the next psi those of a sum."""
    x, drift = ou(500, dim=2), lambda x, t: x**2 - t[:, None]
    phi = waves(x, 6)
    objective = WeakMatching(x, TIMES, phi, None if learned else g, degree=3)
    got = objective.residuals((lambda x, t: (drift(x, t), g(x, t))) if learned else drift, x.transpose(0, 1)).mean(0)
    first = weak_residual(x, TIMES, drift, g, phi, degree=3).residual
    weights, equation, second = quadrature(TIMES, 3), FokkerPlanck(drift, g), 0
    for k, t in enumerate(TIMES):
        psi, end = 2 * t - 1, (t == 1) - (t == 0)
        rate = psi * phi.rate(x[k], equation.drift(x[k], t), equation.covariance(x[k], t))
        second = second + ((end * psi - 2 * weights[k]) * phi.value(x[k]) - weights[k] * rate).mean(0)
    assert torch.allclose(got, objective.white @ torch.cat([first, second]), atol=1e-9 * float(got.abs().max()))


@pytest.mark.parametrize("paths", [False, True], ids=["many snapshots", "paths at rest"])
def test_without_chance_the_loss_is_the_square_error_of_the_drift(paths):
    """For an error that is a slope of the test functions, in any scale of place and time."""
    x = torch.randn(9, 20_000, 2, generator=randomness(), dtype=torch.float64) * torch.tensor([3.0, 0.5])
    x = x[:1, :500].expand(9, -1, -1) if paths else x
    phi = waves(x, 12, longest=1.5)
    objective = WeakMatching(x, [4 * t for t in TIMES], phi, 0.0 if paths else noise, paths=paths)

    def error(x, t):  # the gradient of phi_0 in x / scale, in the units of f
        slopes = [phi.slope(x, e.expand_as(x))[:, 0] for e in torch.diag(phi.scale)]
        return torch.stack(slopes, 1) * phi.scale

    more, none = (objective.residuals(f, x.transpose(0, 1)).mean(0) for f in (error, lambda x, t: 0 * x))
    square = (4 * error(x[0], None) / phi.scale).square().sum(1).mean() / ACCURACY**2
    assert float((more - none).square().sum() / square) == pytest.approx(1, abs=0.06)


def test_chance_weighs_less_than_one():
    """However few the samples, residuals of the right equation are within their standard errors."""
    squares = []
    for seed in range(20):
        x = ou(60, seed)
        r = WeakMatching(x, TIMES, waves(x, 6, seed), noise).residuals(lambda x, t: -x, x.transpose(0, 1)).mean(0)
        squares.append(float(r.square().mean()))
    assert 0.3 < sum(squares) / 20 < 1.3


def test_a_drift_network_is_a_drift_and_is_described():
    network = DriftNetwork([1.0, 2.0], [3.0, 0.5], horizon=2.0, width=8, depth=1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(generator=randomness(1))
    x = torch.randn(5, 2, dtype=torch.float64, generator=randomness())
    equation = FokkerPlanck(network, lambda x, t: torch.ones_like(t))
    assert equation.drift(x, 0.3).dtype == torch.float64
    assert not torch.allclose(equation.drift(x, 0.3), equation.drift(x, 0.9))
    still = DriftNetwork([1.0, 2.0], [3.0, 0.5], width=8, depth=1)
    still.load_state_dict(network.state_dict())
    still = FokkerPlanck(still, lambda x, t: torch.ones_like(t))
    assert torch.equal(still.drift(x, 0.3), still.drift(x, 0.9))
    moved = DriftNetwork([0.0, 0.0], [6.0, 1.0], horizon=2.0, width=8, depth=1)
    moved.load_state_dict(network.state_dict())
    scaled = moved((x - torch.tensor([1.0, 2.0])) * 2, torch.full((5,), 0.3)) / 2
    assert torch.allclose(scaled, equation.drift(x, 0.3), rtol=1e-5, atol=1e-5)
    assert specs.describe(specs.build(network.spec)) == specs.describe(network)


def test_a_process_network_is_a_drift_and_a_diffusion():
    network = ProcessNetwork(DriftNetwork([1.0, 2.0], [3.0, 0.5], width=8, depth=1))
    x, t = torch.randn(5, 2, dtype=torch.float64, generator=randomness()), torch.zeros(5, dtype=torch.float64)
    assert network.diffusion(x, t).tolist() == [[3.0, 0.5]] * 5
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(generator=randomness(1))
        network.log_noise.fill_(-1.5)
    equation, (f, g) = FokkerPlanck(network.drift, network.diffusion), network(x, t)
    assert torch.equal(equation.drift(x, 0.0), f) and torch.equal(equation.covariance(x, 0.0), g.square())
    assert g.dtype == torch.float64 and bool((g > 0).all()) and not torch.equal(g, network.drift.scale.expand_as(g))
    assert specs.describe(specs.build(network.spec)) == specs.describe(network)


def wells(number):
    problem, g = problems.double_well(), randomness()
    start = problems.gaussian(0.0, 0.35, 1).sample(number, g)
    paths = problem.equation.simulate(start, TIMES, 40, g)
    return problem, torch.stack([part[torch.randperm(number, generator=g)] for part in paths])


LEARN = {  # the samples, the longest wave, whether the noise is learned, steps; errors of the drift and of g^2
    "ou": (lambda: (problems.ornstein_uhlenbeck(1), ou(10_000)), 4.0, True, 200, 0.05, 0.05),
    "well": (lambda: wells(20_000), 8.0, True, 500, 0.12, 0.09),
    "well, noise given": (lambda: wells(20_000), 8.0, False, 200, 0.09, 0.0),
}


@pytest.mark.parametrize("case", LEARN)
def test_an_equation_is_learned(case, tmp_path):
    make, longest, learned, steps, drift_error, noise_error = LEARN[case]
    problem, samples = make()
    points = samples.flatten(0, 1)
    torch.manual_seed(0)
    network = DriftNetwork(points.mean(0).tolist(), points.std(0).tolist(), width=32, depth=1)
    network = ProcessNetwork(network) if learned else network
    given = None if learned else problem.equation.diffusion
    objective = WeakMatching(samples, TIMES, waves(samples, 32, longest=longest), given)
    options = {"checkpoint_every": 10_000, "log_every": 100, "device": "cpu"}
    trainer = Trainer(steps=steps, batch_size=256, learning_rate=2e-2, warmup=20, ema_decay=0.98, **options)
    found = trainer.fit(network, objective, paired(samples), tmp_path, progress=False)
    equation = FokkerPlanck(found.drift, found.diffusion) if learned else FokkerPlanck(found, given)
    with torch.no_grad():
        error = equation.drift(points, 0.0) - problem.equation.drift(points, 0.0)
        ratio = equation.covariance(points, 0.0).flatten() / problem.equation.covariance(points, 0.0).flatten()
    assert (
        float(error.square().mean().sqrt() / problem.equation.drift(points, 0.0).square().mean().sqrt()) < drift_error
    )
    assert float((ratio - 1).abs().max()) <= noise_error


def test_noise_is_not_learned_from_samples_of_a_stationary_law():
    x = torch.randn(9, 2000, 1, generator=randomness(), dtype=torch.float64)
    with pytest.raises(UserError, match=r"does not change in time beyond chance \(p = 0\.\d+\)"):
        WeakMatching(x, TIMES, waves(x))
    assert float(WeakMatching(x, TIMES, waves(x), noise)(lambda x, t: -x, examples(x)).mean()) < 0.5


def test_paired_data_are_examples_of_all_times():
    data = paired([torch.zeros(4, 2), torch.ones(5, 2), 2 * torch.ones(3, 2)])
    assert data.values.shape == (3, 3, 2) and data.values[0, :, 0].tolist() == [0, 1, 2]


def call(network, **options):
    x = ou(40)
    return lambda: WeakMatching(x, TIMES, waves(x), **options)(network, examples(x))


BAD = {
    "times": (lambda: WeakMatching(ou(4), TIMES[:-1], waves(ou(4)), noise), "9 snapshots and 8 times"),
    "moments": (call(None, diffusion=noise, time_moments=9), "time_moments=9, expected 1 to 8"),
    "examples": (
        lambda: WeakMatching(ou(4), TIMES, waves(ou(4)), noise)(None, Batch(torch.zeros(4, 3, 1), None, randomness())),
        r"\(4, 3, 1\)",
    ),
    "no noise": (call(lambda x, t: x), "f alone and no diffusion"),
    "two noises": (call(lambda x, t: (x, x), diffusion=noise), "both f and g where one is"),
    "scale": (lambda: DriftNetwork([0.0], [0.0]), "scales from 0"),
    "horizon": (lambda: DriftNetwork([0.0], [1.0], horizon=0.0), "horizon=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(UserError, match=message):
        call()


def told_of_times(times, number, rows, drifts):
    """Whether it is said that the times are too coarse, in 100 batches with each of the drifts."""
    problem, g = problems.ornstein_uhlenbeck(1, start=problems.gaussian(1.0, 0.5)), randomness()
    x = torch.stack([problem.law_at(t).sample(number, g) for t in times])
    objective, data = WeakMatching(x, times, waves(x, 24), noise), paired(x).values.double()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for drift in drifts:
            for _ in range(100):
                objective(drift, Batch(data[torch.randint(len(data), (rows,), generator=g)], None, g))
    return len([one for one in found if "the integrals over" in str(one.message)])


def test_what_is_said_of_times_is_what_the_weak_form_says():
    """With one moment of time the residuals, and what leaving out times does to them, are those of `weak_residual`."""
    problem, g = problems.ornstein_uhlenbeck(1, start=problems.gaussian(1.0, 0.5)), randomness()
    times = [0.0, 0.5, 1.0, 1.5, 2.0]
    x = torch.stack([problem.law_at(t).sample(10_000, g) for t in times])
    functions = waves(x, 24)
    objective, data = WeakMatching(x, times, functions, noise, time_moments=1), paired(x).values.double()
    with pytest.warns(UserWarning, match="the integrals over 5 times may be off") as found:
        for _ in range(200):
            objective(right, Batch(data[torch.randint(len(data), (256,), generator=g)], None, g))
    said = float(str(found[-1].message).split("off by ")[1].split(" ")[0])
    with pytest.warns(UserWarning, match="5 times may be off"):
        share = weak_residual(x, times, right, noise, functions).quadrature_share
    assert said == pytest.approx(share, rel=0.25)


def right(x, t):
    return -x


def wild(x, t):
    return -500 * x * (20 * t[:, None]).cos()


@pytest.mark.parametrize(
    ("times", "number", "rows", "drifts", "said"),
    [
        ([0.0, 1.0, 2.0, 3.0], 5000, 256, [right] * 3, 1),
        ([0.0, 3.0], 5000, 256, [right] * 3, 1),
        (TIMES, 5000, 256, [right] * 3, 0),
        (TIMES, 40_000, 2, [right] * 3, 0),
        (TIMES, 200, 256, [right] * 3, 0),
        (TIMES, 5000, 256, [wild, right, right], 0),
        (TIMES, 5000, 256, [right, wild, wild], 1),
    ],
    ids=["four", "two", "nine", "small-batches", "few", "at-first", "in-the-end"],
)
def test_times_that_do_not_resolve_the_rates_are_said_while_a_network_is_trained(times, number, rows, drifts, said):
    assert told_of_times(times, number, rows, drifts) == said
