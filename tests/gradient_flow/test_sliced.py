"""The sliced Wasserstein distance against exact assignments."""

import math

import pytest
import torch
from cases import draws
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals.sliced import SlicedWasserstein, quantile_pairs


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize(("number", "other"), [(6, 6), (6, 4), (4, 12), (5, 7), (1, 3)])
def test_on_a_line_it_is_the_best_assignment(number, other, p):
    """Of points repeated until both sides are as many."""
    x, y = draws(number, 1, 0) + 0.5, draws(other, 1, 1)
    common = math.lcm(number, other)
    costs = torch.cdist(x.repeat(common // number, 1), y.repeat(common // other, 1)).pow(p)
    best = costs[linear_sum_assignment(costs.numpy())].mean()
    assert float(SlicedWasserstein(y, p=p).value(x)) == pytest.approx(float(best), rel=1e-10)


def test_the_first_power_is_that_of_scipy():
    x, y = draws(50, 1, 0) + 0.5, draws(33, 1, 1)
    expected = wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert float(SlicedWasserstein(y, p=1).value(x)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_a_shift_costs_its_square_over_the_dimension(dim):
    y, shift = draws(30, dim, 0), torch.arange(1.0, dim + 1, dtype=torch.float64)
    functional = SlicedWasserstein(y, 4 * dim).fitted(y, torch.Generator().manual_seed(0))
    assert float(functional.value(y + shift)) == pytest.approx(float(shift.square().sum()) / dim, rel=1e-10)
    torch.testing.assert_close(functional.velocity(y + shift), (-2 * shift / dim).expand(30, dim))


def test_a_step_of_half_the_dimension_ends_a_shift():
    y = draws(30, 4, 0)
    flow = WassersteinFlow(SlicedWasserstein(y, 8))
    moved = flow.run(y + 3.0, steps=1, step_size=2.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, y)


@pytest.mark.parametrize("other", [12, 8])
def test_where_quantiles_meet_the_variation_is_the_mean_of_both_sides(other):
    x, y, weight = draws(12, 1, 0), draws(other, 1, 1) + 0.5, 1e-4
    functional = SlicedWasserstein(y)

    def transport(masses):
        """Of particles with these masses, by merging both staircases."""
        order = x[:, 0].argsort()
        own = torch.cat([torch.zeros(1, dtype=torch.float64), masses[order].cumsum(0)])
        ends = torch.cat([own, torch.arange(other + 1, dtype=torch.float64) / other]).sort().values
        middle = (ends[1:] + ends[:-1]) / 2
        first = x[order, 0][(torch.searchsorted(own, middle) - 1).clamp(0, 11)]
        second = y[:, 0].sort().values[(middle * other).long().clamp(max=other - 1)]
        return float((ends.diff() * (first - second).square()).sum())

    variation = functional.first_variation(x)
    even = torch.full((12,), 1 / 12, dtype=torch.float64)
    for i, j in ((0, 5), (3, 11), (7, 2)):
        masses = even.clone()
        masses[i], masses[j] = masses[i] + weight, masses[j] - weight
        more = transport(masses)
        less = transport(2 * even - masses)
        assert (more - less) / (2 * weight) == pytest.approx(float(variation[i] - variation[j]), rel=1e-6)


def test_pairs_hold_the_masses_of_both():
    pairs = quantile_pairs(9, 6)
    for ranks, number in ((pairs.first, 9), (pairs.second, 6)):
        masses = torch.zeros(number, dtype=torch.float64).index_add_(0, ranks, pairs.weight)
        torch.testing.assert_close(masses, torch.full((number,), 1 / number, dtype=torch.float64))
    assert len(pairs.weight) == 9 + 6 - math.gcd(9, 6)
    assert pairs.ends[0] == 0 and pairs.ends[-1] == len(pairs.weight)


def test_a_bad_power_is_refused(user_error):
    with user_error("p is 0.5", "1 or more"):
        SlicedWasserstein(draws(5, 2, 0), p=0.5)
