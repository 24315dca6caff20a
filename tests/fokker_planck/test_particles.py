"""Particles with a learned score: closed forms, the order of the steps, exact laws, and errors."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck, GridSolver, ParticleSolver, correction, problems
from diffusion.fokker_planck.correction import Correction
from diffusion.fokker_planck.laws import GaussianMixture, gaussian
from diffusion.fokker_planck.learned_score import LearnedScore
from diffusion.fokker_planck.particle_checks import place_error, step_error, warn_of_score, warn_of_steps
from diffusion.trainer import Trainer

DOUBLE = torch.float64
QUICK = Trainer(steps=300, batch_size=256, learning_rate=3e-3, warmup=20, ema_decay=0.9, device="cpu")


def ends(problem, steps, number=40, generator=None, **options):
    solver = ParticleSolver(problem.equation, hidden=(4,), first=replace(QUICK, steps=1, warmup=0), draws=40, **options)
    generator = torch.Generator().manual_seed(0)
    return solver.solve(problem.start, [0.0, problem.horizon], number, steps, generator)


FLOWS = {
    "turning": lambda: problems.ornstein_uhlenbeck(2, turn=1.5),
    "variance_preserving": lambda: problems.variance_preserving(gaussian(1.0, 0.5, 2), low=0.5, high=4.0),
    "diagonal_noise": lambda: gaussian_problem(lambda x, t: torch.tensor([1.0, 0.5]).to(x).expand_as(x)),
    "matrix_noise": lambda: gaussian_problem(
        lambda x, t: torch.tensor([[1.0, 0.0], [0.6, 0.8]]).to(x).expand(len(x), 2, 2)
    ),
}


def gaussian_problem(diffusion):
    """Decay at the rate 1 with constant noise."""
    equation, start = FokkerPlanck(lambda x, t: -x, diffusion), gaussian(1.0, 0.5, 2)
    x = torch.zeros(1, 2, dtype=DOUBLE)
    a = equation.covariance(x, 0.0)[0]
    a = a if a.dim() == 2 else a.diag()

    def law_at(t):
        return start.moved(math.exp(-t) * torch.eye(2, dtype=DOUBLE), (1 - math.exp(-2 * t)) / 2 * a)

    return problems.Problem(equation, start, ((-6, 6), (-6, 6)), 1.0, law_at=law_at)


@pytest.mark.parametrize("name", FLOWS)
def test_order_of_the_steps(name, monkeypatch):
    """Densities and scores of Gaussians, whose scores the network has exactly: what is left is the error in time.

    The places of so few particles are not asked.
    """
    monkeypatch.setattr(correction, "WIDE", math.inf)
    problem, errors = FLOWS[name](), []
    for steps in (16, 32):
        solution = ends(problem, steps)
        x = solution.particles[-1].clone().requires_grad_()
        log_prob = problem.law_at(problem.horizon).log_prob(x)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
        found = (solution.log_density[-1], solution.scores[-1], solution.learned[-1](x.detach()))
        wanted = (log_prob, score, score)
        errors.append([float((a - b).norm()) for a, b in zip(found, wanted, strict=True)])
        assert float(solution.kl_bound[-1]) < 1e-9
    for coarse, fine in zip(*errors, strict=True):
        assert coarse / fine > 2**1.85
        assert fine < 0.1


@pytest.fixture(scope="module")
def mixture():
    """Two Gaussians in the plane that turn and merge."""
    problem = problems.ornstein_uhlenbeck(2, turn=1.0, start=problems.two_gaussians(2), horizon=0.6)
    solver = ParticleSolver(problem.equation, hidden=(16, 48), first=replace(QUICK, steps=800), draws=4000)
    times = [0.0, 0.2, 0.6]
    return problem, solver.solve(problem.start, times, 1000, 15, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_mixture(mixture, index):
    problem, solution = mixture
    law = problem.law_at(float(solution.times[index]))
    kl, error = solution.kl(law, index)
    assert abs(kl) < 0.01 + 3 * error
    assert error < 0.01
    deviations = law.covariance.diagonal().sqrt()
    assert bool(((solution.mean[index] - law.mean).abs() / deviations < 4 / 1000**0.5).all())
    assert torch.allclose(solution.covariance[index], law.covariance, atol=0.13)
    x = solution.particles[index].clone().requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    gap = solution.learned[index](x.detach()) - score
    assert float(gap.square().sum() / score.square().sum()) < 0.12**2
    entropy = -law.log_prob(law.sample(20_000, torch.Generator().manual_seed(1))).mean()
    assert float(solution.entropy[index]) == pytest.approx(float(entropy), abs=0.1)


def test_mixture_is_better_than_a_gaussian(mixture):
    problem, solution = mixture
    law = problem.law_at(0.2)
    fit = GaussianMixture(torch.ones(1, dtype=DOUBLE), law.mean[None], law.covariance[None])
    x = fit.sample(4000, torch.Generator().manual_seed(0))
    assert float((fit.log_prob(x) - law.log_prob(x)).mean()) > 20 * abs(solution.kl(law, 1)[0])


def test_bound_holds_and_grows(mixture):
    problem, solution = mixture
    bounds = solution.kl_bound.tolist()
    assert bounds == sorted(bounds)
    assert bounds[0] == 0
    kl, error = solution.kl(problem.law_at(0.6))
    assert kl - 2 * error < bounds[-1] < 0.3


def test_rate_of_the_bound():
    """1/8 E e.a e, a = 2, for the standard normal's score where that of a normal of mean (1, 1) is right."""
    law, x = gaussian(1.0, 1.0, 2), torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    eye = torch.eye(2, dtype=DOUBLE)
    score = LearnedScore(0.0, torch.zeros(2, dtype=DOUBLE), eye, Correction(2, (4,)).requires_grad_(False))
    solver = ParticleSolver(problems.ornstein_uhlenbeck(2).equation)
    assert solver._missed(solver_state(law, x), score, 0.0, 4) == pytest.approx(2 * 2 / 8)


