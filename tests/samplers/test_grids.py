"""Time grids, over every field."""

import pytest
import torch
from problems import FIELDS, names

from diffusion.fields import linear, variance_exploding, variance_preserving
from diffusion.samplers import BandGrid, LogSNRGrid, PowerGrid, SigmaGrid

GRIDS = [PowerGrid(), PowerGrid(1.0), PowerGrid(7.0), PowerGrid(0.5), LogSNRGrid(), SigmaGrid(), BandGrid(0.1, 5.0)]


@pytest.mark.parametrize("case", **names(FIELDS))
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("points", [2, 3, 18])
def test_a_grid_falls_from_the_horizon_to_t_min(case, grid, points):
    field = case.build()
    times = grid(field, points)
    assert times.dtype == torch.float64
    assert times.shape == (points,)
    assert times[0] == field.horizon
    assert times[-1] == field.t_min
    assert (times.diff() < 0).all()


def test_power_grid_is_that_of_edm():
    """Karras et al. 2022, eq. 5, term by term, with their defaults."""
    n, rho, largest, smallest = 18, 7, 80.0, 0.002
    expected = [
        (largest ** (1 / rho) + i / (n - 1) * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho for i in range(n)
    ]
    for grid in (PowerGrid(), PowerGrid(7.0)):
        assert grid(variance_exploding(), n).tolist() == pytest.approx(expected, rel=1e-12)


def test_log_grid_has_a_constant_ratio():
    times = LogSNRGrid()(variance_exploding(), 11)
    torch.testing.assert_close(times[1:] / times[:-1], torch.full((10,), (0.002 / 80) ** 0.1, dtype=torch.float64))


def test_sigma_grid_is_even_in_a_power_of_sigma():
    field = variance_preserving(2)
    steps = (field.sigma(SigmaGrid(3.0)(field, 9)) ** (1 / 3)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))


def test_log_snr_grid_is_even_where_sigma_is_not_t():
    """Where alpha_T = 0 the even part begins at noise / signal = 100."""
    field = variance_preserving(2)
    steps = field.log_noise_to_signal(LogSNRGrid()(field, 9)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))
    field = linear(2)
    steps = field.log_noise_to_signal(LogSNRGrid()(field, 9))[1:].diff()
    torch.testing.assert_close(steps, steps[:1].expand(7))


@pytest.mark.parametrize("rho", [0.0, -7.0, float("nan")])
def test_rho_is_positive(rho, user_error):
    with user_error(f"rho={rho}"):
        PowerGrid(rho)(variance_exploding(), 5)
    with user_error(f"rho={rho}"):
        SigmaGrid(rho)(variance_exploding(), 5)


@pytest.mark.parametrize("shares", [(0.0, 0.6, 0.4, 1.0), (0.1, 0.5, 1.0), (0.0, 0.5, 0.9), (0.0, float("nan"), 1.0)])
def test_shares_rise_from_0_to_1(shares, user_error):
    with user_error("shares=", "rising from 0 to 1"):
        BandGrid(0.1, 5.0, shares)


@pytest.mark.parametrize("build", [LogSNRGrid, PowerGrid, SigmaGrid])
@pytest.mark.parametrize("value", [0, -1.0, "abc", float("inf")])
def test_numbers_that_no_grid_has(build, value, user_error):
    with user_error(build.__name__, value):
        build(value)
