"""The Sinkhorn divergence against exact transport, its limits and finite differences."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from cases import draws
from geomloss import SamplesLoss
from scipy.optimize import linear_sum_assignment

from diffusion.gradient_flow.functionals import base, transport
from diffusion.gradient_flow.functionals.sinkhorn import SinkhornDivergence, Start
from diffusion.gradient_flow.functionals.transport import Transport


@pytest.mark.parametrize("p", [1, 2])
def test_without_blur_it_is_exact_transport(p):
    x, y = draws(20, 2, 0) + 1, draws(20, 2, 1)
    costs = torch.cdist(x, y).pow(p) / p
    exact = float(costs[linear_sum_assignment(costs.numpy())].mean())
    errors = []
    for temperature in (0.16, 0.02):
        functional = SinkhornDivergence(y, temperature ** (1 / p), p=p, tolerance=1e-3, iterations=5000)
        errors.append(abs(float(functional.value(x)) / exact - 1))
    assert errors[1] < 1.5e-2 and errors[1] < errors[0] / 4


def test_with_a_large_blur_it_is_half_the_squared_distance_of_the_means():
    x, y = draws(20, 3, 0) + 1, draws(30, 3, 1)
    functional = SinkhornDivergence(y, 300.0, tolerance=1e-10)
    apart = x.mean(0) - y.mean(0)
    assert float(functional.value(x)) == pytest.approx(float(apart.square().sum()) / 2, rel=1e-4)
    torch.testing.assert_close(functional.velocity(x), (-apart).expand(20, 3), rtol=1e-3, atol=1e-3)


def test_with_a_large_blur_and_distances_it_is_half_the_energy_distance():
    x, y = draws(20, 3, 0) + 1, draws(30, 3, 1)
    across, inside, outside = torch.cdist(x, y).mean(), torch.cdist(x, x).mean(), torch.cdist(y, y).mean()
    value = SinkhornDivergence(y, 3e4, p=1, tolerance=1e-10).value(x)
    assert float(value) == pytest.approx(float(2 * across - inside - outside) / 2, rel=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_it_is_what_a_slow_annealing_of_geomloss_tends_to(p):
    x, y = draws(20, 2, 0) + 1, draws(30, 2, 1)
    loss = SamplesLoss("sinkhorn", p=p, blur=0.7, scaling=0.99, backend="tensorized")
    value = SinkhornDivergence(y, 0.7, p=p, tolerance=1e-9).value(x)
    assert float(value) == pytest.approx(float(loss(x, y)), rel=1e-3)


def needed(functional, x):
    """Iterations, to a tenth, that do for every potential that a velocity asks for."""
    for iterations in sorted({int(1.1**k) for k in range(90)}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataclasses.replace(functional, iterations=iterations).velocity(x)
        if not caught:
            return iterations
    raise AssertionError("it does not converge")


def test_fitted_starts_from_where_it_was():
    x, y = draws(30, 2, 0) + 1, draws(40, 2, 1)
    cold = SinkhornDivergence(y, 0.5, tolerance=1e-6)
    warm = cold.fitted(x)
    moved = x + 1e-4 * warm.velocity(x)
    assert needed(warm, x) == 1
    assert needed(warm, moved) < 0.7 * needed(cold, moved)
    torch.testing.assert_close(warm.velocity(moved), cold.velocity(moved), rtol=1e-4, atol=1e-4)
    more = torch.cat([x, x[:7] + 0.1])  # the data's potential is still a start
    torch.testing.assert_close(warm.velocity(more), cold.velocity(more), rtol=1e-4, atol=1e-4)


def test_a_small_blur_takes_few_iterations():
    """Without over-relaxation more than 1000."""
    x, y = 0.5 * draws(100, 2, 0) + 1, draws(120, 2, 1)
    assert needed(SinkhornDivergence(y, 0.1), x) < 400


@pytest.mark.parametrize(("scale", "iterations"), [(0, 20), (1, 35), (10, 90)])
def test_points_to_themselves_take_few_iterations(scale, iterations):
    """From the start that is found, and from potentials off by `scale` temperatures; without the mean of both sides,
    50 and more are needed."""
    x = draws(60, 2, 0)
    own = Transport(x, x, 0.5, 2)
    start = scale * 0.25 * draws(60, 1, 3)[:, 0] if scale else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g = own.solve(start, 0.5, 1e-8, iterations)
    torch.testing.assert_close(own.softmin(g), g, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_start_from_far_away_does_no_harm(dtype):
    """Potentials that are off by thousands of temperatures, each by another number."""
    x, y = draws(30, 2, 0), draws(40, 2, 1)
    cold = SinkhornDivergence(y, 0.4, tolerance=1e-5)
    start = Start(*(3e3 * 0.4**2 * draws(number, 1, 2)[:, 0] for number in (40, 30)), lambda: torch.zeros(()))
    warm = dataclasses.replace(cold, start=start).velocity(x.to(dtype))
    torch.testing.assert_close(warm.double(), cold.velocity(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_points_in_one_place_are_moved_as_one(p):
    """A point mass is transported to a point mass at the cost of the distance, whatever the blur."""
    x, y = torch.ones(4, 2).double(), torch.zeros(5, 2).double()
    cold = SinkhornDivergence(y, 0.3, p=p)
    for functional in (cold, cold.fitted(x)):
        assert float(functional.value(x)) == pytest.approx(2 ** (p / 2) / p, rel=1e-9)
        torch.testing.assert_close(functional.velocity(x), -x * (1 if p == 2 else 0.5**0.5))
        assert float(functional.value(y)) == pytest.approx(0, abs=1e-12)
        assert float(functional.velocity(y).abs().max()) < 1e-12
        assert bool(functional.velocity(x[:1]).isfinite().all())


def test_places_far_from_the_origin_lose_no_digits():
    x, y = (draws(30, 3, 0) + 1).float(), draws(40, 3, 1).float()
    near, far = SinkhornDivergence(y, 0.5), SinkhornDivergence(y + 1024, 0.5)
    torch.testing.assert_close(far.velocity(x + 1024), near.velocity(x), rtol=1e-2, atol=2e-3)


@pytest.fixture
def annealed(monkeypatch):
    """The sizes of the transports whose annealing was asked for."""
    sizes, plain = [], Transport._annealed

    def counted(self, scaling):
        sizes.append((len(self.x), len(self.y)))
        return plain(self, scaling)

    monkeypatch.setattr(Transport, "_annealed", counted)
    return sizes


def test_transports_are_annealed_once_and_only_those_that_are_needed(annealed):
    x, y = draws(30, 2, 0), draws(40, 2, 1)
    SinkhornDivergence(y, 0.5).velocity(x)
    assert annealed == [(30, 40), (30, 30)]
    warm = SinkhornDivergence(y, 0.5).fitted(x)
    warm.velocity(x + 0.1)
    assert annealed[2:] == [(30, 40), (30, 30)]
    warm = warm.fitted(x + 0.1)
    warm.value(x)
    assert annealed[4:] == [(40, 40)]
    warm.fitted(x + 0.2).value(x + 0.2)
    assert len(annealed) == 5
    SinkhornDivergence(y, 0.5).relative().fitted(x).value(x)
    assert annealed[5:] == [(30, 40), (40, 40)]


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("asked", [False, True])
def test_a_fitted_one_is_copied_and_pickled(again, asked, annealed):
    """With the constant that was asked for, and without one that was not."""
    x, y = draws(30, 2, 0), draws(40, 2, 1)
    warm = SinkhornDivergence(y, 0.5).fitted(x)
    if asked:
        warm.value(x)
    before = len(annealed)
    assert float(again(warm).value(x)) == pytest.approx(float(warm.value(x)), rel=1e-12)
    assert annealed[before:] == [(40, 40)] * (0 if asked else 2)
    torch.testing.assert_close(again(warm.fitted(x + 0.1)).velocity(x), warm.fitted(x + 0.1).velocity(x))


@pytest.mark.parametrize("p", [1, 2])
def test_in_chunks_it_is_the_same(p, monkeypatch):
    """From a start on part of the points, over-relaxed, and warm; no block of costs is larger than a chunk."""
    x, y = 0.5 * draws(60, 2, 0) + 1, draws(70, 2, 1)
    blocks, cost = [], Transport._cost

    def counted(self, part):
        blocks.append(cost(self, part))
        return blocks[-1]

    def results():
        cold = SinkhornDivergence(y, 0.4, p=p, tolerance=1e-13, iterations=20000)
        warm = cold.fitted(x + 0.01)
        made = []
        for functional in (cold, warm):
            made += [functional.value(x), functional.velocity(x), functional.first_variation(x)]
        return made

    monkeypatch.setattr(Transport, "_cost", counted)
    monkeypatch.setattr(transport, "SUBSET", 20)
    whole, once = results(), len(blocks)
    assert max(block.numel() for block in blocks) == 70 * 70
    monkeypatch.setattr(base, "CHUNK", 1000)
    blocks.clear()
    for part, all_at_once in zip(results(), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-12, atol=1e-12)
    assert max(block.numel() for block in blocks) <= 1000
    assert once < 50 < len(blocks)


def test_a_start_on_part_of_the_points_is_nearly_as_good(monkeypatch):
    x, y = 0.5 * draws(80, 2, 0) + 1, draws(120, 2, 1)
    functional = SinkhornDivergence(y, 0.4)
    whole = needed(functional, x)
    monkeypatch.setattr(transport, "SUBSET", 30)
    assert needed(functional, x) < 1.5 * whole


@pytest.mark.parametrize("p", [1, 2])
def test_the_tolerance_is_the_share_by_which_velocities_are_off(p):
    x, y = 0.5 * draws(100, 2, 0) + 1, draws(100, 2, 1)
    exact = SinkhornDivergence(y, 0.2, p=p, tolerance=1e-9).velocity(x)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4):
        gap = SinkhornDivergence(y, 0.2, p=p, tolerance=tolerance).velocity(x) - exact
        assert float(gap.norm() / exact.norm()) < 2 * tolerance


def test_what_geomloss_does_to_gradients_does_not_leak():
    x, y = draws(10, 2, 0), draws(10, 2, 1)
    with torch.no_grad():
        SinkhornDivergence(y, 0.5).velocity(x)
        assert not torch.is_grad_enabled()
        assert not SinkhornDivergence(y, 0.5).value(x).requires_grad
    assert not SinkhornDivergence(y, 0.5).velocity(x.requires_grad_()).requires_grad
    start = Transport(x, y, 0.5, 2).solve(None, 0.5, 1e-4, 100)
    assert not start.requires_grad


def test_the_default_blur_is_a_fifth_of_the_median_distance():
    y = draws(20, 3, 0)
    assert SinkhornDivergence(y).blur == pytest.approx(float(torch.nn.functional.pdist(y).median()) / 5)


def test_single_precision_ends_without_a_warning():
    x, y = draws(50, 8, 0).float() + 1, draws(60, 8, 1).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = SinkhornDivergence(y, 1.0, tolerance=1e-14).velocity(x)
    double = SinkhornDivergence(y.double(), 1.0, tolerance=1e-10).velocity(x.double())
    assert float((single - double).norm() / double.norm()) < 1e-3


def test_what_has_not_converged_is_warned_of():
    x, y = draws(30, 2, 0) + 1, draws(40, 2, 1)
    with pytest.warns(UserWarning, match="after 2 iterations .* larger blur or more iterations"):
        SinkhornDivergence(y, 0.1, tolerance=1e-8, iterations=2).velocity(x)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"p": 3}, ("p is 3", "1 or 2")),
        ({"blur": 0}, ("blur is 0", "positive")),
        ({"scaling": 1}, ("scaling is 1", "between 0 and 1")),
        ({"tolerance": 0}, ("tolerance is 0", "between 0 and 1")),
        ({"iterations": 0}, ("iterations is 0", "whole number")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_values_are_refused(options, texts, user_error):
    with user_error(*texts):
        SinkhornDivergence(draws(5, 2, 0), **options)


def test_particles_that_are_not_finite_are_refused(user_error):
    with user_error("particles have entries that are not finite"):
        SinkhornDivergence(draws(5, 2, 0)).velocity(draws(4, 2, 1) / 0)


def test_rounding_that_hides_the_marginals_is_warned_of():
    x, y = draws(50, 64, 0).float(), 1 + draws(50, 64, 1).float()
    with pytest.warns(UserWarning, match="float32 .* can be right to .*e-0. only, expected 1e-04"):
        SinkhornDivergence(y, 0.1).velocity(x)
