"""What every run of the grid solver keeps: the mass, the sign, the stationary state."""

import math
import warnings

import pytest
import torch
from grid_problems import bent_noise, sheared

from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck.grid import GridSolver
from diffusion.fokker_planck.laws import GaussianMixture, gaussian

PROBLEMS = {
    "ou": (problems.ornstein_uhlenbeck(), 64),
    "ou_2d_turn": (problems.ornstein_uhlenbeck(2, turn=2.0), 48),
    "vp": (problems.variance_preserving(), 96),
    "ve": (problems.variance_exploding(), 200),
    "double_well": (problems.double_well(), 96),
    "double_well_2d": (problems.double_well(2), (48, 24)),
    "double_well_3d": (problems.double_well(3), (24, 16, 16)),
    "banana": (problems.banana(), 40),
    "banana_sheared": (sheared(problems.banana()), 40),
    "bent_noise": (bent_noise(), 32),
    "ratchet": (problems.ratchet(), 64),
    "geometric_brownian": (problems.geometric_brownian(), 256),
}
REVERSIBLE = [name for name in PROBLEMS if name not in ("ou_2d_turn", "ratchet", "ve", "vp", "geometric_brownian")]


def solver(name, boundary=None):
    problem, cells = PROBLEMS[name]
    return GridSolver(problem.equation, problem.domain, cells, boundary or problem.boundary)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("boundary", ["reflecting", "absorbing", "periodic"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_mass_is_kept_and_no_density_is_negative(name, boundary):
    grid = solver(name, boundary)
    problem = PROBLEMS[name][0]
    start = grid.density(problem.start, lost=0.2)
    result = grid.solve(start, [0.0, 0.3 * problem.horizon, problem.horizon], tolerance=1e-3)
    assert float(result.mass_error.max()) < 1e-12
    assert float(result.density.min()) >= 0
    mass = result.density.reshape(3, -1).sum(1) * grid.box.volume
    torch.testing.assert_close(mass + result.absorbed, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((result.absorbed.diff() >= 0).all()) == (boundary == "absorbing" or not result.absorbed.any())
    assert bool((result.entropy_production >= 0).all())


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("name", REVERSIBLE)
def test_gibbs_state_is_stationary(name):
    problem, _ = PROBLEMS[name]
    grid = solver(name)
    gibbs = torch.softmax(problem.log_stationary(grid.box.centres), 0).reshape(grid.box.cells) / grid.box.volume
    result = grid.solve(gibbs, [0.0, 1.0])
    assert float((result.density[1] - gibbs).abs().sum()) * grid.box.volume < 1e-12
    assert float(result.current.abs().max()) < 1e-10
    found = grid.stationary()
    assert float((found.density[0] - gibbs).abs().sum()) * grid.box.volume < 1e-12


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "geometric_brownian"])
def test_stationary_state_is_kept(name):
    grid = solver(name)
    found = grid.stationary(time=0.5)
    kept = grid.solve(found.density[0], [0.5, 0.5 + 1e-9]) if name in ("ve", "vp") else None
    kept = kept or grid.solve(found.density[0], [0.0, 2.0])
    assert float((kept.density[-1] - found.density[0]).abs().sum()) * grid.box.volume < 1e-12
    assert float(found.density.min()) >= 0
    assert float(found.density.sum()) * grid.box.volume == pytest.approx(1.0, abs=1e-13)


@pytest.mark.parametrize("name", ["ornstein_uhlenbeck", "double_well", "geometric_brownian"])
def test_stationary_state_is_kept_on_fine_grids(name):
    """Where a hundred million jumps would each lose a digit."""
    problem = getattr(problems, name)()
    grid = GridSolver(problem.equation, problem.domain, 16384)
    start = torch.stack([grid.stationary().density[0], 3 * grid.stationary().density[0]])
    kept = grid.solve(start, [0.0, 20.0]).density[-1]
    assert float((kept - start).abs().sum(1).max()) * grid.box.volume < 1e-14


def test_far_start_runs_down_the_slope():
    """All mass where the stationary density is exp(-128): the polynomials of the series would overflow."""
    problem = problems.double_well()
    grid = GridSolver(problem.equation, problem.domain, 128)
    start = torch.zeros(128, dtype=torch.float64)
    start[-1] = 1 / grid.box.volume
    with pytest.warns(UserWarning, match="too coarse"):
        result = grid.solve(start, [0.0, 1.0])
    mirrored = grid.solve(start.flip(0), [0.0, 1.0], tolerance=1.0).density[1].flip(0)
    torch.testing.assert_close(result.density[1], mirrored, rtol=0, atol=1e-12)
    right = float(result.density[1][64:].sum()) * grid.box.volume
    assert 0.9 < right < 0.999
    assert float(result.density.min()) >= 0 and float(result.mass_error.max()) < 1e-12


def test_equation_is_asked_within_a_periodic_domain_only():
    def inside(x):
        assert float(x.min()) >= -3 and float(x.max()) <= 3
        return -x

    start = problems.gaussian(2.0, 0.3)
    densities = []
    for drift in (inside, lambda x: -(torch.remainder(x + 3, 6) - 3)):
        equation = FokkerPlanck(lambda x, t, drift=drift: drift(x), lambda x, t: 1.0)
        densities.append(
            GridSolver(equation, [(-3.0, 3.0)], 48, "periodic")
            .solve(start.log_prob(torch.linspace(-2.9, 2.9, 48, dtype=torch.float64)[:, None]).exp(), [0.0, 0.5])
            .density[1]
        )
    torch.testing.assert_close(*densities, rtol=1e-10, atol=1e-14)


def test_batch_is_its_members():
    problem = problems.double_well(2)
    grid = GridSolver(problem.equation, problem.domain, (24, 20), ("reflecting", "absorbing"))
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(3, 24, 20, generator=generator, dtype=torch.float64)
    starts[2] = 0
    starts[2, 3, 4] = 1.0
    with pytest.warns(UserWarning, match="too coarse"):
        batch = grid.solve(starts, [0.0, 0.1, 0.4])
        members = [grid.solve(start, [0.0, 0.1, 0.4]) for start in starts]
    for name in ("density", "current", "entropy_production", "absorbed"):
        together, alone = getattr(batch, name), torch.stack([getattr(member, name) for member in members], 1)
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    assert batch.density.shape == (3, 3, 24, 20) and batch.current.shape == (3, 3, 2, 24, 20)
    assert batch.mass_error.shape == (3,) and batch.entropy_production.shape == (3, 3)


def test_noise_that_vanishes_is_the_limit_of_upwinding():
    """Without noise the mean moves exactly, the variance grows by h t; with a noiseless coordinate nothing breaks."""
    equation = FokkerPlanck(lambda x, t: torch.ones_like(x), lambda x, t: 0.0)
    grid = GridSolver(equation, [(0.0, 10.0)], 200)
    start = problems.gaussian(3.0, 0.5)
    with pytest.warns(UserWarning, match="too coarse"):
        result = grid.solve(start, [0.0, 2.0])
    x, h = result.grid[0], grid.box.volume
    mean = (result.density * x).sum(1) * h
    variance = (result.density * x**2).sum(1) * h - mean**2
    assert float(mean[1] - mean[0]) == pytest.approx(2.0, abs=1e-10)
    assert float(variance[1] - variance[0]) == pytest.approx(2.0 * h, abs=1e-10)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("cells", [33, 34])
def test_noise_that_vanishes_in_a_point(cells):
    equation = FokkerPlanck(lambda x, t: torch.full_like(x, 0.5), lambda x, t: x)
    grid = GridSolver(equation, [(-1.0, 3.0)], cells, ("reflecting",))
    start = torch.zeros(cells, dtype=torch.float64)
    start[: cells // 8] = 1.0
    result = grid.solve(start, [0.0, 8.0])
    assert bool(torch.isfinite(result.density).all()) and float(result.density.min()) >= 0
    left = result.density[1][result.grid[0] < -0.2].sum() / start.sum()
    assert float(left) < 0.05  # it passes the point, at the speed of the drift


def test_kinetic_equation():
    """dx = v dt, dv = (-x - v) dt + dw: noise in v only; first order, without negative densities."""
    matrix = torch.tensor([[0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    equation = FokkerPlanck(lambda x, t: x @ matrix.T, lambda x, t: torch.tensor([0.0, 1.0]).to(x).expand(len(x), 2))
    errors = []
    final = torch.eye(2, dtype=torch.float64) / 2
    start = problems.gaussian([1.0, 0.0], 0.5)
    decay = torch.matrix_exp(matrix)
    law = start.moved(decay, final - decay @ final @ decay.T)
    for cells in (64, 128):
        grid = GridSolver(equation, [(-5.0, 5.0), (-5.0, 5.0)], cells)
        with pytest.warns(UserWarning, match="too coarse"):
            density = grid.solve(start, [0.0, 1.0]).density[1]
        exact = law.log_prob(grid.box.centres).exp().reshape(cells, cells)
        errors.append(float((density - exact).abs().sum()) * grid.box.volume)
    assert errors[0] < 0.2 and math.log2(errors[0] / errors[1]) > 0.8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("boundary", ["reflecting", "absorbing"])
@pytest.mark.parametrize("dim", [1, 2])
def test_networks_with_parameters(dim, boundary):
    """A drift, a noise and a law that carry gradients are solved like those without."""
    layer, noise = (torch.nn.Parameter(torch.eye(dim, dtype=torch.float64) + 0.2 * more) for more in (0, 1))
    start = gaussian(0.5, 0.6, dim)
    learned = GaussianMixture(*(torch.nn.Parameter(part) for part in (start.weights, start.means, start.covariances)))
    found = []
    for weight, g, law in ((layer, noise, learned), (layer.detach(), noise.detach(), start)):
        equation = FokkerPlanck(
            lambda x, t, w=weight: (1 + t)[:, None] * (x @ w.T - 2 * x),
            lambda x, t, g=g: (1 + t).sqrt()[:, None, None] * g,
        )
        grid = GridSolver(equation, [(-6.0, 6.0)] * dim, 48, boundary)
        found.append(grid.solve(law, [0.0, 0.5]).density)
    assert not found[0].requires_grad and torch.equal(*found)
    again = grid.solve(found[1][0].requires_grad_(), [0.0, 0.5]).density
    torch.testing.assert_close(again, found[1].detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("boundary", ["reflecting", "absorbing"])
def test_a_full_matrix_with_parameters_that_depends_on_the_place(boundary):
    eye = torch.eye(2, dtype=torch.float64)
    found = []
    for size in (torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), 0.3):
        equation = FokkerPlanck(
            lambda x, t: -x, lambda x, t, c=size: eye + (c * (1 + 0.2 * x[:, 0].sin()))[:, None, None] * eye.flip(0)
        )
        found.append(GridSolver(equation, [(-4.0, 4.0)] * 2, 24, boundary).solve(gaussian(0.0, 0.5, 2), [0.0, 0.1]))
    assert torch.equal(found[0].density, found[1].density)


def test_noise_that_grows_from_nothing_is_not_called_thin():
    """The matrix is far from singular at all times; what steps are made of may not be."""
    matrix = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    equation = FokkerPlanck(lambda x, t: t[:, None] - x, lambda x, t: (0.02 + t**3)[:, None, None] * matrix)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = GridSolver(equation, [(-4.0, 4.0)] * 2, 20).solve(gaussian(0.0, 0.7, 2), [0.0, 1.0], tolerance=1e-3)
    assert not any("nearly confined" in str(warning.message) for warning in caught)
    assert float(found.density.min()) >= 0 and float(found.mass_error.max()) < 1e-12
