"""Chains on lines and circles: the compact scheme against dense matrices, and what it is not used for."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from diffusion.fokker_planck import FokkerPlanck, GridSolver, lines, problems
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.jump_process import JumpProcess
from diffusion.fokker_planck.jumps import jumps_at
from diffusion.fokker_planck.laws import gaussian

# the equation and its domain, cells, the boundary, the duration
CASES = {
    "ou": (problems.ornstein_uhlenbeck(), 48, "reflecting", 1.0),
    "geometric_brownian": (problems.geometric_brownian(), 96, "reflecting", 0.5),
    "absorbing": (problems.ratchet(), 48, "absorbing", 0.5),
    "ratchet": (problems.ratchet(), 48, "periodic", 1.0),
    "ratchet_back": (problems.ratchet(force=-0.4, temperature=0.1), 64, "periodic", 3.0),
    "closed_ratchet": (problems.ratchet(force=0.0), 32, "periodic", 1.0),
    "three_cells": (problems.ratchet(), 3, "periodic", 1.0),
}


def line_of(name):
    problem, cells, boundary, duration = CASES[name]
    box = Box(problem.domain, cells, boundary)
    return JumpProcess(box, jumps_at(problem.equation, box, 0.0)), duration


def dense(bands):
    size = bands.shape[1]
    matrix, k = np.zeros((size, size)), np.arange(size)
    for values, rows, columns in zip(bands, (k + 1, k, k), (k, k, k + 1), strict=True):
        matrix[rows % size, columns % size] += values
    return matrix


@pytest.mark.parametrize("name", CASES)
def test_the_compact_scheme_is_an_exponential(name):
    process, duration = line_of(name)
    line, size = process._line, process.number + process.absorbing
    chain = process.apply(torch.eye(size, dtype=torch.float64)).numpy().T
    np.testing.assert_allclose(dense(line.rates), chain[: line.number, : line.number], rtol=0, atol=1e-12)
    compact = dense(line.compact)
    np.testing.assert_allclose(compact.sum(0), 1.0, rtol=0, atol=1e-14)
    generator = np.zeros((size, size))
    generator[: line.number, : line.number] = np.linalg.solve(compact, dense(line.rates))
    if process.absorbing:
        generator[-1, :-1] = line.lost
    states = torch.rand(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    found = line.advance(states, duration, np.array([True, False, True]))
    exact = states @ expm(duration * generator).T
    exact[1] = expm(duration * chain) @ states[1]
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "absorbing"])
def test_the_law_at_rest(name):
    process, _ = line_of(name)
    line = process._line
    assert np.abs(dense(line.rates) @ line.at_rest).max() < 1e-15 * process.rate
    assert line.at_rest.min() > 0 and line.at_rest.sum() == pytest.approx(1.0, abs=1e-14)


def test_a_circle_keeps_its_current_on_fine_grids():
    problem = problems.ratchet()
    grid = GridSolver(problem.equation, problem.domain, 8192, "periodic")
    rest = torch.from_numpy(JumpProcess(grid.box, jumps_at(problem.equation, grid.box, 0.0))._line.at_rest)
    kept = grid.solve(rest / grid.box.volume, [0.0, 20.0]).density[-1]
    assert float((kept * grid.box.volume - rest).abs().sum()) < 1e-14


def test_the_weights_are_those_of_a_fourth_order():
    """Without drift M is (1, 10, 1) / 12: R p = M A p + O(h^4), here on a wave, and on the sixth order no more."""
    box = Box([(0.0, math.tau)], 24, "periodic")
    line = JumpProcess(box, jumps_at(FokkerPlanck(lambda x, t: 0 * x, math.sqrt(2.0)), box, 0.0))._line
    np.testing.assert_allclose(line.compact, np.array([[1.0], [10.0], [1.0]]).repeat(24, 1) / 12, rtol=1e-14)
    wave = np.sin(box.axes[0].numpy())
    ratio = (dense(line.rates) @ wave) / (dense(line.compact) @ wave)
    np.testing.assert_allclose(ratio, -1 + (math.tau / 24) ** 4 / 240, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("spread", "smooth"), [(0.4, False), (0.6, False), (1.0, True), (3.0, True)])
def test_what_the_cells_do_not_resolve_is_left_to_the_chain(spread, smooth):
    """The spread is that of the start, in cells; each member of a batch is looked at by itself."""
    equation = FokkerPlanck(lambda x, t: -x, 1.0)
    grid = GridSolver(equation, [(-5.0, 5.0)], 50)
    starts = torch.stack([grid.density(gaussian(0.3, s), lost=1e-3) for s in (0.2 * spread, 1.0)])
    process = JumpProcess(grid.box, jumps_at(equation, grid.box, 0.0))
    assert process._line.smooth(starts.numpy()).tolist() == [smooth, True]
    short, found = 0.02, grid.solve(starts, [0.0, 0.02])
    chain = expm(short * dense(process._line.rates)) @ starts[0].numpy()
    gap = float(np.abs(found.density[1, 0].numpy() - chain).sum()) * grid.box.volume
    assert gap < 1e-12 if not smooth else gap > 1e-5
    assert float(found.density.min()) >= 0 and found.put_back < 1e-4


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_cells_that_are_too_wide_for_the_drift_leave_the_scheme_regular():
    problem = problems.double_well(barrier=30.0)
    for cells in (16, 31, 64):
        box = Box(problem.domain, cells)
        compact = dense(JumpProcess(box, jumps_at(problem.equation, box, 0.0))._line.compact)
        assert (2 * np.abs(compact.diagonal()) - np.abs(compact).sum(0)).min() > 0.1  # diagonally dominant


@pytest.mark.parametrize("name", ["ou", "absorbing", "ratchet_back"])
def test_many_states_are_taken_along_by_one_matrix(name, monkeypatch):
    process, duration = line_of(name)
    size, resolvents, asked = process.number + process.absorbing, lines._resolvents, []
    states = torch.rand(1200, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    process.ledger.smooth = smooth = np.arange(1200) % 2 > 0
    alone = process._line.advance(states[:40].numpy(), duration, smooth[:40])
    monkeypatch.setattr(lines, "_resolvents", lambda *args: asked.append(args[-1].shape[1]) or resolvents(*args))
    np.testing.assert_allclose(process.advance(states, duration)[:40].numpy(), alone, rtol=0, atol=2e-12)
    assert max(asked) <= size + 2


@pytest.mark.parametrize(
    ("speed", "noise", "time", "waves", "cells", "error"),
    [
        (2.5, 0.5, 12.0, 1, 128, 1e-6),  # five turns, nearly at rest
        (0.05, 0.01, 120.0, 1, 96, 1e-5),  # one turn, in which little is damped
        (0.05, 0.01, 6.0, 4, 256, 1e-5),
        (0.09, 0.01, 60.0, 1, 256, 1e-3),  # much goes around: S fades
        (10.0, 0.01, 1.0, 4, 1024, 0.2),  # too much goes around: the chain, of second order
        (40.0, 0.5, 1.0, 1, 512, 0.02),
        (-40.0, 0.5, 1.0, 1, 512, 0.02),
    ],
)
def test_waves_that_turn_many_times(speed, noise, time, waves, cells, error):
    """Talbot's rule would give 0 for what turns by more than 30: all would be at rest, and both rules would agree."""
    equation = FokkerPlanck(lambda x, t: speed + 0 * x, math.sqrt(2 * noise))
    grid = GridSolver(equation, [(0.0, math.tau)], cells, "periodic")

    def exact(t):
        phase = waves * (grid.box.axes[0] - speed * t)
        return (1 + 0.7 * math.exp(-noise * waves**2 * t) * phase.cos()) / math.tau

    ends = [grid.solve(exact(0.0), torch.linspace(0, time, number).tolist()).density[-1] for number in (2, 12)]
    for end in ends:
        assert float((end - exact(time)).abs().sum()) * grid.box.volume < error
    assert float((ends[0] - ends[1]).abs().sum()) * grid.box.volume < 1e-9


