"""Metropolis-adjusted Langevin dynamics: exact laws at steps at which the plain scheme is wrong."""

import math

import pytest
import torch
from cases import draws
from torch import Tensor

from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama
from diffusion.gradient_flow.flows.preconditioners import Identity, Matrix
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential


def name(value) -> str:
    return type(value).__name__


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


logistic_variance = math.pi**2 / 3


def logistic(x: Tensor) -> Tensor:
    """Of independent coordinates of variance pi^2 / 3 and fourth moment 7 pi^4 / 15."""
    return -(x + 2 * torch.nn.functional.softplus(-x)).sum(1)


@pytest.mark.parametrize(
    "preconditioner", [Identity(), Matrix(torch.tensor([2.0, 0.5], dtype=torch.float64))], ids=name
)
def test_metropolis_has_the_exact_law_at_a_step_at_which_the_plain_scheme_does_not(preconditioner):
    x, h, number = draws(20000, 2, 5, spread=2.0), 2.0, 20000
    *_, moment = Langevin(KL(logistic), Metropolis(), preconditioner).moments(x, 60, h, seeded(6))
    error = math.sqrt((7 / 15 * math.pi**4 - logistic_variance**2) / number)
    assert ((moment.particles.square().mean(0) - logistic_variance).abs() < 4 * error).all()
    assert (moment.particles.mean(0).abs() < 4 * math.sqrt(logistic_variance / number)).all()
    plain = Langevin(KL(logistic), EulerMaruyama(), preconditioner).run(x, 60, h, seeded(6))
    assert ((plain.square().mean(0) - logistic_variance).abs() > 4 * error).any()
    assert 0.3 < moment.memory.rate < 0.99


def test_metropolis_keeps_an_exact_sample_exact_in_one_step():
    """A step of any size from exact draws: pairs (x, x') have the law of (x', x), so E[x^2 x' - x x'^2 ...] vanish."""
    uniform = torch.rand(40000, 1, generator=seeded(7), dtype=torch.float64)
    x = torch.log(uniform / (1 - uniform))
    target = KL(lambda x: logistic(x) + 0.0 * x[:, 0])
    *_, moment = Langevin(target, Metropolis()).moments(x, 1, 3.0, seeded(8))
    new = moment.particles
    for odd in (
        new - x,
        new * x * (new - x),
        new**2 - x**2,
        x**3 * new - new**3 * x,
        (new > 1).double() - (x > 1).double(),
    ):
        assert abs(float(odd.mean())) < 4 * float(odd.std()) / 200
    assert 0.1 < moment.memory.last < 0.9


def gaussian(x: Tensor) -> Tensor:
    return -x.square().sum(1) / 2


def test_acceptance_falls_with_the_step_and_is_nearly_one_for_short_ones():
    x = draws(4000, 3, 9)
    rates = []
    for h in (0.01, 0.3, 1.0, 3.0):
        *_, moment = Langevin(KL(gaussian), Metropolis()).moments(x, 10, h, seeded(10))
        rates.append(moment.memory.rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.99 and rates[-1] < 0.5


def test_the_rate_is_the_share_of_proposals_that_moved():
    x, shares = draws(50, 2, 9), []
    for moment in Langevin(KL(logistic), Metropolis()).moments(x, 8, 3.0, seeded(1)):
        if moment.step:
            shares.append(float((moment.particles != x).any(1).double().mean()))
            assert moment.memory.last == shares[-1]
        x = moment.particles
    assert moment.memory.rate == pytest.approx(sum(shares) / 8) and moment.memory.steps == 8


def test_the_law_is_that_of_the_temperature():
    """exp(-U / tau) with U = x^2 / 2 and tau = 0.4, in coordinates that a full matrix mixes."""
    matrix = Matrix(torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.float64))
    functional = 0.4 * Entropy() + Potential(lambda x: x.square().sum(1) / 2)
    x = Langevin(functional, Metropolis(), matrix).run(draws(8000, 2, 3), 30, 0.7, seeded(4))
    assert ((x.square().mean(0) - 0.4).abs() < 4 * 0.4 * math.sqrt(2 / 8000)).all()


def test_proposals_beyond_the_support_are_refused():
    """x ~ exp(-x), x > 0: the log-density is NaN or -inf elsewhere."""
    target = KL(lambda x: torch.where(x > 0, -x, x.log()).sum(1))
    x = torch.rand(2000, 1, generator=seeded(2), dtype=torch.float64)
    particles = Langevin(target, Metropolis()).run(x, 200, 0.5, seeded(3))
    assert particles.min() > 0
    assert float(particles.mean()) == pytest.approx(1, abs=0.1)


def test_metropolis_costs_one_velocity_and_one_value_a_step():
    calls = {"velocity": 0, "value": 0}

    def log_density(x):
        calls["velocity" if x.requires_grad else "value"] += 1
        return -x.square().sum(1) / 2

    Langevin(KL(log_density), Metropolis()).run(draws(4, 2, 0), 9, 0.1, seeded(0))
    assert calls == {"velocity": 9 + 1, "value": 9 + 2}


def test_metropolis_needs_a_law_of_each_particle_alone(user_error):
    x = draws(5, 2, 0)
    with user_error("Interaction", "expected potentials"):
        Langevin(KL(logistic) + Interaction(lambda z: z.square().sum(-1)), Metropolis()).run(x, 1, 0.1)
    with user_error("score alone"):
        Langevin(KL(lambda x: -x), Metropolis()).run(x, 1, 0.1)
