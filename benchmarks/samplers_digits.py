"""Frechet distance of digits by the number of evaluations: python benchmarks/samplers_digits.py [--checkpoint PATH]

The default recipe is trained, unless a checkpoint is given, and the sampler tuned to it. A row is 2,000 samples from
the same noise, for each of three seeds of it; over_100 is the mean of its distances over that of 100 evaluations.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from gradient_flow_digits import trained
from torch import Tensor

from diffusion import Generator
from diffusion.data import digits
from diffusion.metrics import default_features, evaluate
from diffusion.samplers import Heun, Multistep, Sampler, tune

SAMPLES, SEEDS, TUNED = 2000, (0, 1, 2), (6, 8)


def benchmark(checkpoint: Path) -> list[dict[str, Any]]:
    generator, splits = Generator.load(checkpoint), digits()
    features = default_features(splits)

    def draw(number: int, randomness: torch.Generator) -> tuple[Tensor, dict]:
        return generator.field.sample_prior((number, *generator.shape), randomness, dtype=torch.float64), {}

    samplers: dict[str, Sampler] = {
        "Multistep, 100": Multistep(100),
        **{f"Multistep, {nfe}": Multistep(nfe) for nfe in (6, 8)},
        "Heun, 35": Heun(steps=18),
    }
    seconds: dict[str, float] = {}
    for nfe in TUNED:
        start = time.perf_counter()
        samplers[f"tuned, {nfe}"] = tune(generator, draw, nfe).sampler
        seconds[f"tuned, {nfe}"] = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    for name, sampler in samplers.items():
        found = [evaluate(generator.sample(SAMPLES, sampler, seed), splits, features) for seed in SEEDS]
        frechet = [figures.generated.frechet for figures in found]
        first = rows[0]["frechet"] if rows else frechet
        rows.append({"sampler": name, "frechet": frechet, "over_100": sum(frechet) / sum(first)})
        rows[-1] |= {"seconds_of_tuning": seconds[name]} if name in seconds else {}
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="of experiment=digits_gravity")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    rows = benchmark(options.checkpoint or trained("digits_gravity"))
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