def test_carried_scores_are_gradients_of_carried_densities():
    """Of the law that a wrong score moves to: from the densities at neighbouring starts, by differences."""
    problem = problems.ornstein_uhlenbeck(2, turn=1.0, start=problems.two_gaussians(2), horizon=0.3)
    solver = ParticleSolver(problem.equation, hidden=(8, 8), first=QUICK)
    generator = torch.Generator().manual_seed(0)
    network = Correction(2, (8, 8), generator).requires_grad_(False)
    network.last.weight.normal_(generator=generator)
    score = LearnedScore(0.0, torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE), network)
    x0, h = problem.start.sample(4, generator), 1e-4
    shifts = torch.tensor([[0, 0], [h, 0], [-h, 0], [0, h], [0, -h]], dtype=DOUBLE)
    state = solver_state(problem.start, (x0[:, None] + shifts).reshape(-1, 2))
    for n in range(60):
        now = solver._rates(state, score, n * 5e-3, None)
        state = state.moved(5e-3, now, solver._rates(state.moved(5e-3, now), score, (n + 1) * 5e-3, None))
    places, values = state.x.view(4, 5, 2), state.log_density.view(4, 5)
    steps = torch.stack([places[:, 1] - places[:, 2], places[:, 3] - places[:, 4]], 1)
    changes = torch.stack([values[:, 1] - values[:, 2], values[:, 3] - values[:, 4]], 1)
    wanted = torch.linalg.solve(steps, changes)
    assert torch.allclose(state.score.view(4, 5, 2)[:, 0], wanted, rtol=1e-3, atol=1e-3)


def solver_state(start, x):
    from diffusion.fokker_planck.particles import State

    x = x.clone().requires_grad_()
    log_density = start.log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    return State(x.detach(), log_density.detach(), score, score)


def test_noise_that_depends_on_the_state():
    """Geometric Brownian motion: the term div a matters, in the velocity and in its divergence."""
    problem = problems.geometric_brownian(horizon=0.5)
    solver = ParticleSolver(problem.equation, hidden=(16, 32), first=replace(QUICK, steps=800), draws=4000)
    solution = solver.solve(problem.start, [0.0, 0.5], 500, 10, torch.Generator().manual_seed(0))
    kl, error = solution.kl(problem.law_at(0.5))
    assert abs(kl) < 0.005 + 3 * error
    assert error < 0.005


def test_probes_estimate_the_divergence_of_the_drift():
    """Exact for the part of a drift that is diagonal or antisymmetric."""
    problem = problems.ornstein_uhlenbeck(4, turn=1.5)
    exact, estimated = ends(problem, 4), ends(problem, 4, exact_below=3, probes=1)
    assert torch.allclose(exact.log_density[-1], estimated.log_density[-1], atol=1e-9)
    coupled = FokkerPlanck(lambda x, t: x.roll(1, 1).sin() - x, lambda x, t: 1.0)
    problem = replace(problem, equation=coupled)
    exact, estimated = ends(problem, 4), ends(problem, 4, exact_below=3, probes=200)
    difference = exact.log_density[-1] - estimated.log_density[-1]
    assert 1e-4 < float(difference.abs().mean()) < 0.1


