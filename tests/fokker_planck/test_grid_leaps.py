"""Noise and drift that leap, high barriers, pushes in a small place: wrong densities there are easy to overlook."""

import math
import warnings

import pytest
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck, Fourier, GalerkinSolver, GridSolver
from diffusion.fokker_planck.box import line_rule, split_rule
from diffusion.fokker_planck.laws import gaussian

LEFT = 1 / 1.01  # of the mass at rest on (-1, 1), where g is 0.1 on the left and 1 on the right: p is as 1 / g^2


def leaping(x, t):
    return torch.where(x[:, 0] > 0, 1.0, 0.1).to(x)


def steep(x, t):
    return 0.55 + 0.45 * torch.tanh((x[:, 0] - 4e-4) / 2e-4)


def left_half(solver, density):
    return float(density[solver.box.axes[0] < -1e-9].sum() * solver.box.volume)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("diffusion", [leaping, steep])
@pytest.mark.parametrize("cells", [100, 101, 201, 401])
def test_noise_that_leaps_beside_a_centre(diffusion, cells):
    """Of an odd number of cells the one in the middle has its centre at the leap: half of it may be on either side."""
    solver = GridSolver(FokkerPlanck(lambda x, t: 0 * x, diffusion), [(-1, 1)], cells)
    found = left_half(solver, solver.stationary().density[0])
    assert found == pytest.approx(LEFT, abs=1e-4 if cells % 2 == 0 else 2.5 / cells)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_noise_that_leaps_along_one_of_two_coordinates():
    equation = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: torch.stack([leaping(x, t), 1 + 0 * x[:, 0]], 1))
    solver = GridSolver(equation, [(-1, 1)] * 2, 41)
    assert left_half(solver, solver.stationary().density[0]) == pytest.approx(LEFT, abs=2.5 / 41)


@pytest.mark.parametrize("cells", [100, 101, 400])
def test_noise_that_is_nothing_in_a_point(cells):
    """g^2 = |x|^(1/2): p is as |x|^(-1/2), of which sqrt(1/2) is in the inner half."""
    equation = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: x[:, 0].abs().sqrt().sqrt())
    solver = GridSolver(equation, [(-1, 1)], cells)
    inner = solver.box.axes[0].abs() < 0.5
    found = float(solver.stationary().density[0][inner].sum() * solver.box.volume)
    assert found == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("cells", [101, 201, 401, 801])
def test_a_drift_that_leaps_between_centres(cells):
    """f = -3 sign(x - c), g = 1: a Laplace law of mean c."""
    at = 0.013
    solver = GridSolver(FokkerPlanck(lambda x, t: -3 * torch.sign(x - at), 1.0), [(-4, 4)], cells)
    x, found = solver.box.axes[0], solver.stationary().density[0]
    exact = torch.exp(-6 * (x - at).abs())
    exact = exact / (exact.sum() * solver.box.volume)
    assert float((found - exact).abs().sum() * solver.box.volume) < 0.4 / cells


