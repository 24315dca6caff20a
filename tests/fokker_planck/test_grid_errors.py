"""What the grid solver says to bad input, and to figures that are not good enough."""

import math
import warnings

import pytest
import torch

from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck.grid import GridSolver
from diffusion.fokker_planck.selling import selling

OU = problems.ornstein_uhlenbeck()


@pytest.mark.parametrize(
    "arguments, texts",
    [
        ({"domain": ((0, 1),) * 4}, ("4 coordinates", "particles")),
        ({"domain": ((1, 1),)}, ("(1.0, 1.0)", "low < high")),
        ({"domain": ((0, math.inf),)}, ("inf", "finite")),
        ({"cells": 2}, ("cells is 2", "at least 3")),
        ({"cells": (8, 8)}, ("(8, 8)", "1 coordinates")),
        ({"boundary": "open"}, ("'open'", "reflecting, absorbing, periodic")),
        ({"boundary": ("periodic", "periodic")}, ("boundary", "1 coordinates")),
        ({"boundary": None}, ("boundary is None", "reflecting, absorbing, periodic")),
        ({"device": "abacus"}, ("device is 'abacus'", "'cuda'")),
    ],
    ids=["four", "empty", "infinite", "few", "many_cells", "word", "many_words", "no_word", "device"],
)
def test_bad_grid(arguments, texts, user_error):
    with user_error(*texts):
        GridSolver(OU.equation, **{"domain": OU.domain, "cells": 16, **arguments})


@pytest.mark.parametrize("times", [[], [0.0, 1.0, 0.5], [0.0, 0.0], [0.0, math.nan], "abc", None], ids=str)
def test_bad_times(times, user_error):
    with user_error("times", "rising"):
        GridSolver(OU.equation, OU.domain, 64).solve(OU.start, times)


@pytest.mark.parametrize(
    "start, texts",
    [
        (torch.ones(63), ("(63,)", "(64,)")),
        (torch.ones(1, 2, 64), ("(1, 2, 64)",)),
        (torch.full((64,), math.nan), ("nan",)),
        (torch.linspace(-0.5, 1, 64), ("-0.5", "not negative")),
        (torch.eye(2, 64) * torch.tensor([[1.0], [0.0]]), ("not all 0",)),
        ("normal", ("the start is str", "log_prob", "(64,)")),
    ],
    ids=["cells", "dimensions", "nan", "negative", "zero", "word"],
)
def test_bad_start(start, texts, user_error):
    with user_error(*texts):
        GridSolver(OU.equation, OU.domain, 64).solve(start, [0.0, 1.0])


def test_domain_that_loses_mass(user_error):
    grid = GridSolver(OU.equation, [(-0.5, 6.0)], 64)
    with user_error("0.9986501", "1e-06", "larger domain"):
        grid.solve(OU.start, [0.0, 1.0])
    assert float(grid.density(OU.start, lost=2e-3).sum()) * grid.box.volume == pytest.approx(1.0, abs=1e-14)
    grid = GridSolver(OU.equation, OU.domain, 16)
    with user_error("more"):
        grid.solve(problems.gaussian(1.0, 0.02), [0.0, 1.0])


def test_law_that_is_not_finite(user_error):
    class Law:
        def log_prob(self, x):
            return torch.full_like(x[:, 0], math.nan)

    with user_error("not finite near x=[-7.75]"):
        GridSolver(OU.equation, OU.domain, 32).solve(Law(), [0.0, 1.0])


def test_grid_too_coarse_for_the_drift():
    """The number of cells that the warning asks for is enough, and not much more than enough."""
    problem = problems.double_well(barrier=4.0)
    with pytest.warns(UserWarning, match=r"0\.\d+ of the mass .* about \[\d+\] cells would do") as caught:
        GridSolver(problem.equation, problem.domain, 32).solve(problem.start, [0.0, 1.0])
    needed = int(str(caught[0].message).split("about [")[1].split("]")[0])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GridSolver(problem.equation, problem.domain, int(1.3 * needed)).solve(problem.start, [0.0, 1.0])
    with pytest.warns(UserWarning, match="too coarse for the drift"):
        GridSolver(problem.equation, problem.domain, int(0.6 * needed)).solve(problem.start, [0.0, 1.0])


SWINGS = {
    "along": FokkerPlanck(lambda x, t: 5 * (40 * x).cos() - x, 1.0),
    "full": FokkerPlanck(
        lambda x, t: 5 * (40 * x.sum(1, keepdim=True)).cos() - x,
        lambda x, t: torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=x.dtype).expand(len(x), 2, 2),
    ),
}


