import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import multivariate_normal, norm

from diffusion.metrics import (
    GaussianLaw,
    frechet_distance,
    gaussian_bhattacharyya,
    gaussian_kl,
    gaussian_wasserstein,
)

DISTANCES = [gaussian_kl, gaussian_bhattacharyya, gaussian_wasserstein]
SYMMETRIC = [gaussian_bhattacharyya, gaussian_wasserstein]
every = pytest.mark.parametrize("distance", DISTANCES, ids=lambda f: f.__name__)


def law(dim: int, seed: int, rank: int | None = None) -> GaussianLaw:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, rank or dim + 2, generator=generator, dtype=torch.float64)
    return GaussianLaw(torch.randn(dim, generator=generator, dtype=torch.float64), root @ root.T / dim)


def moved(law: GaussianLaw, matrix: torch.Tensor, shift: torch.Tensor) -> GaussianLaw:
    return GaussianLaw(matrix @ law.mean + shift, matrix @ law.covariance @ matrix.T)


def line(mean: float, std: float) -> GaussianLaw:
    return GaussianLaw(torch.tensor([mean]).double(), torch.tensor([[std**2]]).double())


class TestAgainstSampling:
    """Means over exact draws, within four standard errors of themselves, these being a few per cent of the distance."""

    N = 200_000

    def log_ratio(self):
        a, b = law(4, 0), law(4, 1)
        first, second = (multivariate_normal(law.mean.numpy(), law.covariance.numpy()) for law in (a, b))
        x = first.rvs(self.N, random_state=np.random.default_rng(0))
        return a, b, first.logpdf(x) - second.logpdf(x)

    def test_kl_is_the_mean_log_ratio(self):
        a, b, ratio = self.log_ratio()
        error = ratio.std() / math.sqrt(self.N)
        assert error < 0.02 * ratio.mean()
        assert gaussian_kl(a, b) == pytest.approx(ratio.mean(), abs=4 * error)

    def test_bhattacharyya_is_of_the_mean_root_of_the_ratio(self):
        a, b, ratio = self.log_ratio()
        root = np.exp(-ratio / 2)
        error = root.std() / root.mean() / math.sqrt(self.N)
        assert error < 0.02 * -np.log(root.mean())
        assert gaussian_bhattacharyya(a, b) == pytest.approx(-np.log(root.mean()), abs=4 * error)


class TestAgainstFormulas:
    @pytest.mark.parametrize("dim", [1, 3, 20])
    def test_kl_and_bhattacharyya_of_determinants(self, dim):
        a, b = law(dim, 2), law(dim, 3)
        s, c, gap = a.covariance.numpy(), b.covariance.numpy(), (a.mean - b.mean).numpy()
        middle = (s + c) / 2
        volume_a, volume_b, volume = (np.linalg.slogdet(matrix).logabsdet for matrix in (s, c, middle))
        kl = np.trace(np.linalg.solve(c, s)) - dim + gap @ np.linalg.solve(c, gap) + volume_b - volume_a
        assert gaussian_kl(a, b) == pytest.approx(kl / 2, rel=1e-10)
        expected = gap @ np.linalg.solve(middle, gap) / 8 + (volume - (volume_a + volume_b) / 2) / 2
        assert gaussian_bhattacharyya(a, b) == pytest.approx(expected, rel=1e-10)

    def test_bhattacharyya_is_an_integral_on_the_line(self):
        x = np.linspace(-30, 30, 60001)
        overlap = np.sqrt(norm.pdf(x, 1, 2) * norm.pdf(x, -2, 0.5)).sum() * (x[1] - x[0])
        assert gaussian_bhattacharyya(line(1, 2), line(-2, 0.5)) == pytest.approx(-np.log(overlap), rel=1e-10)

    @pytest.mark.parametrize("dim", [1, 3, 20])
    def test_wasserstein_by_the_matrix_square_root_of_scipy(self, dim):
        a, b = law(dim, 2), law(dim, 3)
        s, c = a.covariance.numpy(), b.covariance.numpy()
        root = sqrtm(s)
        bures = np.trace(s + c - 2 * sqrtm(root @ c @ root).real)
        expected = math.sqrt((a.mean - b.mean).square().sum() + bures)
        assert gaussian_wasserstein(a, b) == pytest.approx(expected, rel=1e-9)

    def test_wasserstein_is_the_integral_over_quantiles_on_the_line(self):
        levels = (np.arange(1_000_000) + 0.5) / 1_000_000
        gaps = norm.ppf(levels, 1, 2) - norm.ppf(levels, -2, 0.5)
        found = gaussian_wasserstein(line(1, 2), line(-2, 0.5))
        assert found == pytest.approx(math.sqrt(np.square(gaps).mean()), rel=1e-5)
        assert found == pytest.approx(math.hypot(3, 1.5), rel=1e-14)

    def test_wasserstein_is_the_frechet_distance_of_sets(self):
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(50, 6, generator=generator, dtype=torch.float64) * k for k in (1.0, 2.0))
        # The law of a set weighs each point by 1/N; the Frechet distance takes the unbiased covariance.
        laws = [GaussianLaw(of.mean, of.covariance * 50 / 49) for of in map(GaussianLaw.of, (a, b))]
        assert gaussian_wasserstein(*laws) ** 2 == pytest.approx(frechet_distance(a, b), rel=1e-12)


