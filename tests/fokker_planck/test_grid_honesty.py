"""What the grid solver says of itself: mass that rounding took, pulses, walls, infinite entropy production."""

import dataclasses
import math
import warnings

import pytest
import torch

from diffusion.fokker_planck import FokkerPlanck, Fourier, GalerkinSolver, GridSolver, problems
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.jump_process import JumpProcess
from diffusion.fokker_planck.jumps import jumps_at
from diffusion.fokker_planck.laws import gaussian

CASES = {
    "ornstein_uhlenbeck": lambda: problems.ornstein_uhlenbeck(),
    "double_well": lambda: problems.double_well(),
    "double_well_2d": lambda: problems.double_well(2),
    "turning": lambda: problems.ornstein_uhlenbeck(2, turn=2.0),
    "ratchet": lambda: problems.ratchet(),
    "banana": lambda: problems.banana(),
    "variance_preserving": lambda: problems.variance_preserving(),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("boundary", ["reflecting", "absorbing", "periodic"])
@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_columns_sum_to_zero_and_little_is_put_back(name, boundary):
    """The chain itself keeps the mass; what `mass_error` is after correction would hide a chain that does not."""
    problem = CASES[name]()
    solver = GridSolver(problem.equation, problem.domain, 40, boundary)
    box = Box(problem.domain, 40, boundary)
    process = JumpProcess(box, jumps_at(problem.equation, box, 0.3))
    state = torch.rand(
        3, box.number + process.absorbing, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert float(process.apply(state).sum(1).abs().max()) < 1e-12 * process.rate * box.number
    found = solver.solve(problem.start, [0.0, 0.1, 0.3])
    assert 0 <= found.put_back < (1e-7 if box.dim == 1 else 1e-10)


@pytest.mark.parametrize("factor", [1.02, 0.98], ids=["loses", "gains"])
def test_a_chain_that_leaks_is_seen(factor):
    problem = problems.ornstein_uhlenbeck()
    box = Box(problem.domain, 40)
    process = JumpProcess(box, jumps_at(problem.equation, box, 0.0))
    process._line.rates[1] *= factor
    mass = box.averages(problem.start.log_prob)[None] * box.volume
    kept = process.advance(mass, 0.5)
    assert float((kept.sum() / mass.sum() - 1).abs()) < 1e-12 and process.ledger.put_back > 1e-4


@pytest.mark.parametrize("boundary", ["reflecting", "absorbing"])
def test_mass_that_is_missing_is_seen(boundary):
    grid = GridSolver(FokkerPlanck(lambda x, t: -x, 1.0), [(-1.0, 1.0)], 40, boundary)
    found = grid.solve(torch.ones(2, 40, dtype=torch.float64), [0.0, 0.5, 1.0])
    assert float(found.mass_error.max()) < 1e-13
    density = found.density.clone()
    density[2, 1, 7] += 0.02 / grid.box.volume  # of a mass of 2
    error = dataclasses.replace(found, density=density).mass_error
    torch.testing.assert_close(error, torch.tensor([0.0, 0.0, 0.01], dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"steps": 100}], ids=["tolerance", "steps"])
def test_a_kick_near_the_end_is_not_missed(options):
    """dx = -x dt + dw, and a push of 20 from 0.95 on."""
    equation = FokkerPlanck(lambda x, t: 20.0 * (t > 0.95) - x, 1.0)
    found = GridSolver(equation, [(-6, 6)], 120).solve(gaussian(0.5, 0.5), [0.0, 1.0], tolerance=1e-3, **options)
    mean = float((found.density[-1] * found.grid[0]).sum() * 0.1)
    exact = 0.5 * math.exp(-1) + 20 * (1 - math.exp(-0.05))
    assert found.steps > 1 and abs(mean - exact) < 0.1


def test_mass_that_piles_up_at_walls_is_named():
    growing = FokkerPlanck(lambda x, t: x, 1.0)
    with pytest.warns(UserWarning, match="mass has come to lie at reflecting walls"):
        GridSolver(growing, [(-2, 2)], 100).solve(gaussian(0.0, 0.3), [0.0, 2.0])
    spreading = problems.variance_exploding()
    for domain in ((-4, 12), (-12, 4)):
        with pytest.warns(UserWarning, match="mass has come to lie at reflecting walls"):
            GridSolver(spreading.equation, [domain], 200).solve(spreading.start, [0.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GridSolver(growing, [(-12, 12)], 400).solve(gaussian(0.0, 0.5), [0.0, 1.0])
        GridSolver(FokkerPlanck(lambda x, t: -x, 1.0), [(-3, 3)], 100).solve(gaussian(0.0, 0.3), [0.0, 2.0])


def test_entropy_production_is_infinite_where_jumps_go_one_way():
    equation, start = FokkerPlanck(lambda x, t: -x, 1.0), torch.zeros(60, dtype=torch.float64)
    start[20:30] = 1.0
    found = GridSolver(equation, [(-3, 3)], 60).solve(start, [0.0, 0.5])
    assert float(found.entropy_production[0]) == math.inf
    assert 0 < float(found.entropy_production[1]) < 10


def test_a_push_between_the_moments_at_which_all_cells_are_asked():
    """It lasts from 0.33 to 0.38: none of the first moments, irregular shares of the time, is in it."""
    equation = FokkerPlanck(lambda x, t: 20.0 * ((t > 0.33) & (t < 0.38)) - x, 1.0)
    found = GridSolver(equation, [(-6, 6)], 120).solve(gaussian(0.5, 0.5), [0.0, 1.0], tolerance=1e-2)
    mean = float((found.density[-1] * found.grid[0]).sum() * 0.1)
    assert found.steps > 1 and abs(mean - 0.5 * math.exp(-1) - 20 * (math.exp(-0.62) - math.exp(-0.67))) < 0.1


def test_walls_that_hold_mass_from_the_start_are_meant():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = torch.ones(50, dtype=torch.float64)
        GridSolver(FokkerPlanck(lambda x, t: torch.ones_like(x), 1.0), [(0, 1)], 50).solve(start, [0.0, 1.0])


def pushed(width, place, kind):
    """dx = f dt + dw, f = -x and a push of 2 in all, a bell around a time; and the mean at 1, from 1 / 2."""
    height = 2 / (width * math.sqrt(math.pi))
    drifts = {
        "times": lambda x, t: height * (-(((t - place) / width) ** 2)).exp()[:, None] - x,
        "a time": lambda x, t: height * torch.exp(-(((t - place) / width) ** 2)) - x,
        "a number": lambda x, t: height * math.exp(-(((float(t) - place) / width) ** 2)) - x,
    }
    mean = 0.5 * math.exp(-1) + 2 * math.exp(place - 1 + width**2 / 4)
    return FokkerPlanck(drifts[kind], 1.0), mean


@pytest.mark.parametrize(
    ("width", "place", "kind"), [(0.005, 0.53, "times"), (0.003, 0.22, "a time"), (0.05, 0.7, "a number")]
)
def test_a_short_push_is_not_passed_over(width, place, kind):
    equation, exact = pushed(width, place, kind)
    grid = GridSolver(equation, [(-6, 8)], 120).solve(gaussian(0.5, 0.5), [0.0, 1.0], tolerance=1e-2)
    assert float((grid.density[-1] * grid.grid[0]).sum() * grid.box.volume) == pytest.approx(exact, abs=0.05)
    assert len(grid.density) == 2
    basis = GalerkinSolver(equation, [Fourier(81, -6, 8)]).solve(gaussian(0.5, 0.5), [0.0, 1.0], tolerance=1e-4)
    assert float(basis.moments()[0][-1]) == pytest.approx(exact, abs=1e-4) and len(basis.values) == 2


def test_noise_that_is_on_for_a_moment_is_not_passed_over():
    """Its drift and noise change by one factor: a step that does not see it would be called exact."""
    equation = FokkerPlanck(
        lambda x, t: 0 * x, lambda x, t: 0.1 + 20 * (((t - 0.61).abs() < 0.004)[:, None] * (1 + 0 * x))
    )
    found = GridSolver(equation, [(-8, 8)], 160).solve(gaussian(0.0, 0.5), [0.0, 1.0], tolerance=1e-3)
    variance = float((found.density[-1] * found.grid[0] ** 2).sum() * found.box.volume)
    assert variance == pytest.approx(0.25 + 0.01 + 0.008 * (20.1**2 - 0.01), rel=0.02)


def test_ends_of_a_period_that_differ_are_named():
    """dx = -x dt + dw on a circle: at its end the drift leaps from -3 to 3."""
    cut = GridSolver(FokkerPlanck(lambda x, t: -x, 1.0), [(-1.5, 1.5)], 60, "periodic")
    start = torch.ones(60, dtype=torch.float64) / 3
    with pytest.warns(UserWarning, match="drift differs by 3 between the ends of coordinate 0") as caught:
        cut.solve(start, [0.0, 1.0])
    assert caught[0].filename == __file__
    leaping = FokkerPlanck(lambda x, t: x.sin() + 0.01 * x / math.tau, 1.0)
    with pytest.warns(UserWarning, match="drift differs by 0.01 between"):
        GridSolver(leaping, [(0, math.tau)], 60, "periodic").solve(torch.ones(60) / math.tau, [0.0, 1.0])
    noisy = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: 2 + x[:, 1] / 3)
    grid = GridSolver(noisy, [(-1.5, 1.5)] * 2, 12, ("reflecting", "periodic"))
    with pytest.warns(UserWarning, match="g g\\^T differs by 4 between the ends of coordinate 1"):
        grid.solve(torch.ones(12, 12, dtype=torch.float64) / 9, [0.0, 0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GridSolver(FokkerPlanck(lambda x, t: -x, 1.0), [(-6, 6)], 60, "periodic").solve(gaussian(0.0, 0.5), [0.0, 1.0])
        rounded = FokkerPlanck(lambda x, t: (10 * x.float()).sin(), 1.0)
        GridSolver(rounded, [(0, 6.2832)], 60, "periodic").solve(torch.ones(60) / 6.2832, [0.0, 1.0])
        ratchet = problems.ratchet()
        GridSolver(ratchet.equation, ratchet.domain, 60, "periodic").solve(ratchet.start, [0.0, 1.0])
