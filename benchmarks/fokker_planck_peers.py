"""Other solvers of the Fokker-Planck equation, called as their users call them; each returns densities on its grid.

Drifts are written once for each case, for numpy arrays of coordinates (one for each axis). fplanck and py-pde are
imported when asked for; a case that a library has no means for gives None.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

Function = Callable[..., np.ndarray]


class Case(NamedTuple):
    """dx = drift dt + sqrt(2 spread(t)) dw on a box.

    Attributes:
        domain: (low, high) of each axis.
        start: density at time 0.
        potential: V with drift = -grad V, where there is one that does not change in time.
        drift: (t, *coordinates) -> one array for each axis.
        spread: t -> number.
        as_text: drift of each axis and spread as py-pde reads them.
    """

    domain: tuple[tuple[float, float], ...]
    horizon: float
    start: Function
    potential: Function | None
    drift: Function
    spread: Callable[[float], float]
    as_text: tuple[list[str], str]


class Result(NamedTuple):
    axes: list[np.ndarray]
    density: np.ndarray


def axes_of(domain, cells: int) -> list[np.ndarray]:
    """Centres of `cells` equal cells along each axis."""
    return [low + (np.arange(cells) + 0.5) * (high - low) / cells for low, high in domain]


def _bernoulli(w: np.ndarray) -> np.ndarray:
    small = np.abs(w) < 1e-8
    return np.where(small, 1 - w / 2, w / np.expm1(np.where(small, 1.0, w)))


def _generator(case: Case, axes: list[np.ndarray], t: float) -> sparse.csc_matrix:
    """Scharfetter and Gummel's fluxes, with the drift at the faces; no flux through the walls."""
    shape, spread = tuple(map(len, axes)), case.spread(t)
    index, rows, columns, values = np.arange(np.prod(shape)).reshape(shape), [], [], []
    for axis, places in enumerate(axes):
        h, n = places[1] - places[0], len(places)
        faces = np.meshgrid(*[p[:-1] + h / 2 if i == axis else p for i, p in enumerate(axes)], indexing="ij")
        w = (case.drift(t, *faces)[axis] * h / spread).ravel()
        left, right = index.take(range(n - 1), axis).ravel(), index.take(range(1, n), axis).ravel()
        forward, backward = spread / h**2 * _bernoulli(-w), spread / h**2 * _bernoulli(w)
        rows += [right, left, left, right]
        columns += [left, left, right, right]
        values += [forward, -forward, backward, -backward]
    return sparse.coo_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (index.size, index.size)
    ).tocsc()


def crank_nicolson(case: Case, cells: int, steps: int) -> Result:
    """scipy: Scharfetter-Gummel in space, Crank-Nicolson in time, sparse LU."""
    axes, h = axes_of(case.domain, cells), case.horizon / steps
    p = case.start(*np.meshgrid(*axes, indexing="ij")).ravel()
    eye = sparse.identity(p.size, format="csc")
    if case.potential is not None:
        generator = _generator(case, axes, 0.0)
        solve, forward = splu(eye - h / 2 * generator).solve, eye + h / 2 * generator
        for _ in range(steps):
            p = solve(forward @ p)
    else:
        for n in range(steps):
            generator = _generator(case, axes, (n + 0.5) * h)
            p = splu(eye - h / 2 * generator).solve((eye + h / 2 * generator) @ p)
    return Result(axes, p.reshape([cells] * len(axes)))


def fplanck(case: Case, cells: int) -> Result | None:
    """fplanck 0.2: fluxes of its own, exponential of a sparse matrix."""
    if case.potential is None:
        return None
    np.product = np.prod  # it calls what numpy has removed
    import fplanck as library
    from scipy import constants

    extent = [high - low for low, high in case.domain]
    middle = [(high + low) / 2 for low, high in case.domain]

    def shifted(function):
        return lambda *x: function(*(a + b for a, b in zip(x, middle, strict=True)))

    solver = library.fokker_planck(
        temperature=case.spread(0.0) / constants.k,
        drag=1.0,
        extent=extent,
        resolution=[side / cells for side in extent],
        potential=shifted(case.potential),
    )
    p = solver.propagate(shifted(case.start), case.horizon)
    axes = [axis + centre for axis, centre in zip(solver.axes, middle, strict=True)]
    return Result(axes, p / np.prod([axis[1] - axis[0] for axis in axes]))


def py_pde(case: Case, cells: int) -> Callable[[], Result]:
    """py-pde, explicit Runge-Kutta with error control; compiled by the first call of what this returns."""
    import pde

    names = ["x", "y", "z"][: len(case.domain)]
    grid = pde.CartesianGrid([list(side) for side in case.domain], cells)
    drifts, spread = case.as_text
    flux = "".join(f" - d_d{name}(({drift}) * p)" for name, drift in zip(names, drifts, strict=True))
    equation = pde.PDE({"p": f"({spread}) * laplace(p){flux}"}, bc={"value": 0})
    axes = list(grid.axes_coords)
    start = pde.ScalarField(grid, case.start(*np.meshgrid(*axes, indexing="ij")))

    def solve() -> Result:
        solver = pde.RungeKuttaSolver(equation, adaptive=True)
        found = pde.Controller(solver, t_range=case.horizon, tracker=None).run(start, dt=1e-5)
        return Result(axes, found.data)

    return solve


def l1_error(result: Result, exact: Function) -> float:
    """The integral of |p - exact| by the midpoint rule on the solver's own grid."""
    volume = np.prod([axis[1] - axis[0] for axis in result.axes])
    return float(np.abs(result.density - exact(*np.meshgrid(*result.axes, indexing="ij"))).sum() * volume)


def double_well_exact(
    horizon: float, start: Function, spread: float, reach: float = 3.4, points: int = 401
) -> Function:
    """The density of V = (x^2 - 1)^2 at the horizon: a Fourier series of `points` terms, to about 1e-12.

    Independent of the library: derivatives and exponential are dense matrices of numpy and scipy.
    """
    from scipy.linalg import expm

    x = -reach + 2 * reach * np.arange(points) / points
    waves = 1j * np.pi / reach * np.fft.fftfreq(points, 1 / points)
    transform = np.fft.fft(np.eye(points), axis=0)
    first = np.fft.ifft(waves[:, None] * transform, axis=0).real
    second = np.fft.ifft(waves[:, None] ** 2 * transform, axis=0).real
    generator = spread * second + first * (4 * x * (x**2 - 1))
    coefficients = np.fft.fft(expm(horizon * generator) @ start(x)) / points

    def density(y: np.ndarray) -> np.ndarray:
        phases = np.exp(waves[None] * (np.ravel(y)[:, None] + reach))
        return (phases @ coefficients).real.reshape(np.shape(y))

    return density


def convergence(errors: list[float], sizes: list[int]) -> list[float]:
    """Observed orders between neighbouring sizes."""
    pairs = zip(itertools.pairwise(errors), itertools.pairwise(sizes), strict=True)
    return [float(np.log(a / b) / np.log(m / n)) for (a, b), (n, m) in pairs]
