"""The Wasserstein flow of particles: order in time, decrease under step-size control, momentum."""

import itertools
import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from cases import draws
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.wasserstein import Pace, StepControl, WassersteinFlow
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.scores.base import GaussianScore

anharmonic = Potential(lambda x: (x**4).sum(1) / 4 + x[:, 0] * x[:, 1] + x.cos().sum(1))
steep = Potential(lambda x: 50 * x[:, 0] ** 2 + (x**4).sum(1) / 4)


def quadratic(curvature: float) -> Potential:
    return Potential(lambda x: curvature / 2 * x.square().sum(1))


@dataclass(frozen=True)
class Counted(Functional):
    """Another functional, with its calls."""

    of: Functional
    calls: dict

    def value(self, particles):
        self.calls["value"] += 1
        return self.of.value(particles)

    def velocity(self, particles):
        self.calls["velocity"] += 1
        return self.of.velocity(particles)

    def first_variation(self, particles):
        return self.of.first_variation(particles)


@dataclass(frozen=True)
class Valueless(Functional):
    """Velocities without a value."""

    def value(self, particles):
        raise UserError("the entropy has a score only")

    def velocity(self, particles):
        return -particles

    def first_variation(self, particles):
        raise UserError("the entropy has a score only")


@dataclass(frozen=True)
class Refitted(Functional):
    """|x|^2 / 2 and a constant that rises whenever it is fitted."""

    constant: float = 0.0

    def fitted(self, particles, generator=None):
        return Refitted(self.constant + 1000)

    def value(self, particles):
        return particles.square().sum(1).mean() / 2 + self.constant

    def velocity(self, particles):
        return -particles

    def first_variation(self, particles):
        return particles.square().sum(1) / 2


@dataclass(frozen=True)
class Uphill(Functional):
    """Velocities that point up."""

    def value(self, particles):
        return particles.square().sum(1).mean()

    def velocity(self, particles):
        return 2 * particles

    def first_variation(self, particles):
        return particles.square().sum(1)


