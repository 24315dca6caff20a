"""The Galerkin solver where the equation changes in time: steps that no swing deceives, forms that stay true."""

import itertools
import math

import pytest
import torch
from time_means import mean_over

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Fourier, Hermite
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.galerkin import GalerkinSolver
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.problems import variance_exploding, variance_preserving

BASIS = Hermite(32, 0.0, 0.9)


def turning(frequency: float, height: float = 3.0):
    return lambda t: height * torch.sin(frequency * math.pi * t)


def still(t):
    return 0 * t


def one(t):
    return 0 * t + 1


def swing(t):
    return 1 + 0.9 * torch.sin(4 * math.pi * t)


def square(t):
    return torch.sign(torch.sin(4 * math.pi * t + 0.3))


DRIVES = {
    "sin2": (turning(2), one),
    "sin4": (turning(4), one),
    "sin8": (turning(8), one),
    "square": (square, one),
    "noise": (still, swing),
}


def driven(drive, noise) -> FokkerPlanck:
    """dx = (drive - x) dt + sqrt(noise) dw: a Gaussian stays one."""
    return FokkerPlanck(lambda x, t: drive(t)[:, None] - x, lambda x, t: noise(t).sqrt().expand(len(x)))


def moments(drive, noise) -> tuple[float, float]:
    """Mean and variance at 1, of mean 0 and variance 0.49 at 0."""
    cuts = sorted([k / 16 for k in range(17)] + [(k - 0.3 / math.pi) / 4 for k in range(1, 5)])
    parts = list(itertools.pairwise(cuts))

    def total(f):
        return sum(float(mean_over(f, low, high, 24)) * (high - low) for low, high in parts)

    def at(t):
        return torch.tensor(t, dtype=torch.float64)

    mean = total(lambda t: drive(at(t)) * math.exp(t - 1))
    return mean, 0.49 * math.exp(-2) + total(lambda t: noise(at(t)) * math.exp(2 * t - 2))


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
@pytest.mark.parametrize("name", DRIVES)
def test_steps_follow_the_drive(name, tolerance):
    """The error is that of the L1 norm: a mean is off by at most some widths of it."""
    drive, noise = DRIVES[name]
    solution = GalerkinSolver(driven(drive, noise), BASIS).solve(gaussian(0.0, 0.7), [0.0, 1.0], tolerance)
    mean, variance = moments(drive, noise)
    found, covariance = solution.moments()
    assert 1 < solution.steps < 300 and 0 < solution.error <= tolerance
    assert float(found[-1, 0]) == pytest.approx(mean, abs=3 * tolerance + 1e-9)
    assert float(covariance[-1, 0, 0]) == pytest.approx(variance, abs=3 * tolerance + 1e-9)
    x = BASIS.rule().nodes[:, None]
    exact = gaussian(mean, math.sqrt(variance)).log_prob(x).exp()
    gap = float(((solution.values[-1] - exact).abs() * solution.weights).sum())
    assert gap <= 3 * tolerance + 3e-6  # what 32 functions leave


def test_cost_follows_the_order():
    solution = GalerkinSolver(driven(turning(2), one), BASIS).solve(gaussian(0.0, 0.7), [0.0, 1.0], 1e-8)
    assert solution.steps < 100


@pytest.mark.parametrize(
    ("problem", "basis"),
    [(variance_preserving(), Fourier(97, -7.0, 7.0)), (variance_exploding(), Fourier(97, -14.0, 14.0))],
    ids=["vp", "ve"],
)
def test_a_change_of_time_is_one_exact_step(problem, basis):
    calls, begin = [], 0.3

    def drift(x, t):
        calls.append(1)
        return problem.equation.drift(x, t + begin)

    later = FokkerPlanck(drift, lambda x, t: problem.equation.diffusion(x, t + begin))
    solution = GalerkinSolver(later, basis).solve(problem.law_at(begin), [0.0, 1 - begin])
    assert solution.steps == 1 and solution.error == 0 and len(calls) < 400
    points = solution.expansion.product.points
    exact = problem.law_at(1.0).log_prob(points).exp()
    assert float((solution.values[-1].reshape(-1) - exact).abs() @ solution.weights.reshape(-1)) < 1e-9


def test_a_gibbs_density_that_changes_and_returns_is_refused():
    equation = FokkerPlanck(lambda x, t: -(1 + 0.9 * torch.sin(math.tau * t)[:, None]) * x, lambda x, t: math.sqrt(2.0))
    with pytest.raises(UserError, match=r"Gibbs density changes in time.*symmetrised=False"):
        GalerkinSolver(equation, BASIS, symmetrised=True).solve(gaussian(0.0, 0.9), [0.0, 1.0])


@pytest.mark.parametrize("high", [20.0, 0.0])
def test_a_pace_that_changes_keeps_the_gibbs_density(high):
    """Even one that stands still at an end, where drift and noise are 0."""
    problem = variance_preserving(gaussian(0.5, 0.7), low=1.0, high=high)
    solution = GalerkinSolver(problem.equation, Hermite(40), symmetrised=True).solve(problem.start, [0.0, 0.5, 1.0])
    mean, variance = solution.moments()
    law = problem.law_at(1.0)
    assert solution.steps == 2
    assert float(mean[-1, 0]) == pytest.approx(float(law.mean), abs=1e-8)
    assert float(variance[-1, 0, 0]) == pytest.approx(float(law.covariance), abs=1e-7)


@pytest.mark.parametrize("pulse", [lambda t: t, lambda t: t * (1 - t)], ids=["later", "between"])
def test_a_cut_that_opens_later_is_seen(pulse):
    """At 0, and in the one case at 1 too, there is no drift that would differ at the ends of the period."""
    equation = FokkerPlanck(lambda x, t: -5 * pulse(t)[:, None] * (x - 1), lambda x, t: 1.0)
    with pytest.warns(UserWarning, match="differ at the ends of axis 0"):
        GalerkinSolver(equation, Fourier(65, -2.0, 2.0)).solve(gaussian(0.0, 0.3), [0.0, 1.0], 1e-4)


@pytest.mark.parametrize("times", [[0.0, math.inf], [0.0, math.nan], [-math.inf, 0.0]], ids=str)
def test_times_are_finite(times):
    with pytest.raises(UserError, match="rising finite"):
        GalerkinSolver(driven(still, one), BASIS).solve(gaussian(0.0, 0.7), times)
