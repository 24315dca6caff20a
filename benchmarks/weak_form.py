"""Coverage and power of the weak residual: python benchmarks/weak_form.py

Coverage: the share of |z| below 3 over 100 seeds, with the right equation. Power: the largest |z|, its limit and the
joint p-value with drift or diffusion wrong by 5 %, from 100,000 samples at nine times together.
"""

import json

import torch

from diffusion.fokker_planck import problems, test_functions, weak_residual

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


if __name__ == "__main__":
    for dim in (1, 2, 20):
        print(json.dumps({"dim": dim, "coverage": coverage(dim), "power": power(dim)}), flush=True)
