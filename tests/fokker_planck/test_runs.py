"""The command that solves a problem: its figures against what the solvers say, its files, problems of one's own."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.fokker_planck import (
    FokkerPlanck,
    GalerkinSolver,
    GridSolver,
    Legendre,
    ParticleSolver,
    fit,
    problems,
    runs,
)
from diffusion.fokker_planck import test_functions as families
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.pictures import histograms, save_picture

TIMES = [0.0, 0.3, 0.6]


def test_errors_against_the_exact_law_and_against_a_finer_grid_agree():
    """Two ways to the same figure: an exact law, and its estimate from twice the cells."""
    exact = problems.variance_preserving(horizon=0.6)
    unknown = problems.Problem(exact.equation, exact.start, exact.domain, exact.horizon)
    for recipe, tolerance in ((runs.Grid(64), 0.05), (runs.Galerkin(32), 0.2)):
        known, estimated = recipe(exact, TIMES), recipe(unknown, TIMES)
        right, guess = known.columns["L1 error"][1:], estimated.columns["L1 error (est.)"][1:]
        assert float(right.min()) > 1e-9
        assert float((guess / right - 1).abs().max()) < tolerance


def test_grid_figures_are_those_of_the_solver():
    problem = problems.double_well()
    run = runs.Grid(160)(problem, TIMES)
    found = GridSolver(problem.equation, problem.domain, 160).solve(problem.start, TIMES)
    assert torch.equal(run.columns["entropy production"], found.entropy_production)
    assert torch.equal(run.picture.density, found.density) and torch.equal(run.picture.current, found.current)
    assert run.facts["cells"] == [160]


def test_the_two_solvers_draw_the_same_currents():
    problem = problems.ratchet()
    grid, galerkin = runs.Grid(400)(problem, TIMES).picture, runs.Galerkin(64)(problem, TIMES).picture
    at = torch.searchsorted(galerkin.axes[0], grid.axes[0]).clamp(2, 397)
    gap = (galerkin.current[:, 0][:, at] - grid.current[:, 0]).abs()[:, 4:-4]
    assert float(gap.max()) < 0.05 * float(grid.current.abs().max())


def test_particles_tell_the_divergence_from_the_exact_law():
    problem = problems.ornstein_uhlenbeck(2)
    run = runs.Particles(600, 20, {"hidden": [16], "draws": 500}, seed=1)(problem, TIMES)
    assert run.picture.places.shape == run.picture.velocities.shape == (3, 600, 2)
    assert float(run.columns["KL to exact"].abs().max()) < 0.02


def test_boundaries_that_a_solver_does_not_have(user_error):
    problem = problems.ornstein_uhlenbeck()
    for recipe in (runs.Particles(600), runs.Galerkin()):
        with user_error("absorbing", "solver=grid"):
            recipe(dataclasses.replace(problem, boundary="absorbing"), TIMES)
    with user_error("('absorbing', 'periodic')", "reflecting"):
        dataclasses.replace(problem, boundary=("absorbing", "periodic"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["solver.cells=10.5"], "10.5"),
        (["solver.tolerance=abc"], "abc"),
        (["solver=galerkin", "solver.order=4.5"], "4.5"),
        (["solver=particles", "solver.number=abc"], "abc"),
        (["solver=particles", "solver.options.hidden=5"], "hidden"),
        (["solver=particles", "+solver.options.nosuch=5"], "nosuch"),
        (["solver=particles", "solver.steps=0"], "steps is 0"),
        (["solver=particles", "solver.number=0"], "number=0"),
        (["solver=particles", "+solver.options.first=3"], "first is 3"),
        (["problem.horizon=null"], "horizon"),
        (["seed=abc"], "abc"),
        (["device=foo"], "foo"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_line(run, options, named):
    status, _, err = run("fokker_planck", "frames=2", "animation=false", *options)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err, err


@pytest.mark.parametrize(
    "options", [["solver.cells=40"], ["solver=galerkin", "solver.order=60"]], ids=["grid", "galerkin"]
)
def test_the_command_writes_table_figures_and_pictures(run, tmp_path, options):
    status, out, err = run("fokker_planck", "frames=4", *options, f"hydra.run.dir={tmp_path / 'r'}")
    assert status == 0, err
    assert {path.name for path in (tmp_path / "r").iterdir()} == {
        "config.yaml", "density.gif", "density.png", "figures.json",
    }  # fmt: skip
    figures = json.loads((tmp_path / "r" / "figures.json").read_text())
    assert figures["times"] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and max(figures["mass error"]) < 1e-12
    lines = out.splitlines()
    assert "L1 error (est.)" in lines[0] and [line.split()[0] for line in lines[1:5]] == ["0", "0.3333", "0.6667", "1"]
    with Image.open(tmp_path / "r" / "density.gif") as frames:
        assert frames.n_frames == 4


def test_two_dimensions_and_no_animation(run, tmp_path):
    options = ["problem=banana", "solver.cells=48", "frames=2", "animation=false", f"hydra.run.dir={tmp_path / 'r'}"]
    status, out, err = run("fokker_planck", *options)
    assert status == 0, err
    assert "animation: none" in out and not (tmp_path / "r" / "density.gif").exists()


OWN = """
import torch
from diffusion.fokker_planck import FokkerPlanck
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.problems import Problem

