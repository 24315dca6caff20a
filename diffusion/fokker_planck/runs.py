"""A problem solved by one of the solvers, with its errors: what scripts/fokker_planck.py prints and draws.

Errors are against the exact law where the problem has one, otherwise against a solution on a finer grid or in more
functions. Solvers here are plain data; each is called with a problem and rising times.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Basis, Fourier, Legendre
from diffusion.fokker_planck.equation import act
from diffusion.fokker_planck.galerkin import GalerkinSolution, GalerkinSolver
from diffusion.fokker_planck.grid import GridSolver
from diffusion.fokker_planck.laws import log_density
from diffusion.fokker_planck.particles import ParticleSolver
from diffusion.fokker_planck.problems import Problem

OUTSIDE = 1e-3  # of the particles
PICTURE_POINTS = {1: 400, 2: 100, 3: 40}  # along each coordinate, for what is not on a grid


class Cloud(NamedTuple):
    """Particles, and the velocities of their probability flow, (K, N, d) each."""

    places: Tensor
    velocities: Tensor


class Lattice(NamedTuple):
    """Densities and currents at points that are even along each coordinate.

    Attributes:
        axes: places along each coordinate.
        density: (K, *n).
        current: (K, d, *n).
    """

    axes: tuple[Tensor, ...]
    density: Tensor
    current: Tensor


@dataclass(frozen=True)
class Run:
    """A solved problem.

    Attributes:
        times: (K,).
        columns: figures at each time, (K,) each; NaN where one is not known.
        facts: single figures.
        picture: the densities, or the particles.
    """

    times: Tensor
    columns: dict[str, Tensor]
    facts: dict[str, Any]
    picture: Lattice | Cloud

    def table(self, rows: int = 11) -> str:
        """At most `rows` of the times, a line each."""
        widths = [max(12, len(name) + 2) for name in self.columns]
        head = "".join(f"{name:>{width}}" for name, width in zip(self.columns, widths, strict=True))
        lines = [f"{'time':>8}{head}"]
        for k in torch.linspace(0, len(self.times) - 1, min(rows, len(self.times))).round().long().tolist():
            figures = (
                f"{float(values[k]):>{width}.3g}" for values, width in zip(self.columns.values(), widths, strict=True)
            )
            lines.append(f"{float(self.times[k]):>8.4g}{''.join(figures)}")
        return "\n".join(
            [
                *lines,
                *(
                    f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}"
                    for name, value in self.facts.items()
                ),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture, as plain data; None for what is not known."""

        def plain(values: Tensor) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values.tolist()]

        columns = {name: plain(values) for name, values in self.columns.items()}
        return {"times": self.times.tolist(), **columns, **self.facts}


class Recipe(ABC):
    """How to solve any problem."""

    @abstractmethod
    def __call__(self, problem: Problem, times: Sequence[float]) -> Run:
        """The problem at rising `times`, the first of them 0."""


