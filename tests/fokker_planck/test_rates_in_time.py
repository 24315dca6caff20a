"""Rates of equations that change in time: found once where that is enough, and never where it is not."""

import math

import numpy as np
import pytest
import torch
from time_means import weighted

from diffusion.fokker_planck import FokkerPlanck, GridSolver, problems, stepping
from diffusion.fokker_planck.asking import at_any_time
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.jumps import jumps_at, mean_jumps
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.observables import current, entropy_production
from diffusion.fokker_planck.rates_in_time import RatesInTime
from diffusion.fokker_planck.stepping import AHEAD, mixed, moments


def forgiving(x, t):
    try:
        return -x * float(t[0])
    except Exception:
        return -x


LOOK = {
    "product": lambda x, t: -x * t[:, None],
    "number": lambda x, t: -x * math.sin(float(t)),
    "comparison": lambda x, t: torch.where((t > 0.5)[:, None], x, -x),
    "branch": lambda x, t: x if t[0] > 0.5 else -x,
    "copy": lambda x, t: -x * torch.tensor(t.tolist()).to(x)[:, None],
    "numpy": lambda x, t: torch.from_numpy(-x.numpy() * np.asarray(t)[:, None]),
    "below": lambda x, t: -x * torch.tensor(t)[:, None],
    "forgiving": forgiving,
}


