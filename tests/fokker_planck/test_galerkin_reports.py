"""What the Galerkin solver says when it is asked for what it cannot do, and what it reports of negative densities."""

import math
import warnings

import pytest
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Fourier, Hermite, Legendre
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.evolution import krylov, largest
from diffusion.fokker_planck.galerkin import GalerkinSolver
from diffusion.fokker_planck.grid import GridSolver
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.observables import warn_of_leaps
from diffusion.fokker_planck.problems import double_well, ornstein_uhlenbeck, ratchet, variance_preserving

OU, OU2 = ornstein_uhlenbeck(), ornstein_uhlenbeck(2, turn=2.0)


class Shapeless:
    @staticmethod
    def log_prob(x):
        return x


class Empty:
    @staticmethod
    def log_prob(x):
        return torch.full_like(x[:, 0], -math.inf)


def plain(problem=OU, bases=None):
    return GalerkinSolver(problem.equation, bases or Hermite(20))


def singular():
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: x[:, 0])
    GalerkinSolver(equation, Legendre(9, -1.0, 1.0), True).solve(gaussian(0.0, 0.2), [0.0, 1.0])


def large():
    """Drift that turns, in units so large that its curl is a small number."""
    equation = FokkerPlanck(lambda x, t: torch.stack([x[:, 1] - x[:, 0], -0.2 * x[:, 0] - x[:, 1]], 1), 1.4e5)
    return GalerkinSolver(equation, [Legendre(24, -7e5, 7e5)] * 2, symmetrised=True)


def shallow():
    """A potential that has a kink in its slope, so that no rule is exact."""
    equation = FokkerPlanck(lambda x, t: -x - (x - 0.3).abs().sqrt(), 1.0)
    return GalerkinSolver(equation, [Legendre(24, -3.0, 3.0)], symmetrised=True)


def switched():
    equation = FokkerPlanck(lambda x, t: -x * (1 + t[:, None]), lambda x, t: torch.ones_like(x[:, 0]))
    GalerkinSolver(equation, Hermite(9), True).solve(gaussian(0.0, 0.9), [0.0, 1.0])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: plain().solve(OU.start, [0.0, 0.0]), "times"),
        (lambda: plain().solve(OU.start, []), "times"),
        (lambda: plain().solve(OU.start, [0.0, 1.0], tolerance=0.0), "tolerance"),
        (lambda: plain().solve(OU.start, [0.0, 1.0], steps=0), "steps"),
        (lambda: plain().solve(Shapeless(), [0.0, 1.0]), r"\(20, 1\)"),
        (lambda: plain().solve(Empty(), [0.0, 1.0]), "no mass"),
        (lambda: plain().solve(torch.zeros(5, 2), [0.0, 1.0]), r"\(5, 2\)"),
        (lambda: plain().solve(torch.full((5, 1), math.nan), [0.0, 1.0]), "finite"),
        (lambda: plain(OU2).solve(OU2.start, [0.0, 1.0]), "fails for x"),
        (lambda: plain().solve(OU2.start, [0.0, 1.0]), r"log_prob\(x\) fails"),
        (lambda: GalerkinSolver(OU2.equation, [Hermite(8)] * 2, True).solve(OU2.start, [0.0, 1.0]), "curl .* is 4 "),
        (lambda: large().solve(gaussian(0.0, 7e4, 2), [0.0, 1.0]), "curl"),
        (
            lambda: GalerkinSolver(ratchet().equation, Fourier(25, 0.0, math.tau), True).solve(OU.start, [0.0, 1.0]),
            "jumps by 0.6",
        ),
        (singular, "singular"),
        (lambda: shallow().solve(gaussian(1.0, 0.2), [0.0, 1.0]), r"1536 points .* leave an error of [1-9]\S+e-"),
        (switched, r"changes in time: at t=0.017\d* the drift differs by 0.078"),
        (lambda: plain().solve(OU.start, [0.0]).density(torch.zeros(3, 2)), r"\(3, 2\)"),
    ],
    ids=[
        "equal-times", "no-times", "tolerance", "steps", "law-shape", "law-empty", "samples-shape", "samples-nan",
        "dimensions", "law-dimensions", "curl", "small-curl", "jump", "singular", "path",
        "moving-gibbs", "points",
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_the_figure(ask, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=message):
            ask()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: plain(bases=Legendre(40, -1.0, 1.5)).solve(OU.start, [0.0, 0.1]), "hold 0.8"),
        (lambda: plain(bases=Hermite(80, 0.0, 0.1)).solve(gaussian(0.0, 9.0), [0.0, 0.1]), "hold 0.1"),
        (lambda: plain(bases=Hermite(8)).solve(OU.start, [0.0, 0.1]), "decayed: at t=0"),
        (lambda: plain(bases=Fourier(65, -3.0, 5.0)).solve(OU.start, [0.0, 3.0]), "differ at the ends of axis 0"),
        (lambda: plain(bases=Legendre(9, -3.0, 1.0)).solve(OU.start.sample(999), [0.0, 0.1]), "hold 0."),
        (
            lambda: GalerkinSolver(double_well().equation, Fourier(97, -3.0, 3.0), True).solve(
                double_well().start, [0.0, 1.0]
            ),
            "wide beside the Gibbs density",
        ),
    ],
    ids=["loss", "too-wide", "coarse", "ends", "samples-outside", "rounding"],
)
def test_what_is_done_badly_is_said(ask, message):
    with pytest.warns(UserWarning, match=message):
        ask()


