"""Trajectory fields: against the affine fields that some of them are, and labels found by Newton's method."""

import math

import pytest
import torch
from problems import FIELDS, coupled, lines, names, principal
from torch.distributions import Laplace

from diffusion.fields import (
    Gaussian,
    Product,
    StudentT,
    TrajectoryField,
    Unavailable,
    curved,
    drifting,
    laplace,
    linear,
    straight,
    uniform,
)
from diffusion.specs import build, describe

TRAJECTORIES = [case for case in FIELDS if isinstance(case.build(), TrajectoryField)]
every_trajectory_field = pytest.mark.parametrize("case", **names(TRAJECTORIES))
without_inverse = pytest.mark.parametrize(
    "case", **names([case for case in TRAJECTORIES if case.build().inverse is None])
)


def blind(field, coordinatewise):
    """The field without what is known of it."""
    return TrajectoryField(field.trajectory, field.prior, field.horizon, None, coordinatewise, field.t_min, field.rho)


def test_straight_lines_to_gaussian_noise_are_flow_matching():
    """Everything that a field gives is what the affine field gives."""
    ours, affine = straight(Gaussian()), linear()
    assert (ours.horizon, ours.t_min, ours.rho) == (affine.horizon, affine.t_min, affine.rho)
    assert ours.clock(9).equal(affine.clock(9))
    randomness = [torch.Generator().manual_seed(0) for _ in range(2)]
    x0 = torch.randn(50, 1, 3, dtype=torch.float64)
    z, same = (field.draw(x0.shape, g, torch.float64) for field, g in zip((ours, affine), randomness, strict=True))
    assert z.equal(same)
    t = affine.clock(50)
    x = affine.transport(x0, z, t)
    torch.testing.assert_close(ours.transport(x0, z, t), x)
    for name in ("velocity", "log_prob"):
        torch.testing.assert_close(
            getattr(ours, name)(x, t, x0), getattr(affine, name)(x, t, x0), rtol=1e-11, atol=1e-11
        )
    velocity = affine.velocity(x, t, x0)
    torch.testing.assert_close(ours.velocity_from_target(x, t, ours.target(x, t, x0)), velocity)
    torch.testing.assert_close(ours.endpoint(x, t, velocity), affine.endpoint(x, t, velocity))
    torch.testing.assert_close(ours.prior_log_prob(x), affine.prior_log_prob(x))
    for call in (lambda f, g: f.sample(x0, t, g), lambda f, g: f.sample_prior(x0.shape, g, torch.float64)):
        a, b = (call(field, torch.Generator().manual_seed(4)) for field in (ours, affine))
        torch.testing.assert_close(a, b)


@every_trajectory_field
def test_the_label_of_a_place_is_that_of_its_line(case):
    field, x0, z, t, x = lines(case)
    reach = (x.abs() + x0.abs() + z.abs() * t[:, None]).amax(1) / t
    assert ((field.label(x, t, x0) - z).abs().amax(1) < 1e-13 * reach + 1e-12).all()


@every_trajectory_field
@pytest.mark.parametrize("coordinatewise", [True, False])
def test_newtons_method_finds_what_the_closed_form_gives(case, coordinatewise):
    field, x0, _, t, x = lines(case)
    if coordinatewise and not field.coordinatewise:
        pytest.skip("the coordinates of this field are coupled")
    found = blind(field, coordinatewise)
    for name in ("velocity", "log_prob"):
        ours, theirs = (getattr(f, name)(x, t, x0) for f in (found, field))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_trajectory_field
@pytest.mark.parametrize("known", [True, False])
def test_derivatives_of_first_and_second_order(case, known):
    """Of the label, the velocity and the density, by x, t and x0, against finite differences."""
    field, x0, _, _, _ = lines(case, 2)
    if known and field.inverse is None:
        pytest.skip("no inverse is known")
    field = field if known else blind(field, field.coordinatewise)
    z = 0.6 * torch.tensor([[0.3, -0.5, 0.7], [-0.9, 0.4, 0.2]]).double()[:, : case.dim]
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    inputs = [a.clone().requires_grad_() for a in (field.transport(x0, z, t), t, x0)]
    for output in (field.label, field.velocity, field.log_prob):
        assert torch.autograd.gradcheck(output, inputs, eps=1e-5, atol=1e-6, rtol=1e-6)
        assert torch.autograd.gradgradcheck(output, inputs, eps=1e-5, atol=1e-5, rtol=1e-5, fast_mode=True)