def always(equation):
    """Drift and covariance at some points, if they are the same at all times."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    return at_any_time(lambda t: (equation.drift(x, t), equation.covariance(x, t)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOK)
def test_a_look_at_the_time_is_seen(name):
    assert always(FokkerPlanck(LOOK[name], 1.0)) is None
    assert always(FokkerPlanck(lambda x, t: -x, lambda x, t: LOOK[name](x, t).abs())) is None
    assert always(FokkerPlanck.from_covariance(lambda x, t: -x, lambda x, t: LOOK[name](x, t).abs())) is None


def test_noise_that_is_the_time_is_not_taken_for_unchanging():
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: t)
    assert always(equation) is None
    found, exact = (RatesInTime(equation, Box([(-1.0, 1.0)], 8), start).at(2.0) for start in (0.5, 2.0))
    torch.testing.assert_close(found.rates[(1,)], exact.rates[(1,)], rtol=1e-12, atol=0)


def test_no_look_at_the_time_is_seen_too():
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    layer = torch.nn.Linear(1, 1).double()
    for drift in (lambda x, t: -x, lambda x, t: layer(x).tanh(), lambda x, t: -x if t is not None else x):
        found, _ = always(FokkerPlanck(drift, 1.0))
        assert torch.equal(found, drift(x, 0.0))
    _, found = always(FokkerPlanck.from_covariance(lambda x, t: -x, lambda x, t: 1 + x.square()))
    assert torch.equal(found, 1 + x.square())


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.function(x, t)


def test_how_often_an_equation_is_asked():
    """Once for its rates; if it looks at the time, at all moments of a step at once."""
    drift, noise = Counted(lambda x, t: -x), Counted(lambda x, t: x[:, 0] * 0 + 1)
    GridSolver(FokkerPlanck(drift, noise), [(-6.0, 6.0)], 64).solve(gaussian(0.5, 0.5), [0.0, 0.3, 1.0])
    assert (drift.calls, noise.calls) == (1, 1)
    problem = problems.variance_preserving(horizon=0.3)
    drift, noise = Counted(problem.equation._drift.function), Counted(problem.equation._diffusion.function)
    found = GridSolver(FokkerPlanck(drift, noise), problem.domain, 64).solve(problem.start, [0.0, 0.3])
    assert found.steps == 1 and drift.calls <= 11 and noise.calls <= 13


@pytest.mark.parametrize("noise", [lambda x, t: 1.0, lambda x, t: 1.0 + t * 0], ids=["still", "looking"])
def test_functions_of_one_number_are_asked_as_they_want(noise):
    equation = FokkerPlanck(lambda x, t: -(1.0 + t) * x, noise)
    other = FokkerPlanck(lambda x, t: -(1.0 + t)[:, None] * x, 1.0)
    found, same = (
        GridSolver(each, [(-6.0, 6.0)], 64).solve(gaussian(0.5, 0.5), [0.0, 0.3], tolerance=0.01).density
        for each in (equation, other)
    )
    torch.testing.assert_close(found, same, rtol=0, atol=1e-13)


MOVING = {
    "factor": (lambda x, t: -(1 + t)[:, None] * x, lambda x, t: (1 + t).sqrt(), True),
    "drift": (lambda x, t: -(1 + t)[:, None] * x, lambda x, t: 1.0, False),
    "noise": (lambda x, t: -x, lambda x, t: 1 + t, False),
    "push": (lambda x, t: t[:, None] - x, lambda x, t: 1.0, False),
    "from_rest": (lambda x, t: -t[:, None] * x, lambda x, t: t.sqrt(), False),
    "to_rest": (lambda x, t: -(0.7 - t).clamp_min(0)[:, None] * x, lambda x, t: (0.7 - t).clamp_min(0).sqrt(), True),
}


@pytest.mark.parametrize("boundary", ["reflecting", "absorbing"])
@pytest.mark.parametrize("name", MOVING)
def test_rates_at_a_time_and_their_means(name, boundary, monkeypatch):
    drift, noise, once = MOVING[name]
    equation, box = FokkerPlanck(drift, noise), Box([(-3.0, 3.0)], 24, boundary)
    rates, asked = RatesInTime(equation, box, 0.0), []
    monkeypatch.setattr(
        "diffusion.fokker_planck.rates_in_time.mean_jumps",
        lambda *known, **options: asked.append(known) or mean_jumps(*known, **options),
    )
    for time in (0.0, 0.4):
        (process,) = rates.means([[(time, 1.0)]])
        assert len(process.values) == 24
        found, exact = process.jumps, jumps_at(equation, box, time)
        torch.testing.assert_close(found.rates[(1,)], exact.rates[(1,)], rtol=1e-12, atol=0)
        torch.testing.assert_close(found.lost, exact.lost, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.way, exact.way, rtol=1e-12, atol=0)
    assert bool(asked) != once
    rule = mixed(AHEAD, [moments(0.2, 0.4), moments(0.4, 0.6)])
    mean = FokkerPlanck.from_covariance(
        lambda x, t: weighted(lambda time: drift(x, 0 * t + time), rule),
        lambda x, t: weighted(lambda time: torch.as_tensor(noise(x, 0 * t + time)).square(), rule),
    )
    found, exact = rates.means([rule])[0].process.jumps, jumps_at(mean, box, 0.0)
    torch.testing.assert_close(found.rates[(1,)], exact.rates[(1,)], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.drives[(1,)], exact.drives[(1,)], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.lost, exact.lost, rtol=1e-12, atol=0)


def turning(x, t):
    """A full matrix whose shape depends on place and time, by different functions."""
    c = 0.3 * (1 + t) * (x[:, 0] + 2 * t * x[:, 1]).sin()
    return torch.stack([1 + t, c, c, 1.2 + 0.1 * (x[:, 1] * t).cos()], 1).reshape(-1, 2, 2)


NOISES = {
    "line": (1, lambda x, t: (1 + t * x[:, 0].cos()) ** 2),
    "axes": (2, lambda x, t: torch.stack([1 + t, 2 + t * x[:, 0].sin()], 1)),
    "matrix": (2, turning),
}


@pytest.mark.parametrize("boundary", ["reflecting", "absorbing"])
@pytest.mark.parametrize("name", NOISES)
def test_means_found_together_are_those_of_the_mean_equations(name, boundary):
    dim, a = NOISES[name]
    box = Box([(-2.0, 2.0)] * dim, 8, boundary)

    def drift(x, t):
        return (1 + t**2)[:, None] * (x + t[:, None]).cos()

    rules = [mixed(AHEAD, [moments(0.1, 0.2), moments(0.2, 0.3)]), moments(0.2, 0.9), [(0.6, 1.0)]]
    found = mean_jumps(FokkerPlanck.from_covariance(drift, a), box, rules)
    for rule, jumps in zip(rules, found, strict=True):
        mean = FokkerPlanck.from_covariance(
            lambda x, t, rule=rule: weighted(lambda time: drift(x, 0 * t + time), rule),
            lambda x, t, rule=rule: weighted(lambda time: a(x, 0 * t + time), rule),
        )
        exact = jumps_at(mean, box, 0.0)
        assert jumps.rates.keys() == exact.rates.keys()
        for e, rates in exact.rates.items():
            torch.testing.assert_close(jumps.rates[e], rates, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(jumps.lost, exact.lost, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(jumps.way, exact.way, rtol=1e-10, atol=1e-13)


def test_which_covariances_are_possible():
    for dim, wrong, right in (
        (1, [[-0.1]], [[0.0]]),
        (2, [[1.0, 0.0], [0.0, -0.1]], [[1.0, 0.0], [0.0, 0.0]]),
        (2, [[1.0, 1.1], [1.1, 1.0]], [[1.0, 1.0], [1.0, 1.0]]),
    ):
        box = Box([(-1.0, 1.0)] * dim, 4)
        process = RatesInTime(FokkerPlanck(lambda x, t: -x, 1.0), box, 0.0).at_start
        for matrix, possible in ((wrong, False), (right, True)):
            values = torch.eye(dim, dtype=torch.float64).repeat(box.number, 1, 1)
            values[-1] = torch.tensor(matrix, dtype=torch.float64)  # in one place only
            assert process.possible(torch.cat([box.centres, values.flatten(1)], 1)) == possible


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_a_full_matrix_that_grows_from_nothing_takes_few_steps():
    matrix = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    equation = FokkerPlanck(lambda x, t: t[:, None] - x, lambda x, t: (t**3)[:, None, None] * matrix)
    grid = GridSolver(equation, [(-4.0, 4.0)] * 2, 16)
    found, fine = (grid.solve(gaussian(0.0, 0.7, 2), [0.0, 1.0], tolerance) for tolerance in (3e-3, 1e-4))
    assert found.steps < 50 and found.time_error < 3e-3
    assert float((found.density[1] - fine.density[1]).abs().sum()) * grid.box.volume < 3e-3


def test_swings_along_any_axis_are_kept():
    box = Box([(-3.0, 3.0)] * 2, 16)
    for axis in (0, 1):
        swinging = torch.eye(2, dtype=torch.float64)[axis]
        equation = FokkerPlanck(lambda x, t, one=swinging: 5 * one * (40 * x).cos() - x, 1.0)
        assert float((jumps_at(equation, box, 0.0).swings > 0.1).double().mean()) > 0.5


def test_coefficients_of_all_kinds_of_noise_agree():
    box = Box([(-1.0, 1.0), (0.0, 4.0)], (4, 5))
    found = []
    for noise in (
        lambda x, t: 1 + t,
        lambda x, t: (1 + t)[:, None].expand(-1, 2),
        lambda x, t: (1 + t)[:, None, None] * torch.eye(2).to(x),
    ):
        equation = FokkerPlanck(lambda x, t: -x, noise)
        found.append(RatesInTime(equation, box, 0.0).means([[(0.5, 1.0)]])[0].values)
    drift, square = found[0][:, :2], found[0][:, 2:].reshape(20, 2, 2)
    torch.testing.assert_close(drift, -box.centres / torch.tensor([0.5, 0.8]).double())
    torch.testing.assert_close(square[7], torch.tensor([1.5 / 0.5, 1.5 / 0.8]).double().square().diag())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_flows_are_those_at_their_times():
    problem = problems.variance_preserving(horizon=0.3)
    times, starts = [0.0, 0.1, 0.3], torch.rand(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    driven = FokkerPlanck(lambda x, t: 3 * (4 * t)[:, None].sin() - x, 1.0)
    for equation in (problem.equation, driven, FokkerPlanck(lambda x, t: -x, 1.0)):
        solver = GridSolver(equation, [(-6.0, 6.0)], 40)
        found = solver.solve(starts, times, tolerance=1e-2)
        for k, time in enumerate(times):
            known = solver.box, jumps_at(equation, solver.box, time), found.density[k] * solver.box.volume
            torch.testing.assert_close(found.current[k], current(*known), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(found.entropy_production[k], entropy_production(*known), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOK)
@pytest.mark.parametrize("times", [[0.1, 0.4, 0.7, 0.9], [0.3]], ids=len)
def test_many_times_at_once_are_times_by_themselves(name, times):
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    for equation in (
        FokkerPlanck(LOOK[name], lambda x, t: LOOK[name](x, t).abs()),
        FokkerPlanck.from_covariance(LOOK[name], lambda x, t: LOOK[name](x, t).abs()),
        FokkerPlanck(lambda x, t: -x, lambda x, t: t),
    ):
        exact = [torch.stack([ask(x, t) for t in times]) for ask in (equation.drift, equation.covariance)]
        for _ in range(2):  # it is found out first how the functions want to be asked
            for found, wanted in zip(equation.over(x, times), exact, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


def test_times_are_asked_at_once_where_that_is_possible():
    x, drift = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None], Counted(lambda x, t: -t[:, None] * x)
    equation = FokkerPlanck(drift, 1.0)
    equation.over(x, [0.1, 0.2, 0.3, 0.4])
    before = drift.calls
    equation.over(x, torch.linspace(0, 1, 50).tolist())
    assert drift.calls == before + 1


def test_noise_may_change_its_shape_in_time():
    def noise(x, t):
        return (
            1.0
            if float(t[0]) < 0.3
            else (x[:, :1] * 0 + 2).expand_as(x)
            if t[0] < 0.7
            else torch.eye(2).expand(len(x), 2, 2)
        )

    x, times = torch.ones(3, 2, dtype=torch.float64), [0.1, 0.5, 0.9]
    found = FokkerPlanck(lambda x, t: -x, noise).over(x, times)[1]
    exact = torch.tensor([1.0, 4.0, 1.0], dtype=torch.float64)[:, None, None, None] * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found, exact.expand(3, 3, 2, 2))


def test_moments_are_asked_for_in_parts_of_bounded_size(monkeypatch):
    equation, asked = FokkerPlanck(lambda x, t: (4 * t)[:, None].sin() - x, 1.0), []
    at_once = FokkerPlanck.over
    monkeypatch.setattr(FokkerPlanck, "over", lambda *args: asked.append(len(args[2])) or at_once(*args))
    monkeypatch.setattr("diffusion.fokker_planck.grid.turning_times", lambda *args: ())
    ends = []
    for numbers, most in ((stepping.AT_ONCE, 24), (48 * 7, 7), (1, 1)):  # 48 centres, and 4 places between each two
        monkeypatch.setattr(stepping, "AT_ONCE", numbers)
        asked.clear()
        ends.append(GridSolver(equation, [(-6.0, 6.0)], 48).solve(gaussian(0.5, 0.6), [0.0, 1.0], 1e-2).density[1])
        assert max(asked) == most
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-12, atol=1e-15)
