"""The Sinkhorn divergence against exact transport, its limits and finite differences."""

import warnings

import pytest
import torch
from cases import draws
from geomloss import SamplesLoss
from scipy.optimize import linear_sum_assignment

from diffusion.gradient_flow.functionals.sinkhorn import SinkhornDivergence


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
    loss = SamplesLoss("sinkhorn", p=p, blur=0.7, scaling=0.999, backend="tensorized")
    value = SinkhornDivergence(y, 0.7, p=p, tolerance=1e-9).value(x)
    assert float(value) == pytest.approx(float(loss(x, y)), rel=1e-3)


def iterations(functional, x, monkeypatch):
    """How often a potential is renewed by a velocity."""
    count = 0
    softmin = SinkhornDivergence._softmin

    def counted(self, costs, g):
        nonlocal count
        count += 1
        return softmin(self, costs, g)

    with monkeypatch.context() as patch:
        patch.setattr(SinkhornDivergence, "_softmin", counted)
        functional.velocity(x)
    return count


def test_fitted_starts_from_where_it_was(monkeypatch):
    x, y = draws(30, 2, 0) + 1, draws(40, 2, 1)
    cold = SinkhornDivergence(y, 0.5, tolerance=1e-6)
    warm = cold.fitted(x)
    moved = x + 1e-3 * warm.velocity(x)
    assert iterations(warm, x, monkeypatch) <= 3
    assert iterations(warm, moved, monkeypatch) < 0.7 * iterations(cold, moved, monkeypatch)
    torch.testing.assert_close(warm.velocity(moved), cold.velocity(moved), rtol=1e-4, atol=1e-4)


def test_what_geomloss_does_to_gradients_does_not_leak():
    x, y = draws(10, 2, 0), draws(10, 2, 1)
    with torch.no_grad():
        SinkhornDivergence(y, 0.5).velocity(x)
        assert not torch.is_grad_enabled()
        assert not SinkhornDivergence(y, 0.5).value(x).requires_grad
    assert not SinkhornDivergence(y, 0.5).velocity(x.requires_grad_()).requires_grad


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