@pytest.mark.parametrize("symmetrised", [False, True], ids=["plain", "symmetrised"])
def test_what_is_done_well_is_not_complained_of(symmetrised):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        solution = GalerkinSolver(OU.equation, Legendre(80, -7.0, 7.0), symmetrised).solve(OU.start, [0.0, 1.0])
        problem = variance_preserving()
        GalerkinSolver(problem.equation, Fourier(97, -7.0, 7.0)).solve(problem.start, [0.0, 1.0])
    assert float(solution.truncation.max()) < 1e-5


def pushed(push, bases, time=3.0, middle=0.0):
    """A constant drift along the last coordinate, from a Gaussian; decay along the one before."""
    equation = FokkerPlanck(lambda x, t: torch.cat([-x[:, :-1], push + 0 * x[:, -1:]], 1), 1.0)
    return GalerkinSolver(equation, bases).solve(gaussian(middle, 0.6, len(bases)), [0.0, time])


@pytest.mark.parametrize(
    ("push", "bases", "where"),
    [
        (2.0, [Legendre(64, -4.0, 3.0)], "axis 0 at 3"),
        (-2.0, [Legendre(64, -3.0, 4.0)], "axis 0 at -3"),
        (2.0, [Hermite(16, 0.0, 0.7), Legendre(40, -4.0, 3.0)], "axis 1 at 3"),
        (0.0, [Legendre(64, -9.0, 3.0)], "axis 0 at 3"),
    ],
    ids=["right", "left", "second", "spreading"],
)
def test_mass_carried_to_a_wall_is_said(push, bases, where):
    with pytest.warns(UserWarning, match=f"wall of {where}: about .* of it would be beyond") as found:
        pushed(push, bases, 9.0 if push else 3.0)
    assert len([one for one in found if "wall of" in str(one.message)]) == 1


@pytest.mark.parametrize(
    ("push", "low", "time"), [(2.0, -4.0, 1.0), (2.0, -4.0, 0.7), (1.0, -4.0, 2.0), (0.0, -9.0, 3.0)]
)
def test_how_much_is_said_to_be_beyond_a_wall_on_the_way(push, low, time):
    """Without the wall a Gaussian of mean push t and variance 0.36 + t: half as much again to twice that, or spread."""
    with pytest.warns(UserWarning, match="wall of axis 0 at 3") as found:
        pushed(push, [Legendre(64, low, 3.0)], time)
    said = float(str(found[-1].message).split("about ")[1].split(" ")[0])
    free = math.erfc((3 - push * time) / math.sqrt(2 * (0.36 + time))) / 2
    assert free < said < (2.5 if push else 8) * free


