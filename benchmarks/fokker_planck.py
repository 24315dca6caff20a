"""The solvers of the Fokker-Planck equation beside others: python benchmarks/fokker_planck.py [--turns 5]

1. Error (L1, against exact answers) and CPU time from the equation to the density at one time, set-up included: our
   GridSolver and GalerkinSolver, scipy (Scharfetter-Gummel and Crank-Nicolson), fplanck and py-pde where installed;
   py-pde's compilation is not counted. The solvers take turns, in another order each time, for what ran before warms
   the caches; the least time of each is kept.
   At the end of each problem: our least time over scipy's, where the grid has no larger error than it.
2. Orders: the grid's in space and time, the decay of the Galerkin error with the number of functions.
3. Mass error and least density of every run of ours.
4. Weak residuals and fits on samples: see weak_form.py. 5. Particles with a learned score: see
   fokker_planck_particles.py; both run from here with --all.

The exact answers are closed forms, or Fourier series solved by dense matrices of numpy and scipy.
"""

import argparse
import json
import math
import random
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fokker_planck_peers as peers
import numpy as np
import torch
from matplotlib.figure import Figure

from diffusion.fokker_planck import FokkerPlanck, Fourier, GalerkinSolver, GridSolver, Hermite, problems
from diffusion.fokker_planck.problems import Problem

SPREAD = 0.5
LINES = 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048


def normal(mean: float, std: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(math.tau))


class Study:
    """One problem, for us and for the others.

    Attributes:
        problem: ours; its horizon is the time that is looked at.
        case: the same for the others.
        exact: the density there, of numpy coordinates.
        galerkin: () -> a solver with its bases.
        sizes: cells along each coordinate; every other one for scipy, too.
        tolerances: of the grid in time.
    """

    def __init__(self, problem: Problem, case: peers.Case, exact, galerkin, sizes, tolerances=(1e-6,)):
        self.problem, self.case, self.exact, self.galerkin, self.sizes = problem, case, exact, galerkin, sizes
        self.tolerances = tolerances


def of_law(law):
    return lambda *x: (
        law.log_prob(torch.from_numpy(np.stack([np.ravel(a) for a in x], 1))).exp().numpy().reshape(np.shape(x[0]))
    )


def ornstein_uhlenbeck() -> Study:
    problem, box = problems.ornstein_uhlenbeck(), ((-8.0, 8.0),)
    case = peers.Case(box, 1.0, normal(1.0, 0.5), lambda x: x**2 / 2, lambda t, x: [-x], lambda t: 1.0, (["-x"], "1.0"))
    return Study(
        problem,
        case,
        of_law(problem.law_at(1.0)),
        lambda: GalerkinSolver(problem.equation, [Hermite(64, 0.0, 1.0)]),
        LINES,
    )


def double_well() -> Study:
    problem, start = problems.double_well(), normal(-1.0, 0.3)
    text, domain = (["-4 * x * (x**2 - 1)"], "0.5"), problem.domain
    case = peers.Case(
        domain, 1.0, start, lambda x: (x**2 - 1) ** 2, lambda t, x: [-4 * x * (x**2 - 1)], lambda t: SPREAD, text
    )
    return Study(
        problem,
        case,
        peers.double_well_exact(1.0, start, SPREAD),
        lambda: GalerkinSolver(problem.equation, [Fourier(101, -3.0, 3.0)]),
        LINES,
    )


def variance_preserving() -> Study:
    problem, horizon = problems.variance_preserving(horizon=0.3), 0.3
    start = of_law(problem.start)

    def beta(t: float) -> float:
        return 0.1 + 19.9 * t

    text = ["-(0.1 + 19.9 * t) * x / 2"], "(0.1 + 19.9 * t) / 2"
    case = peers.Case(
        problem.domain, horizon, start, None, lambda t, x: [-beta(t) * x / 2], lambda t: beta(t) / 2, text
    )
    return Study(
        problem,
        case,
        of_law(problem.law_at(horizon)),
        lambda: GalerkinSolver(problem.equation, [Fourier(127, -6.0, 6.0)]),
        LINES,
    )


