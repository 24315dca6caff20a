"""Affine fields: their schedules, the physics of gravity, the horizon."""

import math

import pytest
import torch
from problems import AFFINE, lines, names, times

from diffusion.fields import (
    AffineField,
    Gaussian,
    Product,
    gravity,
    linear,
    pfgmpp,
    variance_exploding,
    variance_preserving,
)

every_affine_field = pytest.mark.parametrize("case", **names(AFFINE))


@every_affine_field
def test_schedule_derivatives_are_those_of_finite_differences(case):
    field = case.build()
    t = times(field, 50)[1:-1]
    schedule = field.schedule(torch.zeros(len(t), case.dim, dtype=torch.float64), t)
    h = 1e-4 * torch.minimum(t, field.horizon - t)
    for function, dot in ((field.alpha, schedule.alpha_dot), (field.sigma, schedule.sigma_dot)):
        near, far = ((function(t + k * h) - function(t - k * h)) / (2 * k * h) for k in (1, 2))
        torch.testing.assert_close(dot, ((4 * near - far) / 3)[:, None], rtol=1e-7, atol=1e-7)


@every_affine_field
def test_schedule_starts_at_the_data_and_its_noise_to_signal_rises(case):
    field = case.build()
    zero = torch.zeros(1, dtype=torch.float64)
    assert field.alpha(zero) == 1
    assert field.sigma(zero) == 0
    t = times(field, 1000)
    ratio = field.log_noise_to_signal(t)
    torch.testing.assert_close(ratio[:-1].exp(), (field.sigma(t) / field.alpha(t))[:-1])
    assert (ratio.diff() > 0).all()


@every_affine_field
def test_clock_runs_from_t_min_to_the_horizon_evenly_in_its_own_time(case):
    field = case.build()
    clock = field.clock(33)
    assert clock.dtype == torch.float64
    assert clock[0] == field.t_min
    assert clock[-1] == field.horizon
    steps = clock.pow(1 / field.rho).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps))


def test_stated_defaults():
    for field in (gravity(2), pfgmpp(2), variance_exploding()):
        assert (field.horizon, field.t_min, field.rho) == (80, 0.002, 7)
        t = torch.tensor([0.002, 1.0, 80.0])
        assert field.alpha(t).tolist() == [1, 1, 1]
        assert field.sigma(t).equal(t)
    assert gravity(2).base.dof == 1
    assert pfgmpp(2).base.dof == 128
    assert linear().horizon == variance_preserving().horizon == 1
    assert AffineField(linear().alpha, linear().sigma, Gaussian(), 1.0).t_min == 1e-3


def test_variance_preserving_is_ddpm():
    """beta rises linearly from 0.1 to 20, d log alpha / dt = -beta / 2, and the variance is kept."""
    field = variance_preserving()
    t = times(field, 40)
    s = field.schedule(t[:, None], t)
    torch.testing.assert_close(-2 * s.alpha_dot / s.alpha, (0.1 + 19.9 * t)[:, None])
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones(40, 1, dtype=torch.float64))
    assert float(field.alpha(torch.tensor(1.0))) == pytest.approx(math.exp(-0.25 * (0.1 + 20)), rel=1e-5)


@pytest.mark.parametrize("name", ["gravity", "gravity_64"])
def test_gravity_is_the_force_of_a_point_mass_in_space_and_time(name):
    """(p, p f) is c (x - x0, t) / r^(d+1) with r the distance in d + 1 dimensions: written out by hand."""
    case = next(case for case in AFFINE if case.name == name)
    field, x0, _, t, x = lines(case)
    d = case.dim
    r = torch.cat([x - x0, t[:, None]], 1).norm(dim=1)
    log_c = math.lgamma((d + 1) / 2) - 0.5 * (d + 1) * math.log(math.pi)
    log_p = field.log_prob(x, t, x0)
    torch.testing.assert_close(log_p, log_c + t.log() - (d + 1) * r.log(), rtol=1e-11, atol=0)
    log_force = log_c + (x - x0).abs().log() - ((d + 1) * r.log())[:, None]
    flux = field.velocity(x, t, x0)
    torch.testing.assert_close(log_p[:, None] + flux.abs().log(), log_force, rtol=1e-11, atol=0)
    assert (flux.sign() == (x - x0).sign()).all()