@every_trajectory_field
def test_density_is_that_of_the_label_over_the_stretch_of_the_map(case):
    """With the derivative of the map taken entry by entry, in reverse mode."""
    field, x0, z, t, x = lines(case, 5)
    label = z.clone().requires_grad_()
    place = field.transport(x0, label, t)
    rows = [torch.autograd.grad(place[:, i].sum(), label, retain_graph=True)[0] for i in range(case.dim)]
    expected = field.prior.log_prob(z) - torch.stack(rows, 1).det().abs().log()
    torch.testing.assert_close(field.log_prob(x, t, x0), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bend", [-0.49, -0.2, 0.0, 5.0, 100.0])
def test_curved_lines_keep_their_order_and_their_labels(bend):
    """In one coordinate, from labels far from the data to labels close by."""
    field = curved(Gaussian(), bend)
    z = torch.linspace(-40, 40, 2001, dtype=torch.float64)[:, None]
    x0 = torch.full_like(z, 0.3)
    for t in (0.001, 0.5, 0.9, 1.0):
        x = field.transport(x0, z, t)
        assert (x.diff(dim=0) > 0).all()
        torch.testing.assert_close(field.label(x, t, x0), z, rtol=1e-11, atol=1e-9)


def test_curved_lines_by_hand():
    field = curved(Gaussian(), 2.0)
    x0, z = torch.tensor([[1.0]]).double(), torch.tensor([[1.5]]).double()
    for t in (0.25, 0.5):
        c, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        expected = c * 1.0 + s * 1.5 + 2 * math.sin(math.pi * t) * math.tanh(0.5)
        assert float(field.transport(x0, z, t)) == pytest.approx(expected, rel=1e-14)
    assert curved(Gaussian(), 0.0).transport(x0, z, 1 / 3).item() == pytest.approx(math.sqrt(0.75) + 0.75, rel=1e-14)


def test_a_drifting_centre_and_its_width():
    """Mean and standard deviation of x_t are the ones given; the default prior is Gaussian."""
    field = drifting(lambda x0, t: x0 * (1 - t) + t * (1 - t), lambda t: 3 * t, horizon=2.0, t_min=0.01, rho=2.0)
    assert (field.horizon, field.t_min, field.rho) == (2.0, 0.01, 2.0)
    x0 = torch.full((40000, 1), 5.0, dtype=torch.float64)
    x = field.sample(x0, 0.5, torch.Generator().manual_seed(0))
    assert float(x.mean()) == pytest.approx(2.75, abs=4.5 * 1.5 / 200)
    assert float(x.std()) == pytest.approx(1.5, rel=0.02)
    own = drifting(lambda x0, t: x0 * (1 - t), torch.clone, prior=Product(Laplace(0.0, 2.0)))
    assert isinstance(own.prior, Product)


@without_inverse
@pytest.mark.parametrize("shape", [(1, 4, 4), (16,)])
def test_single_precision_and_images(case, shape):
    field = case.build()
    if case.name == "coupled":
        field, shape = case.build(), (1, 2)
    randomness = torch.Generator().manual_seed(0)
    x0, z = torch.randn(8, *shape, generator=randomness), field.draw((8, *shape), randomness, dtype=torch.float32)
    t = torch.linspace(0.05, 1, 8)
    x = field.transport(x0, z, t)
    with torch.no_grad():
        v, log_p = field.velocity(x, t, x0), field.log_prob(x, t, x0)
    assert v.dtype == log_p.dtype == torch.float32
    wide = [a.double() for a in (x, t, x0)]
    torch.testing.assert_close(v.double(), field.velocity(*wide), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_p.double(), field.log_prob(*wide), rtol=1e-4, atol=1e-3)


def test_a_velocity_costs_few_evaluations_of_the_map():
    calls, field = [0], curved(Gaussian(), 2.0)

    def counted(x0, x_T, t):
        calls[0] += 1
        return field.trajectory(x0, x_T, t)

    own = TrajectoryField(counted, Gaussian(), 1.0, coordinatewise=True)
    randomness = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(64, 256, generator=randomness, dtype=torch.float64) for _ in range(2))
    t = own.clock(64)
    x = own.transport(x0, z, t)
    calls[0] = 0
    own.velocity(x, t, x0)
    assert calls[0] < 60


