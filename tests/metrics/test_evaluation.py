import json
import math

import pytest
import torch
from torch.utils.data import Dataset

from diffusion.data import Splits, StreamedData, TensorData, digits
from diffusion.errors import UserError
from diffusion.metrics import PointFeatures, evaluate, evaluation


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything(data: TensorData) -> torch.Tensor:
    return data.take(torch.arange(len(data))).x


@pytest.fixture(scope="module")
def points() -> Splits:
    """Three dimensions, correlated, so that train and test are draws of one Gaussian."""
    mix = normal(3, 3, seed=9)
    return Splits(TensorData(normal(600, 3, seed=1) @ mix), TensorData(normal(100, 3, seed=2) @ mix), "points")


@pytest.fixture(scope="module")
def images() -> Splits:
    return digits()


def test_held_out_data_as_generated_scores_the_floor(images):
    found = evaluate(everything(images.test), images, PointFeatures())
    assert found.generated == pytest.approx(found.real, rel=1e-9)
    assert found.frechet_over_floor == pytest.approx(1)
    assert found.subset_size == found.samples == 450
    assert found.frechet_all == pytest.approx(found.real.frechet)


def test_figures_are_those_of_the_definitions(images):
    train, test = everything(images.train).flatten(1).double(), everything(images.test).flatten(1).double()
    nearest = torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    found = evaluate(everything(images.test), images, PointFeatures()).real
    assert found.nearest_train == pytest.approx(nearest.median().item() / 8)
    assert found.memorised == pytest.approx(0.01, abs=1 / 450)
    assert found.frechet == pytest.approx(evaluation.frechet_distance(test, train))
    assert found.kernel == pytest.approx(evaluation.kernel_distance(test, train))
    assert (found.precision, found.recall) == pytest.approx(evaluation.precision_recall(train, test))
    directions = torch.Generator().manual_seed(0)
    assert found.sliced_w2 == pytest.approx(evaluation.sliced_wasserstein(test, train, directions))


def test_copies_with_less_than_half_a_level_of_noise_are_memorised(images):
    copies = everything(images.train)[:200] + 0.4 / 127.5 * normal(200, 1, 8, 8, seed=3).clamp(-1, 1)
    found = evaluate(copies, images, PointFeatures()).generated
    assert found.nearest_train == 0
    assert found.memorised == 1
    assert found.precision == 1


def test_copies_are_memorised_even_where_real_data_repeats_itself(points):
    held_out = torch.cat([everything(points.test)[:90], everything(points.train)[:10]])
    found = evaluate(everything(points.train)[:50], points._replace(test=TensorData(held_out)), PointFeatures())
    assert found.generated.memorised == 1
    assert 0 < found.real.memorised < 0.2


def test_the_gaussian_column_is_a_gaussian_fit_on_256_levels(images):
    train = everything(images.train)
    law = torch.distributions.MultivariateNormal(
        train.flatten(1).double().mean(0), train.flatten(1).double().T.cov() + 1e-9 * torch.eye(64)
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draws = law.sample((450,)).view(450, 1, 8, 8)
    seen = []

    class Watching:
        name = "watching"

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1).double()

    found = evaluate(draws, images, Watching())
    # Two sets of 450 draws of one law, so that the columns differ by chance only.
    assert found.gaussian.frechet == pytest.approx(found.generated.frechet, rel=0.1)
    assert found.gaussian.sliced_w2 == pytest.approx(found.generated.sliced_w2, rel=0.2)
    assert found.gaussian.nearest_train == pytest.approx(found.generated.nearest_train, rel=0.1)
    assert found.gaussian.nearest_train > 1.2 * found.real.nearest_train
    for x in seen:
        levels = (x + 1) * 127.5
        assert (levels - levels.round()).abs().max() < 1e-4


def test_the_fitted_gaussian_has_the_mean_and_the_full_covariance():
    train = normal(50, 1, 2, 2, seed=1) * torch.tensor([[1.0, 3.0], [0.0, 0.1]]) + 2
    train[:, :, 1, 1] += train[:, :, 0, 0]
    draws = evaluation._fitted_gaussian(train, 20_000, torch.Generator().manual_seed(0)).flatten(1)
    expected, found = train.flatten(1).double().T.cov(), draws.T.cov()
    spread = (expected.diag().outer(expected.diag()) + expected.square()).div(20_000).sqrt()
    assert ((found - expected).abs() <= 4 * spread + 1e-12).all()
    mean_spread = (expected.diag() / 20_000).sqrt()
    assert ((draws.mean(0) - train.flatten(1).double().mean(0)).abs() <= 4 * mean_spread + 1e-12).all()