@pytest.mark.parametrize("D", [1.0, 3.5, 128.0, None], ids=str)
def test_cost_of_a_finite_horizon_is_the_stated_one(D):
    """KL(p_T(.|x0) || prior) = |x0|^2 / (2 T^2) (d + D) / (d + D + 2), estimated from opposite pairs."""
    d, horizon, number = 8, 5.0, 100000
    field = variance_exploding(d, horizon) if D is None else pfgmpp(d, D, horizon)
    x0 = torch.zeros(1, d, dtype=torch.float64)
    x0[0, :2] = torch.tensor([0.3, 0.4])
    z = field.draw((number, d), torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.cat([z, -z])
    x0 = x0.expand_as(z)
    x = field.transport(x0, z, horizon)
    ratio = field.log_prob(x, horizon, x0) - field.prior_log_prob(x)
    ratio = ratio.view(2, number).mean(0)
    factor = 1.0 if D is None else (d + D) / (d + D + 2)
    expected = 0.25 / (2 * horizon**2) * factor
    assert ratio.std() / math.sqrt(number) < 0.005 * expected
    assert float(ratio.mean()) == pytest.approx(expected, rel=0.02)


def test_pfgmpp_becomes_variance_exploding_as_D_grows():
    exact = variance_exploding(3)
    z = exact.draw((50, 3), torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = torch.ones_like(z)
    x = exact.transport(x0, z, 2.0)
    few, many = ((pfgmpp(3, D).log_prob(x, 2.0, x0) - exact.log_prob(x, 2.0, x0)).abs().mean() for D in (1e3, 1e5))
    assert float(many / few) == pytest.approx(0.01, rel=0.05)
    assert pfgmpp(3, 1e5).velocity(x, 2.0, x0).equal(exact.velocity(x, 2.0, x0))


def test_impossible_schedules_are_refused(user_error):
    with user_error("does not rise"):
        AffineField(lambda t: 1 - t, lambda t: t * (1 - t), Gaussian(), 1.0)
    with user_error("does not rise"):
        AffineField(torch.ones_like, torch.ones_like, Gaussian(), 1.0)
    with user_error("t_min is 2.0", "horizon 1.0"):
        AffineField(torch.ones_like, torch.clone, Gaussian(), 1.0, t_min=2.0)
    with user_error("t_min is 0"):
        variance_exploding(t_min=0)
    with user_error("beta_min is 3", "beta_max 2"):
        variance_preserving(beta_min=3, beta_max=2)


@pytest.mark.parametrize("build", [gravity, pfgmpp, variance_exploding, variance_preserving, linear])
def test_points_that_are_not_of_the_dimension_of_the_field_are_refused(build, user_error):
    field = build(64)
    with user_error("(1, 7, 7)", "49", "dim=64"):
        field.draw((2, 1, 7, 7))
    with user_error("(1, 7, 7)", "49", "dim=64"):
        field.sample_prior((2, 1, 7, 7))
    with user_error("(1, 7, 7)", "49", "dim=64"):
        field.log_prob(torch.ones(2, 1, 7, 7), 0.5, torch.zeros(2, 1, 7, 7))


def test_a_field_of_a_product_law_has_its_spread():
    """x_T - alpha x0 has the standard deviation sigma_T times that of the law."""
    field = AffineField(torch.ones_like, torch.clone, Product(torch.distributions.Laplace(0.0, 2.0)), 3.0)
    x = field.sample_prior((40000, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(x.std()) == pytest.approx(3 * 2 * math.sqrt(2), rel=0.02)
