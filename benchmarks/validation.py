"""What `validate` says of right fields: python benchmarks/validation.py [--seeds 200]

1. The strong residual of every built-in field in 2, 64 and 3072 dimensions: relative, in float64; beyond 128 dimensions
   with Hutchinson's estimate of the divergence.
2. False alarms: how many of 200 runs of all checks, on different draws, refuse a right field; and for each check the
   largest figure seen over its tolerance. A fiftieth of the default number of draws: few draws are the harder case.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

from diffusion import fields
from diffusion.fields import checks, validate
from diffusion.fields.validation import Report

FIELDS = {
    "gravity": fields.gravity,
    "pfgmpp": fields.pfgmpp,
    "variance_exploding": fields.variance_exploding,
    "variance_preserving": fields.variance_preserving,
    "linear": fields.linear,
    "radial_tanh": fields.radial_tanh,
    "radial_exponential": fields.radial_exponential,
    "radial_stretched": fields.radial_stretched,
    "radial_gravity": fields.radial_gravity,
    "radial_gaussian": fields.radial_gaussian,
    "straight(uniform)": lambda dim: fields.straight(fields.uniform()),
    "straight(laplace)": lambda dim: fields.straight(fields.laplace()),
    "straight(principal)": lambda dim: fields.straight(fields.PrincipalGaussian.fit(data(dim), min(dim - 1, 16))),
    "curved": lambda dim: fields.curved(fields.Gaussian(), 1.0),
    "drifting": lambda dim: fields.drifting(lambda x0, t: (1 - t) * x0 + t * (1 - t) * x0.sin(), lambda t: t.sin()),
}
REPEATED = [("gravity", 2), ("linear", 64), ("radial_stretched", 2), ("straight(laplace)", 3)]


def data(dim: int) -> torch.Tensor:
    return torch.randn(500, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def residual(name: str, dim: int) -> dict:
    with torch.no_grad():
        check, _, relative = checks.strong_continuity(checks.Subject(FIELDS[name](dim), data(dim), 0, 1.0))
    row = {"field": name, "dim": dim, "worst": float(relative.abs().max()), "passed": check.passed}
    print(f"{name:<20} {dim:>5} {row['worst']:>10.2e} {'pass' if check.passed else 'FAIL'}", flush=True)
    return row


def false_alarms(name: str, dim: int, seeds: int) -> dict:
    refused, largest = Counter(), Counter()
    for seed in range(seeds):
        report: Report = validate(FIELDS[name](dim), data(dim), seed=seed, effort=0.02)
        refused.update(report.failed)
        for check in report.checks:
            if check.passed is not None:
                largest[check.name] = max(largest[check.name], check.figure / check.tolerance)
    worst = ", ".join(f"{check} {ratio:.2f}" for check, ratio in largest.items())
    print(f"{name:<20} {dim:>5}  refused by {dict(refused) or 'none'} in {seeds} runs; largest: {worst}", flush=True)
    return {"field": name, "dim": dim, "runs": seeds, "refused": dict(refused), "largest_over_tolerance": dict(largest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print("largest relative residual of the strong continuity equation")
    residuals = [residual(name, dim) for dim in (2, 64, 3072) for name in FIELDS]
    print("false alarms")
    alarms = [false_alarms(name, dim, seeds) for name, dim in REPEATED]
    result = {"torch": torch.__version__, "strong_residual": residuals, "false_alarms": alarms}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"figures: {path.name}")


if __name__ == "__main__":
    main()
