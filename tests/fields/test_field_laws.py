"""What must be true of every field, whatever its family: each law runs over the whole list in problems.py."""

import math

import numpy as np
import pytest
import torch
from problems import AFFINE, FIELDS, centre, continuity_residual, gradient, lines, names, times
from scipy import stats
from scipy.interpolate import CubicSpline

every_field = pytest.mark.parametrize("case", **names(FIELDS))
STANDARD_ERRORS = 4.5


def draws(case, time, number=20000, seed=1):
    """Points x_t (N, dim) from one data point x0 (1, dim)."""
    field, randomness = case.build(), torch.Generator().manual_seed(seed)
    x0 = torch.randn(1, case.dim, generator=randomness, dtype=torch.float64)
    z = field.draw((number, case.dim), randomness, dtype=torch.float64)
    return field, x0, field.transport(x0.expand(number, -1), z, time)


def radial_cdf(field, dim, t):
    """log r and P(distance from the centre < r) from the density along one ray and the area of the sphere."""
    log_r = torch.arange(-60.0, 60.0, 0.01, dtype=torch.float64)
    x = log_r.exp()[:, None] * torch.nn.functional.normalize(torch.arange(1.0, dim + 1).double(), dim=0)
    log_area = math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)
    log_p = field.log_prob(x, t, torch.zeros_like(x))  # around the origin radii keep their digits
    density = (log_p + log_area + dim * log_r).exp().numpy()
    return log_r.numpy(), CubicSpline(log_r.numpy(), density).antiderivative()(log_r.numpy())


def middle_and_ends(field):
    return times(field, 3).tolist()


@every_field
def test_velocity_is_the_time_derivative_along_a_line(case):
    field, x0, z, _, _ = lines(case)
    for t in times(field, 9):
        t = t.repeat(len(x0))
        x, v = torch.func.jvp(lambda t: field.transport(x0, z, t), (t,), (torch.ones_like(t),))
        error = (field.velocity(x, t, x0) - v).norm(dim=1) / (v.norm(dim=1) + x.norm(dim=1) / field.horizon)
        assert error.max() < 1e-11


@every_field
def test_velocity_is_the_slope_of_a_line(case):
    """By finite differences: for lines whose derivatives are not taken through what `transport` computes."""
    field, x0, z, _, _ = lines(case)
    for t in times(field, 9):
        t = t.repeat(len(x0))
        v, x = field.velocity(field.transport(x0, z, t), t, x0), field.transport(x0, z, t)
        near, far = (
            (field.transport(x0, z, t + k * h) - field.transport(x0, z, t - k * h)) / (2 * k * h)[:, None]
            for k, h in ((1, 1e-3 * t), (2, 1e-3 * t))
        )
        error = ((4 * near - far) / 3 - v).norm(dim=1) / (v.norm(dim=1) + x.norm(dim=1) / field.horizon)
        assert error.max() < 1e-8


@every_field
def test_density_along_a_line_falls_as_its_surroundings_expand(case):
    """log p_t(x_t|x0) + log |det d x_t / d z| is the log-density of the label, the same at all times."""
    field, x0, z, _, _ = lines(case, 8)
    totals = []
    for time in times(field, 5).tolist():
        label = z.clone().requires_grad_()
        x = field.transport(x0, label, time)
        rows = [torch.autograd.grad(x[:, i].sum(), label, retain_graph=True)[0] for i in range(case.dim)]
        totals.append(field.log_prob(x, time, x0) + torch.stack(rows, 1).slogdet()[1])
    torch.testing.assert_close(torch.stack(totals), totals[0].expand(5, -1), rtol=1e-9, atol=1e-9)


@every_field
def test_a_sample_is_where_a_line_of_a_random_label_leads(case):
    field, x0, _, t, _ = lines(case)
    x, z = (
        draw(torch.Generator().manual_seed(3))
        for draw in (lambda g: field.sample(x0, t, g), lambda g: field.draw(x0.shape, g, dtype=x0.dtype))
    )
    torch.testing.assert_close(x, field.transport(x0, z, t), rtol=0, atol=0)


