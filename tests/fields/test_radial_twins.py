"""Two radial fields are affine ones, given by their laws of distances."""

import math

import pytest
import torch
from scipy import stats

from diffusion.fields import (
    RadialField,
    gravity,
    radial_gaussian,
    radial_gravity,
    radial_tanh,
    variance_exploding,
)

TWINS = {"gravity": (radial_gravity, gravity), "gaussian": (radial_gaussian, variance_exploding)}


def without_inverse(field):
    return RadialField(field.cdf, field.dim, field.horizon, None, field.t_min)


@pytest.mark.parametrize("dim", [1, 2, 64, 3072])
@pytest.mark.parametrize("name", TWINS)
class TestTwins:
    """Gravity and Gaussian diffusion, given by their laws of distances, are the affine fields."""

    def test_density_and_velocity(self, name, dim):
        radial, affine = (twin(dim) for twin in TWINS[name])
        assert (radial.horizon, radial.t_min, radial.rho) == (affine.horizon, affine.t_min, affine.rho)
        x0 = torch.randn(200, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        t = affine.clock(200)
        z = affine.draw((200, dim), torch.Generator().manual_seed(1), dtype=torch.float64)
        x = affine.transport(x0, z, t)
        torch.testing.assert_close(radial.log_prob(x, t, x0), affine.log_prob(x, t, x0), rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(radial.velocity(x, t, x0), affine.velocity(x, t, x0), rtol=1e-12, atol=0)
        x = affine.sample_prior((20, dim), torch.Generator().manual_seed(2), dtype=torch.float64)
        torch.testing.assert_close(radial.prior_log_prob(x), affine.prior_log_prob(x), rtol=1e-12, atol=1e-11)

    @pytest.mark.parametrize("closed", [True, False])
    def test_samples(self, name, dim, closed):
        radial = TWINS[name][0](dim)
        radial = radial if closed else without_inverse(radial)
        law = stats.f(dim, 1) if name == "gravity" else stats.chi2(dim, scale=1 / dim)
        x0 = torch.ones(2000, dim, dtype=torch.float64)
        gap = radial.sample(x0, 3.0, torch.Generator().manual_seed(0)) - x0
        squared = gap.square().mean(1)  # a mean square of a law per coordinate, in units of t^2
        assert stats.kstest(squared.numpy() / 9, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize(("dim", "tolerance"), [(1, 1e-12), (2, 1e-12), (16, 1e-12), (64, 1e-5)])
def test_density_at_the_data_point_is_its_limit(name, dim, tolerance):
    radial, affine = (twin(dim) for twin in TWINS[name])
    x0 = torch.ones(2, dim, dtype=torch.float64)
    torch.testing.assert_close(
        radial.log_prob(x0, 3.0, x0), affine.log_prob(x0, 3.0, x0), rtol=tolerance, atol=tolerance
    )


def test_density_at_the_data_point_is_unknown_where_it_underflows_and_large_at_a_pole():
    x0 = torch.ones(2, 3072, dtype=torch.float64)
    assert radial_gaussian(3072).log_prob(x0, 3.0, x0).isnan().all()
    density = radial_tanh(3).log_prob(x0[:, :3], 3.0, x0[:, :3])
    torch.testing.assert_close(density, torch.full_like(density, -math.log(4 * math.pi * 27 * 1e-16)))
