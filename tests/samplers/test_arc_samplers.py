"""Samplers on the arc: orders, costs, what they solve exactly, and what each sample's own noise is worth."""

import math

import numpy as np
import pytest
import torch
from problems import FIELDS, GaussianMixture, PointMasses, names
from reference import error, solved
from scipy.integrate import quad

from diffusion.fields import EmpiricalField, gravity, linear, pfgmpp, variance_exploding, variance_preserving
from diffusion.samplers import Adaptive, BandGrid, Counted, LogSNRGrid, Multistep, PowerGrid, RungeKutta
from diffusion.samplers.arc import USUAL_STD, Arc, noise_scales, solve_times, times_of_noise
from diffusion.samplers.multistep import integral_weights
from diffusion.samplers.on_arc import FINEST, SCALE, hidden

every_order = pytest.mark.parametrize("order", [1, 2, 3, 4])
every_case = pytest.mark.parametrize("name", ["variance_exploding", "linear", "gravity"])


def orders(make, problem, steps):
    """Measured between each number of steps and the next."""
    errors = [error(make(n), problem) for n in steps]
    return np.diff(np.log(errors)) / -np.diff(np.log(steps))


@every_case
@every_order
class TestOrders:
    def test_of_multistep(self, name, order):
        found = orders(lambda n: Multistep(n, order, corrector=False, std=1.5), solved(name, t_min=1e-6), (64, 128))
        assert found == pytest.approx(order, abs=0.15)

    def test_of_multistep_with_corrector(self, name, order):
        """One more; for high orders the first steps, which know few slopes, have a part in the error."""
        kinked = name == "gravity" and order < 3  # slopes over a sine with a small offset: the order is seen later
        steps = (192, 384) if kinked else (24, 48)
        found = orders(lambda n: Multistep(n, order, std=1.5), solved(name, t_min=1e-6), steps)
        if order < 3:
            assert found == pytest.approx(order + 1, abs=0.2)
        else:
            assert found > order + 0.4

    def test_of_runge_kutta(self, name, order):
        found = orders(lambda n: RungeKutta(n + 1, order, std=1.5), solved(name), (64, 128))
        assert found == pytest.approx(order, abs=0.15)


@every_order
@pytest.mark.parametrize("grid", [PowerGrid(3.0), LogSNRGrid(), BandGrid(0.3, 2.0)], ids=["power", "log", "band"])
def test_orders_on_other_grids(order, grid):
    problem = solved("variance_preserving")
    found = orders(lambda n: RungeKutta(n + 1, order, grid=grid), problem, (48, 96))
    assert found == pytest.approx(order, abs=0.15)
    if order < 3:  # beyond, the last step, whose length is t_min, decides
        found = orders(lambda n: Multistep(n, order, False, grid=grid), solved("linear", t_min=1e-6), (64, 128))
        assert found == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("steps", [2, 6, 10, 25])
@every_order
def test_evaluations_are_those_asked_for(order, steps):
    problem = solved("gravity")
    for sampler, evaluations in (
        (Multistep(steps, order), steps),
        (Multistep(steps, order, corrector=False), steps),
        (RungeKutta(steps, order), order * (steps - 1) + 1),
    ):
        model = Counted(problem.model)
        sampler(model, problem.x_T)
        assert model.evaluations == evaluations