@pytest.mark.parametrize(
    "field",
    [straight(uniform(2.0)), straight(laplace()), curved(StudentT(3.0, 2), 0.7), principal()],
    ids=["uniform", "laplace", "curved", "principal"],
)
def test_stored_and_built_again_it_is_the_same_field(field):
    again = build(describe(field))
    x = torch.linspace(-0.5, 0.5, 2 * (field.prior.dim or 2), dtype=torch.float64).view(2, -1)
    assert (again.horizon, again.t_min, again.rho) == (field.horizon, field.t_min, field.rho)
    assert again.log_prob(x, 0.5, -x).equal(field.log_prob(x, 0.5, -x))
    assert again.log_prob(x, 0.5, -x).isfinite().all()


class TestRefusals:
    def test_of_maps_that_are_not_invertible(self, user_error):
        """z^2 is nowhere negative: the third point is not reached, at its own time."""
        x0, t = torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.2, 0.4, 0.7], dtype=torch.float64)
        x = torch.tensor([[0.5, 0.5], [0.1, 0.2], [0.3, -0.5]], dtype=torch.float64)
        for coordinatewise in (True, False):
            field = TrajectoryField(
                lambda x0, z, t: x0 + t * (z - 1).square(), Gaussian(), 1.0, coordinatewise=coordinatewise
            )
            for call in (field.velocity, field.log_prob, field.label):
                with user_error("not invertible at t=0.7, sample 2", "residual 0.5", "expected at most", "inverse="):
                    call(x, t, x0)

    def test_of_maps_that_do_not_depend_on_their_label(self, user_error):
        field = TrajectoryField(lambda x0, z, t: x0 + t + 0 * z, Gaussian(), 1.0)
        with user_error("not invertible at t=0.5, sample 0"):
            field.velocity(torch.ones(2, 2).double(), 0.5, torch.zeros(2, 2).double())

    def test_of_too_many_coupled_coordinates(self, user_error):
        """With an inverse there is still a velocity."""
        known = TrajectoryField(
            lambda x0, z, t: (1 - t) * x0 + t * z.flip(1),
            Gaussian(),
            1.0,
            lambda x0, x, t: ((x - (1 - t) * x0) / t).flip(1),
        )
        x0, x = torch.zeros(2, 300).double(), torch.ones(2, 300).double()
        torch.testing.assert_close(known.velocity(x, 0.5, x0), 2 * x)
        for call in (known.log_prob, blind(known, False).velocity):
            with pytest.raises(Unavailable, match=r"300 x 300.*256.*coordinatewise=True"):
                call(x, 0.5, x0)
        with user_error("300 x 300"):
            known.prior_log_prob(x)

    def test_of_arguments(self, user_error):
        map_ = coupled().trajectory
        with user_error("t_min is 3.0", "horizon 1.0"):
            TrajectoryField(map_, Gaussian(), 1.0, t_min=3.0)
        with user_error("prior is 'gaussian'"):
            TrajectoryField(map_, "gaussian", 1.0)
        with user_error("trajectory is 7"):
            TrajectoryField(7, Gaussian(), 1.0)
        with user_error("inverse is 7"):
            TrajectoryField(map_, Gaussian(), 1.0, inverse=7)
        for bend in (-0.5, math.nan, math.inf):
            with user_error(f"bend is {bend}", "-0.5"):
                curved(Gaussian(), bend)
        with user_error("(2,)", "(2, 3)"):
            x0 = torch.zeros(2, 3)
            TrajectoryField(lambda x0, z, t: z.sum(1), Gaussian(), 1.0).transport(x0, x0, 0.5)

    def test_of_points_of_another_dimension(self, user_error):
        field = straight(Gaussian(64))
        for call in (
            lambda: field.draw((2, 1, 7, 7)),
            lambda: field.sample_prior((2, 1, 7, 7)),
            lambda: field.log_prob(torch.ones(2, 1, 7, 7), 0.5, torch.zeros(2, 1, 7, 7)),
        ):
            with user_error("(1, 7, 7)", "49", "dim=64"):
                call()
