"""Birth and death: the weights are those of the closed-form replicator solution, and nothing moves."""

import math
from dataclasses import dataclass

import pytest
import torch
from cases import draws
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.gradient_flow.flows.base import Alternating
from diffusion.gradient_flow.flows.fisher_rao import FisherRaoFlow, resampled
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import LeimkuhlerMatthews
from diffusion.gradient_flow.flows.underdamped import Underdamped
from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.scores.blob import Blob

ENERGY = Potential(lambda x: x[:, 0].square() + 2 * x[:, 1].cos())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_counts(flow, x, step_size, runs=800):
    """How often each particle is there after a step, on average."""
    generator, counts = seeded(1), torch.zeros(len(x), dtype=torch.float64)
    for _ in range(runs):
        moved = flow.run(x, 1, step_size, generator)
        counts += (moved[:, None] == x[None]).all(2).double().sum(0)
    return counts / runs


@pytest.mark.parametrize("step_size", [0.1, 2.0])
def test_on_a_potential_the_weights_are_those_of_the_exact_solution(step_size):
    """q_t ~ q_0 exp(-t U): a count is its expectation rounded up or down, so its error is at most 0.5 / sqrt(runs)."""
    x = draws(20, 2, 0)
    weights = (-step_size * ENERGY.first_variation(x)).softmax(0)
    counts = mean_counts(FisherRaoFlow(ENERGY), x, step_size)
    assert float((counts - 20 * weights).abs().max()) < 5 * 0.5 / math.sqrt(800)


def test_with_an_entropy_the_weights_are_those_of_the_exact_solution():
    """log q_t = exp(-t tau) log q_0 - (1 - exp(-t tau)) U / tau + constant."""
    x, step_size, tau = draws(20, 2, 0), 1.5, 0.7
    blob = Entropy(Blob(bandwidth=0.5))
    functional = tau * blob + ENERGY
    log_q = blob.first_variation(x)
    solution = math.exp(-tau * step_size) * log_q - (1 - math.exp(-tau * step_size)) / tau * ENERGY.first_variation(x)
    weights = (solution - log_q).softmax(0)
    counts = mean_counts(FisherRaoFlow(functional), x, step_size)
    assert float((counts - 20 * weights).abs().max()) < 5 * 0.5 / math.sqrt(800)


def test_many_particles_follow_the_exact_solution_of_many_steps():
    """A normal law under U = x^2 / 2 stays normal, with precision 1 + t."""
    x = FisherRaoFlow(Potential(lambda x: x.square().sum(1) / 2)).run(draws(20000, 1, 0), 20, 0.1, seeded())
    assert float(x.var()) == pytest.approx(1 / 3, rel=0.05)
    assert float(x.mean()) == pytest.approx(0, abs=0.03)


def test_particles_are_as_many_as_before_and_all_are_copies():
    x = draws(50, 3, 0)
    functional = Potential(lambda x: 4 * x[:, 0])
    moved = FisherRaoFlow(functional).run(x, 5, 0.3, seeded())
    assert moved.shape == x.shape
    assert bool((moved[:, None] == x[None]).all(2).any(1).all())
    assert float(functional.value(moved)) < float(functional.value(x)) - 1


def test_counts_are_expectations_rounded_up_or_down_and_survivors_keep_their_places():
    log_weights = 2 * draws(300, 1, 0)[:, 0]
    expected = 300 * log_weights.softmax(0)
    chosen = resampled(log_weights, seeded())
    counts = torch.bincount(chosen, minlength=300)
    assert bool(((counts - expected).abs() < 1 + 1e-9).all())
    alive = counts > 0
    assert torch.equal(chosen[alive], torch.arange(300)[alive])
    assert 0 < int(alive.sum()) < 300


def test_equal_weights_change_nothing():
    for seed in range(20):
        assert torch.equal(resampled(torch.full((7,), 3.0), seeded(seed)), torch.arange(7))


def test_the_step_repeats_by_its_generator():
    flow, x = FisherRaoFlow(ENERGY), draws(50, 2, 0)
    assert torch.equal(flow.run(x, 3, 0.5, seeded(3)), flow.run(x, 3, 0.5, seeded(3)))
    assert not torch.equal(flow.run(x, 3, 0.5, seeded(3)), flow.run(x, 3, 0.5, seeded(4)))


def two_modes(x):
    return torch.stack(
        [-(x[:, 0] + 3).square() / 2 + math.log(0.2), -(x[:, 0] - 3).square() / 2 + math.log(0.8)]
    ).logsumexp(0)