@pytest.mark.parametrize("half", [1.5, 2.0, 2.5, 3.0, 3.5])
@pytest.mark.parametrize("solver", ["legendre", "grid", "coarse grid"])
def test_mass_that_walls_keep_from_leaving_is_said_though_the_drift_leads_inward(solver, half):
    """At rest an Ornstein-Uhlenbeck process has the mass erfc(L / sqrt 2) beyond -L and L, each wall half of it."""
    equation, start, times = FokkerPlanck(lambda x, t: -x, math.sqrt(2.0)), gaussian(0.0, 0.3), [0.0, 5.0]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if solver == "legendre":
            GalerkinSolver(equation, Legendre(64, -half, half)).solve(start, times)
        else:
            GridSolver(equation, [(-half, half)], 256 if solver == "grid" else 64).solve(start, times)
    told = [str(one.message) for one in found if "come to lie" in str(one.message)]
    beyond = math.erfc(half / math.sqrt(2)) / (2 if solver == "legendre" else 1)
    assert bool(told) == (beyond > 1e-3)
    for text in told:
        assert float(text.split("about ")[1].split(" ")[0]) == pytest.approx(beyond, rel=0.6)


def test_the_wall_warning_points_at_the_caller():
    solver = GalerkinSolver(FokkerPlanck(lambda x, t: 2 + 0 * x, 1.0), Legendre(64, -4.0, 3.0))
    with pytest.warns(UserWarning, match="wall of axis 0") as found:
        solver.solve(gaussian(0.0, 0.6), [0.0, 3.0])
    assert found[-1].filename == __file__


