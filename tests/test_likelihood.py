"""Log-likelihoods against exact densities, in nats."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from own_fields import half_uniform, principal, quadratic_logistic, swirling
from problems import GaussianMixture, PointMasses, mixture, point_masses
from torch import nn

from diffusion import Generator
from diffusion.divergence import Flow
from diffusion.fields import (
    AffineField,
    EmpiricalField,
    Gaussian,
    Product,
    RadialField,
    StudentT,
    gravity,
    linear,
    pfgmpp,
    radial_gaussian,
    radial_gravity,
    radial_stretched,
    radial_tanh,
    variance_exploding,
    variance_preserving,
)
from diffusion.fields.base import Field, expand_time
from diffusion.horizon import log_end
from diffusion.likelihood import dequantise, likelihood
from diffusion.networks import MLP

AFFINE = {
    "gravity": gravity,
    "pfgmpp": pfgmpp,
    "variance_exploding": variance_exploding,
    "variance_preserving": variance_preserving,
    "linear": linear,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shifted(field, dim, shift, stds=None):
    """Three modes, of which none is at the origin, and their mean neither."""
    data = mixture(field, dim)
    return replace(data, means=data.means + shift, stds=data.stds if stds is None else torch.tensor(stds).double())


def data_log_prob(data, x):
    """Of the mixture itself, without a field."""
    var = data.stds.square()
    squared = (x[:, None] - data.means).square().sum(2)
    return (data.weights.log() - 0.5 * (squared / var + x.shape[1] * (math.tau * var).log())).logsumexp(1)


def check(result, exact, limit, times_error=3.0):
    """The mean error is below `limit` nats, and errors are of the size that was said: neither beyond nor far below."""
    off = (result.nats - exact).abs()
    assert off.mean() < limit
    assert (off <= times_error * result.error + 1e-6).double().mean() > 0.9
    assert result.error.median() < 300 * off.median() + 1e-5
    return off


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("name", AFFINE)
def test_density_of_mixtures_in_the_plane(name, shift):
    """The law of the data itself: the extrapolation below t_min counts, and for a shifted mean that p_T is no prior."""
    data = shifted(AFFINE[name](2), 2, shift, (0.5, 0.1, 0.25))
    x = data.draw(24, seeded(1))
    result = likelihood(data, x)
    check(result, data_log_prob(data, x), 3e-4)
    assert result.evaluations.double().mean() < 170
    assert result.nats.dtype == torch.float64


@pytest.mark.parametrize("name", ["variance_exploding", "variance_preserving", "linear", "pfgmpp"])
def test_density_of_mixtures_in_64_dimensions(name):
    data = shifted(AFFINE[name](64), 64, 1.0)
    x = data.draw(6, seeded(1))
    result = likelihood(data, x)
    check(result, data_log_prob(data, x), 3e-4)
    assert result.evaluations.double().mean() < 190


def wide(field, dim):
    """Modes of unit scale per coordinate in a space of three dimensions, with a mean: in 64 dimensions far apart."""
    means = torch.randn(3, 3, generator=seeded(1)).double() @ torch.randn(3, dim, generator=seeded(2)).double()
    stds = weights = torch.tensor([0.2, 0.3, 0.5]).double()
    return GaussianMixture(field, means / math.sqrt(3), stds, weights)


def test_heavy_tails_in_64_dimensions():
    data = shifted(gravity(64), 64, 0.3)
    x = data.draw(1, seeded(1))
    assert (likelihood(data, x).nats - data_log_prob(data, x)).abs().mean() < 2e-4


def test_heavy_tails_at_many_points():
    """From a time on from which they are quickly followed."""
    data = wide(gravity(64), 64)
    x = data.field.sample(data.draw(16, seeded(1)), 20.0, seeded(4))
    check(likelihood(data, x, 20.0), data.log_prob(x, 20.0), 5e-5)


def skewed(horizon, t_min=None):
    """Of a law that is not even."""
    return AffineField(torch.ones_like, torch.clone, Product(torch.distributions.Gumbel(0.0, 1.0)), horizon, t_min)


# Fields, dimensions, and the mean error of the density at the horizon.
ENDS = {
    "gravity": (lambda: gravity(2, horizon=10.0), 2, 2e-5),
    "gravity_64": (lambda: gravity(64), 64, 5e-5),
    "gravity_64_near": (lambda: gravity(64, horizon=40.0), 64, 1e-3),
    "pfgmpp_64": (lambda: pfgmpp(64), 64, 4e-6),
    "variance_exploding": (lambda: variance_exploding(horizon=10.0), 2, 5e-6),
    "radial_gravity": (lambda: radial_gravity(2, horizon=10.0), 2, 4e-6),
    "skewed": (lambda: skewed(20.0), 2, 1.5e-5),
    "short": (lambda: gravity(2, horizon=20.0, t_min=13.0), 2, 4e-7),
    "short_skewed": (lambda: skewed(20.0, 13.0), 2, 5e-6),
}


@pytest.mark.parametrize("name", ENDS)
def test_density_at_the_horizon(name):
    """Of 32 points. The prior misses it by far more, and the error covers what is left."""
    build, dim, limit = ENDS[name]
    data = wide(build(), dim)
    if not (isinstance(data.field, AffineField) and isinstance(data.field.base, Gaussian | StudentT)):
        data = PointMasses(data.field, data.means, data.weights)
    field = data.field
    x0 = data.points[torch.arange(32) % 3] if isinstance(data, PointMasses) else data.draw(32, seeded(1))
    x = field.sample(x0, field.horizon, seeded(3))
    directions = torch.eye(dim, dtype=torch.float64)[:, None].expand(-1, len(x), -1)
    end, exact = log_end(Flow(data, directions, True, {}), x, x0), data.log_prob(x, field.horizon)
    off, missed = (end.log_prob[:, 0] - exact).abs(), (field.prior_log_prob(x) - exact).abs()
    assert off.mean() < limit < 0.1 * missed.mean()
    assert (off <= 3 * end.error + 1e-9).double().mean() > 0.9
    assert end.error.median() < 0.1 * missed.median()


def test_order_at_the_horizon():
    """The same noise at twice the horizon: the error falls with the fifth power of the signal that is left."""
    errors, directions = [], torch.eye(2, dtype=torch.float64)[:, None].expand(-1, 64, -1)
    for horizon in (10.0, 20.0):
        data = wide(gravity(2, horizon, t_min=1e-3), 2)
        x = horizon * data.field.base.draw((64, 2), seeded(5), dtype=torch.float64)
        end = log_end(Flow(data, directions, True, {}), x, x)
        errors.append((end.log_prob[:, 0] - data.log_prob(x, horizon)).abs().median())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(5, abs=0.15)


def test_estimates_at_the_horizon_are_unbiased():
    """All 4 vectors of signs: their mean is exact."""
    data = wide(gravity(2, horizon=10.0), 2)
    x = data.field.sample(data.draw(5, seeded(1)), 10.0, seeded(2))
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 2)
    exact, estimates = (
        log_end(Flow(data, e[:, None].expand(-1, 5, -1), exact, {}), x, x).log_prob
        for e, exact in ((torch.eye(2).double(), True), (signs, False))
    )
    assert estimates.shape == (5, 4)
    assert estimates.std(1).min() > 1e-6
    torch.testing.assert_close(estimates.mean(1), exact[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", AFFINE)
def test_density_at_other_times(name):
    """Above t_min, and between 0 and t_min, where it differs from that of the data by more than the limit."""
    field = AFFINE[name](2)
    data = mixture(field)
    for t, limit in ((0.5 * field.t_min, 2e-4), (field.t_min, 1e-4), (field.horizon / 4, 1e-4)):
        x = field.sample(data.draw(8, seeded(1)), t, seeded(2))
        check(likelihood(data, x, t), data.log_prob(x, t), limit)


def test_what_is_corrected_at_the_ends_matters():
    """Else the tests above would pass without the corrections."""
    data = shifted(gravity(2), 2, 1.0)
    x = data.draw(8, seeded(1))
    assert (data.log_prob(x, data.field.t_min) - data_log_prob(data, x)).abs().mean() > 3e-3
    data = shifted(variance_preserving(), 2, 1.0)
    field = data.field
    x_T = field.sample_prior((1000, 2), seeded(), dtype=torch.float64)
    assert (data.log_prob(x_T, 1.0) - field.prior_log_prob(x_T)).abs().mean() > 3e-3


def test_a_gaussian_has_its_closed_form():
    """N(m, S^2) in 3 dimensions under linear: no other code of this package gives the velocity."""
    m, std = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([0.2, 1.0, 0.6]).double()

    @dataclass
    class Line:
        field: Field

        def velocity(self, x, t):
            t = expand_time(t, x)
            variance = (1 - t).square() * std.square() + t.square()
            gap = x - (1 - t) * m
            return -m + (t - (1 - t) * std.square()) / variance * gap

    x = m + std * torch.randn(16, 3, generator=seeded(), dtype=torch.float64)
    exact = -0.5 * (((x - m) / std).square() + (math.tau * std.square()).log()).sum(1)
    check(likelihood(Line(linear()), x), exact, 1e-4)


# A time at which the law of a few points is smooth, and what its exact field may be off by.
OTHERS = {
    "radial_text": (lambda: RadialField("1 - exp(-(r/t)^2 / 2)", 2, 80.0), 1.3, 1e-4),
    "radial_gravity": (lambda: radial_gravity(2), 1.3, 1e-4),
    "radial_gaussian": (lambda: radial_gaussian(3), 1.3, 1e-4),
    "radial_tanh": (lambda: radial_tanh(2), 150.0, 1e-4),
    "radial_stretched": (lambda: radial_stretched(2), 5.0, 5e-3),
    "straight_principal": (principal, 0.4, 1e-4),
    "swirling": (swirling, 0.4, 1e-4),
    "quadratic_logistic": (quadratic_logistic, 0.5, 1e-4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field(name):
    """Of any family: the law of three points, whose density is known at every time, and which the prior ignores."""
    build, t, limit = OTHERS[name]
    field = build()
    data = point_masses(field, 3 if name in ("straight_principal", "radial_gaussian") else 2)
    x = field.sample(data.points[torch.arange(12) % 3], t, seeded(1))
    check(likelihood(data, x, t), data.log_prob(x, t), limit)
    exact = EmpiricalField(field, data.points, data.weights)
    torch.testing.assert_close(likelihood(exact, x[:3], t).nats, data.log_prob(x[:3], t), atol=2 * limit, rtol=0)


class Logistic(Field):
    """A field with nothing but what a user must write."""

    horizon, t_min, rho = 20.0, 0.002, 7.0

    def sample(self, x0, t, generator=None):
        return x0 + expand_time(t, x0) * torch.rand(x0.shape, generator=generator, dtype=x0.dtype).logit(1e-12)

    def velocity(self, x, t, x0):
        return (x - x0) / expand_time(t, x)

    def log_prob(self, x, t, x0):
        t = expand_time(t, x)
        z = (x - x0) / t
        return (nn.functional.logsigmoid(z) + nn.functional.logsigmoid(-z) - t.log()).flatten(1).sum(1)


def test_a_field_of_ones_own():
    """The horizon is low enough for the prior to be wrong by 0.1 nats."""
    data = point_masses(Logistic())
    x = data.field.sample(data.points[torch.arange(12) % 3], 1.0, seeded(1))
    x_T = data.field.sample_prior((100, 2), seeded(), dtype=torch.float64)
    assert (data.log_prob(x_T, 20.0) - data.field.prior_log_prob(x_T)).abs().max() > 0.01
    check(likelihood(data, x, 1.0), data.log_prob(x, 1.0), 1e-4)


def test_where_the_prior_is_wrong_the_error_says_so():
    """A horizon of 2 for data of size 1, of which no expansion holds; and one where the field's velocity is no help."""
    data = shifted(variance_exploding(horizon=2.0), 2, 1.0)
    x = data.draw(16, seeded(1))
    off = (likelihood(data, x).nats - data_log_prob(data, x)).abs()
    assert off.median() > 0.01
    assert (off < 3 * likelihood(data, x).error).double().mean() > 0.8
    field = radial_stretched(2, horizon=20.0)
    data = point_masses(field)
    x = field.sample(data.points[torch.arange(16) % 3], 2.0, seeded(1))
    off = (likelihood(data, x, 2.0).nats - data.log_prob(x, 2.0)).abs()
    assert off.median() > 1e-3
    assert (off < 3 * likelihood(data, x, 2.0).error).double().mean() > 0.8