@pytest.mark.parametrize("build", [variance_exploding, variance_preserving, linear, lambda dim: pfgmpp(dim, 1e9)])
@pytest.mark.parametrize(
    ("sampler", "mean"),
    [
        (Multistep(2, 1, std=0.5), 0.7),
        (Multistep(7, 3, std=0.5), 0.7),
        (Multistep(7, 4, std=0.5), 0.0),
        (RungeKutta(2, 1, std=0.5), 0.0),
        (RungeKutta(3, 4, std=0.5), 0.0),
    ],
    ids=["multistep 1", "multistep 3", "multistep 4", "runge-kutta 1", "runge-kutta 4"],
)
def test_gaussian_data_of_the_arcs_scale_are_solved_exactly(build, sampler, mean):
    """Their lines are alpha mean + radius line, with radius = sqrt(sigma^2 + c^2 alpha^2) and a constant line."""
    field, c, one = build(3), SCALE * 0.5, torch.ones(1, dtype=torch.float64)
    model = GaussianMixture(field, torch.full((1, 3), mean, dtype=torch.float64), c * one, one)
    x_T = field.sample_prior((5, 3), torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = torch.tensor([field.horizon, field.t_min], dtype=torch.float64)
    alpha = field.alpha(ends)
    radius = (field.sigma(ends).square() + (c * alpha).square()).sqrt()
    line = (x_T - alpha[0] * mean) / radius[0]
    expected = mean + c * line
    if isinstance(sampler, RungeKutta):
        expected = model.denoised(alpha[1] * mean + line * radius[1], field.t_min)
    torch.testing.assert_close(sampler(model, x_T), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("build", [variance_exploding, variance_preserving, linear])
def test_fields_that_are_one_ode_have_one_error(build):
    """The same data from the same noise: what differs is where the ODE begins and ends."""
    for steps, bound in ((6, 0.1), (10, 0.02), (20, 1e-3)):
        name = build.__name__
        assert error(Multistep(steps), solved(name, t_min=1e-5)) < bound


SMOOTH = [
    case
    for case in FIELDS
    if not (case.has_jumps or case.has_pole or case.name in ("radial_narrowing", "curved", "radial_gaussian_64"))
]


@pytest.mark.parametrize("case", **names(SMOOTH))
def test_every_field_leads_to_its_data(case):
    """From the prior to one of two data points, in few steps."""
    field = case.build()
    points = torch.zeros(2, case.dim, dtype=torch.float64)
    points[1, 0] = 1.5
    model = PointMasses(field, points, torch.tensor([0.5, 0.5]).double())
    x_T = field.sample_prior((12, case.dim), torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = Multistep(12, denoise=True), RungeKutta(5, 3)  # with the field's estimate, at the points themselves
    for sampler, bound in ((Multistep(12), 0.01 * case.dim**0.5 + 0.01), *((sampler, 0.05) for sampler in ends)):
        x_0 = sampler(model, x_T)
        nearest, which = torch.cdist(x_0, points).min(1)
        assert nearest.median() < bound
        assert set(which.tolist()) == {0, 1}


class TestHeavyTails:
    def test_scales_are_those_of_the_noise(self):
        """In many dimensions |z|^2 / d is R^2, to within a few per cent."""
        field = gravity(400)
        z = field.draw((50, 400), torch.Generator().manual_seed(0), dtype=torch.float64)
        found = noise_scales(field, field.horizon * z)
        torch.testing.assert_close(found[:, 0], z.square().mean(1).sqrt(), rtol=0.01, atol=0.05)

    def test_gaussian_noise_has_one(self):
        assert noise_scales(linear(2), torch.ones(3, 2)).tolist() == [[1.0]]

    def test_far_samples_are_as_good_as_near_ones(self):
        """With times of their own for each: on a common grid the farther half has many times the error."""
        field = gravity(8)
        weights = torch.tensor([0.5, 0.5]).double()
        means = torch.tensor([[1.0] * 8, [-1.0] * 8], dtype=torch.float64)
        model = GaussianMixture(field, means, torch.tensor([0.3, 0.3]).double(), weights)
        x_T = field.sample_prior((60, 8), torch.Generator().manual_seed(1), dtype=torch.float64)
        far = x_T.norm(dim=1) > x_T.norm(dim=1).quantile(0.8)
        fine = Multistep(60)(model, x_T)

        def worst(sampler):
            return float((sampler(model, x_T) - fine)[far].square().mean(1).sqrt().median())

        assert worst(Multistep(12)) < 0.02
        assert worst(Multistep(12)) < worst(Multistep(12, grid=PowerGrid())) / 3

    @pytest.mark.parametrize("seed", [0, 3])
    def test_times_reach_further_down_in_many_dimensions(self, seed):
        """Where the radii of the data hide the noise: the error is smaller than on the grid of few dimensions."""
        field, randomness = gravity(128), torch.Generator().manual_seed(seed)
        few, many = (torch.randn(size, generator=randomness).double() for size in ((6, 4), (4, 128)))
        stds, weights = torch.linspace(0.1, 0.5, 6).double(), torch.full((6,), 1 / 6, dtype=torch.float64)
        model = GaussianMixture(field, few @ many / 2, stds, weights)
        x_T = field.sample_prior((60, 128), torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        fine, common = Multistep(60)(model, x_T), BandGrid(FINEST * USUAL_STD, 128**0.5 * USUAL_STD)

        def typical(sampler):
            return float((sampler(model, x_T) - fine).square().mean(1).sqrt().log().mean().exp())

        assert typical(Multistep(10)) < 0.9 * typical(Multistep(10, grid=common))

    def test_noise_of_a_scale_that_is_known_is_not_hidden(self):
        assert hidden(variance_exploding(), 192) == hidden(pfgmpp(64, 4.0), 64) == 1
        assert hidden(gravity(16), 16) == hidden(pfgmpp(16, 2.0), 16) == pytest.approx(0.5)

    def test_a_sample_whose_noise_hides_the_data_at_t_min_ends_with_the_estimate(self):
        model = solved("gravity").model
        for far in (2e4, 1e7):
            x_T = torch.tensor([[far, far], [40.0, 60.0]], dtype=torch.float64)
            expected = RungeKutta(40, 4)(model, x_T)
            torch.testing.assert_close(Multistep(30)(model, x_T), expected, rtol=0, atol=0.01)
            torch.testing.assert_close(Adaptive()(model, x_T), expected, rtol=0, atol=0.01)


class TestTimes:
    def test_places_on_the_arc_follow_from_the_schedule(self):
        """Angle, radius and their derivatives, by central differences, for VP with noise twice as large."""
        field, h = variance_preserving(2), 1e-6
        arc = Arc(field, 0.5, torch.tensor([[2.0]]).double())
        t = torch.tensor([[0.01, 0.3, 0.9]], dtype=torch.float64)
        before, at, after = arc.at(t - h), arc.at(t), arc.at(t + h)
        alpha, sigma = field.alpha(t), 2 * field.sigma(t)
        torch.testing.assert_close(at.angle, torch.atan(sigma / (0.5 * alpha)))
        torch.testing.assert_close(at.radius, (sigma.square() + (0.5 * alpha).square()).sqrt())
        torch.testing.assert_close(at.drift, (after.radius.log() - before.radius.log()) / (2 * h), rtol=1e-6, atol=0)
        turned = at.radius * (after.angle - before.angle) / (2 * h)
        torch.testing.assert_close(at.speed, turned, rtol=1e-6, atol=0)
        torch.testing.assert_close(arc.times(at.angle), t, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("build", [variance_exploding, variance_preserving, linear])
    def test_times_of_noise(self, build):
        field = build(2)
        t = times_of_noise(field, torch.tensor([[0.1, 1.0, 3.0]], dtype=torch.float64))
        torch.testing.assert_close(field.sigma(t) / field.alpha(t), torch.tensor([[0.1, 1.0, 3.0]]).double())

    def test_values_beyond_the_ends_are_the_ends(self):
        field = linear(2)
        t = solve_times(field, lambda t: t, torch.tensor([-1.0, 0.5, 2.0]).double())
        assert t.tolist() == pytest.approx([field.t_min, 0.5, 1.0])

    def test_a_band_grid_is_even_in_its_clock(self):
        field = linear(2)
        t = BandGrid(0.1, 3.0)(field, 9)
        s = field.sigma(t) / field.alpha(t)
        clock = ((s[1:] + 0.1) / (s[1:] + 3)).log()  # at T, s is infinite and the clock 0
        torch.testing.assert_close(clock.diff(), clock[:1].expand(7))

    def test_shares_of_a_band_grid(self):
        t, even = BandGrid(0.1, 3.0, (0.0, 0.25, 1.0))(linear(2), 3), BandGrid(0.1, 3.0)(linear(2), 5)
        assert t.tolist() == pytest.approx(even[[0, 1, 4]].tolist())

    def test_shares_must_be_as_many_as_the_points(self, user_error):
        with user_error("3 shares", "expected 5"):
            BandGrid(0.1, 3.0, (0.0, 0.25, 1.0))(linear(2), 5)

    @pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
    def test_bands_have_a_width(self, low, high, user_error):
        with user_error(f"low={low}", f"high={high}"):
            BandGrid(low, high)


@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_weights_integrate_exactly(offset):
    """Polynomials times the sine and the offset, beside scipy's adaptive quadrature."""
    nodes = torch.tensor([[0.3, 0.35, 0.7, 1.1], [1.5, 1.4, 0.6, 0.1]], dtype=torch.float64)
    start, stop = torch.tensor([[0.2], [1.5]]).double(), torch.tensor([[1.3], [0.0]]).double()
    weights = integral_weights(nodes, start, stop, offset)
    for power in range(4):

        def f(angle, power=power):
            return (np.sin(angle) + offset) * angle**power

        exact = [quad(f, float(a), float(b), epsabs=1e-13)[0] for a, b in zip(start, stop, strict=True)]
        found = (weights.numpy() * f(nodes.numpy())).sum(1)
        assert found == pytest.approx(exact, rel=1e-11, abs=1e-12)


def test_the_models_own_std_is_taken():
    class Known:
        def __init__(self, model, data_std):
            self.model, self.field, self.device, self.data_std = model, model.field, model.device, data_std

        def velocity(self, x, t):
            return self.model.velocity(x, t)

    problem = solved("linear")
    known = Known(problem.model, 1.3)
    expected = Multistep(8, std=1.3)(problem.model, problem.x_T)
    assert Multistep(8)(known, problem.x_T).equal(expected)
    assert Multistep(8)(Counted(known), problem.x_T).equal(expected)
    assert not Multistep(8)(problem.model, problem.x_T).equal(expected)
    assert Multistep(8, std=0.7)(known, problem.x_T).equal(Multistep(8, std=0.7)(problem.model, problem.x_T))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Multistep(0), ("steps=0", "at least 1")),
        (lambda: Multistep(2.5), ("steps=2.5", "whole number")),
        (lambda: Multistep(10**10), ("steps=10000000000", "at most 1000000")),
        (lambda: Multistep(5, True), ("order=True", "whole number")),
        (lambda: Multistep(5, 5), ("order=5", "1, 2, 3 or 4")),
        (lambda: Multistep(5, std=-1.0), ("std=-1.0", "positive")),
        (lambda: RungeKutta(1), ("steps=1", "at least 2")),
        (lambda: RungeKutta(5, 7), ("order=7", "1, 2, 3 or 4")),
    ],
    ids=["steps", "half a step", "too many", "no order", "order", "std", "single steps", "single-step order"],
)
def test_impossible_options_are_refused(make, parts, user_error):
    with user_error(*parts):
        make()


def test_data_that_do_not_vary_are_found():
    model = EmpiricalField(linear(2), torch.full((1, 2), 0.7, dtype=torch.float64))
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Multistep(10)(model, x_T), model.data.expand(4, 2), rtol=0, atol=0.02)
    torch.testing.assert_close(Multistep(10, denoise=True)(model, x_T), model.data.expand(4, 2), rtol=0, atol=1e-6)


def test_the_estimate_at_t_min_ends_where_it_is_asked_for():
    problem = solved("variance_preserving")
    assert error(Multistep(40, denoise=True), problem) < 1e-5 < error(Multistep(40), problem)


def test_one_evaluation_is_enough_for_an_answer():
    problem = solved("variance_exploding")
    assert math.isfinite(error(Multistep(1), problem))