def test_the_split_rule_integrates_from_the_start_to_each_node():
    nodes, weights, integrals = split_rule(4, 16)
    function, integral = torch.cos(3 * nodes), torch.sin(3 * nodes) / 3
    torch.testing.assert_close(integrals @ function, integral, rtol=0, atol=1e-8)
    assert float(weights @ function) == pytest.approx(math.sin(3) / 3, abs=1e-12)
    for one, other in zip(split_rule(4, 1), line_rule(4), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize(
    ("low", "cells", "left"),
    [(-4, 101, 0.05), (-4, 301, 0.02), (-2, 98, 0.1), (-2, 100, 0.1), (-2, 101, 0.1), (-2, 300, 0.04)],
)
def test_a_place_without_noise_is_left_with_the_drift(low, cells, left):
    """Noise on the right of 0 only, at a centre or between two, wherever in between: the drift takes all across."""
    equation = FokkerPlanck(lambda x, t: 1 + 0 * x, lambda x, t: (x[:, 0] > 0).to(x))
    solver = GridSolver(equation, [(low, 4)], cells)
    found = solver.solve(gaussian(low / 2 + (low == -4) / 2, 0.2), [0.0, 2.5 if low == -4 else 1.5]).density[-1]
    assert float(found[solver.box.axes[0] < 1e-9].sum() * solver.box.volume) < left


def two_wells(height, dim=1):
    """V = height cos 2x - x / 2 around a circle at temperature 1: both wells are alike, and there is a current."""

    def drift(x, t):
        push = 2 * height * torch.sin(2 * x[:, :1]) + 0.5
        return torch.cat([push, -x[:, 1:]], 1)

    domain, boundary = [(0, math.tau), (-5, 5)][:dim], ["periodic", "reflecting"][:dim]
    return GridSolver(FokkerPlanck(drift, math.sqrt(2.0)), domain, [256] if dim == 1 else [96, 24], boundary)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("height", [3, 10, 15, 30])
def test_wells_behind_high_barriers_are_as_full_as_they_are(height):
    solver = two_wells(height)
    density = solver.stationary().density[0]
    assert float(density[:128].sum() * solver.box.volume) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_what_rounding_decides_is_refused():
    for height in (3, 7):
        solver = two_wells(height, 2)
        density = solver.stationary().density[0]
        assert float(density[:48].sum() * solver.box.volume) == pytest.approx(0.5, abs=1e-8)
    with pytest.raises(UserError, match=r"rounding may move up to .* of the mass"):
        two_wells(15, 2).stationary()


def bump(u):
    return torch.where(u.abs() < 1, (1 - u * u).clamp_min(0) ** 3, 0 * u)


@pytest.mark.parametrize(("start", "width"), [(0.59, 0.01), (0.21, 0.02), (0.7, 0.04)])
@pytest.mark.parametrize("galerkin", [False, True], ids=["grid", "galerkin"])
def test_a_push_in_a_small_place_is_not_passed_over(start, width, galerkin):
    """The same with its ends given as times; without it the density is 0.1 off and more."""

    def drift(x, t):
        return -x + (40 * ((t > start) & (t < start + width)).to(x) * bump(x[:, 0] / 0.5))[:, None]

    equation, law = FokkerPlanck(drift, 0.7), gaussian(0.0, 0.3)
    solver = GalerkinSolver(equation, Fourier(81, -4, 4)) if galerkin else GridSolver(equation, [(-4, 4)], 128)
    found, told = (solver.solve(law, times) for times in ([0.0, 1.0], [0.0, start, start + width, 1.0]))
    now, then = (one.values[-1] if galerkin else one.density[-1] for one in (found, told))
    assert float((now - then).abs().mean()) < 1e-6 < 1e-2 < float((now - told_without(solver, law)).abs().mean())


def test_pushes_in_two_places_at_two_times_are_both_seen():
    def drift(x, t):
        left, right = (bump((x[:, 0] + sign) / 0.4) for sign in (1, -1))
        on = ((t > 0.2) & (t < 0.208)).to(x) * left + ((t > 0.85) & (t < 0.858)).to(x) * right
        return -x + 40 * on[:, None]

    solver, law = GridSolver(FokkerPlanck(drift, 0.7), [(-4, 4)], 128), gaussian(0.0, 0.7)
    around = [0.0, 0.2, 0.208, 0.85, 0.858, 1.0]
    found, told = (solver.solve(law, times, 1e-4).density[-1] for times in ([0.0, 1.0], around))
    assert float((found - told).abs().mean()) < 1e-6


@pytest.mark.parametrize("galerkin", [False, True], ids=["grid", "galerkin"])
def test_a_drift_that_is_a_derivative_by_autograd(galerkin):
    def drift(x, t):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((x.square().sum(1) * (1 + 0.5 * torch.sin(5 * t))).sum() / 2, x)
        return -slope

    def closed(x, t):
        return -x * (1 + 0.5 * torch.sin(5 * t))[:, None]

    law, ends = gaussian(0.3, 0.4), []
    for function in (drift, closed):
        equation = FokkerPlanck(function, 1.0)
        solver = GalerkinSolver(equation, Fourier(61, -4, 4)) if galerkin else GridSolver(equation, [(-4, 4)], 64)
        solution = solver.solve(law, [0.0, 1.0])
        ends.append(solution.values[-1] if galerkin else solution.density[-1])
    torch.testing.assert_close(*ends, rtol=0, atol=1e-8)


def told_without(solver, law):
    """The density without the push."""
    equation = FokkerPlanck(lambda x, t: -x, 0.7)
    if isinstance(solver, GalerkinSolver):
        return GalerkinSolver(equation, Fourier(81, -4, 4)).solve(law, [0.0, 1.0]).values[-1]
    return GridSolver(equation, [(-4, 4)], 128).solve(law, [0.0, 1.0]).density[-1]


@pytest.mark.parametrize("late", [False, True], ids=["always", "later"])
def test_a_full_matrix_that_leaps_is_named_also_when_it_comes_later(late):
    def noise(x, t):
        on = (t > 0.05).to(x) if late else 1 + 0 * t
        q = torch.where(x[:, 0] > 0.01, 2.0, 0.9).to(x)
        return torch.stack([torch.stack([q, 0 * q], 1), torch.stack([0.5 * q * on, 0.8 * q], 1)], 1)

    solver = GridSolver(FokkerPlanck(lambda x, t: -x, noise), [(-5, 5)] * 2, 24)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        solver.solve(gaussian(0.0, 0.7, 2), [0.0, 0.1], tolerance=1e-2)
    assert sum("the noise leaps" in str(one.message) for one in found) >= 1


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("height", [4.0, 16.0, 20.0])
def test_a_double_well_that_turns_is_not_taken_for_one_at_rest(height):
    """f = -grad V turned by a constant matrix keeps exp(-V); products of rates along paths put all mass elsewhere."""

    def drift(x, t):
        slopes = torch.stack([4 * height * x[:, 0] * (x[:, 0].square() - 1), 4 * x[:, 1]], 1)
        return -slopes + torch.stack([slopes[:, 1], -slopes[:, 0]], 1)

    solver = GridSolver(FokkerPlanck(drift, math.sqrt(2.0)), [(-1.9, 1.9), (-2.5, 2.5)], [96, 48])
    x = solver.box.centres
    exact = (-height * (x[:, 0].square() - 1).square() - 2 * x[:, 1].square()).exp()
    found = solver.stationary().density[0].reshape(-1) * solver.box.volume
    assert float((found - exact / exact.sum()).abs().sum()) < 0.05


@pytest.mark.parametrize("duration", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_mass_that_comes_to_walls_is_said_for_each_start(slope, duration):
    """With the one start there is a little at the walls from the first, which is not to hide what comes."""
    solver = GridSolver(FokkerPlanck(lambda x, t: slope * x, 1.0), [(-2.5, 2.5)], 128)
    inner, outer = (solver.density(gaussian(0.0, std)) for std in (0.3, 0.5))
    for start in (torch.stack([inner, outer]), outer, torch.stack([inner, torch.full_like(inner, 0.2)])):
        with pytest.warns(UserWarning, match="mass has come to lie at reflecting walls"):
            solver.solve(start, [0.0, duration])


@pytest.mark.parametrize("cells", [128, 512])
def test_walls_that_are_never_reached_are_not_spoken_of(cells):
    """Noise that vanishes at the wall: the square-root process (Feller 1951) with 2 a / s^2 = 1.39."""
    equation = FokkerPlanck(lambda x, t: 1 - x, lambda x, t: 1.2 * x[:, 0].clamp_min(0).sqrt())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GridSolver(equation, [(0, 16)], cells).solve(gaussian(1.5, 0.2), [0.0, 1.0, 3.0])