def test_a_prior_without_derivatives_is_no_obstacle():
    """half_uniform: the law of its prior is piecewise constant. The data are so wide that nothing else has jumps."""
    field = half_uniform()
    data = PointMasses(field, torch.zeros(1, 2).double(), torch.ones(1).double())
    x = torch.tensor([[0.1, -0.2], [0.5, 0.4]]).double()
    torch.testing.assert_close(likelihood(data, x, 0.5).nats, data.log_prob(x, 0.5), atol=1e-4, rtol=0)


class TestDivergence:
    data = shifted(variance_preserving(), 6, 0.5)
    x = data.draw(5, seeded(1))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)

    def exact(self):
        jacobian = torch.autograd.functional.jacobian(lambda x: self.data.velocity(x, self.t).sum(0), self.x)
        return torch.einsum("ibi->b", jacobian)

    def test_exact(self):
        directions = torch.eye(6, dtype=torch.float64)[:, None].expand(-1, 5, -1)
        flow = Flow(self.data, directions, True, {})
        v, divergence = flow(self.x, self.t, torch.arange(5))
        torch.testing.assert_close(divergence[:, 0], self.exact())
        torch.testing.assert_close(v, self.data.velocity(self.x, self.t))
        index = torch.tensor([3, 1])
        torch.testing.assert_close(flow(self.x[index], self.t[index], index).divergence[:, 0], self.exact()[index])
        assert flow.evaluations.tolist() == [1, 2, 1, 2, 1]

    @pytest.mark.parametrize("points", [1, 100, 300])
    def test_many_copies_at_a_time(self, points):
        """At 300 points there is one, at 100 two and a rest."""
        x, t = self.x[:1].repeat(points, 1), self.t[:1].repeat(points)
        directions = torch.eye(6, dtype=torch.float64)[:5, None].expand(-1, points, -1)
        found = Flow(self.data, directions, False, {})(x, t, torch.arange(points)).divergence
        jacobian = torch.autograd.functional.jacobian(lambda x: self.data.velocity(x, t[:1])[0], x[:1])[:, 0]
        torch.testing.assert_close(found, jacobian.diagonal()[:5].expand(points, -1))

    def test_estimates_are_unbiased(self):
        """All 64 vectors of signs: their mean is exact."""
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 6)
        flow = Flow(self.data, signs[:, None].expand(-1, 5, -1), False, {})
        estimates = flow(self.x, self.t, torch.arange(5)).divergence
        torch.testing.assert_close(estimates.mean(1), self.exact())
        assert estimates.std(1).max() > 0.1


