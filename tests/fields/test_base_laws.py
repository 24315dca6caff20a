"""The laws of the noise against scipy's, and the noise level that a point reveals."""

import math

import numpy as np
import pytest
import torch
from own_fields import Logistic
from scipy import stats
from sklearn.decomposition import PCA
from torch.distributions import Laplace, Normal, Uniform

from diffusion.fields import Gaussian, PrincipalGaussian, Product, StudentT, laplace, uniform
from diffusion.specs import build, describe

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
        (laplace(), stats.laplace(scale=math.sqrt(0.5))),
        (uniform(0.3), stats.uniform(-0.3, 0.6)),
    ],
    ids=["laplace", "normal", "uniform", "own", "laplace_of_unit_variance", "narrow_cube"],
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


class TestScales:
    """z as a Gaussian whose scale is drawn first."""

    @pytest.mark.parametrize("dim", [1, 8, 64])
    @pytest.mark.parametrize("dof", [0.5, 1.0, 3.5, 128.0, 2048.0])
    def test_mixture_of_the_scales_is_the_law(self, dof, dim):
        """The density, at radii beyond which lies 1e-4 of it on either side."""
        law = StudentT(dof, dim)
        levels = torch.logspace(-4, 0, 26, dtype=torch.float64)[:-1]
        radii = torch.from_numpy(stats.f(dim, dof).ppf(torch.cat([levels, 1 - levels]))).sqrt()
        z = radii[:, None].expand(-1, dim)
        R, log_weight = law.scales
        gaussian = -0.5 * z.square().sum(1, keepdim=True) / R**2 - dim * (R.log() + 0.5 * math.log(2 * math.pi))
        mixture = (gaussian + log_weight).logsumexp(1)
        torch.testing.assert_close(mixture, law.log_prob(z), rtol=0, atol=1e-3)
        assert log_weight.exp().sum().item() == pytest.approx(1)

    @pytest.mark.parametrize("law", [Gaussian(), Product(Laplace(0.0, 0.7)), Logistic()])
    def test_laws_with_a_variance_have_one_scale(self, law):
        assert law.scales.value.tolist() == [law.std]
        assert law.scales.log_weight.tolist() == [0]


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


@pytest.mark.parametrize("law", [uniform(), laplace()], ids=["uniform", "laplace"])
def test_product_laws_have_unit_variance_and_can_be_stored(law):
    assert law.std == pytest.approx(1, abs=1e-15)
    again, z = build(describe(law)), torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    assert again.log_prob(z).equal(law.log_prob(z))
    assert drawn(law, (4, 3), dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_product_laws_have_a_positive_width(bad, user_error):
    with user_error(f"half_width {bad}"):
        uniform(bad)
    with user_error(f"scale {bad}"):
        laplace(bad)


class TestPrincipalGaussian:
    """Probabilistic principal components: scikit-learn's, and its own arithmetic."""

    @staticmethod
    def data(number=500, dim=6):
        mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        mixing = mixing * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.4, 0.3])[:, None]
        return drawn(Gaussian(), (number, dim)) @ mixing + torch.arange(dim)

    @pytest.mark.parametrize("components", [1, 3, 5])
    def test_fit_is_that_of_scikit_learn(self, components):
        data = self.data()
        law, theirs = PrincipalGaussian.fit(data, components), PCA(components).fit(data.numpy())
        # Variances are those of most likelihood, over N; scikit-learn's are unbiased, over N - 1.
        scale = (len(data) - 1) / len(data)
        np.testing.assert_allclose(law.variances, theirs.explained_variance_ * scale, rtol=1e-10)
        assert law.remainder == pytest.approx(theirs.noise_variance_ * scale, rel=1e-10)
        expected = stats.multivariate_normal(theirs.mean_, theirs.get_covariance() * scale).logpdf(data.numpy())
        np.testing.assert_allclose(law.log_prob(data), expected, rtol=1e-10)
        assert law.std == pytest.approx(math.sqrt(float(data.var(0, correction=0).mean())), rel=1e-10)

    def test_fit_is_most_likely(self):
        data = self.data()
        law = PrincipalGaussian.fit(data, 2)
        best = float(law.log_prob(data).mean())
        for factor in (0.97, 1.03):
            for other in (
                PrincipalGaussian(law.mean * factor, law.components, law.variances, law.remainder),
                PrincipalGaussian(law.mean, law.components, law.variances * factor, law.remainder),
                PrincipalGaussian(law.mean, law.components, law.variances, law.remainder * factor),
                PrincipalGaussian(law.mean, law.components.roll(1, 1), law.variances, law.remainder),
            ):
                assert float(other.log_prob(data).mean()) < best - 1e-5

    @pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
    def test_draws_have_its_mean_and_covariance(self, shape):
        law = PrincipalGaussian.fit(self.data(), 2)
        z = drawn(law, (100000, *shape)).flatten(1)
        u, eye = law.components, torch.eye(6, dtype=torch.float64)
        covariance = law.remainder * eye + u.T @ torch.diag(law.variances - law.remainder) @ u
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (z - law.mean).T, upper=False)
        assert float(white.mean(1).abs().max()) < 4.5 / math.sqrt(len(z))
        assert float((white.cov() - eye).abs().max()) < 4.5 * math.sqrt(2 / len(z))
        torch.testing.assert_close(law.log_prob(z.view(-1, *shape)[:5]), law.log_prob(z[:5]))

    def test_no_components_is_an_isotropic_gaussian(self):
        data = self.data()
        law = PrincipalGaussian.fit(data, 0)
        expected = Gaussian().log_prob((data - data.mean(0)) / law.std) - 6 * math.log(law.std)
        torch.testing.assert_close(law.log_prob(data), expected)

    def test_stored_and_built_again(self):
        law = PrincipalGaussian.fit(self.data().view(-1, 2, 3), 2)
        again = build(describe(law))
        z = drawn(law, (5, 2, 3))
        assert again.log_prob(z).equal(law.log_prob(z))
        assert drawn(again, (5, 2, 3), dtype=torch.float32).dtype == torch.float32

    def test_refusals(self, user_error):
        data, u = self.data(), [[1.0, 0.0]]
        for components in (6, -1):
            with user_error(f"components is {components}", "6 coordinates", "500 data points"):
                PrincipalGaussian.fit(data, components)
        flat = data.clone()
        flat[:, 2:] = 0
        with user_error("do not vary beyond 2"):
            PrincipalGaussian.fit(flat, 2)
        with user_error("(2,)", "(1, 3)", "(1,)"):
            PrincipalGaussian([0.0, 0.0], [[1.0, 0.0, 0.0]], [1.0], 1.0)
        with user_error("not orthonormal"):
            PrincipalGaussian([0.0, 0.0], [[1.0, 1.0]], [1.0], 1.0)
        with user_error("-1.0", "positive"):
            PrincipalGaussian([0.0, 0.0], u, [-1.0], 1.0)
        with user_error("0.0", "positive"):
            PrincipalGaussian([0.0, 0.0], u, [1.0], 0.0)
        with user_error("(4,)", "2"):
            PrincipalGaussian([0.0, 0.0], u, [1.0], 1.0).draw((3, 4))
