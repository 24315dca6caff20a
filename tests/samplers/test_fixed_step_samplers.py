"""Fixed-step samplers: order of convergence, cost, and the law of what they make. A new sampler joins FIXED_STEP."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import mixture
from reference import BUILD, error, solved
from scipy import stats

from diffusion.samplers import Counted, Euler, Grid, Heun, LogSNRGrid, PowerGrid

FIXED_STEP = {Euler: lambda steps: steps, Heun: lambda steps: 2 * steps - 1}  # evaluations in all

every_sampler = pytest.mark.parametrize("sampler", FIXED_STEP)


class SineGrid(Grid):
    """A grid of a user's own, uneven in every variable."""

    def __call__(self, field, points):
        u = torch.linspace(0, 1, points, dtype=torch.float64)
        u = u + 0.1 * (math.tau * u).sin()
        ends = [time ** (1 / field.rho) for time in (field.horizon, field.t_min)]
        return (ends[0] + u * (ends[1] - ends[0])) ** field.rho


def slope(sampler, problem, grid, intervals):
    errors = [error(sampler(n + 1, grid), problem) for n in intervals]
    return -np.polyfit(np.log(intervals), np.log(errors), 1)[0]


@every_sampler
@pytest.mark.parametrize("name", ["variance_exploding", "linear", "gravity"])
def test_order_of_convergence(sampler, name):
    assert slope(sampler, solved(name), PowerGrid(), (128, 256, 512)) == pytest.approx(sampler.order, abs=0.15)


@every_sampler
@pytest.mark.parametrize("name", ["variance_exploding", "linear"])
@pytest.mark.parametrize("grid", [PowerGrid(3.0), LogSNRGrid(), SineGrid()], ids=["power", "log", "own"])
def test_order_of_convergence_on_other_grids(sampler, name, grid):
    assert slope(sampler, solved(name), grid, (64, 128, 256)) == pytest.approx(sampler.order, abs=0.15)


@every_sampler
def test_more_steps_are_not_only_faster_but_right(sampler):
    """An order of convergence says nothing of where to; 256 steps are within 1 % of the width of the modes."""
    assert error(sampler(257), solved("variance_exploding")) < 0.01


@every_sampler
@pytest.mark.parametrize("steps", [2, 5, 18])
def test_evaluations_are_those_stated(sampler, steps):
    problem = solved("variance_exploding")
    model = Counted(problem.model)
    sampler(steps)(model, problem.x_T)
    assert model.evaluations == FIXED_STEP[sampler](steps)


class Watched:
    """A model that remembers what it was asked, and what it said."""

    def __init__(self, problem):
        self.model, self.field, self.asked, self.answers = problem.model, problem.model.field, [], []

    def velocity(self, x, t):
        self.asked.append((x, t))
        self.answers.append(self.model.velocity(x, t))
        return self.answers[-1]


@every_sampler
def test_a_sampler_ends_with_the_denoised_mean_at_t_min(sampler):
    problem = solved("gravity")
    model = Watched(problem)
    x_0 = sampler(20)(model, problem.x_T)
    x, t = model.asked[-1]
    assert (t == model.field.t_min).all()
    torch.testing.assert_close(x_0, problem.model.denoised(x, t), rtol=1e-9, atol=1e-9)


@every_sampler
def test_times_of_evaluation_are_those_of_the_grid(sampler):
    problem = solved("linear")
    model = Watched(problem)
    sampler(9, LogSNRGrid())(model, problem.x_T)
    seen = [t for t, _ in itertools.groupby(float(t[0]) for _, t in model.asked)]
    assert seen == pytest.approx(LogSNRGrid()(problem.model.field, 9).tolist())


@every_sampler
def test_states_are_double_precision_whatever_the_prior_draw(sampler):
    problem = solved("variance_exploding")
    model = Watched(problem)
    assert sampler(5)(model, problem.x_T.float()).dtype == torch.float32
    assert {(x.dtype, t.dtype) for x, t in model.asked} == {(torch.float64, torch.float64)}


@pytest.mark.parametrize("name", BUILD)
def test_samples_are_distributed_as_the_data(name):
    """From the prior through the exact velocity: the modes and the law of a projection."""
    data, number = mixture(BUILD[name](2)), 1000
    prior = data.field.sample_prior((number, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([Heun(24)(data, part) for part in prior.split(50)])
    mode = torch.cdist(x, data.means).argmin(1)
    counts = torch.bincount(mode, minlength=3)
    assert stats.chisquare(counts.numpy(), number * data.weights.numpy()).pvalue > 1e-3
    for k, mean in enumerate(data.means):
        part = x[mode == k]
        assert ((part.mean(0) - mean) / (data.stds[k] / math.sqrt(len(part)))).abs().max() < 4.5
        assert float(part.std(0).mean() / data.stds[k]) == pytest.approx(1, abs=3 / math.sqrt(len(part)))
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    laws = [stats.norm(float(m @ direction), float(s)) for m, s in zip(data.means, data.stds, strict=True)]

    def cdf(y):
        return sum(float(w) * law.cdf(y) for w, law in zip(data.weights, laws, strict=True))

    assert stats.kstest((x @ direction).numpy(), cdf).pvalue > 1e-3


@every_sampler
@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_fewer_than_two_steps_are_refused(sampler, steps, user_error):
    with user_error(f"steps={steps}", "at least 2"):
        sampler(steps)
