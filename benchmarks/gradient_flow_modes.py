"""Sampling laws of many modes from their log-density alone: who finds the modes, and with what weights.

400 particles, 200 steps, from a normal law that knows nothing of the modes. W2 is that between the particles and as
many exact draws, by optimal assignment; its floor is W2 between two sets of exact draws. The circle is that of the data
set 8gaussians (std a tenth of the radius), off the centre of the first particles and in units in which the floor is
about 0.105. The step sizes of ULA (std^2 / 10), MALA (std^2 / 2; a third of that in 10 dimensions) and SVGD (the better
of two; infinite W2 where it diverges) come from what no user knows, the width of the modes; Tempered is given nothing.

    python benchmarks/gradient_flow_modes.py --json modes.json
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.flows.fisher_rao import FisherRaoFlow
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama
from diffusion.gradient_flow.flows.stein import SteinFlow
from diffusion.gradient_flow.flows.tempering import Annealing, Tempered
from diffusion.gradient_flow.functionals.kl import KL

N, STEPS, SEEDS = 400, 200, 5


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians; with `bend` the second coordinate is raised by bend x_1^2, which keeps volumes.

    Attributes:
        means: (K, d).
        stds: (K,).
        weights: (K,), summing to 1.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    bend: float = 0.0

    def log_prob(self, x: Tensor) -> Tensor:
        squares = (self._bent(x, -1)[:, None] - self.means).square().sum(2)
        return (self.weights.log() - x.shape[1] * self.stds.log() - squares / (2 * self.stds**2)).logsumexp(1)

    def draw(self, number: int, generator: Generator) -> Tensor:
        index = torch.multinomial(self.weights, number, True, generator=generator)
        noise = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self._bent(self.means[index] + self.stds[index, None] * noise, 1)

    def shares(self, x: Tensor) -> Tensor:
        """Of the particles that are nearest to each mode, in its widths, (K,)."""
        nearest = (torch.cdist(self._bent(x, -1), self.means) / self.stds).argmin(1)
        return torch.bincount(nearest, minlength=len(self.means)) / len(x)

    def _bent(self, x: Tensor, sign: int) -> Tensor:
        if not self.bend:
            return x
        return torch.cat([x[:, :1], x[:, 1:2] + sign * self.bend * x[:, :1].square(), x[:, 2:]], 1)


@dataclass(frozen=True)
class Problem:
    """A law, and the standard deviation of the first particles around 0."""

    law: Mixture
    spread: float


def circle(dim: int, unit: float, weights: Tensor | None = None) -> Problem:
    """Eight modes in a plane; the circle's centre is 2.1 radii off, first particles are 1.9 radii wide."""
    angle = torch.arange(8, dtype=torch.float64) * (math.tau / 8)
    means = torch.zeros(8, dim, dtype=torch.float64)
    means[:, 0], means[:, 1] = unit * (angle.cos() + 2.1), unit * angle.sin()
    return Problem(_mixture(means, 0.1 * unit, weights), 1.9 * unit)


def _mixture(means: Tensor, stds: Tensor | float, weights: Tensor | None = None, bend: float = 0.0) -> Mixture:
    ones = torch.ones(len(means), dtype=torch.float64)
    weights = ones if weights is None else weights.double()
    return Mixture(means, ones * stds, weights / weights.sum(), bend)


def problems() -> dict[str, Problem]:
    generator = Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    corners = torch.randint(2, (8, 10), generator=generator).double() * 2 - 1
    widths = torch.linspace(0.05, 0.4, 20, dtype=torch.float64)
    rising = torch.arange(1, 9)
    return {
        "circle, d = 2": circle(2, 0.53),
        "circle, d = 10": circle(10, 0.32),
        "circle, weights 1 to 8, d = 2": circle(2, 0.53, rising),
        "circle, weights 1 to 8, d = 10": circle(10, 0.32, rising),
        "corners, weights 1 to 8, d = 10": Problem(_mixture(0.7 * corners, 0.1, rising), 1.0),
        "20 modes, widths 0.05 to 0.4, d = 2": Problem(_mixture(2 * normal(20, 2), widths), 2.0),
        "two bananas, d = 2": Problem(_mixture(torch.tensor([[-1.0, 0.0], [2.0, -2.0]]).double(), 0.5, bend=0.5), 2.0),
    }