@every_field
def test_density_and_velocity_satisfy_the_continuity_equation(case):
    field, x0, _, t, x = lines(case)
    residual = continuity_residual(lambda x, t: field.log_prob(x, t, x0), lambda x, t: field.velocity(x, t, x0), x, t)
    assert residual.max() < 1e-9


@every_field
def test_sampling_agrees_with_the_density_by_stein_identities(case):
    """E[grad log p . v + div v] = 0 for bounded v: radial ones at three lengths, and plane waves."""
    if case.has_jumps:
        pytest.skip("integration by parts leaves boundary terms")
    for time in middle_and_ends(case.build()):
        field, x0, x = draws(case, time)
        d = case.dim
        x.requires_grad_()
        score = gradient(field.log_prob(x, time, x0.expand_as(x)), x).detach()
        x = x.detach()
        offset = x - centre(field, x0, time)
        unit = offset.square().mean(1).median().sqrt()
        y, score = offset / unit, score * unit
        tests = []
        for length in (0.3, 1.0, 3.0):
            s = y.square().mean(1) / length**2
            tests.append(((score * y).sum(1) + d) / (1 + s) - 2 * s / (1 + s) ** 2)
        waves = torch.randn(5, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(d)
        # At a pole the waves vanish, so that what is averaged has a variance.
        s = y.square().mean(1)
        window, slope = (
            (s / (1 + s), 2 * y / d / (1 + s[:, None]) ** 2) if case.has_pole else (1.0, torch.zeros_like(y))
        )
        for wave, shift in zip(waves, torch.arange(5), strict=True):
            angle = y @ wave + shift
            divergence = window * wave.square().sum() * angle.cos() + (slope @ wave) * angle.sin()
            tests.append(window * (score @ wave) * angle.sin() + divergence)
        tests = torch.stack(tests)
        in_standard_errors = tests.mean(1) / tests.std(1) * math.sqrt(tests.shape[1])
        assert in_standard_errors.abs().max() < STANDARD_ERRORS


@pytest.mark.parametrize("case", **names([case for case in FIELDS if case.isotropic]))
def test_mass_is_one_and_radii_follow_the_density(case):
    for time in middle_and_ends(case.build()):
        field, x0, x = draws(case, time)
        log_r, mass = radial_cdf(field, case.dim, time)
        assert mass[-1] == pytest.approx(1, abs=1e-8)
        radii = (x - centre(field, x0, time)).norm(dim=1).log().numpy()
        assert stats.kstest(radii, lambda r, log_r=log_r, mass=mass: np.interp(r, log_r, mass)).pvalue > 1e-3


@pytest.mark.parametrize("case", **names([case for case in FIELDS if case.isotropic]))
def test_directions_are_uniform_and_independent_of_the_radius(case):
    field, x0, x = draws(case, case.build().horizon)
    y = x - centre(field, x0, field.horizon)
    first = (y[:, 0] / y.norm(dim=1)).numpy()
    if case.dim > 1:
        law = stats.beta(0.5, 0.5 * (case.dim - 1))
        assert stats.kstest(first**2, law.cdf).pvalue > 1e-3
    assert stats.binomtest(int((first > 0).sum()), len(first)).pvalue > 1e-3
    assert stats.kendalltau(first**2, y.norm(dim=1).numpy()).pvalue > 1e-3


@every_field
def test_lines_start_at_the_data(case):
    field, x0, z, _, _ = lines(case)
    lengths = 1 + z.norm(dim=1, keepdim=True)
    for t, tolerance in ((1e-12 * field.horizon, 1e-5), (0.0, 1e-12)):
        assert ((field.transport(x0, z, t) - x0).abs() / lengths).max() < tolerance


@every_field
def test_prior_is_the_law_of_a_point_at_the_origin(case):
    field = case.build()
    size = (64, case.dim)
    x, z = (
        draw(size, torch.Generator().manual_seed(3), dtype=torch.float64) for draw in (field.sample_prior, field.draw)
    )
    origin = torch.zeros_like(x)
    torch.testing.assert_close(x, field.transport(origin, z, field.horizon))
    torch.testing.assert_close(field.prior_log_prob(x), field.log_prob(x, field.horizon, origin))


@every_field
def test_numbers_and_one_time_for_each_point_agree(case):
    field, x0, z, _, _ = lines(case)
    for time in middle_and_ends(field):
        x = field.transport(x0, z, time)
        calls = (
            lambda t: field.transport(x0, z, t),
            lambda t, x=x: field.velocity(x, t, x0),
            lambda t, x=x: field.log_prob(x, t, x0),
            lambda t, x=x: field.target(x, t, x0),
            lambda t, x=x: field.velocity_from_target(x, t, x0),
            lambda t, x=x: field.endpoint(x, t, x0),
        )
        for call in calls:
            expected = call(time)
            assert len(expected) == len(x0)
            one = torch.tensor(time, dtype=torch.float64)
            for t in (one, one[None], one.repeat(len(x0)), one.expand(len(x0))):
                torch.testing.assert_close(call(t), expected, rtol=0, atol=0)


@every_field
def test_each_point_moves_by_its_own_time(case):
    """Times that differ, as many as there are coordinates: nothing but the rule tells which they belong to."""
    field, x0, z, t, x = lines(case, case.dim)
    for i in range(case.dim):
        one, time = slice(i, i + 1), float(t[i])
        torch.testing.assert_close(x[one], field.transport(x0[one], z[one], time))
        torch.testing.assert_close(field.velocity(x, t, x0)[one], field.velocity(x[one], time, x0[one]))
        torch.testing.assert_close(field.log_prob(x, t, x0)[one], field.log_prob(x[one], time, x0[one]))


@every_field
def test_images_are_points(case):
    """(B, 1, d) and (B, d) are the same points."""
    field, x0, z, t, x = lines(case)
    as_images = [a[:, None] for a in (x0, z, x)]
    torch.testing.assert_close(field.transport(as_images[0], as_images[1], t)[:, 0], x)
    torch.testing.assert_close(field.velocity(as_images[2], t, as_images[0])[:, 0], field.velocity(x, t, x0))
    torch.testing.assert_close(field.log_prob(as_images[2], t, as_images[0]), field.log_prob(x, t, x0))


@every_field
def test_target_gives_the_velocity(case):
    field, x0, _, t, x = lines(case)
    velocity = field.velocity_from_target(x, t, field.target(x, t, x0))
    torch.testing.assert_close(velocity, field.velocity(x, t, x0))


@pytest.mark.parametrize("case", **names(AFFINE))
def test_endpoint_gives_the_data_of_an_affine_field(case):
    field, x0, _, t, x = lines(case)
    ratio = (x - x0).norm(dim=1) + x0.norm(dim=1)  # what is subtracted from what, hence the size of rounding
    error = (field.endpoint(x, t, field.velocity(x, t, x0)) - x0).norm(dim=1)
    assert (error / ratio).max() < 1e-12


@every_field
def test_endpoint_gives_the_data_but_for_the_bend_of_the_line(case):
    """A tenth of the time leaves a tenth of the distance to x0, and a tenth of the endpoint's error as a part of it."""
    field, x0, z, _, _ = lines(case)
    parts = []
    for t in (1e-3 * field.horizon, 1e-4 * field.horizon):
        x = field.transport(x0, z, t)
        error = (field.endpoint(x, t, field.velocity(x, t, x0)) - x0).norm(dim=1)
        parts.append(error / (x - x0).norm(dim=1))
        rounding = 1e-13 * (1 + x0.norm(dim=1) / (x - x0).norm(dim=1))
    assert (parts[1] < 0.11 * parts[0] + rounding).all()


@every_field
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_seed_and_the_dtype(case, dtype):
    field = case.build()
    for draw in (field.draw, field.sample_prior):
        a, b, c = (draw((6, case.dim), torch.Generator().manual_seed(seed), dtype=dtype) for seed in (5, 5, 6))
        assert a.dtype == dtype
        assert a.equal(b)
        assert not (a == c).any()
        assert a.unique().numel() == a.numel()


@every_field
def test_a_time_for_each_of_other_points_is_refused(case, user_error):
    field, x0, z, _, _ = lines(case, 4)
    with user_error("(3,)", "4"):
        field.transport(x0, z, torch.ones(3))