def test_more_samples_do_not_flatter_a_generator(points):
    # As good as real, ten times as many, sorted: the bias of 100 samples must stay, and subsets must be mixed.
    samples = normal(1000, 3, seed=3) @ normal(3, 3, seed=9)
    found = evaluate(samples[samples[:, 0].argsort()], points, PointFeatures())
    assert found.subset_size == 100
    assert 0.4 < found.frechet_over_floor < 2.5
    assert found.frechet_all < 0.3 * found.generated.frechet
    assert found.generated.recall == pytest.approx(found.real.recall, abs=0.1)


def test_fewer_samples_shrink_every_column(points):
    samples = normal(25, 3, seed=3) @ normal(3, 3, seed=9)
    few, many = evaluate(samples, points, PointFeatures()), evaluate(samples.repeat(4, 1), points, PointFeatures())
    assert few.subset_size == 25
    assert few.real.frechet > 2 * many.real.frechet
    assert few.gaussian.frechet > 2 * many.gaussian.frechet
    assert few.real.recall < many.real.recall


def test_ratios_and_records_agree(images):
    noise = normal(450, 1, 8, 8, seed=3)
    found = evaluate(noise, images, PointFeatures())
    assert found.frechet_over_floor == found.generated.frechet / found.real.frechet > 10
    assert found.frechet_over_gaussian == found.generated.frechet / found.gaussian.frechet > 3
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["generated"]["sliced_w2"] == found.generated.sliced_w2
    assert record["gaussian"]["recall"] == found.gaussian.recall
    assert record["frechet_over_gaussian"] == found.frechet_over_gaussian
    assert (record["samples"], record["reference"], record["data"]) == (450, 1347, "digits")


def test_the_table_is_aligned_and_holds_the_figures(images):
    found = evaluate(normal(450, 1, 8, 8, seed=3), images, PointFeatures())
    rows = found.table().splitlines()
    assert len({len(row) for row in rows[:8]}) == 1
    for row, *values in zip(rows[1:8], found.generated, found.real, found.gaussian, strict=True):
        printed = row.removesuffix("as real").split()
        printed = printed[-3:] if row.endswith("as real") else printed[-4:-1]
        assert [float(word) for word in printed] == pytest.approx(values, rel=1e-3)
    assert f"{found.frechet_over_floor:.3g} times real" in rows[8]
    assert "1,347 training examples" in rows[9]
    assert "digits" in rows[10] and "coordinates" in rows[10] and "seed: 0" in rows[10]


def test_the_seed_decides_and_the_global_state_is_left_alone(points, monkeypatch):
    monkeypatch.setattr(evaluation, "REFERENCE_EXAMPLES", 300)
    monkeypatch.setattr(evaluation, "PAIRWISE_EXAMPLES", 50)
    samples = normal(120, 3, seed=3)
    before = torch.get_rng_state()
    first = evaluate(samples, points, PointFeatures(), seed=1)
    assert torch.get_rng_state().equal(before)
    assert (first.reference, first.subset_size) == (300, 50)
    torch.manual_seed(99)
    assert evaluate(samples, points, PointFeatures(), seed=1) == first
    other = evaluate(samples, points, PointFeatures(), seed=2)
    assert all(a != b for a, b in zip(first.real[:2], other.real[:2], strict=True))
    assert other.generated.sliced_w2 != first.generated.sliced_w2


def test_a_stream_scores_as_the_same_data_in_memory(images, monkeypatch):
    monkeypatch.setattr(evaluation, "REFERENCE_EXAMPLES", 300)

    class Items(Dataset):
        def __init__(self, data: TensorData):
            self.data = data

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, i: int):
            return self.data.values[i], self.data.labels[i].item()

    streams = Splits(*(StreamedData(Items(data), 10, workers=0) for data in images[:2]), "digits")
    noise = normal(60, 1, 8, 8, seed=3)
    assert evaluate(noise, streams, PointFeatures()) == evaluate(noise, images, PointFeatures())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(9, 1, 8, 8, dtype=torch.uint8), r"torch.uint8, expected floats"),
        (torch.zeros(9, 3, 8, 8), r"\(9, 3, 8, 8\), expected \(N, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\), expected"),
        (torch.zeros(3, 1, 8, 8), "3 generated samples, expected at least 4"),
        (torch.zeros(9, 1, 8, 8).index_fill(0, torch.tensor([4, 6]), math.nan), "2 of 9 .* first is sample 4"),
        (torch.zeros(9, 1, 8, 8).index_fill(0, torch.tensor([8]), math.inf), "1 of 9 .* first is sample 8"),
    ],
)
def test_broken_samples_are_refused_in_one_line(samples, message, images):
    with pytest.raises(UserError, match=message) as caught:
        evaluate(samples, images, PointFeatures())
    assert "\n" not in str(caught.value)


def test_a_tiny_test_split_is_refused(points):
    tiny = points._replace(test=TensorData(torch.zeros(3, 3)))
    with pytest.raises(UserError, match="the test split of points has 3 examples, expected at least 4"):
        evaluate(normal(20, 3, seed=0), tiny, PointFeatures())