def methods(problem: Problem) -> dict[str, tuple[Callable[[KL], Flow], tuple[float, ...]]]:
    """Flows, and the step sizes of which each may have the best."""
    width = float(problem.law.stds.min())
    small = (0.1 * width**2,)
    larger = (width**2 * (0.5 if problem.law.means.shape[1] == 2 else 0.17),)
    stein = (width**2, 4 * width**2)
    return {
        "ULA": (lambda f: Langevin(f, EulerMaruyama()), small),
        "ULA + birth-death": (lambda f: Langevin(f, EulerMaruyama()) + FisherRaoFlow(f), small),
        "MALA": (lambda f: Langevin(f, Metropolis()), larger),
        "MALA + birth-death": (lambda f: Langevin(f, Metropolis()) + FisherRaoFlow(f), larger),
        "SVGD": (SteinFlow, stein),
        "SVGD + birth-death": (lambda f: SteinFlow(f) + FisherRaoFlow(f), stein[1:]),
        "tempered": (Tempered, (1.0,)),
        "tempered, no jumps": (lambda f: Tempered(f, jumps=0), (1.0,)),
    }


def w2(x: Tensor, y: Tensor) -> float:
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(cost[rows, columns].mean())


@dataclass
class Counted:
    """A log-density that counts the points at which it is asked, and those of them that are differentiated."""

    law: Mixture
    values: int = 0
    gradients: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.values += len(x)
        self.gradients += len(x) * x.requires_grad
        return self.law.log_prob(x)


def sample(problem: Problem, build: Callable[[KL], Flow], step_size: float, seed: int) -> dict[str, float]:
    """One run of a method: its W2 and floor, what of the modes it found, and what it asked for."""
    law, generator = problem.law, Generator().manual_seed(seed)
    exact, others = law.draw(N, generator), law.draw(N, generator)
    x = problem.spread * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    counted, start = Counted(law), time.process_time()
    memory, diverged = None, False
    try:
        for moment in build(KL(counted)).moments(x, STEPS, step_size, generator):
            x, memory = moment.particles, moment.memory
    except UserError:  # particles, or their bandwidth, are no longer finite
        diverged = True
    shares = law.shares(x)
    return {
        "w2": math.inf if diverged else w2(x, exact),
        "floor": w2(others, exact),
        "found": int((shares > 0.5 * law.weights).sum()),
        "variation": float((shares - law.weights).abs().sum() / 2),
        "gradients": counted.gradients / N,
        "evaluations": counted.values / N,
        "seconds": time.process_time() - start,
        "share": memory.share if isinstance(memory, Annealing) else 1.0,
    }


def modes(
    seeds: int = SEEDS, names: tuple[str, ...] = (), titles: tuple[str, ...] = ()
) -> dict[str, dict[str, dict[str, float]]]:
    """Medians over seeds, of the methods `names` on the problems `titles`; of all where there are none."""
    result = {}
    for title, problem in problems().items():
        if titles and title not in titles:
            continue
        chosen = {k: v for k, v in methods(problem).items() if not names or k in names}
        rows = {}
        for name, (build, step_sizes) in chosen.items():
            tries = []
            for step_size in step_sizes:
                runs = [sample(problem, build, step_size, seed) for seed in range(seeds)]
                medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                tries.append(medians | {"worst": max(run["w2"] for run in runs), "step_size": step_size})
            rows[name] = min(tries, key=lambda row: row["w2"])
            print(f"{title}, {name}: {rows[name]}", flush=True)
        result[title] = rows
        print(table(title, rows), flush=True)
    return result


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    floor = next(iter(rows.values()))["floor"]
    lines = [
        f"{title}: floor {floor:.3f}",
        f"{'':22}{'W2':>7}{'worst':>7}{'found':>7}{'TV':>7}{'grads':>7}{'values':>8}",
    ]
    for name, row in rows.items():
        figures = f"{row['w2']:7.3f}{row['worst']:7.3f}{row['found']:7.0f}{row['variation']:7.3f}"
        lines.append(f"{name:22}{figures}{row['gradients']:7.0f}{row['evaluations']:8.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="*", default=[], help="names of methods, all without")
    parser.add_argument("--problems", nargs="*", default=[], help="titles of problems, all without")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = modes(arguments.seeds, tuple(arguments.methods), tuple(arguments.problems))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
