"""Marginal errors of the stochastic samplers against exact mixtures: python benchmarks/stochastic.py

Three point masses of different weight in the plane, 2 apart, and fields that end at t_min, where the law is a mixture
of laws of scale 0.2 around them, those of the field's noise: Gaussian, Cauchy under gravity, Student-t under PFGM++.
Samples start from the exact law at the horizon, so that only the steps of the sampler are to blame. The error is the
distance of the distribution functions of projections on eight directions, [mean (F_N - F)^2]^(1/2) with the mean over
the exact law, from which the part due to chance, 1 / (6 N), is subtracted; what chance leaves is the error of four sets
of exact draws, in the row "exact".
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

from diffusion.fields import (
    AffineField,
    StudentT,
    conversions,
    gravity,
    linear,
    pfgmpp,
    variance_exploding,
    variance_preserving,
)
from diffusion.samplers import (
    Ancestral,
    Churn,
    EulerMaruyama,
    Motion,
    PredictorCorrector,
    Stochastic,
    StochasticSampler,
)
from diffusion.samplers.base import Randomness

SCALE = 0.2
POINTS = torch.tensor([[1.2, 0.1], [-0.8, 0.9], [-0.3, -1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
FIELDS = {
    "variance_exploding": lambda: variance_exploding(2, t_min=SCALE),
    "variance_preserving": lambda: variance_preserving(2, t_min=0.04),
    "linear": lambda: linear(2, t_min=SCALE / (1 + SCALE)),
    "gravity": lambda: gravity(2, t_min=SCALE),
    "pfgmpp, D = 4": lambda: pfgmpp(2, 4.0, t_min=SCALE),
}
NOISE = {"0": 0.0, "0.3": 0.3, "1": 1.0, "3": 3.0, "t / (1 + t)": lambda t: t / (1 + t)}
CHURN, ETA = (0.0, 2.0, 5.0, 10.0, 20.0), (0.0, 0.25, 0.5, 0.75, 1.0)


class Masses:
    """The exact model of the masses, with samples left where they are at t_min."""

    def __init__(self, field: AffineField):
        self.field = field
        self.dof = field.base.dof if isinstance(field.base, StudentT) else math.inf
        self.field.endpoint = lambda x, t, velocity: x

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.velocity_and_score(x, t).velocity

    def velocity_and_score(self, x: Tensor, t: Tensor) -> Motion:
        c = self.field.schedule(x, t[:1])
        z = (x[:, None] - c.alpha * POINTS) / c.sigma
        squared = z.square().sum(2)
        heavy = math.isfinite(self.dof)
        logits = -0.5 * (self.dof + 2) * torch.log1p(squared / self.dof) if heavy else -0.5 * squared
        share = (WEIGHTS.log() + logits).softmax(1)
        pull = (self.dof + 2) / (self.dof + squared) if heavy else torch.ones_like(squared)
        score = -((share * pull)[:, :, None] * z).sum(1) / c.sigma
        return Motion(conversions.from_denoised(c, x, share @ POINTS).velocity, score)


def start(field: AffineField, t: float, number: int, randomness: torch.Generator) -> Tensor:
    """Draws (number, 2) of the exact law at `t`."""
    masses = POINTS[torch.multinomial(WEIGHTS, number, True, generator=randomness)]
    return field.sample(masses, t, randomness)


def error(field: AffineField, x: Tensor) -> float:
    """See above; 0 where chance explains all."""
    law = stats.t(field.base.dof) if isinstance(field.base, StudentT) else stats.norm()
    end = torch.tensor(field.t_min, dtype=torch.float64)
    alpha, sigma, squares = float(field.alpha(end)), float(field.sigma(end)), []
    for k in range(8):
        direction = torch.tensor([math.cos(math.pi * k / 8), math.sin(math.pi * k / 8)], dtype=torch.float64)
        places = (x @ direction).sort().values.numpy()
        centres = (alpha * POINTS @ direction).tolist()
        exact = sum(w * law.cdf((places - c) / sigma) for w, c in zip(WEIGHTS.tolist(), centres, strict=True))
        ranks = (torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)
        squares.append(float(((ranks.numpy() - exact) ** 2).mean() + 1 / (12 * len(x) ** 2) - 1 / (6 * len(x))))
    return math.sqrt(max(0.0, sum(squares) / len(squares)))


def samplers() -> Iterator[tuple[str, str, Callable[[int], StochasticSampler]]]:
    """Scheme, level of noise, and the sampler with a number of steps."""
    for scheme in (EulerMaruyama, Stochastic, PredictorCorrector):
        for level, noise in NOISE.items():
            yield scheme.__name__, level, lambda steps, scheme=scheme, noise=noise: scheme(steps, noise=noise)
    for churn in CHURN:
        yield "Churn", f"{churn:g}", lambda steps, churn=churn: Churn(steps, churn=churn)
    for eta in ETA:
        yield "Ancestral", f"{eta:g}", lambda steps, eta=eta: Ancestral(steps, eta=eta)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--number", type=int, default=10_000, help="samples")
    options.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100])
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {"torch": torch.__version__, "number": chosen.number, "steps": chosen.steps}
    print(f"{'field':20}{'scheme':20}{'noise':>12}" + "".join(f"{n:>10}" for n in chosen.steps), flush=True)
    started = time.perf_counter()
    for name, build in FIELDS.items():
        rows = results[name] = []
        draws: list[Randomness] = [torch.Generator().manual_seed(k) for k in range(4)]
        exact = [error(build(), start(build(), build().t_min, chosen.number, g)) for g in draws]
        rows.append({"scheme": "exact", "noise": "", "errors": exact})
        for scheme, level, sampler in samplers():
            errors = []
            for steps in chosen.steps:
                model = Masses(build())
                x = start(model.field, model.field.horizon, chosen.number, torch.Generator().manual_seed(10))
                errors.append(error(model.field, sampler(steps)(model, x, torch.Generator().manual_seed(11))))
            rows.append({"scheme": scheme, "noise": level, "errors": errors})
        for row in rows:
            figures = "".join(f"{value:10.4f}" for value in row["errors"])
            print(f"{name:20}{row['scheme']:20}{row['noise']:>12}{figures}", flush=True)
    chosen.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{chosen.json}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
