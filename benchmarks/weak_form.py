"""Coverage and power of the weak residual, and honesty of fits: python benchmarks/weak_form.py

Coverage: the share of |z| below 3 over 100 seeds, with the right equation. Power: the largest |z|, its limit and the
joint p-value with drift or diffusion wrong by 5 %, from 100,000 samples at nine times together. Fits: coefficients in
standard errors from the truth, over seeds; independent snapshots.
"""

import json
from dataclasses import replace

import torch

from diffusion.fokker_planck import dictionaries, fit, problems, test_functions, weak_residual
from diffusion.fokker_planck.laws import gaussian

TIMES = torch.linspace(0, 1, 9, dtype=torch.float64).tolist()


def coverage(dim: int, seeds: int = 100, points: int = 2000, functions: int = 32) -> dict[str, float]:
    problem = problems.ornstein_uhlenbeck(dim, turn=0.5)
    z, passed = [], 0
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        x = torch.stack([problem.law_at(t).sample(points, g) for t in TIMES])
        phi = test_functions.RandomFourier.adapted(x, functions, g)
        got = weak_residual(x, TIMES, problem.equation.drift, problem.equation.diffusion, phi)
        z.append(got.z)
        passed += got.passed
    z = torch.cat(z)
    return {
        "within_3": float((z.abs() < 3).double().mean()),
        "rms_z": float(z.square().mean().sqrt()),
        "passed": passed,
    }


def power(dim: int, points: int = 100_000) -> dict[str, dict]:
    problem, g = problems.ornstein_uhlenbeck(dim, turn=0.5), torch.Generator().manual_seed(0)
    x = torch.stack([problem.law_at(t).sample(points // len(TIMES), g) for t in TIMES])
    phi = test_functions.RandomFourier.adapted(x, 32, g)
    phi = test_functions.Together(phi, test_functions.HermitePolynomials.adapted(x, 1))
    found = {}
    for name, f, s in [("right", 1, 1), ("drift", 1.05, 1), ("drift", 0.95, 1), ("diffusion", 1, 1.05)]:
        got = weak_residual(
            x,
            TIMES,
            lambda x, t, f=f: f * problem.equation.drift(x, t[0]),
            lambda x, t, s=s: s * problem.equation.diffusion(x, t[0]),
            phi,
        )
        found[f"{name} {f} {s}"] = {"max_z": float(got.z.abs().max()), "limit": got.limit, "p": got.p_value}
    return found


def snapshots(problem, times, points: int, g: torch.Generator) -> torch.Tensor:
    """Independent samples (K, N, d): from the exact law, or from paths of small steps, a fresh set for each time."""
    if problem.law_at is not None:
        return torch.stack([problem.law_at(t).sample(points, g) for t in times])
    parts = [problem.start.sample(points, g)]
    for t in times[1:]:
        start = problem.start.sample(points, g)
        parts.append(problem.equation.simulate(start, [0.0, t], max(10, round(200 * t)), g, order=2)[-1])
    return torch.stack(parts)


def fits(name: str, seeds: int) -> dict:
    """Fits of all coefficients of a drift of degree 1 or 3, and of the noise."""
    graded = torch.linspace(0, 1, 17, dtype=torch.float64).pow(1.5).tolist()
    problem, degree, times, points = {
        "ornstein_uhlenbeck": (problems.ornstein_uhlenbeck(), 1, TIMES, 2000),
        "double_well": (replace(problems.double_well(), start=gaussian(0.0, 0.5)), 3, graded, 6000),
    }[name]
    truth = torch.tensor({1: [0.0, -1.0, 2.0], 3: [0.0, 4.0, 0.0, -4.0, 1.0]}[degree], dtype=torch.float64)
    z, last = [], None
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        x = snapshots(problem, times, points, g)
        phi = test_functions.RandomFourier.adapted(x, 24, g)
        terms = dictionaries.polynomial_drift(1, degree), dictionaries.isotropic_covariance(1)
        last = fit(x, times, *terms, phi)
        z.append((last.coefficients - truth) / last.standard_errors)
    z = torch.stack(z)
    return {
        "problem": name,
        "seeds": seeds,
        "within_2": float((z.abs() < 2).double().mean()),
        "rms_z": float(z.square().mean().sqrt()),
        "last": last.to_dict(),
    }


def figures() -> dict:
    """Everything."""
    residuals = [{"dim": dim, "coverage": coverage(dim), "power": power(dim)} for dim in (1, 2, 20)]
    return {"residuals": residuals, "fits": [fits("ornstein_uhlenbeck", 40), fits("double_well", 15)]}


if __name__ == "__main__":
    print(json.dumps(figures(), indent=1))
