"""What must be true of every functional: its value, velocity and first variation belong together."""

import itertools

import pytest
import torch
from cases import FUNCTIONALS, draws

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals import base as module

N, M = 30, 40
every = pytest.mark.parametrize("case", FUNCTIONALS, ids=str)
in_dims = pytest.mark.parametrize("dim", [2, 5])


def built(case, dim):
    """The functional fitted to particles, and these."""
    data, x = draws(M, dim, 0), 0.5 + draws(N, dim, 1, spread=1.3)
    return case.build(data).fitted(x, torch.Generator().manual_seed(2)), x


@every
@in_dims
def test_the_velocity_is_the_negative_gradient_of_the_value(case, dim):
    functional, x = built(case, dim)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.value(x), x)
    velocity = functional.velocity(x.detach())
    assert not velocity.requires_grad
    assert float((velocity + N * gradient).norm() / velocity.norm()) < case.tolerance


@every
def test_the_value_falls_by_the_mean_square_of_the_velocity(case):
    functional, x = built(case, 2)
    velocity, h = functional.velocity(x), 1e-5
    slope = (functional.value(x + h * velocity) - functional.value(x - h * velocity)) / (2 * h)
    assert float(slope) == pytest.approx(-float(velocity.square().sum(1).mean()), rel=max(1e-5, 10 * case.tolerance))


@every
@in_dims
def test_the_first_variation_is_the_derivative_in_the_weight_of_a_particle(case, dim):
    """Of K N + 1 particles, one once more, for K = 2, 4, 8, 16: the slope in its weight at 0, extrapolated."""
    if not case.copies:
        pytest.skip("a derivative in a weight has two sides")
    functional, x = built(case, dim)
    variation = functional.first_variation(x)
    expected = variation - variation.mean()
    for i in (0, 7):
        slopes = []
        for copies in case.copies:
            more = torch.cat([x.repeat(copies, 1), x[i : i + 1]])
            slopes.append((functional.value(more) - functional.value(x)) * (copies * N + 1))
        while len(slopes) > 1:
            order = 5 - len(slopes)
            pairs = zip(slopes[1:], slopes[:-1], strict=True)
            slopes = [fine + (fine - coarse) / (2**order - 1) for fine, coarse in pairs]
        assert float(slopes[0] - expected[i]) == pytest.approx(0, abs=1e-4 * float(expected.abs().max()))


@every
def test_particles_in_another_order_and_as_images_move_the_same(case):
    data, x = draws(M, 6, 0), 0.5 + draws(N, 6, 1)
    functional = case.build(data).fitted(x, torch.Generator().manual_seed(2))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    velocity = functional.velocity(x)
    scale = float(velocity.abs().max())
    assert float((functional.velocity(x[order]) - velocity[order]).abs().max()) < 1e-9 * scale


@every
def test_particles_that_are_the_data_rest(case):
    if not case.rest:
        pytest.skip("the functional has no data, or another minimum")
    data = draws(M, 3, 0)
    functional = case.build(data).fitted(data, torch.Generator().manual_seed(2))
    assert float(functional.velocity(data).abs().max()) < 1e-9
    assert abs(float(functional.value(data))) < 1e-9


@every
def test_the_value_falls_along_the_flow(case):
    """Of the functional fitted to the particles of each moment, not to the first."""
    flow, x = WassersteinFlow(case.build(draws(M, 2, 0))), 0.5 + draws(N, 2, 1, spread=1.3)
    moments = flow.moments(x, steps=10, step_size=0.02, generator=torch.Generator().manual_seed(2))
    values = [moment.value() for moment in moments]
    assert values[-1] < values[0]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))
    assert not case.rest or values[-1] > 0


@every
def test_what_relative_functionals_lack_cancels_between_data_sets(case):
    x = 0.5 + draws(N, 3, 1)

    def gap(relative):
        pair = [case.build(draws(M, 3, seed)) for seed in (0, 4)]
        pair = [(part.relative() if relative else part).fitted(x, torch.Generator().manual_seed(2)) for part in pair]
        difference = pair[0] + -1.0 * pair[1]
        return difference.velocity(x), difference.value(x), difference.first_variation(x)

    for mine, full in zip(gap(True), gap(False), strict=True):
        torch.testing.assert_close(mine, full, rtol=1e-9, atol=1e-11)


@every
def test_results_have_the_dtype_of_the_particles(case):
    functional, x = built(case, 2)
    half = x.float()
    single = functional.velocity(half)
    assert single.dtype == torch.float32 and functional.value(half).dtype == torch.float32
    assert functional.first_variation(half).dtype == torch.float32
    exact = functional.velocity(x)
    assert float((single - exact).norm() / exact.norm()) < 1e-3


@every
def test_chunks_change_nothing(case, monkeypatch):
    functional, x = built(case, 2)
    whole = functional.velocity(x), functional.value(x), functional.first_variation(x)
    monkeypatch.setattr(module, "CHUNK", 97)
    for part, all_at_once in zip(
        (functional.velocity(x), functional.value(x), functional.first_variation(x)), whole, strict=True
    ):
        torch.testing.assert_close(part, all_at_once, rtol=1e-9, atol=1e-12)


@every
def test_particles_of_a_wrong_kind_are_refused(case, user_error):
    functional, _ = built(case, 2)
    with user_error("particles are torch.int64", "floating point (N, *shape)"):
        functional.velocity(torch.zeros(3, 2, dtype=torch.int64))


@every
def test_one_particle_that_is_not_finite_is_seen(case):
    """An error, or not a finite value and not a finite velocity of that particle."""
    functional, x = built(case, 2)
    x[3, 1] = float("nan")
    try:
        value, velocity = functional.value(x), functional.velocity(x)
    except UserError:
        return
    assert not bool(value.isfinite()) and not bool(velocity[3].isfinite().all())


def test_weights_are_those_of_the_terms():
    first, x = built(FUNCTIONALS[0], 2)
    twice = 2.0 * (first + 0.5 * first)
    torch.testing.assert_close(twice.velocity(x), 3 * first.velocity(x))
    torch.testing.assert_close(twice.value(x), 3 * first.value(x))
    assert [term.weight for term in twice.terms()] == [2.0, 1.0]


def test_a_sum_with_what_is_no_functional_is_refused(user_error):
    with user_error("expected a finite weight and a functional"):
        module.Sum((module.Term(1.0, 3),))
