"""Samplers of a trained generator of digits: python benchmarks/samplers_digits.py [--checkpoint PATH]

The default recipe is trained, unless a checkpoint is given.

1. Errors from the same noise, as in samplers.py and beside the same libraries, for those that are installed. The exact
   answer is a solution of the network's ODE by a method of order 8, down to t_min: of images of few grey levels the
   network resolves details there. Multistep, which goes on to t = 0, is compared with it at t_min all the same, and
   with denoise=True, like others that end so, with the network's estimate there.
2. Frechet distances, also of the sampler tuned to the generator. A row is 2,000 samples from the same noise, for each
   of ten seeds of it; over_100 is the mean of its distances over that of 100 evaluations, and over_100_error the
   standard error of that, from the seeds; it leaves out how much a tuned row depends on the draws it was tuned on.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import stdev
from typing import Any

import mixtures
import peers
import torch
from gradient_flow_digits import trained
from samplers import cell, ours, table
from torch import Tensor

from diffusion import Generator
from diffusion.data import digits
from diffusion.metrics import default_features, evaluate
from diffusion.samplers import Heun, Multistep, Sampler, tune

SAMPLES, SEEDS, TUNED = 2000, range(10), (6, 8)
COMPARED, NFE = 128, (6, 8, 10, 15, 20)  # samples, evaluations


class Flat:
    """A generator of images as a model of benchmarks/mixtures.py: points are (N, d), E[x0|x] is the network's."""

    def __init__(self, generator: Generator):
        self.generator, self.field = generator, generator.field
        self.data_std, self.data_mean = generator.data_std, generator.data_mean.flatten()

    def posterior_mean(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """For fields with alpha = 1 and sigma = t."""
        return self._of_images(self.generator.denoised, x, sigma)

    def velocity(self, x: Tensor, t: Tensor | float) -> Tensor:
        return self._of_images(self.generator.velocity, x, t)

    def _of_images(self, function: Callable[[Tensor, Tensor | float], Tensor], x: Tensor, t: Tensor | float) -> Tensor:
        return function(x.view(-1, *self.generator.shape), t).flatten(1)


@torch.no_grad()
def errors(generator: Generator) -> dict[str, Any]:
    """Evaluations -> row -> figures, see `samplers.cell`; and how well the exact answer is known."""
    model, field = Flat(generator), generator.field
    x = field.sample_prior((COMPARED, *generator.shape), torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.flatten(1)
    rough, state = (mixtures.follow(model, x, field.horizon, field.t_min, rtol) for rtol in (1e-4, 1e-5))
    denoised = model.posterior_mean(state, 1.0, field.t_min)
    uncertainty = float((state - rough).square().mean(1).sqrt().median())
    case = mixtures.Case("digits_gravity", model, x, state, denoised, state, uncertainty)
    methods, missing = peers.installed()
    cells = {nfe: cell(case, methods, nfe, borrowed=False, tuning=False) for nfe in NFE}
    for nfe, found in cells.items():
        found["ours: Multistep, denoise"] = ours(case, Multistep(nfe, denoise=True), "denoised", nfe)
    table(case, cells)
    return {"errors": {"missing": missing, "reference_uncertainty": uncertainty, "fixed": cells}}


def distances(generator: Generator) -> dict[str, Any]:
    splits = digits()
    features = default_features(splits)

    def draw(number: int, randomness: torch.Generator) -> tuple[Tensor, dict]:
        return generator.field.sample_prior((number, *generator.shape), randomness, dtype=torch.float64), {}

    samplers: dict[str, Sampler] = {
        "Multistep, 100": Multistep(100),
        **{f"Multistep, {nfe}": Multistep(nfe) for nfe in (6, 8)},
        "Heun, 35": Heun(steps=18),
    }
    for nfe in TUNED:
        samplers[f"tuned, {nfe}"] = tune(generator, draw, nfe).sampler
    rows: list[dict[str, Any]] = []
    for name, sampler in samplers.items():
        found = [evaluate(generator.sample(SAMPLES, sampler, seed), splits, features) for seed in SEEDS]
        frechet = [figures.generated.frechet for figures in found]
        first = rows[0]["frechet"] if rows else frechet
        ratio = sum(frechet) / sum(first)
        error = stdev(a - ratio * b for a, b in zip(frechet, first, strict=True)) * len(SEEDS) ** 0.5 / sum(first)
        rows.append({"sampler": name, "frechet": frechet, "over_100": ratio, "over_100_error": error})
        print(rows[-1], flush=True)
    return {"frechet": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="of experiment=digits_gravity")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    generator = Generator.load(options.checkpoint or trained("digits_gravity"))
    found = {}
    for part in (errors, distances):
        found |= part(generator)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
