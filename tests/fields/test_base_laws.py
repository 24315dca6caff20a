"""The laws of the noise against scipy's, and the noise level that a point reveals."""

import math

import numpy as np
import pytest
import torch
from problems import Logistic
from scipy import stats
from torch.distributions import Laplace, Normal, Uniform

from diffusion.fields import Gaussian, Product, StudentT

NUMBER = 20000
SIGNIFICANCE = 1e-3


def drawn(law, size, seed=0, dtype=torch.float64):
    return law.draw(size, torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dof", [0.5, 1.0, 3.5, 128.0])
@pytest.mark.parametrize("dim", [1, 2, 64])
def test_student_t_radius_and_density_are_scipys(dof, dim):
    law = StudentT(dof, dim)
    z = drawn(law, (NUMBER, dim))
    assert stats.kstest((z.square().sum(1) / dim).numpy(), stats.f(dim, dof).cdf).pvalue > SIGNIFICANCE
    expected = stats.multivariate_t(np.zeros(dim), np.eye(dim), df=dof).logpdf(z[:200].numpy())
    np.testing.assert_allclose(law.log_prob(z[:200]).numpy(), expected.reshape(-1), rtol=1e-10)


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8)])
def test_one_scale_is_shared_by_all_coordinates_of_an_image_and_by_no_two_images(shape):
    size = drawn(StudentT(1.0, 64), (2000, *shape)).flatten(1).abs().log()
    assert size.mean(1).std() > 1  # the scale R differs from point to point
    assert (size - size.mean(1, keepdim=True)).std() == pytest.approx(1.11, abs=0.02)  # std of log|N(0, 1)|


@pytest.mark.parametrize("dim", [1, 64])
def test_gaussian_radius_and_density_are_scipys(dim):
    z = drawn(Gaussian(), (NUMBER, dim))
    assert stats.kstest(z.square().sum(1).numpy(), stats.chi2(dim).cdf).pvalue > SIGNIFICANCE
    expected = stats.norm.logpdf(z[:200].numpy()).sum(1)
    np.testing.assert_allclose(Gaussian().log_prob(z[:200]).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("law", "reference"),
    [
        (Product(Laplace(0.0, 0.7)), stats.laplace(scale=0.7)),
        (Product(Normal(0.0, 1.3)), stats.norm(scale=1.3)),
        (Product(Uniform(-2.0, 2.0)), stats.uniform(-2, 4)),
        (Logistic(), stats.logistic()),
    ],
    ids=["laplace", "normal", "uniform", "own"],
)
def test_product_law_has_the_marginals_and_the_density_of_scipys(law, reference):
    z = drawn(law, (NUMBER, 3))
    for coordinate in z.T.numpy():
        assert stats.kstest(coordinate, reference.cdf).pvalue > SIGNIFICANCE
    dependence = np.corrcoef(np.abs(z.numpy()), rowvar=False) - np.eye(3)
    assert np.abs(dependence).max() < 4.5 / math.sqrt(NUMBER)
    np.testing.assert_allclose(law.log_prob(z).numpy(), reference.logpdf(z.numpy()).sum(1), rtol=1e-6)
    assert law.std == pytest.approx(reference.std(), rel=1e-6)


def test_product_draws_stay_off_the_poles_of_the_quantile_function():
    class Ends(torch.distributions.Distribution):
        """Records where its quantile function is asked for."""

        arg_constraints, stddev = {}, torch.tensor(1.0)

        def icdf(self, u):
            self.asked = u
            return u

    for dtype in (torch.float32, torch.float64):
        ends = Ends(validate_args=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda size, dtype, **_: torch.tensor([[0.0, 1.0]], dtype=dtype))
            Product(ends).draw((1, 2), dtype=dtype)
        assert 0 < ends.asked[0, 0] < ends.asked[0, 1] < 1


@pytest.mark.parametrize("dof", [0.1, 0.5, 1.0])
def test_student_t_draws_are_finite_in_single_precision(dof):
    assert drawn(StudentT(dof, 2), (200000, 2), dtype=torch.float32).isfinite().all()


