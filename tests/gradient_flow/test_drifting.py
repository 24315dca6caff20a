"""The drifting field against its closed form, a direct sum, and what must be 0."""

import pytest
import torch
from cases import draws

from diffusion.gradient_flow.functionals import base as module
from diffusion.gradient_flow.functionals.drifting import Drifting, gaussian, laplace

N, M = 12, 15
PLAIN = {"together": False, "columns": False, "unit": False}


def points(dim=3):
    return 0.3 + draws(N, dim, 1, 1.2), draws(M, dim, 0)


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_with_gaussian_kernels_it_is_the_difference_of_the_scores_of_kernel_estimates(dim):
    (x, y), h = points(dim), 0.7

    def score(places):
        at = x.clone().requires_grad_()
        log_density = (-torch.cdist(at, places).square() / (2 * h**2)).logsumexp(1).sum()
        return torch.autograd.grad(log_density, at)[0]

    found = Drifting(y, (h,), gaussian, **PLAIN).velocity(x)
    torch.testing.assert_close(found, h**2 * (score(y) - score(x)), rtol=1e-9, atol=1e-12)


def test_several_widths_add_up():
    x, y = points()
    each = [Drifting(y, (tau,), **PLAIN).velocity(x) for tau in (0.5, 1.0)]
    torch.testing.assert_close(Drifting(y, (0.5, 1.0), **PLAIN).velocity(x), each[0] + each[1])


@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("own", [True, False], ids=["own", "others"])
def test_it_is_the_double_sum_over_data_and_particles(own, columns):
    """Of geometric means of weights over both kinds of points, and over the particles that they act on."""
    x, y = points()
    tau, every = 0.6, torch.cat([y, x])
    k = torch.zeros(N, M + N, dtype=torch.float64)
    for i in range(N):
        for j in range(M + N):
            if own or j != M + i:
                k[i, j] = (-(x[i] - every[j]).norm() / tau).exp()
    weight = k / k.sum(1, keepdim=True)
    if columns:
        weight = (weight * k / k.sum(0)).sqrt()
    expected = torch.zeros_like(x)
    for i in range(N):
        for j in range(M):
            for n in range(N):
                expected[i] += weight[i, j] * weight[i, M + n] * (y[j] - x[n])
    found = Drifting(y, (tau,), laplace, columns=columns, unit=False, own=own).velocity(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "options", [{}, PLAIN, {"columns": False}, {"kernel": gaussian}], ids=["default", "plain", "rows", "gaussian"]
)
def test_particles_that_are_the_data_rest(options):
    data = draws(M, 3, 0)
    field = Drifting(data, **{"unit": False, **options})
    assert float(field.velocity(data[torch.randperm(M)]).abs().max()) < 1e-12
    assert float(field.velocity(data + 0.1).abs().max()) > 1e-3


def test_unit_fields_have_mean_square_one():
    x, y = points()
    assert float(Drifting(y, (0.5,)).velocity(x).square().mean()) == pytest.approx(1)


def test_narrow_kernels_far_away_are_finite():
    x, y = points()
    for options in ({}, PLAIN, {"own": False}):
        assert bool(Drifting(1e3 + y, (1e-3,), **options).velocity(x).isfinite().all())
        assert bool(Drifting(1e3 + y, (1e-3,), **options).velocity(x.float()).isfinite().all())


@pytest.mark.parametrize("options", [{}, {"own": False}, PLAIN], ids=["default", "others", "plain"])
def test_chunks_images_and_single_precision_change_nothing(options, monkeypatch):
    x, y = points(4)
    field = Drifting(y, **options)
    whole = field.velocity(x)
    images = Drifting(y.view(M, 1, 2, 2), **options).velocity(x.view(N, 1, 2, 2).float())
    assert images.shape == (N, 1, 2, 2) and images.dtype == torch.float32
    torch.testing.assert_close(images.view(N, 4).double(), whole, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(module, "CHUNK", 100)
    torch.testing.assert_close(field.velocity(x), whole, rtol=1e-12, atol=1e-14)


def test_it_has_no_value(user_error):
    x, y = points()
    for ask in (Drifting(y).value, Drifting(y).first_variation):
        with user_error("the drifting field has no value", "EnergyDistance"):
            ask(x)


def test_wrong_data_are_refused_and_half_precision_is_not(user_error):
    with user_error("data has entries that are not finite"):
        Drifting(draws(M, 2, 0) / 0)
    with user_error("data is list"):
        Drifting([1.0, 2.0])
    x, y = points()
    half = Drifting(y).velocity(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), Drifting(y).velocity(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("taus", [(), (0.0,), (1.0, -1.0), (float("inf"),)], ids=str)
def test_wrong_widths_are_refused(taus, user_error):
    with user_error("taus is", "positive numbers"):
        Drifting(draws(M, 2, 0), taus)


def test_a_single_particle_that_nothing_repels_is_refused(user_error):
    with user_error("one particle"):
        Drifting(draws(M, 2, 0), own=False).velocity(draws(1, 2, 1))
