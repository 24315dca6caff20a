"""scikit-learn's digits: the values, the split, the proportions of the classes."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from diffusion.data import digits


@pytest.fixture(scope="module")
def splits():
    return digits()


def rows(data):
    return {(*image.flatten().tolist(), label) for image, label in zip(data.values, data.labels.tolist(), strict=True)}


def test_sizes(splits):
    assert (splits.name, len(splits.train), len(splits.test)) == ("digits", 1347, 450)
    assert splits.train.shape == splits.test.shape == (1, 8, 8)
    assert splits.train.num_classes == splits.test.num_classes == 10


def test_values_are_the_seventeen_original_ones_spread_over_a_byte(splits):
    spread = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert splits.train.values.unique().tolist() == spread


def test_the_split_keeps_every_image_with_its_label_once(splits):
    train, test = rows(splits.train), rows(splits.test)
    source = load_digits()
    spread = np.floor(source.images * 255 / 16 + 0.5).astype(int).reshape(-1, 64)
    everything = {(*image, label) for image, label in zip(spread.tolist(), source.target.tolist(), strict=True)}
    assert len(everything) == 1797
    assert not train & test
    assert train | test == everything


def test_the_split_is_stratified(splits):
    whole = np.bincount(load_digits().target)
    for data, share in ((splits.train, 1347 / 1797), (splits.test, 450 / 1797)):
        counts = torch.bincount(data.labels, minlength=10).numpy()
        assert np.abs(counts - share * whole).max() < 1


def test_the_split_is_fixed(splits):
    again = digits()
    assert torch.equal(again.train.values, splits.train.values) and torch.equal(again.test.labels, splits.test.labels)
