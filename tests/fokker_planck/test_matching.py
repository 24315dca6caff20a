"""The weak form as an objective: unbiased, zero for the right drift, and a drift is learned with it."""

import math

import pytest
import torch

from diffusion import specs
from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck import test_functions as families
from diffusion.fokker_planck.matching import WeakMatching, paired
from diffusion.fokker_planck.snapshots import quadrature
from diffusion.networks.drift import DriftNetwork
from diffusion.objectives import Batch
from diffusion.trainer import Trainer

OBJECTIVE = {"functions": 32, "shortest": 1.0, "longest": 8.0, "half_turns": 1}
TRAINING = {"steps": 400, "batch_size": 256, "learning_rate": 2e-2}
TIMES = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def ou(number, seed=0, dim=1):
    problem, g = problems.ornstein_uhlenbeck(dim), randomness(seed)
    return torch.stack([problem.law_at(t).sample(number, g) for t in TIMES])


def noise(x, t):
    return torch.full_like(x[:, 0], math.sqrt(2.0))


def losses(drift, diffusion=noise, number=8000, steps=4, dim=1, **options):
    x = ou(number, dim=dim)
    objective, data = WeakMatching(x, TIMES, diffusion, functions=16, **options), x.transpose(0, 1)
    return torch.stack([objective(drift, Batch(data, None, randomness(s))).mean(0) for s in range(steps)])


@pytest.mark.parametrize("dim", [1, 3])
def test_only_the_right_equation_has_no_loss(dim):
    right = losses(lambda x, t: -x, dim=dim)
    assert float(right.mean().abs()) < 1e-3
    for drift, diffusion in [
        (lambda x, t: -0.7 * x, noise),
        (lambda x, t: x, noise),
        (lambda x, t: -x, lambda x, t: 1.2 * noise(x, t)),
        (lambda x, t: -x * (0.5 + t[:, None]), noise),
    ]:
        wrong = losses(drift, diffusion, dim=dim)
        assert float(wrong.mean()) > 5 * float(right.abs().mean())


def test_the_mean_is_the_square_without_the_variance():
    """Over small batches it vanishes for the right drift, and agrees with the square of the mean for a wrong one."""
    x = ou(6000)
    objective, data = WeakMatching(x, TIMES, noise, functions=8), x.transpose(0, 1)
    for factor in (1.0, -1.0):
        drift = lambda x, t, factor=factor: -factor * x  # noqa: E731
        whole = objective(drift, Batch(data, None, randomness())).mean(0)
        small = torch.stack([objective(drift, Batch(data[i : i + 10], None, randomness())) for i in range(0, 6000, 10)])
        assert small.shape == (600, 10, 8)
        each = small.mean(1)
        error = each.std(0) / math.sqrt(len(each))
        assert bool(((each.mean(0) - whole).abs() < 4 * error + 1e-6).all())
        assert float(each.mean(0).sum()) > 0.1 or factor == 1.0


def test_it_is_the_product_of_the_residuals_of_two_examples():
    x = ou(2, dim=2)
    objective = WeakMatching(x, TIMES, lambda x, t: (1 + t)[:, None] * torch.ones_like(x), functions=5, half_turns=2)
    got = objective(lambda x, t: x**2 - t[:, None], Batch(x.transpose(0, 1), None, randomness(3)))
    g = randomness(3)
    phi = families.RandomFourier.drawn(objective.centre, objective.scale, 5, g, 0.5, 4.0)
    turns = torch.randint(3, (5,), generator=g)
    phase = math.tau * torch.rand(5, dtype=torch.float64, generator=g)
    t = torch.tensor(TIMES, dtype=torch.float64)
    residual = []
    for i in range(2):
        value = phi.value(x[:, i])
        rate = phi.rate(x[:, i], x[:, i] ** 2 - t[:, None], (1 + t) ** 2)
        psi = (math.pi * turns * t[:, None] + phase).cos()
        slope = -math.pi * turns * (math.pi * turns * t[:, None] + phase).sin()
        inner = quadrature(TIMES, 5) @ (slope * value + psi * rate)
        residual.append(psi[-1] * value[-1] - psi[0] * value[0] - inner)
    assert torch.allclose(got, (residual[0] * residual[1]).expand(2, 5), atol=1e-12)


def test_a_drift_network_is_a_drift_and_is_described(tmp_path):
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


def test_the_drift_of_a_double_well_is_learned(tmp_path):
    problem, g = problems.double_well(), randomness()
    start = problems.gaussian(0.0, 0.35, 1).sample(20_000, g)
    paths = problem.equation.simulate(start, TIMES, 20, g)
    samples = torch.stack([part[torch.randperm(20_000, generator=g)] for part in paths])
    points = samples.flatten(0, 1)
    torch.manual_seed(0)
    network = DriftNetwork(points.mean(0).tolist(), points.std(0).tolist(), width=32, depth=1)
    objective = WeakMatching(samples, TIMES, problem.equation.diffusion, **OBJECTIVE)
    trainer = Trainer(**TRAINING, warmup=20, ema_decay=0.98, checkpoint_every=10_000, log_every=100, device="cpu")
    learned = trainer.fit(network, objective, paired(samples), tmp_path)
    x = points[points[:, 0].abs() < points[:, 0].abs().quantile(0.98)]
    with torch.no_grad():
        error = learned(x, torch.zeros(len(x))) - problem.equation.drift(x, 0.0)
    assert float(error.square().mean().sqrt() / problem.equation.drift(x, 0.0).square().mean().sqrt()) < 0.15


def test_paired_data_are_examples_of_all_times():
    data = paired([torch.zeros(4, 2), torch.ones(5, 2), 2 * torch.ones(3, 2)])
    assert data.values.shape == (3, 3, 2) and data.values[0, :, 0].tolist() == [0, 1, 2]


BAD = {
    "times": (lambda: WeakMatching(ou(4), TIMES[:-1], noise), "9 snapshots and 8 times"),
    "functions": (lambda: WeakMatching(ou(4), TIMES, noise, functions=0), "functions=0"),
    "turns": (lambda: WeakMatching(ou(4), TIMES, noise, half_turns=-1), "half_turns=-1"),
    "examples": (
        lambda: WeakMatching(ou(4), TIMES, noise)(lambda x, t: x, Batch(torch.zeros(4, 3, 1), None, randomness())),
        r"\(4, 3, 1\)",
    ),
    "scale": (lambda: DriftNetwork([0.0], [0.0]), "scales from 0"),
    "horizon": (lambda: DriftNetwork([0.0], [1.0], horizon=0.0), "horizon=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises(UserError, match=message):
        call()