def test_stochastic_likelihoods_scatter_as_they_say():
    data = shifted(linear(), 8, 0.5, (0.5, 0.2, 0.3))
    x = data.draw(1, seeded(3)).repeat(64, 1)
    result = likelihood(data, x, exact_dim=4, probes=4, generator=seeded(1))
    off = result.nats - data_log_prob(data, x)
    scatter = float(off.std())
    assert scatter > 0.02
    assert abs(float(off.mean())) < 4 * scatter / 8
    assert float(result.error.mean()) == pytest.approx(scatter, rel=0.3)
    again, fewer = (likelihood(data, x[:n], exact_dim=4, generator=seeded(1), batch_size=4) for n in (64, 6))
    torch.testing.assert_close(again.nats, result.nats, atol=1e-9, rtol=0)
    torch.testing.assert_close(fewer.nats, result.nats[:6], atol=1e-9, rtol=0)
    assert not likelihood(data, x[:6], exact_dim=4, generator=seeded(2)).nats.allclose(fewer.nats, atol=1e-3)


def test_the_error_follows_the_tolerance():
    data = mixture(variance_exploding())
    x = data.draw(16, seeded(1))
    exact, found = data_log_prob(data, x), {}
    for tolerance in (1e-2, 1e-7):
        result = likelihood(data, x, tolerance=tolerance)
        found[tolerance] = (result.nats - exact).abs().mean(), result.error.mean(), result.evaluations.double().mean()
    assert found[1e-7][0] < 2e-6 < found[1e-2][0] < 1e-2
    assert found[1e-7][1] < 1e-2 * found[1e-2][1]
    assert found[1e-7][2] > 1.3 * found[1e-2][2]