def test_training_goes_on_where_asked():
    problem = problems.variance_preserving(dim=2, horizon=0.2)
    for following in (None, replace(QUICK, steps=2)):
        first, last = ends(problem, 2, following=following).learned
        same = torch.equal(first.correction.layers[0].weight, last.correction.layers[0].weight)
        assert same == (following is None)


def test_same_seeds_same_solution():
    problem = problems.variance_preserving(dim=2, horizon=0.2)
    one, two = ends(problem, 2), ends(problem, 2)
    assert torch.equal(one.particles, two.particles)
    assert torch.equal(one.log_density, two.log_density)


def test_high_dimensions():
    """50 coordinates with a turn, from fewer particles than the covariance has entries."""
    problem = problems.ornstein_uhlenbeck(50, turn=1.0, horizon=0.5)
    solution = ends(problem, 10, number=300)
    kl, error = solution.kl(problem.law_at(0.5))
    assert abs(kl) < 0.05
    assert error < 0.02
    x = solution.particles[-1]
    law = problem.law_at(0.5)
    exact = -(x - law.mean) @ law.covariance.inverse()
    assert float((solution.learned[-1](x) - exact).norm() / exact.norm()) < 0.01


class Undifferentiable:
    def sample(self, number, generator=None):
        return gaussian(0.0, 1.0, 2).sample(number, generator)

    def log_prob(self, x):
        return gaussian(0.0, 1.0, 2).log_prob(x.detach())


@pytest.mark.parametrize(
    ("options", "run", "words"),
    [
        ({"hidden": (4, 4, 4)}, {}, r"hidden is \(4, 4, 4\), expected the widths of one or two layers"),
        ({"held_out": 1.0}, {}, "held_out is 1.0"),
        ({"memory": 1.5}, {}, "memory is 1.5"),
        ({"probes": 0}, {}, "probes is 0"),
        ({"device": "abacus"}, {}, "device is 'abacus'"),
        ({}, {"times": [0.0, 0.0]}, "expected rising finite numbers"),
        ({}, {"steps": 0}, "steps=0"),
        ({}, {"number": 0}, "number=0"),
        ({"memory": "abc"}, {}, "memory is 'abc'"),
        ({"probes": "abc"}, {}, "probes is 'abc'"),
        ({"first": 3}, {}, "first is 3 .* expected a Trainer"),
        ({}, {"number": 12}, "there are 10 particles to learn from and 2 held out, expected at least 14"),
        ({}, {"start": Undifferentiable()}, "has no derivative in x"),
    ],
    ids=[
        "layers",
        "held_out",
        "memory",
        "probes",
        "device",
        "times",
        "steps",
        "none",
        "words",
        "word",
        "first",
        "number",
        "start",
    ],
)
def test_bad_input(options, run, words):
    problem = problems.ornstein_uhlenbeck(2)
    with pytest.raises(UserError, match=words):
        solver = ParticleSolver(problem.equation, **{"hidden": (4,), "first": replace(QUICK, steps=1), **options})
        solver.solve(**{"start": problem.start, "times": [0.0, 1.0], "number": 40, "steps": 2, **run})


def test_lost_particles():
    equation = FokkerPlanck(lambda x, t: 1e308 * x.tanh(), lambda x, t: 1.0)
    with pytest.raises(
        UserError, match=r"of 40 particles .* not finite at t=.*, after a step of 10 \(step 1\); take more steps"
    ):
        ends(replace(problems.ornstein_uhlenbeck(2, horizon=20.0), equation=equation), 2)


def test_particles_in_a_plane():
    equation = FokkerPlanck(lambda x, t: torch.cat([-x[:, :1], -2 * x[:, 1:]], 1), lambda x, t: 0.0)
    with pytest.raises(UserError, match="span no volume at t=1"):
        ends(replace(problems.ornstein_uhlenbeck(2), equation=equation), 1)


def double_well(steps, hidden=(24,), number=1000, dim=1):
    """From one well into the other: a new mode grows, and the drift's slope is -100 at the cloud's edge."""
    equation = FokkerPlanck(lambda x, t: 4 * (x - x**3), lambda x, t: 1.0)
    solver = ParticleSolver(equation, hidden=hidden, first=QUICK, draws=4000)
    times, generator = [0.0, 0.5, 1.0], torch.Generator().manual_seed(0)
    return equation, solver.solve(gaussian(-1.0, 0.3, dim), times, number, steps, generator)