def pushed() -> Study:
    """dx = (3 sin(4 t) - x) dt + dw: drifts at two times do not commute, and the exact law is a Gaussian."""
    mean, std = 3 * (math.sin(4.0) - 4 * math.cos(4.0) + 4 * math.exp(-1)) / 17, math.sqrt(0.5 - 0.25 * math.exp(-2))
    equation = FokkerPlanck(lambda x, t: 3 * (4 * t)[:, None].sin() - x, lambda x, t: 1.0)
    problem = Problem(equation, problems.gaussian(0.0, 0.5), ((-6.0, 6.0),), 1.0)
    text = ["3 * sin(4 * t) - x"], "0.5"
    case = peers.Case(
        problem.domain, 1.0, normal(0.0, 0.5), None, lambda t, x: [3 * math.sin(4 * t) - x], lambda t: SPREAD, text
    )
    return Study(
        problem,
        case,
        normal(mean, std),
        lambda: GalerkinSolver(problem.equation, [Fourier(81, -6.0, 6.0)]),
        LINES,
        (1e-3, 1e-6, 1e-8),
    )


def double_well_2d() -> Study:
    problem = problems.double_well(2)
    first = peers.double_well_exact(1.0, normal(-1.0, 0.3), SPREAD)
    # The second coordinate is an Ornstein-Uhlenbeck process of variance 1/2, started at 0 with standard deviation 0.3.
    second = normal(0.0, math.sqrt(0.5 + (0.09 - 0.5) * math.exp(-2.0)))
    case = peers.Case(
        problem.domain,
        1.0,
        lambda x, y: normal(-1.0, 0.3)(x) * normal(0.0, 0.3)(y),
        lambda x, y: (x**2 - 1) ** 2 + y**2 / 2,
        lambda t, x, y: [-4 * x * (x**2 - 1), -y],
        lambda t: SPREAD,
        (["-4 * x * (x**2 - 1)", "-y"], "0.5"),
    )
    return Study(
        problem,
        case,
        lambda x, y: first(x[:, 0])[:, None] * second(y[0])[None],
        lambda: GalerkinSolver(problem.equation, [Fourier(97, -2.6, 2.6), Fourier(65, -6.0, 6.0)], symmetrised=True),
        (48, 64, 96, 128, 192, 256),
    )


STUDIES = {
    "ornstein_uhlenbeck, d = 1": ornstein_uhlenbeck,
    "double_well, d = 1": double_well,
    "variance_preserving, d = 1": variance_preserving,
    "pushed, d = 1": pushed,
    "double_well, d = 2": double_well_2d,
}


