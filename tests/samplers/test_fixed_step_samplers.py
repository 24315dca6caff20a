"""Fixed-step samplers: order of convergence, cost, and the law of what they make. A new sampler joins FIXED_STEP."""

import itertools
import math

import numpy as np
import pytest
import torch
from problems import mixture
from reference import BUILD, error, solved
from scipy import stats

from diffusion.samplers import Counted, Euler, Grid, Heun, LogGrid, PowerGrid

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
@pytest.mark.parametrize("grid", [PowerGrid(3.0), LogGrid(), SineGrid()], ids=["power", "log", "own"])
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


@every_sampler
def test_a_sampler_ends_with_the_denoised_mean_at_t_min(sampler):
    model, x_T, _ = solved("gravity")
    t_min = model.field.t_min
    x = sampler(20).integrate(model.velocity, x_T, model.field)
    torch.testing.assert_close(sampler(20)(model, x_T), model.denoised(x, t_min), rtol=1e-9, atol=1e-9)


@every_sampler
def test_times_of_evaluation_are_those_of_the_grid(sampler):
    problem, seen = solved("linear"), []

    def velocity(x, t):
        seen.append(float(t))
        return problem.model.velocity(x, t)

    sampler(9, LogGrid()).integrate(velocity, problem.x_T, problem.model.field)
    assert [t for t, _ in itertools.groupby(seen)][: 9 - (sampler.order == 1)] == pytest.approx(
        LogGrid()(problem.model.field, 9)[: 9 - (sampler.order == 1)].tolist()
    )


@every_sampler
def test_states_are_double_precision_whatever_the_prior_draw(sampler):
    problem, seen = solved("variance_exploding"), []

    class Watched:
        field = problem.model.field

        def velocity(self, x, t):
            seen.append((x.dtype, t.dtype))
            return problem.model.velocity(x, t)

    assert sampler(5)(Watched(), problem.x_T.float()).dtype == torch.float32
    assert set(seen) == {(torch.float64, torch.float64)}


@pytest.mark.parametrize("name", BUILD)
def test_samples_are_distributed_as_the_data(name):
    """From the prior through the exact velocity: the modes and the law of a projection."""
    data, number = mixture(BUILD[name]()), 1000
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