@pytest.mark.filterwarnings("error")
def test_a_new_mode_grows():
    equation, solution = double_well(30, (32,), 2000)
    grid = GridSolver(equation, [(-3, 3)], cells=200).solve(gaussian(-1.0, 0.3), [0.0, 0.5, 1.0])
    x, width = grid.grid[0], 6 / 200
    entropy = -(grid.density * grid.density.clamp_min(1e-300).log()).sum(1) * width

    assert torch.allclose(solution.entropy, entropy, atol=0.04)
    assert torch.allclose(solution.mean[:, 0], (grid.density * x).sum(1) * width, atol=0.05)


def test_steps_too_long_are_warned_of():
    with pytest.warns(
        RuntimeWarning, match=r"at t=1 are off by about .*, because 5 steps are too few.*take 10 or more"
    ):
        double_well(5)


def test_fine_steps_are_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends(problems.ornstein_uhlenbeck(2, turn=1.5), 16)


def test_error_of_a_step():
    """Heun's on a rate that falls from 1 to 1 - 2c: Euler's error h c, times c / (1 + c)."""
    now, c = torch.ones(5, dtype=DOUBLE), 0.2
    assert step_error(now, now - 2 * c, 0.1) == pytest.approx(0.1 * c * c / (1 + c))
    assert step_error(0 * now, 0 * now, 0.1) == 0


def test_error_of_a_step_in_the_places():
    """Heun's on dx/dt = -x with steps of z: z^3 / 4 / (1 + z / 2) of x, of the coordinate with the least deviation."""
    x, z = torch.tensor([[-1.0, 9.0], [1.0, 11.0]], dtype=DOUBLE) / 2**0.5, 0.2
    after = x * torch.tensor([2.0, 0.5], dtype=DOUBLE)
    second = place_error(-x, -(1 - z) * x, z, x, after)
    rms = float(x[:, 1].square().mean().sqrt()) / float(after[:, 1].std())
    assert second == pytest.approx(z**3 / 4 / (1 + z / 2) * rms)
    assert place_error(0 * x, 0 * x, z, x, after) == 0


@pytest.mark.parametrize("steps", [2, 12, 16])
def test_particles_that_swing_further_at_each_step_are_warned_of(steps):
    """The particles' own spread hides it from all that is judged at the end of the run."""
    equation = FokkerPlanck(lambda x, t: -40 * x, 1.0)
    problem = problems.Problem(equation, gaussian(1.0, 1.0, 2), ((-6, 6),) * 2, 1.0)
    with pytest.warns(RuntimeWarning, match=rf"places by [\d.e+]+ standard deviations, because {steps} steps") as found:
        solution = ends(problem, steps)
    assert float(solution.mean[-1].norm()) > 100
    told = [one for one in found if "standard deviations" in str(one.message)][-1]
    assert told.filename == __file__
    assert float(str(told.message).split("places by ")[1].split()[0]) > 10


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (1.05, False), (1.3, True), (0.7, True)])
def test_scores_that_do_not_fit_are_warned_of(scale, warned):
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    whitening = scale**0.5 * torch.eye(3, dtype=DOUBLE)
    score = LearnedScore(0.5, torch.zeros(3, dtype=DOUBLE), whitening, Correction(3, (4,)).requires_grad_(False))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_score(x, score, 0.5)
    assert [str(one.message)[:26] for one in found] == ["the score learned at t=0.5"] * warned


def test_particles_that_run_away_name_the_step():
    """x^3 on its way out: told before the drift itself is not finite."""
    equation = FokkerPlanck(lambda x, t: x**3, lambda x, t: 1.0)
    with pytest.raises(UserError, match=r"particles have a place.* not finite at t=.*\(step \d+\); take more steps"):
        ends(replace(problems.ornstein_uhlenbeck(2), equation=equation, horizon=40.0), 20)


def test_the_step_warning_grows_with_the_dimension():
    """A tenth of COARSE for each coordinate beyond ten: 0.5 nats in 50 dimensions."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_steps(0.09, 0.0, 1.0, 10, 1)
        warn_of_steps(0.45, 0.0, 1.0, 10, 50)
        warn_of_steps(0.0, 0.09, 1.0, 10, 1)
    for error, astray, dim in ((0.11, 0.0, 1), (0.11, 0.0, 10), (0.55, 0.0, 50), (0.0, 0.11, 50), (0.0, math.nan, 1)):
        with pytest.warns(RuntimeWarning, match="take 20 or more"):
            warn_of_steps(error, astray, 1.0, 10, dim)


def test_a_drift_that_torch_cannot_differentiate_is_refused(user_error):
    equation = FokkerPlanck(lambda x, t: -x.detach(), 1.0)
    with user_error("torch does not see how drift changes"):
        ParticleSolver(equation, hidden=(8,), draws=200).solve(gaussian(0.0, 1.0, 2), [0.0, 0.1], 100, 1)