def test_student_t_is_a_gaussian_at_many_degrees_of_freedom():
    """The densities differ by a multiple of 1 / D, so a hundred times the D leaves a hundredth of the difference."""
    z = drawn(Gaussian(), (100, 5))
    few, many = ((StudentT(dof, 5).log_prob(z) - Gaussian().log_prob(z)).abs() for dof in (1e3, 1e5))
    assert (many / few).median() == pytest.approx(0.01, rel=0.1)
    assert many.max() < 1e-2
    assert StudentT(1e5, 5).std == pytest.approx(1, abs=1e-4)


def test_standard_deviation_of_student_t():
    assert StudentT(2.0, 3).std == math.inf
    assert StudentT(1.0, 3).std == math.inf
    assert StudentT(5.0, 3).std == pytest.approx(stats.t(5).std())


class TestNoiseLevel:
    """sigma R from the radius alone, never below sigma."""

    SIGMA = 0.3

    def levels(self, dof, dim, number=20000):
        """R, and what the law makes of the power of sigma z, in units of sigma."""
        randomness = torch.Generator().manual_seed(0)
        gamma = torch.distributions.Gamma(dof / 2, dof / 2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            R = gamma.sample((number,)).double().rsqrt()
        z = R[:, None] * torch.randn(number, dim, generator=randomness, dtype=torch.float64)
        sigma = torch.full((number,), self.SIGMA, dtype=torch.float64)
        return R, StudentT(dof, dim).noise_level((sigma[:, None] * z).square().mean(1), sigma, dim) / self.SIGMA

    @pytest.mark.parametrize("dim", [64, 1024])
    @pytest.mark.parametrize("dof", [1.0, 3.5])
    def test_large_levels_are_read_off_to_the_stated_error(self, dof, dim):
        R, level = self.levels(dof, dim)
        error = (level / R).log()[R > 3]
        assert error.square().mean().sqrt() * math.sqrt(2 * dim) == pytest.approx(1, abs=0.15)

    def test_no_level_is_below_the_scale_of_the_law(self):
        R, level = self.levels(1.0, 64)
        assert level.min() == 1
        assert (level[R < 0.5] == 1).all()

    def test_the_level_is_sigma_where_the_law_is_nearly_gaussian(self):
        _, level = self.levels(1e6, 64)
        assert (level - 1).abs().max() < 1e-4

    def test_power_can_be_negative_or_zero(self):
        power, sigma = torch.tensor([-1.0, 0.0, 1e30]), torch.full((3,), self.SIGMA)
        level = StudentT(1.0, 8).noise_level(power, sigma, 8)
        assert level[:2].tolist() == pytest.approx([self.SIGMA] * 2)
        assert level[2] == pytest.approx(math.sqrt(1e30 * 8 / 9))

    @pytest.mark.parametrize("law", [Gaussian(), Product(Laplace(0.0, 0.7)), Logistic()])
    def test_laws_with_a_variance_say_what_sigma_says(self, law):
        power, sigma = torch.tensor([0.0, 100.0]), torch.tensor([0.5, 2.0])
        torch.testing.assert_close(law.noise_level(power, sigma, 3), sigma * law.std)


@pytest.mark.parametrize("dof", [0.0, -1.0, math.inf, math.nan])
def test_degrees_of_freedom_are_positive(dof, user_error):
    with user_error(dof):
        StudentT(dof, 2)


def test_refused_laws(user_error):
    with user_error("dim 0"):
        StudentT(1.0, 0)
    with user_error("(2,)"):
        Product(Normal(torch.zeros(2), 1.0))
    with user_error("Cauchy"):
        Product(torch.distributions.Cauchy(0.0, 1.0))


@pytest.mark.parametrize("law", [StudentT(1.0, 64), Gaussian(64)], ids=["student", "gaussian"])
def test_points_of_another_dimension_are_refused(law, user_error):
    with user_error("(3, 4)", "12", "64"):
        law.draw((5, 3, 4))
    with user_error("(2,)", "64"):
        law.log_prob(torch.zeros(5, 2))
