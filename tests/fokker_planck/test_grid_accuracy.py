"""The grid solver against closed forms, and its order in space and in time."""

import itertools
import math

import pytest
import torch
from grid_problems import SHEAR, bent_noise
from scipy.linalg import solve_continuous_lyapunov

from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.grid import GridSolver
from diffusion.fokker_planck.jumps import jumps_at
from diffusion.fokker_planck.problems import Problem


def correlated(dim):
    """dx = -x dt + g dw with a full matrix g: Gaussians at all times."""
    g = torch.eye(3, dtype=torch.float64)
    g[1:, :2], g[0, 2] = SHEAR.flip(0), -0.5
    g = g[:dim, :dim] if dim == 3 else SHEAR
    a, start = g @ g.T, problems.gaussian([0.6, -0.4, 0.3][:dim], 0.8)

    def law_at(t):
        eye = torch.eye(dim, dtype=torch.float64)
        return start.moved(math.exp(-t) * eye, (1 - math.exp(-2 * t)) * a / 2)

    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: g.expand(len(x), -1, -1))
    return Problem(equation, start, ((-5.0, 5.0),) * dim, 0.4, law_at=law_at)


def turning_wave():
    """On a circle, 1 + c exp(-D k^2 t) cos(k (x - v t)), here with D = 1 / 2, k = 2 and the speed v = 2."""

    class Wave:
        def __init__(self, t):
            self.t = t

        def log_prob(self, x):
            return (1 + 0.7 * math.exp(-2 * self.t) * (2 * (x[:, 0] - 2 * self.t)).cos()).log() - math.log(math.tau)

    equation = FokkerPlanck(lambda x, t: torch.full_like(x, 2.0), 1.0)
    return Problem(equation, Wave(0.0), ((0.0, math.tau),), 0.8, "periodic", law_at=Wave)


# the problem, numbers of cells, and the order
ORDERS = {
    "ou": (problems.ornstein_uhlenbeck(horizon=0.5), (64, 128), 4),
    "vp": (problems.variance_preserving(horizon=0.3), (64, 128), 4),
    "ve": (problems.variance_exploding(), (80, 160), 4),
    "geometric_brownian": (problems.geometric_brownian(horizon=0.5), (256, 512), 4),
    "turning_wave": (turning_wave(), (24, 48), 4),
    "ou_2d_turn": (problems.ornstein_uhlenbeck(2, turn=2.0, horizon=0.5), (48, 96), 2),
    "ou_3d_turn": (problems.ornstein_uhlenbeck(3, turn=1.0, noise=2.0, horizon=0.2), (36, 54), 2),
    "correlated_2d": (correlated(2), (48, 96), 2),
    "correlated_3d": (correlated(3), (32, 48), 2),
}


def distance(grid, density, law):
    exact = law.log_prob(grid.box.centres).exp().reshape(grid.box.cells)
    return float((density - exact).abs().sum()) * grid.box.volume


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("name", ORDERS)
def test_order_in_space(name):
    (problem, sizes, order), errors = ORDERS[name], []
    for cells in sizes:
        grid = GridSolver(problem.equation, problem.domain, cells, problem.boundary)
        start = grid.density(problem.start, lost=1e-2)
        density = grid.solve(start, [0.0, problem.horizon], tolerance=1e-7).density[1]
        errors.append(distance(grid, density, problem.law_at(problem.horizon)))
    assert errors[1] < 0.02
    assert math.log(errors[0] / errors[1], sizes[1] / sizes[0]) == pytest.approx(order, abs=0.15)


def driven(t):
    """Mean at t of dx = (3 sin(4 t) - x) dt + dw from 0."""
    return 3 * (math.sin(4 * t) - 4 * math.cos(4 * t) + 4 * math.exp(-t)) / 17


DRIVEN = FokkerPlanck(lambda x, t: 3 * (4 * t)[:, None].sin() - x, lambda x, t: 1.0)


def test_order_in_time():
    """On fine cells; on others there is a part of second order, far below the error in space."""
    grid = GridSolver(DRIVEN, [(-4.0, 4.0)], 256)
    start, sizes, errors = problems.gaussian(0.0, 0.5), (4, 8, 16), []
    exact = grid.solve(start, [0.0, 1.0], steps=128, tolerance=1.0).density[1]
    for steps in sizes:
        result = grid.solve(start, [0.0, 1.0], steps=steps, tolerance=1.0)
        errors.append(float((result.density[1] - exact).abs().sum()) * grid.box.volume)
        assert result.steps == steps and float(result.density.min()) >= 0
        assert errors[-1] < result.time_error < 250 * errors[-1]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([4, 4], abs=0.15)


