"""Log-likelihoods beside the exact log-densities of Gaussian mixtures: python benchmarks/likelihood.py [--json PATH]

Data at the default settings, exact divergence, mixtures of 2 and 64 dimensions of three seeds (benchmarks/mixtures.py)
under five fields. In nats: mean and largest error, mean of the errors that are reported, and the share of points whose
error is within three times what is reported for it.
"""

import argparse
import json
import math
from pathlib import Path

import mixtures
import torch
from mixtures import FIELDS, Mixture
from torch import Tensor

from diffusion.likelihood import likelihood


def log_density(model: Mixture, x: Tensor) -> Tensor:
    """Of the data at `x` (B, d), (B,)."""
    gap = (x[:, None] - model.means).square().sum(2) / model.stds.square()
    return (model.weights.log() - 0.5 * gap - x.shape[1] * (model.stds * math.sqrt(math.tau)).log()).logsumexp(1)


def measure(field: str, dim: int, seed: int, number: int = 16) -> dict[str, float | str | int]:
    model, randomness = mixtures.mixture(FIELDS[field](dim), dim, seed), torch.Generator().manual_seed(11)
    mode = torch.multinomial(model.weights, number, replacement=True, generator=randomness)
    noise = torch.randn(number, dim, generator=randomness, dtype=torch.float64)
    x = model.means[mode] + model.stds[mode, None] * noise
    found = likelihood(model, x)
    error = (found.nats - log_density(model, x)).abs()
    return {
        "field": field,
        "dim": dim,
        "seed": seed,
        "mean_error": float(error.mean()),
        "largest_error": float(error.max()),
        "mean_reported_error": float(found.error.mean()),
        "within_three": float((error <= 3 * found.error).double().mean()),
        "evaluations": float(found.evaluations.double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    rows = []
    for dim in mixtures.DIMS:
        for field in FIELDS:
            for seed in range(3):
                rows.append(measure(field, dim, seed))
                print(rows[-1], flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