@dataclass(frozen=True)
class Grid(Recipe):
    """By GridSolver.

    Args:
        cells: along each coordinate, or one number for all; 256, 128, 48 in 1, 2, 3 dimensions unless given.
        tolerance: of the steps in time, in L1.
        device: "cpu" or "cuda".
    """

    cells: int | Sequence[int] | None = None
    tolerance: float = 1e-6
    device: str = "cpu"

    def __call__(self, problem, times):
        solver = GridSolver(problem.equation, problem.domain, self.cells, problem.boundary, self.device)
        found = solver.solve(problem.start, times, self.tolerance)
        if problem.law_at is not None:
            exact = torch.stack([_exact(problem, t, solver.box.centres) for t in times])
            error, name = found.density - exact.reshape(found.density.shape), "L1 error"
        else:
            fine = tuple((3 if problem.dim == 1 else 2) * n for n in solver.box.cells)
            finer = GridSolver(problem.equation, problem.domain, fine, problem.boundary, self.device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said already of the coarser one
                density = finer.solve(problem.start, times, self.tolerance).density
            if problem.dim == 1:
                error = found.density - density[:, 1::3]
            else:
                for axis, word in enumerate(solver.box.boundary, 1):
                    density = _at_middles(density, axis, word == "periodic")
                error = (found.density - density) * (4 / 3)  # halving the cells takes three quarters of it away
            name = "L1 error (est.)"
        volume, inner = solver.box.volume, tuple(range(1, found.density.dim()))
        columns = {
            name: error.abs().sum(inner) * volume,
            "mass error": found.mass_error,
            "least density": found.density.amin(inner),
            "entropy production": found.entropy_production,
        }
        if "absorbing" in solver.box.boundary:
            columns["absorbed"] = found.absorbed
        facts = {"cells": list(solver.box.cells), "steps in time": found.steps, "error in time": found.time_error}
        facts["mass put back after rounding"] = found.put_back
        return Run(
            found.times.cpu(), _on_cpu(columns), facts, Lattice(*_on_cpu(found.grid, found.density, found.current))
        )


def _at_middles(density: Tensor, axis: int, periodic: bool) -> Tensor:
    """Between the first and second cells along an axis, the third and fourth, ...: by cubic polynomials but at ends."""
    first, second = density.unflatten(axis, (-1, 2)).unbind(axis + 1)
    bend = first + second - second.roll(1, axis) - first.roll(-1, axis)
    if not periodic:
        bend.select(axis, 0).zero_()
        bend.select(axis, -1).zero_()
    return (first + second) / 2 + bend / 16


@dataclass(frozen=True)
class Galerkin(Recipe):
    """By GalerkinSolver, in Fourier functions where the domain is periodic, otherwise in Legendre polynomials.

    Args:
        order: functions along each coordinate; 96, 48, 24 in 1, 2, 3 dimensions unless given.
        symmetrised: see GalerkinSolver.
        tolerance: of the steps in time, in L1.
        device: "cpu" or "cuda".
    """

    order: int | None = None
    symmetrised: bool = False
    tolerance: float = 1e-8
    device: str = "cpu"

    def __call__(self, problem, times):
        order = {1: 96, 2: 48, 3: 24}.get(problem.dim) if self.order is None else self.order
        if order is None:
            raise UserError(
                f"the problem has {problem.dim} coordinates, test functions are for 1, 2 or 3; take particles"
            )
        solver, found = self._solve(problem, times, order)
        points, weights = solver.product.points, found.weights.reshape(-1)
        values = found.values.reshape(len(times), -1)
        if problem.law_at is not None:
            exact, name = torch.stack([_exact(problem, t, points) for t in times]), "L1 error"
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said already of fewer functions
                finer = self._solve(problem, times, order * 3 // 2)[1]
            exact, name = torch.stack([finer.density(points, k) for k in range(len(times))]), "L1 error (est.)"
        columns = {
            name: (values - exact).abs() @ weights,
            "mass error": found.mass_error,
            "least density": found.most_negative,
            "truncation": found.truncation.amax(1),
        }
        facts = {"functions": list(solver.product.shape), "steps in time": found.steps, "error in time": found.error}
        times = torch.tensor(times, dtype=torch.float64)
        return Run(times, _on_cpu(columns), facts, Lattice(*_on_cpu(*_lattice(problem, found))))

    def _solve(self, problem: Problem, times: Sequence[float], order: int) -> tuple[GalerkinSolver, GalerkinSolution]:
        bases = [_basis(order, *side, problem.boundary) for side in problem.domain]
        solver = GalerkinSolver(problem.equation, bases, self.symmetrised, device=self.device)
        return solver, solver.solve(problem.start, times, self.tolerance)


def _basis(order: int, low: float, high: float, boundary: str) -> Basis:
    if boundary == "absorbing":
        raise UserError("the boundary is absorbing, which test functions do not have; take solver=grid")
    return Fourier(order + 1 - order % 2, low, high) if boundary == "periodic" else Legendre(order, low, high)


def _lattice(problem: Problem, found: GalerkinSolution) -> Lattice:
    """The current is that of differences of the density between the points."""
    number, dim = PICTURE_POINTS[problem.dim], problem.dim
    options = {"dtype": torch.float64, "device": found.values.device}
    axes = tuple(torch.linspace(low, high, number, **options) for low, high in problem.domain)
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dim)
    densities, currents = [], []
    for k, t in enumerate(found.times):
        p = found.density(x, k).reshape([number] * dim)
        slopes = torch.stack([g.reshape(-1) for g in torch.gradient(p, spacing=axes)], 1)
        still = problem.equation.velocity(x, t, torch.zeros_like(x))
        current = still * p.reshape(-1, 1) - 0.5 * act(problem.equation.covariance(x, t), slopes)
        densities.append(p)
        currents.append(current.T.reshape(dim, *p.shape))
    return Lattice(axes, torch.stack(densities), torch.stack(currents))


@dataclass(frozen=True)
class Particles(Recipe):
    """By ParticleSolver: any dimension. Without an exact law there is the bound on the KL divergence alone.

    Args:
        number: of particles.
        steps: in time, in all.
        options: of ParticleSolver.
        seed: of the particles and of the network.
    """

    number: int = 4000
    steps: int = 100
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __call__(self, problem, times):
        if problem.boundary == "absorbing":
            raise UserError("the boundary is absorbing, which particles do not see; take solver=grid")
        known = {option.name for option in fields(ParticleSolver)} - {"equation", "seed"}
        if unknown := set(self.options) - known:
            raise UserError(f"unknown options {sorted(unknown)} of ParticleSolver; expected some of {sorted(known)}")
        solver = ParticleSolver(problem.equation, seed=self.seed, **self.options)
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, expected at least 1")
        steps = math.ceil(self.steps / (len(times) - 1))
        generator = torch.Generator().manual_seed(self.seed)
        found = solver.solve(problem.start, times, self.number, steps, generator)
        _warn_of_walls(problem, found.particles)
        columns = {"KL bound": found.kl_bound, "entropy": found.entropy}
        if problem.law_at is not None:
            pairs = [found.kl(problem.law_at(t), k) for k, t in enumerate(times)]
            divergence, error = torch.tensor(pairs, dtype=torch.float64).T
            columns = {"KL to exact": divergence, "standard error": error, **columns}
        facts = {"particles": self.number, "steps in time": steps * (len(times) - 1)}
        states = zip(found.times.tolist(), found.particles, found.scores, strict=True)
        velocities = torch.stack([problem.equation.velocity(x, t, score).detach() for t, x, score in states])
        return Run(found.times.cpu(), _on_cpu(columns), facts, Cloud(*_on_cpu(found.particles, velocities)))


def _warn_of_walls(problem: Problem, particles: Tensor) -> None:
    low, high = torch.tensor(problem.domain).to(particles).T
    outside = float(((particles < low) | (particles > high)).any(2).double().mean(1).max())
    if outside > OUTSIDE:
        walls = "the period, and entropy is that on the line" if problem.boundary == "periodic" else "walls"
        warnings.warn(
            f"up to {outside:.2g} of the particles are outside the domain: they do not see {walls}; take solver=grid, "
            "or a domain that holds the density",
            stacklevel=3,
        )


def _exact(problem: Problem, time: float, x: Tensor) -> Tensor:
    """The exact density (N,) at `x` (N, d)."""
    return log_density(problem.law_at(time), x, f"law_at({time:g})").exp()


def _on_cpu(*values):
    if len(values) == 1 and isinstance(values[0], dict):
        return {name: value.cpu() for name, value in values[0].items()}
    return [tuple(part.cpu() for part in value) if isinstance(value, tuple) else value.cpu() for value in values]