@pytest.mark.parametrize(("name", "cells"), [("along", 32), ("along", 64), ("along", 128), ("full", 32)])
def test_a_drift_that_swings_within_the_cells_is_named(name, cells):
    """No difference between neighbours is large then: it may be 0.4 off (L1) though the rates look harmless."""
    dim = 2 if name == "full" else 1
    grid = GridSolver(SWINGS[name], [(-5.0, 5.0)] * dim, cells)
    with pytest.warns(UserWarning, match="swings within the cells that hold 1 of the mass"):
        grid.solve(problems.gaussian(0.0, 0.5, dim), [0.0, 0.1])


@pytest.mark.parametrize(
    ("drift", "cells", "dim"),
    [
        (lambda x, t: -2 * x.sign(), 64, 2),
        (lambda x, t: -3 * x.sign(), 64, 1),
        (lambda x, t: 4 * x - x**3, 128, 1),
        (lambda x, t: 5 * (40 * x).cos() - x, 512, 1),
    ],
    ids=["leap_2d", "leap", "cubic", "fine"],
)
def test_a_drift_that_the_cells_resolve_is_not_spoken_of(drift, cells, dim):
    grid = GridSolver(FokkerPlanck(drift, 1.0), [(-5.0, 5.0)] * dim, cells)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid.solve(problems.gaussian(0.0, 0.5, dim), [0.0, 1.0])


@pytest.mark.parametrize("push", [3.9, 4.1, -4.1])
def test_grid_a_little_too_coarse(push):
    """The log density at rest changes by half the push from one cell to the next; 2 is the limit."""
    grid = GridSolver(FokkerPlanck(lambda x, t: push + 0 * x, math.sqrt(2)), [(-6.0, 6.0)], 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grid.solve(problems.gaussian([-1.0], 0.8), [0.0, 0.1])
    assert ["too coarse" in str(warning.message) for warning in caught] == [True] * (abs(push) > 4)


def test_steps_too_coarse_for_the_tolerance():
    equation = FokkerPlanck(lambda x, t: 3 * (4 * t)[:, None].sin() - x, lambda x, t: 1.0)
    with pytest.warns(UserWarning, match="3 steps between times are too coarse"):
        GridSolver(equation, [(-4.0, 4.0)], 64).solve(problems.gaussian(0.0, 0.5), [0.0, 1.0], steps=3)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_no_stationary_state(user_error):
    with user_error("absorbing"):
        GridSolver(OU.equation, OU.domain, 16, "absorbing").stationary()
    still = FokkerPlanck(
        lambda x, t: -x * torch.tensor([1.0, 0.0]).to(x), lambda x, t: torch.tensor([1.0, 0.0]).to(x).expand_as(x)
    )
    with user_error("parts", "noise in every coordinate"):
        GridSolver(still, ((-3, 3), (-3, 3)), 8).stationary()


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_noise_along_a_line_is_named():
    g = torch.tensor([[1.0, 0.0], [0.61, 0.0]], dtype=torch.float64)
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: g.expand(len(x), -1, -1))
    grid = GridSolver(equation, ((-5, 5), (-5, 5)), 32)
    with pytest.warns(UserWarning, match=r"confined to a line .* 0\.001 of its largest") as caught:
        result = grid.solve(problems.gaussian([0.0, 0.0], 0.7), [0.0, 0.5])
    assert caught[0].filename == __file__
    assert float(result.density.min()) >= 0 and float(result.mass_error.max()) < 1e-12


@pytest.mark.parametrize(("width", "said"), [(0.003, True), (0.2, False)])
def test_noise_that_leaps(width, said):
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    equation = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: (1.5 + 0.5 * (x[:, :1] / width).tanh())[:, :, None] * root)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GridSolver(equation, ((-1, 1), (-1, 1)), 32).solve(torch.full((32, 32), 0.25), [0.0, 0.1])
    assert sum("the noise leaps" in str(warning.message) for warning in caught) == said


def test_full_noise_that_does_not_change_need_not_be_made_of_torch():
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: torch.from_numpy(root.expand(len(x.numpy()), -1, -1).numpy()))
    GridSolver(equation, ((-4, 4), (-4, 4)), 16).solve(problems.gaussian([0.0, 0.0], 0.7), [0.0, 0.1])