def test_points_do_not_depend_on_their_company():
    """A point at a distance of 1e4 keeps its own steps, and leaves the others theirs."""
    data = mixture(gravity(2))
    x = torch.cat([data.draw(3, seeded(1)), torch.tensor([[1e4, -3e3]]).double()])
    together = likelihood(data, x, 0.5)
    for i in range(4):
        torch.testing.assert_close(likelihood(data, x[i : i + 1], 0.5).nats, together.nats[i : i + 1])
    check(together, data.log_prob(x, 0.5), 1e-3)


def test_a_point_at_the_origin():
    data = GaussianMixture(variance_exploding(), torch.zeros(1, 2).double(), torch.ones(1).double(), torch.ones(1))
    x = torch.zeros(1, 2, dtype=torch.float64)
    assert float(likelihood(data, x).nats) == pytest.approx(-math.log(math.tau), abs=1e-4)


class TestGenerator:
    @staticmethod
    def generator(field, num_classes=0, shape=(2, 2)):
        torch.manual_seed(0)
        generator = Generator(field, MLP(shape, 16, 1, num_classes), shape).double()
        nn.init.normal_(generator.network.last.weight, std=0.1)
        return (
            generator.calibrate(torch.randn(50, *shape, generator=seeded(1)) * 0.7 + 0.2).eval().requires_grad_(False)
        )

    def test_mass_is_one(self):
        """Whatever the network: the integral over a line."""
        generator = self.generator(linear(), shape=(1,))
        x = torch.linspace(-5, 5, 101, dtype=torch.float64)
        density = generator.log_likelihood(x[:, None]).exp()
        assert density[[0, -1]].max() < 1e-4
        assert float(torch.trapezoid(density, x)) == pytest.approx(1, abs=1e-3)

    def test_labels_reach_the_network_and_stay_with_their_points(self):
        generator = self.generator(linear(), 3)
        x = torch.randn(1, 2, 2, generator=seeded(2)).repeat(6, 1, 1)
        label = torch.tensor([0, 1, 2, 2, 1, 0])
        found = generator.log_likelihood(x, label, tolerance=0.01, batch_size=4)
        torch.testing.assert_close(found, found.flip(0), atol=1e-6, rtol=0)
        assert (found[:3].diff().abs() > 1e-3).all()
        torch.testing.assert_close(
            generator.log_likelihood(x[:2], 1, tolerance=0.01), found[1].expand(2), atol=1e-6, rtol=0
        )

    def test_single_precision_networks(self):
        double = self.generator(variance_exploding())
        x = torch.randn(6, 2, 2, generator=seeded(2))
        exact = double.log_likelihood(x)
        single = double.float()
        assert exact.dtype == torch.float64
        torch.testing.assert_close(single.log_likelihood(x), exact, atol=5e-3, rtol=0)

    def test_other_shapes_are_refused(self, user_error):
        with user_error("(5, 4)", "(B, 2, 2)"):
            self.generator(linear()).log_likelihood(torch.ones(5, 4))