def test_cells_between_which_nothing_jumps_do_not_ring():
    """Noise on the right only: on the left nothing moves, whatever flows in at the edge."""
    equation = FokkerPlanck(lambda x, t: 0 * x, lambda x, t: (x > 0).to(x))
    grid = GridSolver(equation, [(-4.0, 4.0)], 128)
    before, after = grid.solve(gaussian(0.2, 0.5), [0.0, 0.3]).density
    torch.testing.assert_close(after[:63], before[:63], rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:the grid is too coarse")
def test_entropy_production_is_the_loss_of_free_energy_to_second_order():
    problem, h, gaps = problems.double_well(), 1e-3, []
    for cells in (64, 128):
        grid = GridSolver(problem.equation, problem.domain, cells)
        found, gibbs = grid.solve(problem.start, [0.0, 0.5 - h, 0.5, 0.5 + h]), grid.stationary().density[0]
        energy = torch.xlogy(found.density, found.density / gibbs).sum(1) * grid.box.volume
        gaps.append(abs(float(found.entropy_production[2] - (energy[1] - energy[3]) / (2 * h))))
    assert gaps[1] < 1e-4 and math.log2(gaps[0] / gaps[1]) == pytest.approx(2, abs=0.15)


def test_what_goes_around_may_cross_the_limit():
    """H from 32 to 79, in time: the scheme fades into the chain, so that steps of either side agree."""
    equation = FokkerPlanck(lambda x, t: 1.6 + 2.4 * t[:, None] + 0.2 * x.sin(), math.sqrt(0.6))
    grid = GridSolver(equation, [(0.0, math.tau)], 128, "periodic")
    start = grid.density(gaussian(math.pi, 0.4))
    found = grid.solve(start, [0.0, 1.0], tolerance=1e-5)
    fine = GridSolver(equation, [(0.0, math.tau)], 384, "periodic").solve(gaussian(math.pi, 0.4), [0.0, 1.0], 1e-5)
    assert found.steps < 200 and found.time_error < 1e-5
    assert float((found.density[1] - fine.density[1, 1::3]).abs().sum()) * grid.box.volume < 1e-2


def test_nothing_is_done_for_what_isat_rest(monkeypatch):
    process, _ = line_of("ratchet_back")
    asked, resolvents = [], lines._resolvents
    monkeypatch.setattr(lines, "_resolvents", lambda *args: asked.append(args) or resolvents(*args))
    state = np.eye(process.number)[:1]
    end = process._line.advance(state, 1e5, np.array([True]))
    np.testing.assert_allclose(end[0], process._line.at_rest, rtol=0, atol=1e-13)
    assert len(asked) < 1000


def circle(around, cells=128):
    """A circle of length 2 pi and noise D = 1 / 2, with a constant drift of that H."""
    speed = around / (4 * math.pi)
    grid = GridSolver(FokkerPlanck(lambda x, t: speed + 0 * x, 1.0), [(0.0, math.tau)], cells, "periodic")
    return grid, JumpProcess(grid.box, jumps_at(grid.equation, grid.box, 0.0))._line, speed


def test_a_wave_that_one_part_turns_too_far_is_looked_at():
    """The first wave turns by 4.9, the sixth by 29: a start of the sixth alone would be 0 by both numbers of poles."""
    grid, line, speed = circle(59.0)
    state, time = 1 + 0.9 * (6 * grid.box.axes[0]).cos()[None].numpy(), 4.9 / speed
    exact = state @ expm(time * np.linalg.solve(dense(line.compact), dense(line.rates))).T
    assert np.abs(exact - 1).max() > 1e-9
    np.testing.assert_allclose(line.advance(state, time, np.array([True])), exact, rtol=0, atol=1e-12)


def test_the_order_fades_where_much_goes_around():
    def error(around):
        grid, _, speed = circle(around, 96)
        x = grid.box.axes[0]
        start, end = (1 + 0.9 * math.exp(-t / 2) * (x - speed * t).cos() for t in (0.0, 0.3))
        return float((grid.solve(start, [0.0, 0.3]).density[1] - end).abs().mean())

    near, beyond, half, none = map(error, (63.9, 64.1, 48.0, 31.9))
    assert near == pytest.approx(beyond, rel=0.03) and half < 0.6 * near and none < 0.01 * near
    assert circle(64.1)[1].advance(np.ones((1, 128)), 1.0, np.array([True])) is None