@pytest.mark.parametrize(
    "mover", [lambda f: Langevin(f, Metropolis()), WassersteinFlow], ids=["langevin", "wasserstein"]
)
def test_with_a_flow_that_moves_mass_gets_over_a_gap(mover):
    """Modes 6 standard deviations apart with weights 0.2 and 0.8, from equal halves: moves alone leave them so."""
    kl = KL(two_modes, Entropy(Blob()))
    x = draws(200, 1, 0) + torch.tensor([-3.0, 3.0], dtype=torch.float64).repeat(100)[:, None]
    alone = mover(kl).run(x, 40, 0.1, seeded())
    together = (mover(kl) + FisherRaoFlow(kl)).run(x, 40, 0.1, seeded())
    assert float((alone > 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((together > 0).double().mean()) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_functional_that_is_not_finite_is_refused(value, user_error):
    def energy(x):
        all_of_them = torch.full_like(x[:, 0], value)
        return all_of_them if value > 0 else torch.where(torch.arange(len(x)) == 4, all_of_them, x[:, 0])

    with user_error("weight of particle", "expected none NaN or infinite"):
        FisherRaoFlow(Potential(energy)).run(draws(8, 2, 0), 1, 0.1, seeded())


def test_particles_of_infinite_energy_die():
    x = draws(40, 1, 0)
    moved = FisherRaoFlow(Potential(lambda x: torch.where(x[:, 0] > 0, 0.0, math.inf))).run(x, 1, 0.1, seeded())
    assert bool((moved > 0).all())


@dataclass(frozen=True)
class SquaredMean(Functional):
    """(E U)^2 / 2 + E V, of U = x_0 and V = x_1."""

    def value(self, particles):
        return particles[:, 0].mean().square() / 2 + particles[:, 1].mean()

    def first_variation(self, particles):
        return particles[:, 0].mean() * particles[:, 0] + particles[:, 1]

    def velocity(self, particles):
        raise NotImplementedError


def test_of_weights_on_places_it_is_the_natural_gradient_flow():
    """dw/dt = -G^-1 df/dw for free weights (w_1, ... w_(K-1)), with the Fisher information G of a categorical law."""
    places, shares = draws(4, 2, 3), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def right(_, free):
        free = torch.from_numpy(free).requires_grad_()
        w = torch.cat([free, 1 - free.sum(0, keepdim=True)])
        f = (w @ places[:, 0]).square() / 2 + w @ places[:, 1]
        log_jacobian = torch.cat([torch.eye(3).double() / w[:3], -torch.ones(1, 3) / w[3]]).detach()  # of log w in free
        information = log_jacobian.T @ (w.detach()[:, None] * log_jacobian)
        return -torch.linalg.solve(information, torch.autograd.grad(f, free)[0]).numpy()

    exact, number, errors = solve_ivp(right, (0, 1), shares[:3].numpy(), rtol=1e-9, atol=1e-12).y[:, -1], 10**6, []
    x = places.repeat_interleave((shares * number).round().long(), 0)
    for steps in (8, 16):
        moved = x
        for _ in range(steps):
            moved = moved[moved[:, 0].argsort()]  # copies side by side: their number is what is expected, within 1
            moved = FisherRaoFlow(SquaredMean()).run(moved, 1, 1 / steps, seeded())
        found = torch.stack([(moved == place).all(1).double().mean() for place in places])
        errors.append(float((found[:3] - torch.from_numpy(exact)).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.3) and errors[1] < 0.01


MOVERS = {
    "limit": lambda f: Langevin(f, LeimkuhlerMatthews()),
    "underdamped": lambda f: Langevin(f, Underdamped()),
    "heavy_ball": lambda f: WassersteinFlow(f, momentum=0.9, control=None),
}


def remembered(memory):
    return memory if isinstance(memory, Tensor) else memory.momentum


DRIVEN = 0.5 * Entropy(Blob()) + Potential(lambda x: 8 * x[:, 0].square() + x[:, 1].square())


@pytest.mark.parametrize("mover", MOVERS)
def test_copies_remember_what_the_particle_copied_did(mover):
    move = MOVERS[mover](DRIVEN)
    alone = list(move.moments(draws(60, 2, 0), 1, 0.1, seeded(4)))[1]
    moment = list((move + FisherRaoFlow(DRIVEN)).moments(draws(60, 2, 0), 1, 0.1, seeded(4)))[1]
    origin = (moment.particles[:, None] == alone.particles[None]).all(2).double().argmax(1)
    assert torch.equal(origin, moment.origin) and len(origin.unique()) < 60
    assert torch.equal(remembered(moment.memory[0]), remembered(alone.memory)[origin])


def test_copies_move_by_what_they_remember():
    """x + h b + sqrt(2 tau h) (xi + xi') / 2, the xi of the step before being that of the particle copied."""
    flow = FisherRaoFlow(DRIVEN) + Langevin(DRIVEN, LeimkuhlerMatthews())
    _, one, two = flow.moments(draws(60, 2, 0), 2, 0.1, seeded(4))
    assert len(two.origin.unique()) < 60
    x = one.particles[two.origin]
    noise = one.memory[1][two.origin] + two.memory[1]
    slope = torch.tensor([-16.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(two.particles, x + 0.1 * slope * x + 0.1**0.5 / 2 * noise)


def test_sums_of_sums_know_who_is_a_copy_of_whom():
    potential, x = Potential(lambda x: 5 * x[:, 0]), draws(40, 2, 0)
    inner = FisherRaoFlow(potential) + FisherRaoFlow(potential)
    for moment in (inner + Alternating((WassersteinFlow(potential, control=None),))).moments(x, 1, 0.2, seeded()):
        if moment.step:
            still = x[moment.origin] + 0.2 * torch.tensor([-5.0, 0.0])
            torch.testing.assert_close(moment.particles, still)
            assert len(moment.origin.unique()) < 40


def test_the_flows_of_a_sum_take_steps_of_one_size():
    """Of 10 |x|^2 / 2 a step of 1 is halved to 1/8 under control; birth and death then last for 1/8 too."""
    steep, x = Potential(lambda x: 5 * x.square().sum(1)), draws(40, 2, 0)
    *_, moment = (WassersteinFlow(steep) + FisherRaoFlow(steep)).moments(x, 1, 1.0, seeded(1))
    assert moment.time == 0.125
    moved = x - 1.25 * x
    chosen = resampled(-0.125 * steep.first_variation(moved), seeded(1))
    torch.testing.assert_close(moment.particles, moved[chosen])
    *_, moment = (FisherRaoFlow(steep) + FisherRaoFlow(steep)).moments(x, 3, 0.1, seeded(1))
    assert moment.time == pytest.approx(0.3)
