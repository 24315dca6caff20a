import sys
from urllib.error import URLError

import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
from torchmetrics.image.fid import NoTrainInceptionV3

from diffusion.data import Splits, TensorData, digits, to_uint8
from diffusion.errors import UserError
from diffusion.metrics import (
    ClassifierFeatures,
    InceptionFeatures,
    PointFeatures,
    default_features,
    features,
    train_classifier_features,
)


def noise_images(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def striped_set(count: int, channels: int, side: int, seed: int) -> TensorData:
    """Noise with a brighter stripe: two classes, horizontal and vertical, at random places."""
    generator = torch.Generator().manual_seed(seed)
    values, labels = noise_images(count, channels, side, side, seed=seed) // 2, torch.arange(count) % 2
    for image, label in zip(values, labels, strict=True):
        place = torch.randint(side - 4, (), generator=generator)
        stripe = image if label == 0 else image.mT
        stripe[:, place : place + 3] += 100
    return TensorData(values, labels, num_classes=2)


def accuracy(found: ClassifierFeatures, data: TensorData) -> float:
    x, label = data.take(torch.arange(len(data)))
    return (found.head(found(x).float()).argmax(1) == label).double().mean().item()


@pytest.fixture(scope="module")
def trained() -> ClassifierFeatures:
    return train_classifier_features([digits().train])


class TestClassifier:
    def test_generalises_to_digits_that_it_has_not_seen(self, trained):
        assert accuracy(trained, digits().test) >= 0.97

    def test_features_are_64_float64_whatever_the_chunks(self, trained, monkeypatch):
        x = digits().test.take(torch.arange(20)).x
        found = trained(x)
        assert found.shape == (20, 64) and found.dtype == torch.float64
        monkeypatch.setattr(features, "CHUNK_IMAGES", 7)
        torch.testing.assert_close(trained(x), found, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (3, 50)])
    def test_learns_images_of_other_sizes(self, channels, side, monkeypatch):
        monkeypatch.setattr(features, "TRAINING_STEPS", 20)
        found = train_classifier_features([striped_set(300, channels, side, seed=0)])
        assert accuracy(found, striped_set(100, channels, side, seed=1)) >= 0.97

    def test_the_seed_decides_and_the_global_state_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(features, "TRAINING_STEPS", 3)
        data = striped_set(40, 1, 8, seed=0)
        x = data.take(torch.arange(10)).x
        before = torch.get_rng_state()
        first = train_classifier_features([data], seed=1)
        assert torch.get_rng_state().equal(before)
        torch.manual_seed(99)
        assert train_classifier_features([data], seed=1)(x).equal(first(x))
        weights, others = first.head.weight, train_classifier_features([data], seed=2).head.weight
        assert (weights - others).norm() > 0.5 * weights.norm()

    def test_large_sets_are_read_in_part_and_in_proportion(self, monkeypatch):
        monkeypatch.setattr(features, "TRAINING_STEPS", 1)
        monkeypatch.setattr(features, "TRAINING_IMAGES", 100)
        read = []

        class Counted(TensorData):
            def take(self, index):
                read.append(len(index))
                return super().take(index)

        sets = [striped_set(count, 1, 8, seed=0) for count in (150, 50)]
        train_classifier_features([Counted(data.values, data.labels, 2) for data in sets])
        assert read == [75, 25]

    @pytest.mark.parametrize(
        ("datasets", "message"),
        [
            ([TensorData(noise_images(9, 1, 8, 8))], "with 0 classes"),
            ([TensorData(torch.zeros(9, 2), torch.arange(9), 9)], "PointFeatures"),
            ([striped_set(9, 1, 8, seed=0), striped_set(9, 3, 8, seed=0)], "data sets differ"),
        ],
    )
    def test_other_data_is_refused_in_one_line(self, datasets, message):
        with pytest.raises(UserError, match=message) as caught:
            train_classifier_features(datasets)
        assert "\n" not in str(caught.value)


class TestInception:
    @pytest.fixture
    def without_weights(self, monkeypatch):
        """The real network with the weights that it is constructed with, the same each time."""
        monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        monkeypatch.setattr(NoTrainInceptionV3, "load_state_dict", lambda self, state: None)
        monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)

    def test_images_reach_the_network_as_in_the_reference_implementation(self, without_weights):
        images = noise_images(2, 3, 32, 32)
        x = TensorData(images).take(torch.arange(2)).x
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ours = InceptionFeatures()
            torch.manual_seed(0)
            reference = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        expected = reference(images)[0].double()
        found = ours(x + 0.3 / 127.5)
        assert found.shape == (2, 2048) and found.dtype == torch.float64
        assert (expected[0] - expected[1]).norm() > 1e-3 * expected.norm()
        assert (found - expected).norm() < 1e-5 * expected.norm()

    def test_grey_is_repeated_and_other_channels_are_refused(self, without_weights):
        seen = []
        grey = torch.linspace(-1, 1, 2 * 8 * 8).view(2, 1, 8, 8)
        found = InceptionFeatures()
        found.network = type("Network", (), {"to": lambda self, device: lambda x: seen.append(x) or x.flatten(1)})()
        found(grey)
        assert seen[0].equal(to_uint8(grey).repeat(1, 3, 1, 1))
        with pytest.raises(UserError, match="1 or 3"):
            found(torch.zeros(2, 4, 8, 8))

    def test_missing_weights_say_where_to_put_them(self, monkeypatch):
        def offline(*args, **kwargs):
            raise URLError("no\nnetwork")

        monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
        with pytest.raises(UserError, match=r"no network.*checkpoints.*copy the file there") as caught:
            InceptionFeatures()
        assert "\n" not in str(caught.value)

    def test_a_missing_package_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
        with pytest.raises(UserError, match=r"pip install .*\[fid\]"):
            InceptionFeatures()


class TestDefault:
    @staticmethod
    def splits(data: TensorData) -> Splits:
        return Splits(data, data, "made up")

    def test_points_are_their_own_features(self):
        x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        found = default_features(self.splits(TensorData(x)))
        assert isinstance(found, PointFeatures)
        assert found(x).equal(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))

    def test_labelled_images_get_a_classifier_of_both_splits(self, monkeypatch):
        monkeypatch.setattr(features, "TRAINING_STEPS", 2)
        train, test = striped_set(20, 1, 8, seed=0), striped_set(10, 1, 8, seed=1)
        x = test.take(torch.arange(10)).x
        expected = train_classifier_features([train, test], seed=3)
        found = default_features(Splits(train, test, "made up"), seed=3)
        assert isinstance(found, ClassifierFeatures) and found(x).equal(expected(x))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_unlabelled_images_get_inception(self, channels, monkeypatch):
        monkeypatch.setattr(InceptionFeatures, "__init__", lambda self: None)
        found = default_features(self.splits(TensorData(noise_images(9, channels, 8, 8))))
        assert isinstance(found, InceptionFeatures)
