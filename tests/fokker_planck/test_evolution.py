"""Steps in time: exact where operators commute and only there, honest errors, orders."""

import itertools
import math

import numpy as np
import pytest
import torch
from time_means import mean_over, means_of, weighted
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.evolution import evolve, rising
from diffusion.fokker_planck.stepping import Operator, step


class Matrix(Operator):
    """A small matrix, which counts its exponentials."""

    exponentials = 0

    def __init__(self, values: Tensor):
        self.values = values

    def advance(self, state: Tensor, duration: float) -> Tensor:
        Matrix.exponentials += 1
        return state @ torch.linalg.matrix_exp(duration * self.values).mT


def square(t: float) -> float:
    return 1.0 if math.sin(math.tau * t + 0.3) > 0 else -1.0


DRIVES = {
    "sin2": lambda t: 3 * math.sin(2 * math.pi * t),
    "sin4": lambda t: 3 * math.sin(4 * math.pi * t),
    "sin8": lambda t: 3 * math.sin(8 * math.pi * t),
    "sin16": lambda t: 3 * math.sin(16 * math.pi * t),
    "cos8": lambda t: 3 * math.cos(8 * math.pi * t),
    "square": square,
    "square-even": lambda t: 1.0 if (8 * t) % 1 < 0.5 else -1.0,
    "kink": lambda t: abs(3 * t - 1),
    "last": lambda t: 20.0 if t > 0.95 else 0.0,
}
PACES = {
    "constant": lambda t: 2.0,
    "vp": lambda t: 0.1 + 19.9 * t,
    "ve": lambda t: math.exp(7.4 * t),
    "swing": lambda t: 1 + 0.9 * math.sin(4 * math.pi * t),
    "septic": lambda t: 0.1 + 5 * t**7,
}


def driven(drive, pace=lambda t: 1.0):
    """The mean (x, 1) of dx = (drive - pace x) dt: matrices that commute only where the drive is a multiple of pace."""

    def values(t: float) -> Tensor:
        return torch.tensor([[-pace(t), drive(t)], [0.0, 0.0]], dtype=torch.float64)

    return means_of(lambda rule: Matrix(weighted(values, rule)))


def integral(f) -> float:
    """Over [0, 1], by Gauss' rule between the places where the drives jump or have a kink."""
    cuts = sorted({k / 16 for k in range(17)} | {0.5 - 0.3 / math.tau, 1 - 0.3 / math.tau, 1 / 3, 0.95})
    return float(
        sum(
            mean_over(lambda t: torch.tensor(f(t), dtype=torch.float64), low, high, 24) * (high - low)
            for low, high in itertools.pairwise(cuts)
        )
    )


START = torch.tensor([[0.5, 1.0]], dtype=torch.float64)


def size(difference: Tensor) -> float:
    return float(difference.abs().sum())


