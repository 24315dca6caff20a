import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linprog
from scipy.stats import norm
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from diffusion.errors import UserError
from diffusion.metrics import (
    distances,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    precision_recall,
    sliced_wasserstein,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def two_sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated, shifted sets of 60 and 45 points in 6 dimensions."""
    return normal(60, 6) @ normal(6, 6, seed=1), 0.7 * normal(45, 6, seed=2) @ normal(6, 6, seed=3) + 0.5


@pytest.fixture(params=[4096, 7])
def block_rows(request, monkeypatch) -> int:
    """The blocks as they are, and blocks so small that both sets take several and the last one is not full."""
    monkeypatch.setattr(distances, "BLOCK_ROWS", request.param)
    return request.param


class TestFrechet:
    def test_agrees_with_the_matrix_square_root_of_scipy(self, two_sets):
        a, b = (x.numpy() for x in two_sets)
        cov_a, cov_b = np.cov(a.T), np.cov(b.T)
        shift = np.square(a.mean(0) - b.mean(0)).sum()
        expected = shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
        assert frechet_distance(*two_sets) == pytest.approx(expected, rel=1e-10)

    def test_agrees_with_torchmetrics(self, two_sets):
        a, b = two_sets
        expected = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)

    def test_commuting_covariances_have_a_closed_form(self):
        def exact_set(count: int, mean: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
            x = normal(count, len(mean))
            white = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(count - 1)
            return mean + white * deviations

        mean_a, mean_b = torch.tensor([0.0, 1, 2]).double(), torch.tensor([0.5, 1, 0]).double()
        deviations_a, deviations_b = torch.tensor([1.0, 2, 3]).double(), torch.tensor([3.0, 2, 0.1]).double()
        expected = (mean_a - mean_b).square().sum() + (deviations_a - deviations_b).square().sum()
        found = frechet_distance(exact_set(20, mean_a, deviations_a), exact_set(31, mean_b, deviations_b))
        assert found == pytest.approx(expected.item(), rel=1e-12)

    def test_singular_covariances_keep_their_digits(self):
        # Two points u apart have the covariance u u^T / 2, and the trace of the root is |u.v| / 2.
        u, v = normal(300, seed=1), normal(300, seed=2)
        a, b = torch.stack([u, 0 * u]), torch.stack([v, 0 * v])
        expected = (u - v).square().sum() / 4 + u.square().sum() / 2 + v.square().sum() / 2 - (u @ v).abs()
        assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)
        few = normal(20, 300)
        assert 0 <= frechet_distance(few, few.flip(0)) < 1e-10


class TestKernel:
    def test_agrees_with_a_double_loop_for_unequal_sizes(self, two_sets, block_rows):
        a, b = (x.numpy() for x in two_sets)

        def kernel(x, y):
            return (x @ y / 6 + 1) ** 3

        within = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
        expected = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
        assert kernel_distance(*two_sets) == pytest.approx(expected, rel=1e-10)

    def test_agrees_with_torchmetrics(self, two_sets):
        a, b = two_sets
        assert kernel_distance(a[:45], b) == pytest.approx(poly_mmd(a[:45], b).item(), rel=1e-10)

    def test_is_zero_in_the_mean_for_equal_laws(self):
        found = torch.tensor([kernel_distance(normal(5, 2, seed=s), normal(8, 2, seed=s + 5000)) for s in range(2000)])
        assert found.mean().abs() < 3 * found.std() / math.sqrt(len(found))
        assert found.min() < 0


class TestPrecisionRecall:
    @staticmethod
    def by_sklearn(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
        radius = NearestNeighbors(n_neighbors=k).fit(manifold).kneighbors()[0][:, -1]
        distance = np.linalg.norm(points[:, None] - manifold, axis=-1)
        return (distance <= radius).any(1).mean()

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_agrees_with_nearest_neighbours_of_sklearn(self, k, block_rows):
        real, fake = normal(50, 3), 0.8 * normal(33, 3, seed=1) + 1
        found = precision_recall(real, fake, k)
        assert found.precision == pytest.approx(self.by_sklearn(fake.numpy(), real.numpy(), k))
        assert found.recall == pytest.approx(self.by_sklearn(real.numpy(), fake.numpy(), k))
        assert 0 < found.precision < 1 and 0 < found.recall < 1 and found.precision != found.recall

    def test_a_subset_is_precise_and_a_missed_mode_is_not_recalled(self):
        modes = torch.cat([normal(40, 2), normal(40, 2, seed=1) + 100])
        assert precision_recall(modes, modes[:40]).precision == 1
        assert precision_recall(modes, modes[:40]).recall == 0.5

    def test_repeated_points_have_radius_zero_and_cover_only_their_copies(self):
        offset = 1000 + normal(5)  # far from the origin, where |a|^2 + |b|^2 - 2 a.b has lost its digits
        repeated = offset + torch.tensor([[0.3], [0.7]]).double().repeat(5, 1)
        points = offset + torch.tensor([[0.3], [0.3 + 1e-6], [0.5], [9.0]]).double()
        assert precision_recall(repeated, points).precision == 0.25

    def test_too_few_points_are_refused(self):
        with pytest.raises(UserError, match="at least 4 rows"):
            precision_recall(normal(10, 2), normal(3, 2))
        with pytest.raises(UserError, match="k is 0"):
            precision_recall(normal(10, 2), normal(10, 2), k=0)


class TestSlicedWasserstein:
    @pytest.mark.parametrize("sizes", [(5, 7), (6, 6), (4, 8), (1, 3)])
    def test_on_a_line_it_is_the_optimal_plan_of_a_linear_programme(self, sizes):
        n, m = sizes
        a, b = normal(n, 1), 2 * normal(m, 1, seed=1) + 0.3
        rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
        marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
        cost = (a - b.T).square().flatten().numpy()
        expected = linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=marginals).fun
        assert sliced_wasserstein(a, b, directions(), projections=3) ** 2 == pytest.approx(expected, rel=1e-9)

    def test_gaussian_quantiles_give_the_closed_form(self):
        def quantiles(count: int, mean: float, deviation: float) -> torch.Tensor:
            return torch.from_numpy(norm.ppf((np.arange(count) + 0.5) / count, mean, deviation))[:, None]

        found = sliced_wasserstein(quantiles(20_001, 1, 2), quantiles(15_000, -0.5, 0.5), directions(), projections=1)
        assert found == pytest.approx(math.hypot(1.5, 1.5), rel=1e-3)

    def test_a_shift_adds_its_length_over_the_root_of_the_dimension(self):
        dimension, projections = 5, 4000
        a, shift = normal(12, dimension), normal(dimension, seed=1)
        found = sliced_wasserstein(a, (a + shift).repeat(2, 1), directions(), projections) ** 2
        mean = shift.square().sum().item()
        spread = mean * math.sqrt(2 * (dimension - 1) / (dimension + 2)) / dimension / math.sqrt(projections)
        assert abs(found - mean / dimension) < 3 * spread

    def test_the_seed_decides_the_directions(self, two_sets):
        first, again, other = (sliced_wasserstein(*two_sets, directions(seed), projections=8) for seed in (1, 1, 2))
        assert first == again != other


class TestNearest:
    def test_agrees_with_all_differences(self, block_rows):
        samples, reference = normal(20, 2, 3), normal(30, 2, 3, seed=1)
        expected = (samples[:, None] - reference).flatten(2).norm(dim=2).amin(1)
        torch.testing.assert_close(nearest_distance(samples, reference), expected, rtol=1e-12, atol=0)

    def test_copies_are_at_zero_and_near_copies_keep_their_digits(self):
        reference = (normal(100, 64) + 30).float()
        copies, near = reference[::3], reference.double() + 1e-9 * normal(100, 64, seed=1)
        assert nearest_distance(copies, reference).eq(0).all()
        expected = (near - reference).norm(dim=1)
        torch.testing.assert_close(nearest_distance(near, reference), expected, rtol=1e-12, atol=0)

    def test_other_widths_are_refused(self):
        with pytest.raises(UserError, match="same width"):
            nearest_distance(normal(3, 4), normal(3, 5))


@pytest.mark.parametrize(
    "distance", [frechet_distance, kernel_distance, lambda a, b: sliced_wasserstein(a, b, directions())]
)
@pytest.mark.parametrize("shape", [(9, 4), (9, 3, 1), (0, 3)])
def test_sets_of_other_shapes_are_refused_in_one_line(distance, shape):
    with pytest.raises(UserError, match="same width") as caught:
        distance(normal(9, 3), normal(*shape))
    assert "\n" not in str(caught.value)
    assert str(shape) in str(caught.value)