class TestLaws:
    @every
    def test_a_law_is_at_no_distance_from_itself(self, distance):
        a = law(6, 0)
        assert abs(distance(a, a)) < 1e-13

    @every
    def test_near_laws_keep_their_digits(self, distance):
        """Means 1e-7 apart are at the distance of the quadratic form, which the constant terms must not drown."""
        a = law(3, 0)
        h = 1e-7 * torch.ones(3, dtype=torch.float64)
        form = (h @ torch.linalg.solve(a.covariance, h)).item()
        expected = {gaussian_kl: form / 2, gaussian_bhattacharyya: form / 8, gaussian_wasserstein: h.norm().item()}
        found = distance(a, GaussianLaw(a.mean + h, a.covariance))
        assert found == pytest.approx(expected[distance], rel=1e-3 if distance is not gaussian_wasserstein else 1e-7)

    def test_small_changes_of_the_covariance(self):
        """W2 to (1 + e)^2 S is e sqrt(tr S): second order in e, where the difference of traces has lost all digits."""
        a, e = law(5, 1), 1e-9
        found = gaussian_wasserstein(a, GaussianLaw(a.mean, (1 + e) ** 2 * a.covariance))
        assert found == pytest.approx(e * math.sqrt(a.covariance.trace()), rel=1e-4)

    @pytest.mark.parametrize("distance", SYMMETRIC, ids=lambda f: f.__name__)
    def test_symmetric(self, distance):
        assert distance(law(5, 0), law(5, 1)) == pytest.approx(distance(law(5, 1), law(5, 0)), rel=1e-12)

    def test_kl_is_not_symmetric(self):
        assert abs(gaussian_kl(law(5, 0), law(5, 1)) - gaussian_kl(law(5, 1), law(5, 0))) > 0.1

    @every
    def test_the_same_in_other_coordinates(self, distance):
        """KL and Bhattacharyya in all linear ones, Wasserstein in orthonormal ones."""
        generator = torch.Generator().manual_seed(5)
        matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
        if distance is gaussian_wasserstein:
            matrix = torch.linalg.qr(matrix).Q
        shift = torch.arange(4).double()
        a, b = law(4, 0), law(4, 1)
        assert distance(moved(a, matrix, shift), moved(b, matrix, shift)) == pytest.approx(distance(a, b), rel=1e-9)

    @pytest.mark.parametrize("distance", [gaussian_kl, gaussian_bhattacharyya], ids=lambda f: f.__name__)
    def test_independent_blocks_add(self, distance):
        a, b, c, d = law(2, 0), law(3, 1), law(2, 2), law(3, 3)
        both = [
            GaussianLaw(torch.cat([p.mean, q.mean]), torch.block_diag(p.covariance, q.covariance))
            for p, q in ((a, b), (c, d))
        ]
        assert distance(*both) == pytest.approx(distance(a, c) + distance(b, d), rel=1e-11)

    def test_the_law_of_points(self):
        points = torch.randn(30, 2, 2, generator=torch.Generator().manual_seed(0))
        found = GaussianLaw.of(points)
        assert found.covariance.dtype == torch.float64
        np.testing.assert_allclose(found.covariance, np.cov(points.flatten(1).double().T, bias=True), rtol=1e-12)
        np.testing.assert_allclose(found.mean, points.flatten(1).double().mean(0), rtol=1e-12)

    @every
    def test_pairs_of_float32_are_measured_in_float64(self, distance):
        a, b = law(4, 0), law(4, 1)
        single = [(law.mean.float(), law.covariance.float()) for law in (a, b)]
        again = [GaussianLaw(mean.double(), covariance.double()) for mean, covariance in single]
        assert distance(*single) == pytest.approx(distance(*again), rel=1e-12)