def test_error_control_in_time():
    grid = GridSolver(DRIVEN, [(-4.0, 4.0)], 80)
    start = problems.gaussian(0.0, 0.5)
    fine = grid.solve(start, [0.0, 1.0], tolerance=1e-9)
    for tolerance in (1e-5, 1e-7):
        result = grid.solve(start, [0.0, 1.0], tolerance=tolerance)
        error = float((result.density[1] - fine.density[1]).abs().sum()) * grid.box.volume
        assert tolerance / 1000 < error < tolerance and result.time_error < tolerance
        assert result.steps < min(fine.steps, 40)
    mean = float((fine.density[1] * fine.grid[0]).sum()) * grid.box.volume
    assert mean == pytest.approx(driven(1.0), abs=1e-5)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
@pytest.mark.parametrize("dim", [1, 2])
def test_the_error_of_steps_is_honest_on_coarse_cells(dim):
    """There the part of second order in time is the larger one."""
    if dim == 1:
        equation = FokkerPlanck(lambda x, t: 3 * (7 * t)[:, None].sin() + x.cos() + 1, 1.0)
        grid, start = GridSolver(equation, [(0.0, math.tau)], 64, "periodic"), problems.gaussian(3.0, 0.4)
    else:
        equation = FokkerPlanck(lambda x, t: 3 * (3 * t)[:, None].sin() - x, 0.8)
        grid, start = GridSolver(equation, [(-4.0, 4.0)] * 2, 20), problems.gaussian(0.0, 0.6, 2)
    start = grid.density(start)
    fine = grid.solve(start, [0.0, 1.0], tolerance=2e-6 if dim == 2 else 3e-7).density[1]
    found = grid.solve(start, [0.0, 1.0], tolerance=1e-4 if dim == 2 else 1e-5)
    assert float((found.density[1] - fine).abs().sum()) * grid.box.volume < 1.1 * found.time_error


@pytest.mark.parametrize("power", [1, 7])
def test_change_of_time_is_one_step(power):
    def pace(t):
        return 0.1 + 5 * t**power

    problem = problems.ornstein_uhlenbeck()
    equation = FokkerPlanck(lambda x, t: -pace(t)[:, None] * x, lambda x, t: (2 * pace(t)).sqrt())
    result = GridSolver(equation, problem.domain, 64).solve(problem.start, [0.0, 0.3, 1.0], tolerance=1e-12)
    assert result.steps == 2 and result.time_error == 0


@pytest.mark.parametrize("drift", [0.0, 3.0, -3.0])
def test_survival_between_absorbing_ends(drift):
    """p = exp(c x / 2D) sin(pi x) decays at the rate pi^2 D + c^2 / 4D, here with D = 1."""
    equation = FokkerPlanck(lambda x, t: torch.full_like(x, drift), lambda x, t: math.sqrt(2.0))
    rate, errors = math.pi**2 + drift**2 / 4, []
    for cells in (32, 64):
        grid = GridSolver(equation, [(0.0, 1.0)], cells, "absorbing")
        x = grid.box.axes[0]
        start = (drift * x / 2).exp() * (math.pi * x).sin()
        start = start / (start.sum() / cells)
        result = grid.solve(start, [0.0, 0.1, 0.3])
        survival = result.density.sum(1) / cells
        torch.testing.assert_close(survival + result.absorbed, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-13)
        errors.append(abs(math.log(float(survival[2] / survival[1])) / 0.2 + rate))
        scale = result.density[1].sum() / ((drift * x / 2).exp() * (math.pi * x).sin()).sum()
        current = scale * (drift * x / 2).exp() * (drift / 2 * (math.pi * x).sin() - math.pi * (math.pi * x).cos())
        torch.testing.assert_close(
            result.current[1, 0], current, rtol=0, atol=30 / cells**2 * float(current.abs().max())
        )
    assert errors[1] < 1e-4 and math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("drift", [2.0, -2.0])
