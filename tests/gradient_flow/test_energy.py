"""The energy distance by slices against sums over all pairs."""

import pytest
import torch
from cases import draws

from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.slices import draw, mean_projection


def direct(x, y):
    """Value, velocity and first variation by sums over all pairs."""

    def distances(a, b):
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def pull(a, b):
        gaps = a[:, None] - b
        return (gaps / distances(a, b)[..., None].where(gaps.any(-1, keepdim=True), 1)).mean(1)

    across, inside = distances(x, y), distances(x, x)
    value = 2 * across.mean() - inside.mean() - distances(y, y).mean()
    return value, 2 * (pull(x, x) - pull(x, y)), 2 * (across.mean(1) - inside.mean(1))


def check(functional, x, y, rtol):
    value, velocity, variation = direct(x, y)
    found = functional.first_variation(x)
    assert float(functional.value(x)) == pytest.approx(float(value), rel=rtol)
    assert float((functional.velocity(x) - velocity).norm() / velocity.norm()) < rtol
    expected = variation - variation.mean()
    assert float((found - found.mean() - expected).norm() / expected.norm()) < rtol


@pytest.mark.parametrize("number", [2, 17, 50])
def test_on_a_line_it_is_the_sum_over_all_pairs(number):
    x, y = draws(number, 1, 0) + 1, draws(31, 1, 1)
    check(EnergyDistance(y), x, y, 1e-11)


def test_points_in_one_place_push_each_other_nowhere():
    x, y = draws(60, 1, 0).mul(3).round(), draws(45, 1, 1).mul(3).round() + 1
    assert len(x.unique()) < 20 and bool(torch.isin(x, y).any())
    check(EnergyDistance(y), x, y, 1e-11)


def test_in_a_plane_the_error_falls_with_the_square_of_the_directions():
    x, y = draws(300, 2, 0, 1.3) + 0.5, draws(200, 2, 1)
    velocity = direct(x, y)[1]
    errors = [
        float((EnergyDistance(y, number).velocity(x) - velocity).norm() / velocity.norm()) for number in (16, 64, 256)
    ]
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3 and errors[1] < 6e-3


@pytest.mark.parametrize("dim", [3, 10])
def test_many_directions_agree_with_all_pairs(dim):
    x, y = draws(20, dim, 0, 1.3) + 0.5, draws(25, dim, 1)
    functional = EnergyDistance(y, 40_000).fitted(x, torch.Generator().manual_seed(2))
    check(functional, x, y, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_particles_that_are_data_with_repetitions_rest(dim, dtype):
    data = draws(200, dim, 0).mul(4).round().to(dtype).repeat(2, 1)
    functional = EnergyDistance(data).fitted(data, torch.Generator().manual_seed(1))
    assert float(functional.velocity(data).abs().max()) == 0
    assert float(functional.value(data)) == 0


def test_in_single_precision_it_is_as_good_for_many_particles():
    x, y = draws(100_000, 1, 0) + 0.1, draws(100_000, 1, 1)
    single = EnergyDistance(y).velocity(x.float())
    double = EnergyDistance(y).velocity(x)
    assert float((single - double).norm() / double.norm()) < 1e-4
    assert float(EnergyDistance(y).value(x.float())) == pytest.approx(float(EnergyDistance(y).value(x)), rel=1e-4)


@pytest.mark.parametrize("dim", [2, 6])
def test_directions_are_drawn_anew_by_fitting_and_fixed_before(dim):
    x, y = draws(20, dim, 0), draws(25, dim, 1)
    functional, randomness = EnergyDistance(y), torch.Generator().manual_seed(0)
    assert torch.equal(functional.velocity(x), functional.velocity(x))
    first = functional.fitted(x, randomness)
    second = first.fitted(x, randomness)
    assert not torch.allclose(first.velocity(x), second.velocity(x))
    again = functional.fitted(x, torch.Generator().manual_seed(0))
    assert torch.equal(first.velocity(x), again.velocity(x))


@pytest.mark.parametrize(("dim", "number"), [(1, 1), (2, 7), (3, 3), (5, 12), (64, 64), (100, 30)])
def test_directions_are_unit_vectors_and_orthogonal_within_blocks(dim, number):
    theta = draw(dim, number, torch.Generator().manual_seed(0))
    assert theta.shape == (number, dim)
    torch.testing.assert_close(theta.norm(dim=1), torch.ones(number, dtype=torch.float64))
    if dim > 2:
        block = theta[:dim]
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [2, 3, 20])
def test_the_mean_projection_of_a_unit_vector(dim):
    theta = draw(dim, 200_000, torch.Generator().manual_seed(0))
    assert mean_projection(dim) == pytest.approx(float(theta[:, 0].abs().mean()), rel=0.01)


def test_bad_values_are_refused(user_error):
    with user_error("directions is 0", "whole number"):
        EnergyDistance(draws(5, 2, 0), 0)
    with user_error("data is list", "(M, *shape)"):
        EnergyDistance([1.0, 2.0])
    with user_error("not finite"):
        EnergyDistance(draws(5, 2, 0) / 0)
    with user_error("3 coordinates", "expected 2"):
        EnergyDistance(draws(5, 2, 0)).velocity(draws(5, 3, 0))