class TestSingular:
    def test_wasserstein_between_singular_laws(self):
        """Two points u apart have the covariance u u^T / 4, and the trace of the root is |u.v| / 4."""
        generator = torch.Generator().manual_seed(0)
        u, v = torch.randn(2, 8, generator=generator, dtype=torch.float64)
        a, b = (GaussianLaw(torch.zeros(8).double(), torch.outer(w, w) / 4) for w in (u, v))
        expected = (u.square().sum() + v.square().sum() - 2 * (u @ v).abs()) / 4
        assert gaussian_wasserstein(a, b) ** 2 == pytest.approx(expected.item(), rel=1e-12)

    def test_wasserstein_to_a_point(self):
        a = law(5, 0)
        point = GaussianLaw(a.mean + 1, torch.zeros(5, 5).double())
        assert gaussian_wasserstein(a, point) ** 2 == pytest.approx(5 + a.covariance.trace().item(), rel=1e-12)

    @pytest.mark.parametrize("distance", [gaussian_kl, gaussian_bhattacharyya], ids=lambda f: f.__name__)
    def test_the_others_refuse(self, distance, user_error):
        flat = law(4, 1, rank=2)
        with user_error("the second law has a singular covariance", "positive definite"):
            distance(law(4, 0), flat)
        with user_error("the first law has a singular covariance"):
            distance(flat, law(4, 0))

    def test_very_different_scales_are_not_singular(self):
        scales = torch.tensor([1e-12, 1.0, 1e12]).double()
        a = GaussianLaw(torch.zeros(3).double(), scales.square().diag())
        assert gaussian_kl(a, GaussianLaw(a.mean, 4 * a.covariance)) == pytest.approx(3 * (0.25 - 1 + math.log(4)) / 2)


class TestErrors:
    @every
    def test_bad_laws_are_refused(self, distance, user_error):
        good = law(2, 0)
        skew = GaussianLaw(good.mean, torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double())
        negative = GaussianLaw(good.mean, torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double())
        with user_error("the second law has a covariance that differs from its transpose by 0.5"):
            distance(good, skew)
        with user_error("the first law has a covariance with the eigenvalue -1"):
            distance(negative, good)
        with user_error("mean (2,) and covariance (3, 3)", "expected (d,) and (d, d)"):
            distance(good, GaussianLaw(good.mean, torch.eye(3).double()))
        with user_error("2 and 3 dimensions"):
            distance(good, law(3, 0))
        for shape in ((5,), (0, 2)):
            with user_error(f"points have shape {shape}"):
                GaussianLaw.of(torch.zeros(shape))
        with user_error("not finite"):
            distance(good, GaussianLaw(good.mean, good.covariance * math.nan))