def shear(strength: float = 1.0) -> Problem:
    def drift(x, t):
        return torch.stack([strength * x[:, 1] - x[:, 0], -x[:, 1]], 1)
    equation = FokkerPlanck(drift, lambda x, t: 1.0)
    return Problem(equation, gaussian(0.0, 0.6, 2), ((-5.0, 5.0), (-5.0, 5.0)), 0.5)
"""


def test_a_problem_of_ones_own(run, module):
    module("own_shear", OWN)
    own = ["problem=own", "problem._target_=own_shear.shear", "+problem.strength=0.5", "solver.cells=40", "frames=2"]
    status, out, err = run("fokker_planck", *own, "animation=false")
    assert status == 0, err
    assert math.isclose(float(out.splitlines()[2].split()[0]), 0.5)


@pytest.mark.parametrize("axis", [1, 2])
def test_densities_between_two_cells(axis):
    """Exact for cubic polynomials, but next to ends, where it is for straight lines; on a circle next to all."""
    x = torch.arange(12, dtype=torch.float64)
    cubic, wave = 1 + x - 0.2 * x**2 + 0.03 * x**3, (math.tau * x / 12).sin()
    middle = x[::2] + 0.5

    def found(values, periodic):
        values = values.expand(2, 4, 12) if axis == 2 else values[:, None].expand(2, 12, 4)
        return runs._at_middles(values, axis, periodic).movedim(axis, 2)[1, 3]

    exact = 1 + middle - 0.2 * middle**2 + 0.03 * middle**3
    torch.testing.assert_close(found(cubic, False)[1:-1], exact[1:-1], rtol=1e-14, atol=0)
    torch.testing.assert_close(found(cubic, False)[[0, -1]], (cubic[[0, -2]] + cubic[[1, -1]]) / 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(found(wave, True), (math.tau * middle / 12).sin(), rtol=0, atol=0.002)


OU = problems.ornstein_uhlenbeck()
SMALL = {"hidden": [16], "draws": 500}


def counted(monkeypatch):
    """What ParticleSolver.solve is given."""
    seen, solve = [], ParticleSolver.solve

    def noted(self, start, times, number, steps, generator):
        seen.append((steps, generator.initial_seed(), self.seed))
        return solve(self, start, times, number, steps, generator)

    monkeypatch.setattr(ParticleSolver, "solve", noted)
    return seen


def test_steps_of_particles_are_counted_in_all_and_the_seed_is_used(monkeypatch):
    seen = counted(monkeypatch)
    run = runs.Particles(400, 20, SMALL, seed=7)(problems.ornstein_uhlenbeck(), TIMES)
    assert seen == [(10, 7, 7)] and run.facts["steps in time"] == 20


@pytest.mark.parametrize(
    ("boundary", "drift", "said"),
    [("reflecting", 0.0, "walls"), ("periodic", 1.0, "the period"), ("reflecting", -9.0, "")],
)
def test_particles_beyond_the_walls_are_said(boundary, drift, said):
    equation = FokkerPlanck(lambda x, t: drift * x if drift < 0 else drift + 0 * x, 1.0)
    problem = problems.Problem(equation, gaussian(0.0, 0.1), ((-1.5, 1.5),), 2.0, boundary)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        runs.Particles(400, 20, SMALL)(problem, [0.0, 2.0])
    told = [str(one.message) for one in found if "of the particles are outside the domain" in str(one.message)]
    assert len(told) == bool(said) and all(f"they do not see {said}" in text for text in told)


def test_currents_of_particles_are_drawn(tmp_path):
    """The flow through the bins of Gaussian particles that drift without noise is their density times the drift."""
    equation = FokkerPlanck(lambda x, t: 2 + 0 * x, 1e-3)
    problem = problems.Problem(equation, gaussian(0.0, 0.3), ((-9.0, 9.0),), 0.5)
    run = runs.Particles(400, 4, SMALL)(problem, [0.0, 0.5])
    torch.testing.assert_close(run.picture.velocities, 2 + 0 * run.picture.places, atol=1e-3, rtol=0)
    edges, density, current = histograms(*(values[-1, :, 0].numpy() for values in run.picture))
    assert float(density @ np.diff(edges)) == pytest.approx(1.0)
    np.testing.assert_allclose(current, 2 * density, rtol=1e-3, atol=1e-12)
    with Image.open(save_picture(run, tmp_path / "density.png")) as image:
        assert image.size[0] > 1000


def test_velocities_of_particles_are_those_of_the_probability_flow():
    """v = -x - score, and the score is that of the exact Gaussian."""
    run = runs.Particles(800, 40, SMALL)(OU, [0.0, 1.0])
    law, x = OU.law_at(1.0), run.picture.places[-1]
    exact = -x + (x - law.mean) / law.covariance[0, 0]
    assert float((run.picture.velocities[-1] - exact).square().mean().sqrt()) < 0.1 * float(
        exact.square().mean().sqrt()
    )


class Odd:
    def __init__(self, found):
        self.found = found

    def log_prob(self, x):
        if self.found is None:
            raise RuntimeError("no such law")
        return self.found


ODD = {
    "equation": (lambda: dataclasses.replace(OU, equation=None), "equation=NoneType, expected a FokkerPlanck"),
    "no law": (lambda: runs.Grid(40)(dataclasses.replace(OU, law_at=lambda t: 3), TIMES), "law_at(0) is int"),
    "start fails": (lambda: runs.Grid(40)(dataclasses.replace(OU, start=Odd(None)), TIMES), "start.log_prob(x) fails"),
    "start number": (lambda: runs.Grid(40)(dataclasses.replace(OU, start=Odd(1.0)), TIMES), "start.log_prob(x) gives"),
    "no time": (lambda: runs.Grid(40)(OU, [0.0, 1e-320]), "expected rising finite numbers"),
    "grid": (lambda: GridSolver(None, [(0, 1)]), "the equation is NoneType"),
    "bases": (lambda: GalerkinSolver(OU.equation, 3), "bases are [3], expected one of Hermite"),
    "interval": (lambda: Legendre(10, "a", 2), "from 'a' to 2"),
    "particles": (lambda: ParticleSolver(lambda x, t: -x), "expected a FokkerPlanck"),
    "no start": (lambda: ParticleSolver(OU.equation).solve(None, TIMES, 100), "draws from the start, NoneType, fail"),
    "point": (
        lambda: ParticleSolver(OU.equation).solve(gaussian(0.0, 0.0), TIMES, 100),
        "draws from the start, GaussianMixture, fail",
    ),
    "half steps": (lambda: ParticleSolver(OU.equation).solve(OU.start, TIMES, 100, 1.5), "steps=1.5"),
    "simulated steps": (lambda: OU.equation.simulate(torch.zeros(3, 1), TIMES, 1.5), "steps=1.5"),
    "whole numbers": (lambda: OU.equation.simulate(torch.zeros(3, 1).long(), TIMES), "torch.int64"),
    "nowhere": (lambda: OU.equation.simulate(torch.zeros(0, 1), TIMES), "shape (0, 1)"),
    "no families": (lambda: families.Together(), "Together has []"),
    "waves": (
        lambda: families.RandomFourier.adapted(torch.randn(2, 9, 1), 1.5, torch.Generator()),
        "number=1.5",
    ),
    "no list": (lambda: fit(torch.randn(2, 9, 1), [0, 1], lambda x, t: x, [], None), "expected a list of functions"),
    "known": (
        lambda: fit(torch.randn(2, 9, 1), [0, 1], [lambda x, t: x], [], None, known=lambda x, t: x),
        "expected a FokkerPlanck",
    ),
    "barrier": (lambda: problems.double_well(barrier=-1.0), "barrier is -1.0, expected a positive number"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_input_is_named(case, user_error):
    call, words = ODD[case]
    with user_error(words):
        call()
