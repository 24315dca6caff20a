"""Digits by particle flows and by a one-step generator: python benchmarks/gradient_flow_digits.py [--json PATH]

The same evaluation for all: 2,000 samples, Frechet distance in the features of one classifier, memorisation beside
held-out digits. Flows start from normal noise and see all training digits; the generators are trained by
scripts/train.py with their default recipes, unless checkpoints are given.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import Generator
from diffusion.data import digits
from diffusion.gradient_flow import (
    EnergyDistance,
    OneStepGenerator,
    SinkhornDivergence,
    SlicedWasserstein,
    WassersteinFlow,
)
from diffusion.gradient_flow.flows.base import Flow
from diffusion.metrics import default_features, evaluate
from diffusion.samplers import Heun

SAMPLES = 2000
ROOT = Path(__file__).parents[1]
RECIPES = {"gravity, 35 evaluations": "digits_gravity", "one step, 1 evaluation": "digits_onestep"}


def flows(data: Tensor) -> dict[str, tuple[Flow, int, float]]:
    """Flow, steps and largest step, as in conf/flow."""
    return {
        "energy distance, 200 steps": (WassersteinFlow(EnergyDistance(data)), 200, 30.0),
        "sliced W2, 200 steps": (WassersteinFlow(SlicedWasserstein(data)), 200, 100.0),
        "Sinkhorn divergence, 30 steps": (WassersteinFlow(SinkhornDivergence(data)), 30, 1.0),
    }


def trained(experiment: str) -> Path:
    """The last checkpoint of a run of the recipe."""
    folder = Path(tempfile.mkdtemp()) / experiment
    options = [f"experiment={experiment}", "logger=none", "device=cpu", "num_samples=0", f"hydra.run.dir={folder}"]
    subprocess.run([sys.executable, str(ROOT / "scripts" / "train.py"), *options], check=True, capture_output=True)
    return folder / "checkpoints" / "last"


def benchmark(checkpoints: dict[str, Path] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each way to digits, and one for held-out digits."""
    splits = digits()
    data = splits.train.take(torch.arange(len(splits.train))).x
    features = default_features(splits)
    rows: list[dict[str, Any]] = []

    def judge(name: str, x: Tensor, seconds: float) -> None:
        found = evaluate(x, splits, features, seed)
        if not rows:
            rows.append({"method": "held-out digits", **found.real._asdict()})
        figures = found.generated
        nearness = figures.nearest_train / found.real.nearest_train
        rows.append({"method": name, **figures._asdict(), "nearest_over_held_out": nearness, "cpu_seconds": seconds})
        print(
            f"{name:32} Frechet {figures.frechet:8.3f}  precision {figures.precision:.2f}  recall {figures.recall:.2f}"
            f"  nearest {nearness:.2f} of held-out  memorised {figures.memorised:6.1%}  {seconds:6.1f} s",
            flush=True,
        )

    for name, experiment in RECIPES.items():
        start = time.process_time()
        place = (checkpoints or {}).get(experiment) or trained(experiment)
        if experiment == "digits_gravity":
            x = Generator.load(place).sample(SAMPLES, Heun(steps=18), seed)
        else:
            x = OneStepGenerator.load(place).sample(SAMPLES, seed)
        judge(name, x, time.process_time() - start)
    for name, (flow, steps, step_size) in flows(data).items():
        randomness = torch.Generator().manual_seed(seed)
        start = time.process_time()
        x = flow.run(torch.randn(SAMPLES, 1, 8, 8, generator=randomness), steps, step_size, randomness)
        judge(name, x, time.process_time() - start)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    parser.add_argument("--gravity", type=Path, help="a checkpoint of experiment=digits_gravity")
    parser.add_argument("--one-step", type=Path, help="a checkpoint of experiment=digits_onestep")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = benchmark({"digits_gravity": options.gravity, "digits_onestep": options.one_step})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
