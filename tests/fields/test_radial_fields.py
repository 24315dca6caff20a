"""Radial fields: against the affine fields that two of them are, against closed forms, and in the far tails."""

import math

import numpy as np
import pytest
import torch
from problems import FIELDS, lines, names, narrowing
from scipy import stats

from diffusion.fields import (
    RadialField,
    radial_exponential,
    radial_gaussian,
    radial_gravity,
    radial_stretched,
    radial_tanh,
)
from diffusion.fields.inversion import Quantile
from diffusion.specs import build, describe

RADIAL = [case for case in FIELDS if isinstance(case.build(), RadialField)]
every_radial_field = pytest.mark.parametrize("case", **names(RADIAL))
FACTORIES = [radial_tanh, radial_exponential, radial_stretched, radial_gravity, radial_gaussian]


def at_distances(field, s, t):
    """x and x0 (B, dim) with |x - x0| = s t, around the origin."""
    x = torch.nn.functional.normalize(torch.arange(1.0, field.dim + 1).double(), dim=0) * (s * t)[:, None]
    return x, torch.zeros_like(x)


def without_inverse(field):
    return RadialField(field.cdf, field.dim, field.horizon, None, field.t_min)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_beyond_the_last_digit_of_the_law_is_finite(dtype):
    """psi is 1 to all digits at hazard 40: without an inverse the radius is one at which it first is."""
    z = torch.tensor([[40.0, 0.0], [0.0, 90.0]], dtype=dtype)
    field = radial_tanh(2)
    x = without_inverse(field).transport(torch.zeros_like(z), z, 1.0)
    assert (x.norm(dim=1) > 17).all() and (x.norm(dim=1) < 20).all()
    exact = field.transport(torch.zeros_like(z), z, 1.0)
    torch.testing.assert_close(exact.norm(dim=1), z.norm(dim=1) / 2 + math.log(2) / 2)


@every_radial_field
def test_labels_are_uniform_directions_with_exponential_lengths(case):
    z = case.build().draw((20000, case.dim), torch.Generator().manual_seed(0), dtype=torch.float64)
    length = z.norm(dim=1)
    assert stats.kstest(length.numpy(), stats.expon.cdf).pvalue > 1e-3
    assert float((z / length[:, None]).mean(0).norm()) < 4.5 / math.sqrt(20000)
    assert float((z / length[:, None]).T.cov().diagonal().sub(1 / case.dim).abs().max()) < 4.5 / math.sqrt(20000)


@every_radial_field
def test_a_label_of_length_zero_stays_and_the_start_is_exact(case):
    field, x0, z, _, _ = lines(case)
    for known in (field, without_inverse(field)):
        assert known.transport(x0, torch.zeros_like(z), 1.0).equal(x0)
    assert field.transport(x0, z, 0.0).equal(x0)
    t = torch.zeros(len(x0), dtype=torch.float64)
    t[::2] = field.horizon
    x = field.transport(x0, z, t)
    assert x[1::2].equal(x0[1::2])
    torch.testing.assert_close(x[::2], field.transport(x0[::2], z[::2], field.horizon))


@every_radial_field
def test_at_the_data_point_nothing_moves(case):
    field, x0, _, t, _ = lines(case)
    x = x0.clone().requires_grad_()
    velocity = field.velocity(x, t, x0)
    assert not velocity.detach().any()
    assert torch.autograd.grad(velocity.sum(), x)[0].isfinite().all()


def test_at_the_data_point_nothing_moves_in_many_dimensions():
    """Where all densities nearby underflow."""
    x0, field = torch.ones(2, 3072), radial_gaussian(3072)
    assert not field.velocity(x0, 3.0, x0).any()
    squared = torch.zeros(2, 5, requires_grad=True)
    rate = field.isotropic(x0, 3.0).rate(squared)
    assert rate.isfinite().all()
    assert not torch.autograd.grad(rate.sum(), squared)[0].any()


