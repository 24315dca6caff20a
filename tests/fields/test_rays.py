"""Integrals along rays against closed forms: masses and laws of the radius, from 1 to 3072 dimensions."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn.functional import normalize

from diffusion.fields import Gaussian, StudentT, radial_tanh
from diffusion.fields.rays import integrate_rays, log_sphere_area, spread

DIMS = [1, 2, 64, 3072]


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_rays(log_prob):
    """A log-density of points (B, d) as one of points (R, K, d)."""
    return lambda points: log_prob(points.flatten(0, 1)).view(points.shape[:2])


def integrals(log_prob, draws, origin=None, start=None, width=None):
    """Along the rays from `origin` through each of the draws, divided at the draws unless told otherwise."""
    origin = torch.zeros_like(draws) if origin is None else origin.expand_as(draws)
    r = (draws - origin).norm(dim=1)
    start = r if start is None else start
    return integrate_rays(on_rays(log_prob), origin, (draws - origin) / r[:, None], start, width or spread(r.log()))


def quantile(law):
    return (law.log_below - law.log_total).exp().numpy()


LAWS = {
    "gaussian": (lambda d: Gaussian(d), lambda d, r: stats.chi(d).cdf(r)),
    **{
        f"student_{dof}": (
            lambda d, dof=dof: StudentT(dof, d),
            lambda d, r, dof=dof: stats.f(d, dof).cdf(r**2 / d),
        )
        for dof in (0.5, 1.0, 5.0)
    },
}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", LAWS)
class TestIsotropicLaws:
    def test_mass_is_one_along_every_ray(self, name, dim):
        law = LAWS[name][0](dim)
        draws = law.draw((24, dim), torch.Generator().manual_seed(0), dtype=torch.float64)
        found = integrals(law.log_prob, draws, start=draws.norm(dim=1).median().expand(24))
        assert (found.log_total + log_sphere_area(dim)).abs().max() < 1e-9
        assert not found.jumps.any()

    def test_quantile_of_the_radius(self, name, dim):
        build, cdf = LAWS[name]
        law = build(dim)
        draws = law.draw((24, dim), torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = cdf(dim, draws.norm(dim=1).numpy())
        assert np.abs(quantile(integrals(law.log_prob, draws)) - expected).max() < 1e-7
        assert expected.min() < 0.2 < 0.8 < expected.max()

    def test_the_start_and_the_width_need_only_be_rough(self, name, dim):
        law = LAWS[name][0](dim)
        draws = law.draw((24, dim), torch.Generator().manual_seed(2), dtype=torch.float64)
        width = spread(draws.norm(dim=1).log())
        middle = draws.norm(dim=1).median().expand(24)
        for factor in (0.5, 2.0):
            found = integrals(law.log_prob, draws, start=middle * math.exp(2 * width), width=factor * width)
            assert (found.log_total + log_sphere_area(dim)).abs().max() < 1e-6


class TestOffCentre:
    """About another origin than the centre of the law."""

    def test_gaussian_on_a_line(self):
        origin, draws = torch.tensor([[0.7]], dtype=torch.float64), normal(200, 1)
        found = integrals(Gaussian().log_prob, draws, origin)
        right = (draws > origin)[:, 0].numpy()
        outside = np.where(right, stats.norm.sf(0.7), stats.norm.cdf(0.7))
        inside = np.abs(stats.norm.cdf(draws[:, 0]) - stats.norm.cdf(0.7))
        np.testing.assert_allclose(found.log_total.exp(), outside, rtol=1e-5)
        np.testing.assert_allclose(quantile(found), inside / outside, atol=1e-7)

    def test_gaussian_in_the_plane(self):
        """The integral of s exp(-(s + b)^2 / 2), with b the part of the origin along the ray."""
        origin, draws = torch.tensor([[0.8, -1.5]], dtype=torch.float64), normal(200, 2)
        gap = draws - origin
        r = gap.norm(dim=1)
        b = (origin * gap).sum(1) / r
        apart = (-(origin.square().sum() - b.square()) / 2).exp() / math.tau

        def upto(end):
            ends = torch.stack([torch.zeros_like(end), end]) + b
            exponential, normal_cdf = (-ends.square() / 2).exp(), torch.special.ndtr(ends)
            return apart * (exponential[0] - exponential[1] - b * math.sqrt(math.tau) * (normal_cdf[1] - normal_cdf[0]))

        found = integrals(Gaussian().log_prob, draws, origin)
        total = upto(torch.full_like(r, 50.0))
        torch.testing.assert_close(found.log_total.exp(), total, rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.from_numpy(quantile(found)), upto(r) / total, rtol=0, atol=1e-7)

    def test_gaussian_in_64_dimensions(self):
        origin, draws = 0.5 * normal(1, 64, seed=5), normal(6, 64)
        gap = draws - origin
        r = gap.norm(dim=1)
        b = ((origin * gap).sum(1) / r).numpy()
        found = quantile(integrals(Gaussian().log_prob, draws, origin))
        for k, (end, part) in enumerate(zip(r.tolist(), b, strict=True)):
            peak = (-part + math.sqrt(part**2 + 4 * 63)) / 2
            top = 63 * math.log(peak) - (peak + part) ** 2 / 2

            def integrand(s, part=part, top=top):
                return math.exp(63 * math.log(s) - (s + part) ** 2 / 2 - top)

            below, above = (integrate.quad(integrand, *ends, epsabs=1e-13)[0] for ends in ((0.1, end), (end, 60.0)))
            assert found[k] == pytest.approx(below / (below + above), abs=1e-8)

    @pytest.mark.parametrize("dof", [0.5, 1.0, 5.0])
    def test_mass_over_all_directions_of_the_plane(self, dof):
        """A mean over equal angles of a smooth periodic function: the rule converges exponentially."""
        angle = torch.arange(128, dtype=torch.float64) * math.tau / 128
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        origin = torch.tensor([[0.6, -0.3]], dtype=torch.float64).expand(128, -1)
        start = torch.ones(128, dtype=torch.float64)
        found = integrate_rays(on_rays(StudentT(dof, 2).log_prob), origin, direction, start, 1.0)
        log_mass = found.log_total.logsumexp(0) - math.log(128) + log_sphere_area(2)
        assert abs(float(log_mass)) < 1e-9

    def test_a_density_with_a_pole_far_from_the_origin_of_coordinates(self):
        """Near the pole distances drown in the rounding of x; what is lost there is less than 1e-9 of the mass."""
        field, t = radial_tanh(16), 2.0
        x0 = torch.full((200, 16), 30.0, dtype=torch.float64)
        draws = field.sample(x0, t, torch.Generator().manual_seed(0))
        found = integrals(lambda x: field.log_prob(x, t, x0[:1].expand_as(x)), draws, x0[:1])
        r = (draws - x0).norm(dim=1)
        assert np.abs(quantile(found) - torch.tanh(r / t).numpy()).max() < 1e-7
        assert (found.log_total + log_sphere_area(16)).abs().max() < 1e-7


class TestJumps:
    @pytest.mark.parametrize("dim", DIMS)
    def test_uniform_cube_about_a_point_within(self, dim):
        """Along each ray the radius has the law (r / R)^d up to the wall at R, where the density jumps to nothing."""
        randomness = torch.Generator().manual_seed(0)
        draws = 2 * torch.rand(24, dim, generator=randomness, dtype=torch.float64) - 1
        origin = 0.3 * (2 * torch.rand(1, dim, generator=randomness, dtype=torch.float64) - 1)

        def log_prob(x):
            inside = (x.abs() <= 1).all(1)
            return torch.where(inside, -dim * math.log(2.0), -math.inf).double()

        found = integrals(log_prob, draws, origin)
        gap = draws - origin
        r = gap.norm(dim=1)
        n = gap / r[:, None]
        wall = ((n.sign() - origin) / n).amin(1)
        torch.testing.assert_close(
            found.log_total, dim * wall.log() - math.log(dim) - dim * math.log(2.0), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(torch.from_numpy(quantile(found)), (r / wall) ** dim, rtol=0, atol=1e-7)
        assert found.jumps.all()

    def test_a_start_outside_of_the_support_is_moved_into_it(self):
        def log_prob(x):
            return torch.where(x.norm(dim=1) <= 1, 0.0, -math.inf).double()

        direction = normalize(normal(24, 3), dim=1)
        found = integrals(log_prob, direction, start=torch.full((24,), 40.0, dtype=torch.float64), width=0.2)
        torch.testing.assert_close(found.log_total, torch.full((24,), -math.log(3.0)).double(), rtol=0, atol=1e-7)

    def test_both_walls_of_a_shell(self):
        def log_prob(x):
            r = x.norm(dim=1)
            return torch.where((r >= 1) & (r <= 2), 0.0, -math.inf).double()

        r = torch.linspace(1.05, 1.95, 24, dtype=torch.float64)
        found = integrals(log_prob, r[:, None] * normalize(normal(24, 3), dim=1), width=0.2)
        torch.testing.assert_close(found.log_below.exp(), (r**3 - 1) / 3, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.log_above.exp(), (8 - r**3) / 3, rtol=1e-9, atol=1e-12)
        assert found.jumps.all()


@pytest.mark.parametrize(("dim", "area"), [(1, 2), (2, math.tau), (3, 4 * math.pi), (4, 2 * math.pi**2)])
def test_area_of_the_sphere(dim, area):
    assert log_sphere_area(dim) == pytest.approx(math.log(area), rel=1e-12)


def test_spread_is_the_standard_deviation_of_a_normal_sample_whatever_its_outliers():
    sample = torch.from_numpy(stats.norm(loc=3, scale=0.2).ppf((np.arange(999) + 0.5) / 999))
    sample[-20:] = 300
    assert spread(sample) == pytest.approx(0.2, rel=0.05)
    assert spread(torch.ones(10, dtype=torch.float64)) > 0