@pytest.mark.parametrize("matrix", [False, True])
def test_rates_to_an_absorbing_face(matrix, drift):
    """A constant current to the face: D / (h int_0^(h/2) exp(-f x / D) dx), for noise D of its own or in a matrix."""
    d, h, sides = 0.5, 0.25, ((0.0, 1.0), (0.0, 1.0)) if matrix else ((0.0, 1.0),)
    g = torch.tensor([[1.0, 0.0], [1e-9, 1.0]], dtype=torch.float64) if matrix else torch.ones(1).double()
    equation = FokkerPlanck(
        lambda x, t: drift * torch.eye(x.shape[1])[0].to(x).expand_as(x),
        lambda x, t: g.expand(len(x), *g.shape),
    )
    box = Box(sides, 4, ("absorbing", "reflecting")[: len(sides)])
    jumps = jumps_at(equation, box, 0.0)
    lost, way = jumps.lost.reshape(4, -1)[:, -1], jumps.way.reshape(len(sides), 4, -1)[0, :, -1]
    ends = [f / h / -math.expm1(-f * h / 2 / d) for f in (-drift, drift)]
    torch.testing.assert_close(lost, torch.tensor([ends[0], 0, 0, ends[1]]).double(), rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(way, h / 2 * torch.tensor([-ends[0], 0, 0, ends[1]]).double(), rtol=1e-7, atol=1e-6)


def test_one_absorbing_side_of_a_square():
    """Words for each coordinate: absorbed along the second, reflected along the first."""
    equation = FokkerPlanck(lambda x, t: torch.zeros_like(x), lambda x, t: math.sqrt(2.0))
    grid = GridSolver(equation, [(0.0, 1.0), (0.0, 1.0)], (5, 32), ("reflecting", "absorbing"))
    start = (math.pi * grid.box.axes[1]).sin().expand(5, 32)
    result = grid.solve(start, [0.0, 0.2])
    factor = math.exp(-0.2 * 4 * 32**2 * math.sin(math.pi / 64) ** 2)
    torch.testing.assert_close(result.density[1], factor * start, rtol=1e-11, atol=0)


def test_skew_noise_between_absorbing_sides():
    """Jumps that cross a face end there: in a strip only the noise across it counts, whatever is along it."""
    a = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    g = torch.linalg.cholesky(a)
    equation = FokkerPlanck(lambda x, t: torch.zeros_like(x), lambda x, t: g.expand(len(x), -1, -1))
    errors = []
    for cells in (24, 48):
        grid = GridSolver(equation, [(0.0, 1.0), (0.0, 1.0)], cells, ("absorbing", "periodic"))
        start = (math.pi * grid.box.axes[0]).sin()[:, None].expand(cells, cells)
        survival = grid.solve(start, [0.0, 0.1, 0.2]).density.sum((1, 2))
        errors.append(abs(math.log(float(survival[1] / survival[2])) / 0.1 - math.pi**2 * 2.0 / 2))
    assert errors[1] < 0.05 and errors[0] / errors[1] > 1.8


@pytest.mark.parametrize("matrix", [False, True])
def test_waves_on_a_torus(matrix):
    """cos(k.x) decays at the rate k.a.k / 2 and travels at the speed f."""
    a = torch.tensor([[0.04, 0.024], [0.024, 0.02]], dtype=torch.float64) if matrix else 0.02 * torch.eye(2).double()
    g, f = torch.linalg.cholesky(a), torch.tensor([0.1, -0.07], dtype=torch.float64)
    equation = FokkerPlanck(lambda x, t: f.expand_as(x), lambda x, t: g.expand(len(x), -1, -1))
    wave, errors = math.tau * torch.tensor([1.0, 1.0], dtype=torch.float64), []
    for cells in (48, 96):
        grid = GridSolver(equation, [(0.0, 1.0), (0.0, 1.0)], cells, "periodic")
        x = grid.box.centres
        density = grid.solve((1 + 0.5 * (x @ wave).cos()).reshape(cells, cells), [0.0, 1.0]).density[1]
        exact = 1 + 0.5 * math.exp(-float(wave @ a @ wave) / 2) * (((x - f) @ wave).cos())
        errors.append(float((density.reshape(-1) - exact).abs().max()))
    assert errors[1] < 0.02 and math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("cells", [96, 128])
def test_ratchet_out_of_equilibrium(cells):
    """Density and current of Stratonovich's formula at the centres, but for the normalisation by the centres' sum."""
    problem = problems.ratchet()
    grid = GridSolver(problem.equation, problem.domain, cells, "periodic")
    found = grid.stationary()
    exact, current = problems.ratchet_stationary(grid.box.axes[0])
    torch.testing.assert_close(found.density[0], exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.current[0, 0], torch.full_like(exact, current), rtol=0, atol=1e-9)
    production = current * math.tau / 0.5  # force times current over temperature, force 1
    assert float(found.entropy_production) == pytest.approx(production, abs=1e-8)


@pytest.mark.parametrize("cells", [256, 600])
def test_a_cold_ratchet_has_one_current(cells):
    """Where the way around is nearly closed, one of its two ends holds much more mass than the other."""
    problem = problems.ratchet(temperature=0.1)
    found = GridSolver(problem.equation, problem.domain, cells, "periodic").stationary()
    current = problems.ratchet_stationary(found.grid[0], temperature=0.1)[1]
    torch.testing.assert_close(found.current, torch.full_like(found.current, current), rtol=0, atol=1e-9)
    assert float(found.entropy_production) == pytest.approx(current * math.tau / 0.1, rel=1e-6)


@pytest.mark.parametrize(("reach", "cells"), [(9.0, 64), (10.0, 96)])
@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_the_emptiest_cells_do_not_matter_to_what_is_at_rest(reach, cells):
    problem = problems.ornstein_uhlenbeck(2, turn=1.0)
    grid = GridSolver(problem.equation, ((-reach, reach),) * 2, cells)
    found = grid.stationary()
    exact = grid.box.averages(lambda x: -x.square().sum(1) / 2 - math.log(math.tau))
    assert float((found.density.reshape(-1) - exact).abs().sum()) * grid.box.volume < 5e-3
    assert float(found.entropy_production) == pytest.approx(2.0, abs=1e-3)


def test_what_is_at_rest_under_correlated_noise():
    """The entropy production of a linear drift -A x is tr(A^T D^-1 A S) - tr A, with S the covariance at rest."""
    rate = torch.tensor([[1.0, -0.8], [0.3, 0.6]], dtype=torch.float64)
    a = torch.tensor([[2.0, 0.9], [0.9, 0.7]], dtype=torch.float64)
    rest = torch.from_numpy(solve_continuous_lyapunov(rate.numpy(), a.numpy()))
    exact = float((rate.T @ torch.linalg.inv(a / 2) @ rate @ rest).trace() - rate.trace())
    root, errors = torch.linalg.cholesky(a), []
    equation = FokkerPlanck(lambda x, t: -x @ rate.T, lambda x, t: root.expand(len(x), -1, -1))
    for cells in (48, 96):
        found = GridSolver(equation, ((-5.0, 5.0),) * 2, cells).stationary()
        x, mass = torch.cartesian_prod(*found.grid), found.density.reshape(-1) * (10.0 / cells) ** 2
        assert float((mass @ x).abs().max()) < 1e-9
        errors.append(abs(float(found.entropy_production) - exact))
    assert errors[1] < 5e-3 and errors[0] / errors[1] > 3.0


def test_current_and_entropy_production_of_a_turn():
    """At rest the current is -turn R x p, and |turn x|^2 / D averages to 2 turn^2 / rate."""
    errors = []
    for cells in (48, 96):
        problem = problems.ornstein_uhlenbeck(2, turn=1.0)
        grid = GridSolver(problem.equation, problem.domain, cells)
        found = grid.stationary()
        x = grid.box.centres
        density = found.density.reshape(-1)
        exact = torch.stack([-x[:, 1], x[:, 0]]) * density
        gap = float((found.current[0].reshape(2, -1) - exact).abs().sum()) * grid.box.volume
        errors.append((gap, abs(float(found.entropy_production) - 2.0)))
    assert errors[1][0] < 0.03 and math.log2(errors[0][0] / errors[1][0]) == pytest.approx(2, abs=0.15)
    assert errors[1][1] < 1e-4 and errors[0][1] / errors[1][1] > 3.5


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_entropy_production_is_the_loss_of_free_energy():
    problem = problems.double_well(2)
    grid = GridSolver(problem.equation, problem.domain, (64, 32))
    h = 1e-4
    result = grid.solve(problem.start, [0.0, 0.5 - h, 0.5, 0.5 + h])
    gibbs = grid.stationary().density[0]
    energy = (torch.xlogy(result.density, result.density / gibbs)).sum((1, 2)) * grid.box.volume
    assert float(result.entropy_production[2]) == pytest.approx(float(energy[1] - energy[3]) / (2 * h), rel=1e-6)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_noise_that_turns_with_the_place():
    """The weak form, for moments that know nothing of the grid: d/dt E[phi] = E[f . grad phi + tr(a Hess phi) / 2]."""
    problem, errors = bent_noise(), []
    for cells in (32, 64):
        grid = GridSolver(problem.equation, problem.domain, cells)
        h = 0.02
        result = grid.solve(problem.start, [0.0, 0.2, 0.2 + h, 0.2 + 2 * h])
        x, p = grid.box.centres, result.density.reshape(4, -1) * grid.box.volume
        f, a = problem.equation.drift(x, 0.0), problem.equation.covariance(x, 0.0)
        moments = torch.stack([x[:, 0], x[:, 1], x[:, 0] * x[:, 1], x[:, 0] ** 2], 1)
        rates = torch.stack(
            [f[:, 0], f[:, 1], f[:, 0] * x[:, 1] + f[:, 1] * x[:, 0] + a[:, 0, 1], 2 * f[:, 0] * x[:, 0] + a[:, 0, 0]],
            1,
        )
        change = (p[3] - p[1]) @ moments
        simpson = h / 3 * (p[1] + 4 * p[2] + p[3]) @ rates
        errors.append(float((change - simpson).abs().max()) / (2 * h))
    assert errors[1] < 0.01 and errors[0] / errors[1] > 3