class TestImages:
    def test_noise_stays_within_its_level(self):
        levels = torch.arange(256.0) / 127.5 - 1
        x = levels.double().repeat(40, 1)
        noisy = dequantise(x, seeded())
        assert ((noisy + 1) * 127.5).round().equal(((x + 1) * 127.5).round())
        shift = (noisy - x) * 127.5
        assert abs(float(shift.mean())) < 4 * 0.29 / math.sqrt(shift.numel())
        assert float(shift.std()) == pytest.approx(12**-0.5, rel=0.05)

    @pytest.mark.parametrize("levels", [256, 17])
    def test_bits_of_a_law_that_is_flat_over_levels(self, levels):
        """A density that is uniform over 4 levels a coordinate costs 2 bits a coordinate."""
        nats = torch.full((3,), -5 * math.log(4 * 2 / (levels - 1)), dtype=torch.float64)
        result = replace(likelihood(mixture(linear(), 5), torch.zeros(1, 5).double()), nats=nats)
        torch.testing.assert_close(result.bits_per_dim(levels), torch.full((3,), 2.0).double())


class TestRefusals:
    data = mixture(linear())
    x = torch.zeros(2, 2, dtype=torch.float64)

    @pytest.mark.parametrize(
        ("options", "texts"),
        [
            ({"t": 1.0}, ("t is 1.0", "horizon")),
            ({"t": -0.1}, ("t is -0.1", "horizon")),
            ({"tolerance": 0.0}, ("tolerance is 0.0", "positive")),
            ({"probes": 0}, ("probes 0",)),
            ({"batch_size": 0}, ("batch_size 0",)),
            ({"max_evaluations": 30}, ("point 0", "30 evaluations", "(2 such points)", "max_evaluations")),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_options(self, options, texts, user_error):
        with user_error(*texts):
            likelihood(self.data, self.x, **options)

    @pytest.mark.parametrize(
        "x", [torch.zeros(2), torch.zeros(0, 2), torch.zeros(2, 2).long(), torch.full((1, 2), math.nan)],
        ids=["flat", "none", "integers", "nan"],
    )  # fmt: skip
    def test_points(self, x, user_error):
        with user_error("expected finite floating points"):
            likelihood(self.data, x)

    def test_a_velocity_without_derivative(self, user_error):
        @dataclass
        class Detached:
            field: AffineField

            @torch.no_grad()
            def velocity(self, x, t):
                return -x

        with user_error("no derivative", "no_grad"):
            likelihood(Detached(linear()), self.x)

    def test_a_velocity_that_is_not_finite(self, user_error):
        @dataclass
        class Broken:
            field: AffineField

            def velocity(self, x, t):
                return (x[:, :1] - 0.5).sqrt() * x

        with user_error("point 1", "not finite", "t=0.001"):
            likelihood(Broken(linear()), self.x + torch.tensor([[1.0], [0.0]]), 0.001)