def test_a_coordinate_without_noise_is_named():
    equation = FokkerPlanck(
        lambda x, t: torch.stack([x[:, 1], -x[:, 0] - x[:, 1]], 1),
        lambda x, t: torch.tensor([0.0, 2**0.5], dtype=x.dtype).expand(len(x), 2),
    )
    with pytest.warns(UserWarning, match=r"no noise along coordinates \[0\], where the grid is of first order"):
        GridSolver(equation, ((-5, 5), (-5, 5)), 48).solve(problems.gaussian([0.0, 0.0], 0.8), [0.0, 0.1])


def test_drift_that_is_not_finite(user_error):
    equation = FokkerPlanck(lambda x, t: 1 / (x - 0.5).clamp_min(0), lambda x, t: 1.0)
    with user_error("drift", "not finite"):
        GridSolver(equation, [(0.0, 1.0)], 16).solve(torch.ones(16), [0.0, 1.0])


@pytest.mark.parametrize("dim", [2, 3])
def test_selling(dim):
    """Positive weights and whole numbers that give the matrix back; few of them for each matrix."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(200, dim, dim, generator=generator, dtype=torch.float64)
    matrices = g @ g.mT + 0.01 * torch.eye(dim)
    weights = selling(matrices)
    total, used = torch.zeros_like(matrices), torch.zeros(200)
    for e, rho in weights.items():
        vector = torch.tensor(e, dtype=torch.float64)
        assert e > (0,) * dim and float(rho.min()) >= 0
        total += rho[:, None, None] * torch.outer(vector, vector)
        used += rho > 0
    torch.testing.assert_close(total, matrices, rtol=1e-11, atol=1e-11)
    assert int(used.max()) <= dim * (dim + 1) // 2


def test_a_law_beyond_a_period(user_error):
    grid = GridSolver(FokkerPlanck(lambda x, t: 0 * x, 1.0), [(0.0, 1.0)], 64, "periodic")
    with user_error("the mass 0.", "fold the law into the periodic domain"):
        grid.solve(problems.gaussian(0.05, 0.1), [0.0, 0.1])


def test_a_state_that_is_not_kept_is_no_answer(monkeypatch, user_error):
    monkeypatch.setattr("diffusion.fokker_planck.stationary.KEPT", -1.0)
    problem = problems.ornstein_uhlenbeck(2, turn=1.0)
    with user_error("cannot be found", "not balanced"):
        GridSolver(problem.equation, ((-5, 5), (-5, 5)), 32).stationary()


def test_full_noise_that_vanishes_has_at_most_all_of_itself_added():
    root = torch.linalg.cholesky(torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: x[:, :1].clamp_min(0)[:, :, None] * root)
    with pytest.warns(UserWarning, match=r"up to 1 of its largest eigenvalue"):
        GridSolver(equation, ((-4, 4), (-4, 4)), 16).solve(problems.gaussian([0.5, 0.0], 0.6), [0.0, 0.01])


@pytest.mark.parametrize("height", [8.0, 100.0])
def test_cells_too_wide_for_a_push_between_the_times_are_named(height):
    """A push of 100 at t=0.4 spreads the density over cells of 1/16; at 0 and 1 there is none."""
    equation = FokkerPlanck(lambda x, t: height * (-((t - 0.4) / 0.01).square()).exp()[:, None] - x, 1.0)
    grid = GridSolver(equation, [(-8.0, 8.0)], 256)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = grid.solve(problems.gaussian(0.0, 0.7), [0.0, 1.0], tolerance=1e-3)
    shift = height * 0.01 * math.sqrt(math.pi) * math.exp(-0.6)
    exact = problems.gaussian(shift, math.sqrt(0.5 - 0.01 * math.exp(-2.0))).log_prob(grid.box.centres).exp()
    error = float((found.density[1] - exact).abs().sum()) * grid.box.volume
    said = any("too coarse for the drift" in str(warning.message) for warning in caught)
    assert said == (height > 50) and (error > 1e-2) == said


@pytest.mark.parametrize(("height", "said"), [(0.2, False), (20.0, True)])
def test_swings_of_a_push_between_the_times_are_named(height, said):
    """0.2 is small beside the noise of a cell of 1/8."""
    equation = FokkerPlanck(
        lambda x, t: height * (-((t - 0.4) / 0.05).square()).exp()[:, None] * (40 * x).cos() - x, 1.0
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GridSolver(equation, [(-5.0, 5.0)], 80).solve(problems.gaussian(0.0, 0.7), [0.0, 1.0], tolerance=1e-3)
    assert any("swings within the cells" in str(warning.message) for warning in caught) == said