@every_radial_field
def test_as_a_function_of_distances_it_is_the_same_field(case):
    """Each x against several x0, with the time of its own row."""
    field, _, _, t, x = lines(case, 6)
    x0 = torch.randn(4, case.dim, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + x[:4]
    record = field.isotropic(x, t)
    assert (record.alpha.tolist(), record.alpha_dot.tolist()) == ([[1.0]] * 6, [[0.0]] * 6)
    squared = (x[:, None] - x0).square().sum(2)
    for j in range(4):
        b = torch.arange(6)
        log_p, v = field.log_prob(x, t, x0[j].expand(6, -1)), field.velocity(x, t, x0[j].expand(6, -1))
        torch.testing.assert_close(record.log_prob(squared)[:, j], log_p, rtol=1e-10, atol=1e-10)
        rates = record.rate(squared)[b, j][:, None]
        torch.testing.assert_close(rates * (x - x0[j]), v, rtol=1e-10, atol=0, equal_nan=True)
    torch.testing.assert_close(
        field.isotropic(x, float(t[2])).rate(squared)[2], record.rate(squared)[2], equal_nan=True
    )


def test_functions_of_distances_keep_the_dtype():
    record = radial_tanh(2).isotropic(torch.ones(3, 2), 1.0)
    squared = torch.ones(3, 5)
    assert record.log_prob(squared).dtype == record.rate(squared).dtype == record.alpha.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@every_radial_field
def test_derivatives_of_first_and_second_order(case):
    """Of the radius by label and time, of the velocity and of the density, against finite differences."""
    field, x0, z, _, _ = lines(case, 3)
    t = torch.full((3,), 0.3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0])
    x = field.transport(x0, z, t)
    if case.dim > 3:  # along two directions only
        a, b = x - x0, torch.ones_like(x)
        place = lambda y: x + y[:, :1] * a + y[:, 1:] * b  # noqa: E731
        y = torch.zeros(3, 2, dtype=torch.float64)
    else:
        place, y = (lambda y: y), x.clone()
    y, t = y.requires_grad_(), t.requires_grad_()
    outputs = (lambda y, t: field.log_prob(place(y), t, x0), lambda y, t: field.velocity(place(y), t, x0))
    for output in outputs:
        assert torch.autograd.gradcheck(output, (y, t), eps=1e-5, atol=1e-6, rtol=1e-6)
        assert torch.autograd.gradgradcheck(output, (y, t), eps=1e-5, atol=1e-5, rtol=1e-5, fast_mode=True)
    h = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    radius = lambda h, t: Quantile.apply(h, t, field.cdf, field.inverse)  # noqa: E731
    assert torch.autograd.gradcheck(radius, (h, t), eps=1e-5, atol=1e-6, rtol=1e-6, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(radius, (h, t), eps=1e-5, atol=1e-5, rtol=1e-5)


S = torch.tensor([1e-6, 1e-3, 0.1, 0.9, 1.1, 5.0, 18.0, 50.0, 300.0], dtype=torch.float64)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_densities_keep_their_digits_in_the_tails(dim):
    """To 300 scales, where the mass that is left is exp(-600)."""
    t = torch.full_like(S, 0.7)
    log_area = math.log(2 * math.pi ** (dim / 2) / math.gamma(dim / 2))
    geometry = log_area + (dim - 1) * (S * t).log() + t.log()
    log_sech2 = math.log(4) - 2 * S - 2 * torch.log1p((-2 * S).exp())
    for factory, log_slope in ((radial_exponential, -S), (radial_tanh, log_sech2)):
        field = factory(dim)
        x, x0 = at_distances(field, S, t)
        torch.testing.assert_close(field.log_prob(x, t, x0), log_slope - geometry, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(field.velocity(x, t, x0), (x - x0) / t[:, None], rtol=1e-12, atol=0)


def test_velocity_and_density_of_the_stretched_field_by_hand():
    """ln(r/t) d(exponent)/dt - exponent / t over exponent / r, which psi' cancels from."""
    field, t = radial_stretched(3, horizon=4.0), torch.full_like(S, 1.3)[:6]
    s = S[:6]
    x, x0 = at_distances(field, s, t)
    k = 1 + t / 4
    rate = 1 / t - s.log() / (4 * k)
    torch.testing.assert_close(field.velocity(x, t, x0), rate[:, None] * x, rtol=1e-11, atol=0)
    density = k / t * s ** (k - 1) / torch.cosh(s**k).square() / (4 * math.pi * (s * t).square())
    torch.testing.assert_close(field.log_prob(x, t, x0), density.log(), rtol=1e-11, atol=1e-11)


def test_outside_its_support_a_field_has_no_mass_and_no_velocity():
    """A uniform ball of radius t."""
    field = RadialField(lambda r, t: ((r / t) ** 3).clamp_max(1), 3, 2.0)
    x = torch.tensor([[0.5, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64).requires_grad_()
    log_p, v = field.log_prob(x, 1.0, torch.zeros_like(x)), field.velocity(x, 1.0, torch.zeros_like(x))
    torch.testing.assert_close(log_p.exp().tolist(), [3 / (4 * math.pi), 0.0])
    torch.testing.assert_close(v[0].tolist(), [0.5, 0.0, 0.0])
    assert v[1].isnan().all()
    for output in (log_p[:1].sum(), v[:1].sum()):
        (grad,) = torch.autograd.grad(output, x, retain_graph=True)
        assert not grad[1].any()


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("shape", [(64,), (1, 8, 8)])
def test_single_precision_in_double_precision_out_agree(factory, shape):
    field = factory(64)
    randomness = torch.Generator().manual_seed(0)
    x0, z = torch.randn(16, *shape, generator=randomness), field.draw((16, *shape), randomness, dtype=torch.float32)
    t = field.clock(16).float()
    with torch.no_grad():
        x = field.transport(x0, z, t)
        v, log_p = field.velocity(x, t, x0), field.log_prob(x, t, x0)
    assert x.dtype == v.dtype == log_p.dtype == torch.float32
    assert v.shape == x.shape == x0.shape and log_p.shape == (16,)
    wide = [a.double() for a in (x0, z, x, t)]
    torch.testing.assert_close(
        x.double() - wide[0], field.transport(wide[0], wide[1], wide[3]) - wide[0], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(v.double(), field.velocity(wide[2], wide[3], wide[0]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_p.double(), field.log_prob(wide[2], wide[3], wide[0]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize(
    ("factory", "cost"), [(radial_tanh, 1e-4), (radial_exponential, 1e-4), (radial_stretched, 6e-5)]
)
def test_cost_of_the_default_horizon_is_the_stated_one(factory, cost, dim):
    """KL(p_T(.|x0) || prior) in nats at |x0|^2 = d, over a grid of distances and random directions."""
    field, directions = factory(dim), 20
    assert field.t_min == pytest.approx(0.002 * math.sqrt(dim))
    log_h = torch.arange(-16, 4, 0.005, dtype=torch.float64).repeat_interleave(directions)
    n = torch.nn.functional.normalize(
        torch.randn(len(log_h), dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    x0 = torch.zeros_like(n)
    x0[:, 0] = math.sqrt(dim)
    ratio = 0
    for sign in (1, -1):
        x = field.transport(x0, sign * log_h.exp()[:, None] * n, field.horizon)
        ratio = ratio + (field.log_prob(x, field.horizon, x0) - field.prior_log_prob(x)) / 2
    kl = float((ratio * (log_h - log_h.exp()).exp()).sum()) * 0.005 / directions
    assert 0.1 * cost * dim < kl < 1.2 * cost * dim


@pytest.mark.parametrize("factory", FACTORIES)
def test_stored_and_built_again_it_is_the_same_field(factory):
    field = factory(5)
    again = build(describe(field))
    x = torch.arange(10.0).view(2, 5).double()
    assert (again.horizon, again.t_min, again.rho) == (field.horizon, field.t_min, field.rho)
    assert again.log_prob(x, 2.0, -x).equal(field.log_prob(x, 2.0, -x))


class TestRefusals:
    @pytest.mark.parametrize(
        ("cdf", "texts"),
        [
            (lambda r, t: torch.tanh(r / t).sum(), ["shape ()", "(483,)"]),
            (lambda r, t: 2 * torch.tanh(r / t), ["cdf(r=", "between 0 and 1"]),
            (lambda r, t: torch.tanh(r / t) - 0.5, ["cdf(r=", "-0.5", "between 0 and 1"]),
            (lambda r, t: (r - r) / (t - t), ["nan", "between 0 and 1"]),
            (lambda r, t: torch.exp(-r / t), ["falls where r rises"]),
            (lambda r, t: torch.sin(r / t).square(), ["falls where r rises"]),
            (lambda r, t: 0.5 * torch.ones_like(r) + 0 * t, ["does not change", "0.5"]),
            (lambda r, t: torch.tanh(r / t).detach(), ["no derivative"]),
            (lambda r, t: np.tanh(r.numpy() / t.numpy()), ["torch operations"]),
            (lambda r: r, ["cdf(r, t) fails", "torch operations"]),
            (lambda r, t: 0.5 * torch.tanh(r / t), ["psi(r, t=", "it is 0.6", "CDF"]),
            (lambda r, t: 0.5 + 0.5 * torch.tanh(r / t), ["psi(r, t=", "it is 0.09", "CDF"]),
            ("tanh(r/s)", ["tanh(r/s)", "'s'"]),
            (0.5, ["cdf is 0.5"]),
        ],
    )
    def test_of_laws_that_cannot_be_used(self, cdf, texts, user_error):
        with user_error(*texts):
            RadialField(cdf, 2, 1.0)

    def test_of_laws_that_are_merely_wrong_is_left_to_validation(self):
        """Time reversed, and one that does not start at the data."""
        RadialField(lambda r, t: torch.tanh(r / (2 - t)), 2, 1.0)
        RadialField(lambda r, t: torch.tanh(r + 0 * t), 2, 1.0)

    def test_of_other_arguments(self, user_error):
        law = narrowing().cdf
        with user_error("t_min is 2.0", "horizon 1.0"):
            RadialField(law, 2, 1.0, t_min=2.0)
        with user_error("dim 0"):
            RadialField(law, 0, 1.0)
        with user_error("dim 0"):
            radial_tanh(0)
        with user_error("inverse is 3"):
            RadialField(law, 2, 1.0, inverse=3)
        with user_error("inverse(h, t)", "()", "(3,)"):
            RadialField(law, 2, 1.0, inverse=lambda h, t: h.sum())

    @pytest.mark.parametrize("factory", FACTORIES)
    def test_of_points_of_another_dimension(self, factory, user_error):
        field = factory(64)
        for call in (
            lambda: field.draw((2, 1, 7, 7)),
            lambda: field.sample_prior((2, 1, 7, 7)),
            lambda: field.log_prob(torch.ones(2, 1, 7, 7), 0.5, torch.zeros(2, 1, 7, 7)),
        ):
            with user_error("(1, 7, 7)", "49", "dim=64"):
                call()


def test_draws_of_one_coordinate_go_both_ways():
    z = radial_tanh(1).draw((1000, 1), torch.Generator().manual_seed(0))
    assert 400 < int((z > 0).sum()) < 600