@pytest.mark.parametrize(
    ("push", "time", "middle"),
    [(2.0, 0.1, 0.0), (0.0, 0.1, 0.0), (2.0, 3.0, 2.0)],
    ids=["before", "not-yet", "there-from-the-start"],
)
def test_walls_that_mass_does_not_come_to_are_not_spoken_of(push, time, middle):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pushed(push, [Legendre(64, -4.0, 3.0)], time, middle)
    assert not [one for one in found if "wall of" in str(one.message)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_negative_densities_are_reported_and_taken_away():
    problem = double_well()
    solution = GalerkinSolver(problem.equation, Fourier(49, -3.0, 3.0)).solve(problem.start, [0.0, 1.0])
    x = torch.linspace(-3, 3, 4001, dtype=torch.float64)[:, None]
    raw, positive = solution.density(x), solution.positive()
    assert float(solution.most_negative[-1]) < -1e-5 and float(raw.min()) < -1e-5
    assert float(solution.most_negative[-1]) == float(solution.values[-1].min())
    cut = positive.density(x)
    assert float(cut.min()) == 0
    assert float(torch.trapezoid(cut, x[:, 0])) == pytest.approx(1, abs=1e-4)
    negative = float(torch.trapezoid((-raw).clamp_min(0), x[:, 0]))
    assert float(positive.negative[-1]) == pytest.approx(negative, rel=0.05)
    assert float(positive.scale[-1]) == pytest.approx(1 + negative, abs=1e-6)
    assert float(torch.trapezoid((cut - raw).abs(), x[:, 0])) <= 2.1 * negative


def test_densities_outside_the_domain_are_zero():
    solution = GalerkinSolver(OU.equation, Legendre(80, -7.0, 7.0)).solve(OU.start, [0.0, 1.0])
    assert solution.density(torch.tensor([[-7.5], [0.0], [9.0]]))[[0, 2]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("duration", [0.01, 1.0, 30.0])
def test_krylov_is_the_exponential(duration):
    matrix = torch.randn(120, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix - matrix @ matrix.mT / 4 - 2 * torch.eye(120, dtype=torch.float64)
    state = torch.randn(1, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = state @ torch.linalg.matrix_exp(duration * matrix).mT
    found = krylov(lambda u: u @ matrix.mT, state, duration)
    assert float((found - expected).norm()) < 1e-12 * float(state.norm())


def test_krylov_ends_early_in_an_invariant_space():
    turn = torch.zeros(9, 9, dtype=torch.float64)
    turn[0, 1], turn[1, 0], calls = -2.0, 2.0, []

    def apply(u):
        calls.append(u)
        return u @ turn.mT

    found = krylov(apply, torch.eye(9, dtype=torch.float64)[:1], 1.0)
    assert found[0, :2].tolist() == pytest.approx([math.cos(2.0), math.sin(2.0)], abs=1e-13)
    assert len(calls) <= 4


def test_the_bound_of_a_spectrum_is_above_it():
    for seed in range(5):
        root = torch.randn(80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        matrix = root @ root.mT
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        bound = largest(lambda u, m=matrix: -u @ m, torch.zeros(1, 80, dtype=torch.float64))
        assert top <= bound < 1.5 * top


@pytest.mark.parametrize("unit", [1e-10, 1.0, 1e5])
def test_ends_that_differ_are_seen_in_any_unit(unit):
    equation = FokkerPlanck(lambda x, t: 1.5 * unit - x, 2**0.5 * unit)
    solver = GalerkinSolver(equation, Fourier(65, -4 * unit, 4 * unit))
    with pytest.warns(UserWarning, match="differ at the ends of axis 0"):
        solver.solve(gaussian(0.0, 0.4 * unit), [0.0, 3.0])


@pytest.mark.parametrize(("width", "said"), [(1e-3, True), (0.3, False)])
def test_noise_that_leaps(width, said):
    equation = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: 1.5 + 0.5 * (x / width).tanh())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GalerkinSolver(equation, Legendre(64, -1.0, 1.0)).solve(gaussian(0.0, 0.12), [0.0, 0.1])
    assert sum("the noise leaps" in str(warning.message) for warning in caught) == said


@pytest.mark.parametrize(("at", "said"), [(0, False), (2, True), (3, True), (5, False)])
def test_leaps_matter_to_the_mass_on_either_side(at, said):
    equation = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: 1.5 + (x / 1e-3).tanh())
    places, masses = torch.arange(6.0, dtype=torch.float64) - 2.5, torch.zeros(1, 6, dtype=torch.float64)
    masses[0, at] = 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_leaps(equation, [places], 0.0, masses, stacklevel=1)
    assert sum("the noise leaps: 1 of the mass" in str(warning.message) for warning in caught) == said


def test_a_turning_drift_that_torch_cannot_differentiate_is_no_gradient(user_error):
    equation = FokkerPlanck(lambda x, t: OU2.equation.drift(x, t).detach(), 2**0.5)
    with user_error("torch does not see how drift changes"):
        GalerkinSolver(equation, [Hermite(8)] * 2, True).solve(OU2.start, [0.0, 1.0])


@pytest.mark.parametrize(
    ("drift", "bases", "said"),
    [
        (lambda x: 5 * (40 * x).cos() - x, [Fourier(201, -5.0, 5.0)], True),  # 2e-2 off at a truncation of 4e-5
        (lambda x: 5 * (40 * x).cos() - x, [Fourier(501, -5.0, 5.0)], False),
        (lambda x: 5 * (8 * x).cos() - x, [Hermite(64)], True),
        (lambda x: -x, [Hermite(32)], False),
        (lambda x: 2 * (6 * x).sin() - x, [Fourier(65, -5.0, 5.0), Legendre(40, -5.0, 5.0)], True),
        (lambda x: 0.5 * x.sin() - x, [Fourier(65, -5.0, 5.0), Hermite(32)], False),
    ],
)
def test_a_drift_that_swings_faster_than_the_functions_is_named(drift, bases, said):
    start = gaussian(0.0, 0.7, len(bases))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GalerkinSolver(FokkerPlanck(lambda x, t: drift(x), 1.0), bases).solve(start, [0.0, 0.5])
    named = [warning for warning in caught if "drift swings faster than the functions" in str(warning.message)]
    assert len(named) == said and all(warning.filename == __file__ for warning in named)


@pytest.mark.filterwarnings("ignore:the noise leaps", "ignore:the expansion has not decayed")
def test_noise_that_swings_faster_than_the_functions_is_named():
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: 1 + 0.3 * (30 * x).sin())
    with pytest.warns(UserWarning, match="noise swings faster than the functions"):
        GalerkinSolver(equation, [Fourier(151, -5.0, 5.0)]).solve(gaussian(0.0, 0.5), [0.0, 0.1])