def exact(functional: Functional, x: Tensor, time: float) -> Tensor:
    def velocity(_, state):
        return functional.velocity(torch.from_numpy(state).view(x.shape)).flatten().numpy()

    solution = solve_ivp(velocity, (0, time), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.from_numpy(solution.y[:, -1].copy()).view(x.shape)


PROBLEMS = {
    "potential": anharmonic,
    "gaussian_kl": KL(lambda x: -(x - 1).square().sum(1) / 4, Entropy(GaussianScore())),
    "interacting": 0.5 * anharmonic + Interaction(lambda z: z.square().sum(-1).add(1).log()),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_order_is_as_declared(problem, order):
    functional, x = PROBLEMS[problem], draws(12, 2, 0, spread=0.7)
    end, errors = exact(functional, x, 1.0), []
    for steps in (32, 64):
        flow = WassersteinFlow(functional, order=order, control=None)
        errors.append(float((flow.run(x, steps, 1 / steps) - end).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_velocities_a_step_are_as_many_as_the_order(order):
    calls = {"velocity": 0, "value": 0}
    WassersteinFlow(Counted(anharmonic, calls), order=order, control=None).run(draws(5, 2, 0), 7, 0.01)
    assert calls == {"velocity": 7 * order, "value": 0}


def test_control_costs_one_value_a_step_where_steps_are_kept():
    calls = {"velocity": 0, "value": 0}
    flow = WassersteinFlow(Counted(anharmonic, calls))
    moments = list(flow.moments(draws(5, 2, 0), 7, 0.01))
    assert calls == {"velocity": 7, "value": 8}
    assert moments[-1].time == pytest.approx(0.07, abs=1e-12)


@pytest.mark.parametrize("order, momentum", [(1, 0.0), (1, 0.9), (2, 0.0), (4, 0.0)])
def test_the_value_falls_at_every_step_however_long_the_steps_may_be(order, momentum):
    x = draws(40, 2, 1, spread=3.0)
    moments = list(WassersteinFlow(steep, order=order, momentum=momentum).moments(x, 200, 100.0))
    values = [moment.value() for moment in moments]
    falls = [earlier - later for earlier, later in itertools.pairwise(values)]
    assert all(fall > 0 or moment.memory.resting for fall, moment in zip(falls, moments[1:], strict=True))
    assert all(fall >= 0 for fall in falls)
    assert values[-1] < 0.05 < 500 < values[0]


def test_a_step_falls_by_the_share_that_is_asked_for():
    """From x = 1, of x^2 / 2 a step h falls by h (1 - h / 2): at least 0.1 h up to h = 1.8, 0.5 h up to h = 1."""
    x = torch.ones(3, 1, dtype=torch.float64)
    for least, size, taken in [(0.1, 1.79, 1.79), (0.1, 1.81, 0.905), (0.5, 0.99, 0.99), (0.5, 1.1, 0.55)]:
        flow = WassersteinFlow(quadratic(1.0), control=StepControl(least=least))
        *_, moment = flow.moments(x, 1, size)
        assert moment.time == pytest.approx(taken)
        torch.testing.assert_close(moment.particles, x * (1 - taken))


def test_steps_grow_again_but_never_beyond_the_largest():
    """The curvature falls from 100 to 1 as the particles move in."""
    barrier = Potential(
        lambda x: torch.where(x.abs() > 2, 50 * (x.abs() - 2).square(), 0).sum(1) + x.square().sum(1) / 2
    )
    x = torch.full((3, 1), 4.0, dtype=torch.float64)
    times = [moment.time for moment in WassersteinFlow(barrier).moments(x, 60, 0.4)]
    sizes = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(sizes) < 0.05
    assert sizes[-1] == pytest.approx(0.4)
    assert max(sizes) <= 0.4 + 1e-12


def test_steps_that_fall_by_little_do_not_grow():
    """Of x^2 / 2 a step of 3 is halved; one of 1.5 falls by a quarter of 1.5 |v|^2, so 3 is not tried again."""
    calls = {"velocity": 0, "value": 0}
    *_, moment = WassersteinFlow(Counted(quadratic(1.0), calls)).moments(draws(5, 2, 0), 4, 3.0)
    assert moment.time == pytest.approx(6.0) and calls == {"velocity": 4, "value": 1 + 2 + 3}


def test_momentum_is_heavy_ball():
    """Of curvature a: x_(k+1) = x_k - h a x_k + b (x_k - x_(k-1)), solved by the roots of its polynomial."""
    a, b, h, x0 = 2.0, 0.8, 0.05, 1.5
    total = 1 + b - h * a
    root = complex(total**2 / 4 - b) ** 0.5
    plus, minus = total / 2 + root, total / 2 - root
    weight = ((1 - h * a) - minus) / (plus - minus)
    flow = WassersteinFlow(quadratic(a), momentum=b, control=None)
    for moment in flow.moments(torch.full((2, 3), x0, dtype=torch.float64), 40, h):
        expected = x0 * (weight * plus**moment.step + (1 - weight) * minus**moment.step)
        assert abs(expected.imag) < 1e-12
        torch.testing.assert_close(moment.particles, torch.full((2, 3), expected.real, dtype=torch.float64))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_particle_goes_down_an_ordinary_function(momentum):
    """As gradient descent does in torch.optim."""
    x = draws(1, 3, 5)
    theta = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.SGD([theta], lr=0.02, momentum=momentum)
    for _ in range(30):
        optimizer.zero_grad()
        anharmonic.energy(theta).sum().backward()
        optimizer.step()
    moved = WassersteinFlow(anharmonic, momentum=momentum, control=None).run(x, 30, 0.02)
    torch.testing.assert_close(moved, theta.data)


def test_control_finds_its_step_where_the_largest_is_much_too_long():
    """The energy distance to 8 modes: as near as with the steps of length 1 that suit it."""
    angles = torch.arange(8) * math.tau / 8
    centres = 4 * torch.stack([angles.cos(), angles.sin()], 1).double()
    distance = EnergyDistance(centres.repeat(40, 1) + 0.3 * draws(320, 2, 0))
    x = draws(200, 2, 1)
    suited = distance.value(WassersteinFlow(distance, control=None).run(x, 150, 1.0))
    for largest in (1.0, 30.0, 100.0):
        assert distance.value(WassersteinFlow(distance).run(x, 150, largest)) < 1.1 * suited


def test_momentum_is_faster_on_a_narrow_valley():
    valley = Potential(lambda x: x[:, 0] ** 2 / 2 + 50 * x[:, 1] ** 2)
    x = draws(20, 2, 3)
    ends = [WassersteinFlow(valley, momentum=b).run(x, 100, 0.019) for b in (0.0, 0.8)]
    plain, heavy = (float(valley.value(end)) for end in ends)
    assert heavy < 1e-2 * plain


def test_momentum_that_leads_uphill_is_dropped_before_the_step_is_shortened():
    flow, x = WassersteinFlow(quadratic(2.0), momentum=0.9), torch.ones(2, 3, dtype=torch.float64)
    first = next(flow.moments(x, 1, 0.3))
    moment = flow.advance(replace(first, memory=Pace(1.0, torch.full_like(x, -10.0))), 0.3, None)
    torch.testing.assert_close(moment.particles, torch.full_like(x, 0.4))
    torch.testing.assert_close(moment.memory.momentum, torch.full_like(x, -2.0))


def test_particles_that_can_fall_no_more_stay_and_one_warning_says_so():
    x = draws(6, 2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moments = list(WassersteinFlow(Uphill()).moments(x, 5, 0.5))
    assert all(torch.equal(moment.particles, x) for moment in moments)
    assert moments[-1].time == 0 and moments[-1].memory.resting == 5
    (warning,) = caught
    value, speed = float(x.square().sum(1).mean()), float((2 * x).square().sum(1).mean().sqrt())
    assert f"{value:.6g}" in str(warning.message) and f"velocities of {speed:.2g}" in str(warning.message)


def test_values_are_compared_on_one_fit():
    x = draws(6, 2, 4)
    torch.testing.assert_close(WassersteinFlow(Refitted()).run(x, 3, 0.5), x / 8)


def test_particles_at_rest_need_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not WassersteinFlow(quadratic(1.0)).run(torch.zeros(3, 2, dtype=torch.float64), 5, 1.0).any()


def test_without_a_value_control_must_be_given_up(user_error):
    x = draws(4, 2, 0)
    with user_error("the entropy has a score only", "control=None"):
        WassersteinFlow(Valueless()).run(x, 2, 0.1)
    torch.testing.assert_close(WassersteinFlow(Valueless(), control=None).run(x, 2, 0.1), 0.81 * x)


@pytest.mark.parametrize(
    "options, texts",
    [
        ({"order": 3}, ("order=3", "1, 2 or 4")),
        ({"momentum": 1.0}, ("momentum=1.0", "not 1")),
        ({"momentum": 0.5, "order": 2}, ("momentum=0.5", "order=1")),
    ],
    ids=["order", "momentum", "both"],
)
def test_bad_options_are_refused(options, texts, user_error):
    with user_error(*texts):
        WassersteinFlow(anharmonic, **options)


@pytest.mark.parametrize("options", [{"least": 1.0}, {"least": 0.5, "most": 0.4}, {"halvings": 0}], ids=str)
def test_bad_step_control_is_refused(options, user_error):
    with user_error("step control has", *options):
        StepControl(**options)