def methods(study: Study, with_peers: bool) -> dict[str, Callable[[], tuple[peers.Result | None, Callable[[], dict]]]]:
    """Name -> a function that solves anew, set-up included, and returns the density and () -> what else is known."""
    problem, case = study.problem, study.case
    times = [0.0, problem.horizon]
    found: dict[str, Callable] = {}

    def grid(cells: int, tolerance: float):
        equation = FokkerPlanck(problem.equation._drift.function, problem.equation._diffusion.function)
        solution = GridSolver(equation, problem.domain, cells).solve(problem.start, times, tolerance)
        axes = [axis.numpy() for axis in solution.grid]
        return peers.Result(axes, solution.density[-1].numpy()), lambda: {
            "mass_error": float(solution.mass_error.max()),
            "least": float(solution.density.min()),
        }

    def galerkin():
        solver = study.galerkin()
        solution = solver.solve(problem.start, times)
        return solution, lambda: {
            "mass_error": float(solution.mass_error.max()),
            "least": float(solution.most_negative.min()),
            "unknowns": int(np.prod(solver.product.shape)),
        }

    for k, cells in enumerate(study.sizes):
        for tolerance in study.tolerances:
            suffix = f", to {tolerance:.0e}" if len(study.tolerances) > 1 else ""
            found[f"grid, n = {cells}{suffix}"] = lambda cells=cells, tolerance=tolerance: grid(cells, tolerance)
        if k % 2 == 0:
            continue
        for steps in (cells // 8, cells // 4, cells // 2):
            found[f"scipy, n = {cells}, {steps} steps"] = lambda cells=cells, steps=steps: (
                peers.crank_nicolson(case, cells, steps),
                dict,
            )
    found["galerkin"] = galerkin
    flat = len(case.domain) == 1
    if with_peers and find_spec("fplanck") and case.potential is not None:
        found[f"fplanck, n = {256 if flat else 64}"] = lambda: (peers.fplanck(case, 256 if flat else 64), dict)
    if with_peers and find_spec("pde") and flat:
        solve = peers.py_pde(case, 256)
        found["py-pde, n = 256"] = lambda: (solve(), dict)
    return found


def compare(name: str, turns: int, with_peers: bool) -> list[dict[str, Any]]:
    study = STUDIES[name]()
    choices = methods(study, with_peers)
    seconds: dict[str, list[float]] = {}
    results = {}
    for turn in range(turns + 1):
        for label, solve in random.Random(turn).sample(list(choices.items()), len(choices)):
            if turn > 2 and max(seconds[label]) > 2:
                continue  # slow ones are not repeated for long
            began = time.process_time()
            results[label] = solve()
            if turn:  # the first is to warm up
                seconds.setdefault(label, []).append(time.process_time() - began)
    rows = []
    for label, (result, facts) in results.items():
        error = galerkin_error(result, study.exact) if label == "galerkin" else peers.l1_error(result, study.exact)
        rows.append(
            {"problem": name, "method": label, "error": error, "milliseconds": 1e3 * min(seconds[label]), **facts()}
        )
    for row in sorted(rows, key=lambda row: row["error"]):
        extra = "".join(f"  {key} {row[key]:.2g}" for key in ("mass_error", "least", "unknowns") if key in row)
        print(f"{name:<28} {row['method']:<26} {row['error']:>9.2e} {row['milliseconds']:>9.2f} ms{extra}", flush=True)
    print(f"{name:<28} grid over scipy at its error or less:", at_equal_error(rows), flush=True)
    return rows


def at_equal_error(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The least time of the grid, at no larger error, over that of each row of scipy that no other one dominates."""
    grid, scipy = ([row for row in rows if row["method"].startswith(kind)] for kind in ("grid", "scipy"))
    ratios = {}
    for row in sorted(scipy, key=lambda row: row["error"]):
        if any(o["error"] <= row["error"] and o["milliseconds"] < row["milliseconds"] for o in scipy):
            continue
        ours = [other["milliseconds"] for other in grid if other["error"] <= row["error"]]
        ratios[f"{row['error']:.1e}"] = round(min(ours, default=math.inf) / row["milliseconds"], 2)
    return ratios


def galerkin_error(solution, exact) -> float:
    """L1 on an even grid of points, finer than the nodes."""
    product = solution.expansion.product
    axes = [np.linspace(max(b.low, -6.0), min(b.high, 6.0), 401) for b in product.bases]
    mesh = np.meshgrid(*axes, indexing="ij")
    x = torch.from_numpy(np.stack([m.ravel() for m in mesh], 1))
    gap = np.abs(solution.density(x).numpy().reshape(mesh[0].shape) - exact(*mesh))
    for axis in axes[::-1]:
        gap = np.trapezoid(gap, axis)
    return float(gap)


def orders() -> dict[str, Any]:
    """Orders in space and time, and Galerkin errors by the number of functions."""
    found: dict[str, Any] = {}
    swinging = FokkerPlanck(
        lambda x, t: 2 * (4 * t)[:, None].cos() - (1 + 0.5 * (5 * t)[:, None].sin()) * x,
        lambda x, t: 1 + 0.5 * (3 * t).sin(),
    )
    x = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)[:, None]

    def by_grid(steps: int) -> torch.Tensor:
        solver = GridSolver(swinging, [(-6.0, 6.0)], 256)
        return solver.solve(problems.gaussian(0.5, 0.7), [0.0, 1.0], steps=steps, tolerance=1.0).density[-1]

    def by_galerkin(steps: int) -> torch.Tensor:
        solver = GalerkinSolver(swinging, [Hermite(32, 0.0, 0.9)])
        return solver.solve(problems.gaussian(0.5, 0.7), [0.0, 1.0], steps=steps, tolerance=1.0).density(x)

    for kind, end in (("grid", by_grid), ("galerkin", by_galerkin)):
        sizes, fine = [8, 16, 32], end(256)
        errors = [float((end(steps) - fine).abs().mean()) for steps in sizes]
        found[f"{kind} in time"] = {"sizes": sizes, "errors": errors, "orders": peers.convergence(errors, sizes)}
    for name in ("ornstein_uhlenbeck, d = 1", "double_well, d = 1", "variance_preserving, d = 1"):
        study, sizes = STUDIES[name](), [64, 128, 256, 512]
        errors = []
        for cells in sizes:
            solution = GridSolver(study.problem.equation, study.problem.domain, cells).solve(
                study.problem.start, [0.0, study.problem.horizon]
            )
            result = peers.Result([axis.numpy() for axis in solution.grid], solution.density[-1].numpy())
            errors.append(peers.l1_error(result, study.exact))
        found[f"grid in space, {name}"] = {"sizes": sizes, "errors": errors, "orders": peers.convergence(errors, sizes)}
        sizes, errors = [21, 31, 41, 61, 81, 101, 121], []
        for order in sizes:
            low, high = study.problem.domain[0]
            solver = GalerkinSolver(study.problem.equation, [Fourier(order, low, high)])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # too few functions say so
                solution = solver.solve(study.problem.start, [0.0, study.problem.horizon])
            errors.append(galerkin_error(solution, study.exact))
        found[f"galerkin, Fourier, {name}"] = {"sizes": sizes, "errors": errors}
    for label, entry in found.items():
        print(label, entry, flush=True)
    return found


def picture(report: dict[str, Any], path: Path) -> None:
    """Error against CPU time for each problem, and against the number of unknowns."""
    figure = Figure(figsize=(4.5 * len(STUDIES), 7), layout="constrained")
    axes = figure.subplots(2, len(STUDIES))
    colours = {"grid": "C0", "galerkin": "C3", "scipy": "C7", "fplanck": "C2", "py-pde": "C1"}
    for place, name in zip(axes[0], STUDIES, strict=True):
        for kind, colour in colours.items():
            rows = [r for r in report["comparison"] if r["problem"] == name and r["method"].startswith(kind)]
            if rows:
                place.loglog(
                    [r["milliseconds"] for r in rows], [r["error"] for r in rows], "o", color=colour, label=kind
                )
        place.set(title=name, xlabel="CPU time, ms", ylabel="L1 error")
    axes[0, 0].legend()
    for place, name in zip(axes[1], STUDIES, strict=False):
        for kind, colour in (("grid in space", "C0"), ("galerkin, Fourier", "C3")):
            entry = report["orders"].get(f"{kind}, {name}")
            if entry:
                place.semilogy(entry["sizes"], entry["errors"], "o-", color=colour, label=kind)
                place.set(ylim=(1e-15, 1), xlabel="unknowns", ylabel="L1 error")
                place.legend()
            else:
                place.axis("off")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="leave fplanck and py-pde out")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--all", action="store_true", help="weak residuals, fits and particles, too, anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for name in STUDIES if options.only in name for row in compare(name, options.turns, not options.no_peers)
    ]
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    anew = {(row["problem"], row["method"]) for row in rows}
    kept = [row for row in report.get("comparison", []) if (row["problem"], row["method"]) not in anew]
    report.update(comparison=rows + kept, orders=orders())
    report["grid over scipy at its error or less"] = {
        name: at_equal_error([row for row in report["comparison"] if row["problem"] == name]) for name in STUDIES
    }
    if options.all:
        import fokker_planck_particles
        import weak_form

        report["particles"] = [fokker_planck_particles.study(name) for name in fokker_planck_particles.STUDIES]
        report["weak_form"] = weak_form.figures()
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if not options.only:
        picture(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