@pytest.mark.parametrize("name", PACES)
def test_a_change_by_a_factor_is_one_exact_step(name):
    pace = PACES[name]
    run = evolve(driven(lambda t: 0.7 * pace(t), pace), START, [0.0, 1.0], size)
    kept = math.exp(-integral(pace))
    assert run.steps == 1 and run.error == 0
    assert float(run.states[-1, 0, 0]) == pytest.approx(0.5 * kept + 0.7 * (1 - kept), abs=1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("name", DRIVES)
def test_the_error_is_within_the_tolerance(name, tolerance):
    drive = DRIVES[name]
    run = evolve(driven(drive), START, [0.0, 1.0], size, tolerance)
    exact = 0.5 * math.exp(-1) + integral(lambda t: drive(t) * math.exp(t - 1))
    assert abs(float(run.states[-1, 0, 0]) - exact) <= 3 * tolerance
    assert 0 < run.error <= tolerance and 1 < run.steps < 1500


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", ["sin4", "sin8", "sin16", "square-even", "last"])
def test_a_fixed_step_too_long_to_see_the_drive_says_so(name, steps):
    drive = DRIVES[name]
    with pytest.warns(UserWarning, match="too coarse"):
        run = evolve(driven(drive), START, [0.0, 1.0], size, 1e-3, steps=steps)
    exact = 0.5 * math.exp(-1) + integral(lambda t: drive(t) * math.exp(t - 1))
    assert abs(float(run.states[-1, 0, 0]) - exact) <= 3 * run.error


def test_order():
    """A drive and a pace that swing, three coordinates: a turn, too."""

    def values(t: float) -> Tensor:
        a, b = math.sin(3 * t), math.cos(2 * t)
        return torch.tensor([[-1 - a, b, 2 * a], [-b, -1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)

    start = torch.tensor([[0.5, -0.3, 1.0]], dtype=torch.float64)
    runs = [
        evolve(means_of(lambda rule: Matrix(weighted(values, rule))), start, [0.0, 1.5], size, 1.0, steps)
        for steps in (8, 16, 256)
    ]
    coarse, fine = (size(run.states[-1] - runs[-1].states[-1]) for run in runs[:2])
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.15)
    assert fine < runs[1].error < 20 * fine


class Positive(Matrix):
    """Of a growth that is not to be negative."""

    def possible(self, values: Tensor) -> bool:
        return float(values[0, 0]) >= 0


@pytest.mark.parametrize(("begin", "exponentials"), [(0.0, 3), (-1.0, 3), (1.0, 6)])
def test_operators_that_are_not_possible_are_never_made(begin, exponentials, monkeypatch):
    """A growth like t^3 from 0 is 15 times as large in the second half: (7 L - R) / 6 is negative; or in the first."""

    def values(t: float) -> Tensor:
        return torch.tensor([[abs(t) ** 3, math.sin(3 * t)], [0.0, 0.0]], dtype=torch.float64)

    advance, made = Matrix.advance, []
    monkeypatch.setattr(Positive, "advance", lambda self, *args: made.append(self.values) or advance(self, *args))
    means = means_of(lambda rule: Positive(weighted(values, rule)))
    one = evolve(means, START, [begin, begin + 1.0], size, 1.0, steps=1)
    assert len(made) == exponentials  # of order 2, or of order 4
    many = evolve(means, START, [begin, begin + 1.0], size, 1.0, steps=128)
    assert min(float(found[0, 0]) for found in made) >= 0
    assert size(one.states[-1] - many.states[-1]) < 3 * one.error


def test_cost_follows_the_order():
    """Of order 4, error per time: steps grow by 10 with 1e4 of the tolerance; each has at most six exponentials."""
    numbers = []
    for tolerance in (1e-6, 1e-10):
        Matrix.exponentials = 0
        run = evolve(driven(DRIVES["sin2"]), START, [0.0, 1.0], size, tolerance)
        numbers.append(run.steps)
        assert Matrix.exponentials <= 6 * run.steps + 30
    assert numbers[1] < 15 * numbers[0] and numbers[1] < 400


def test_a_jump_at_a_time_of_output_costs_nothing():
    run = evolve(driven(lambda t: 1.0 if t < 0.5 else -1.0), START, [0.0, 0.5, 1.0], size)
    assert run.steps == 2 and run.error == 0


def test_operators_of_another_sign_or_shape_are_not_multiples():
    fall = Matrix(torch.tensor([[-1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    rise = Matrix(-fall.values)
    means = means_of(lambda rule: fall if min(rule)[0] < 0.5 else rise)
    assert step(means, START, 0.0, 1.0, size).error > 0.1
    wide = Matrix(torch.zeros(3, 3, dtype=torch.float64))
    wide.advance = lambda state, duration: state
    means = means_of(lambda rule: fall if min(rule)[0] < 0.5 else wide)
    assert step(means, START, 0.0, 1.0, size).error > 0.1


def test_factors_of_an_operator():
    values = torch.tensor([[-1.0, 2.0], [0.5, 0.0]], dtype=torch.float64)
    operator, other = Matrix(values), values.clone()
    assert [operator.factor(c * values) for c in (0.0, 0.3, 1.0, 1e6)] == pytest.approx([0.0, 0.3, 1.0, 1e6], rel=1e-14)
    other[1, 1] = 1e-9
    assert [operator.factor(wrong) for wrong in (-values, other, 1e6 * other, values[:1])] == [None] * 4
    assert Matrix(0 * values).factor(values) is None


@pytest.mark.parametrize(
    "times", [[], [0.0, 0.0], [1.0, 0.0], [0.0, math.inf], [0.0, math.nan], [-math.inf, 0.0]], ids=str
)
def test_times_must_rise_and_be_finite(times):
    with pytest.raises(UserError, match="rising finite"):
        rising(times)


def test_times_of_every_kind():
    assert rising(torch.tensor([0, 1])) == rising(torch.tensor([0.0, 1.0]).unbind()) == [0.0, 1.0]
    assert rising([2]) == rising(2.0) == rising(np.array(2)) == [2.0]


@pytest.mark.parametrize("bad", [{"tolerance": 0.0}, {"tolerance": math.nan}, {"steps": 0}], ids=str)
def test_tolerance_and_steps_are_positive(bad):
    with pytest.raises(UserError, match="positive"):
        evolve(driven(DRIVES["sin2"]), START, [0.0, 1.0], size, **bad)


def test_stops_next_to_times_are_left_out():
    """A step of a few roundings would be followed by others."""
    times = [0.0, 0.3, 1.0]
    run = evolve(driven(lambda t: 0.7), START, times, size, stops=[0.3 + 1e-16, 0.3 - 1e-9, 0.6, 1 - 1e-12])
    assert run.steps == 3 and len(run.states) == 3
