"""A flow followed from noise to data: what scripts/flow.py prints, draws and keeps."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Flow, Moment
from diffusion.metrics import nearest_distance

COPIED = 0.5
"""Particles this near to training points, as a share of what held-out points are, are called copies."""


@dataclass(frozen=True)
class Run:
    """What became of the particles.

    Attributes:
        steps: done at each of K moments.
        columns: figures at these moments, K each; NaN where one is not known.
        frames: particles at these moments, (K, N, *shape).
        held_out: median distance of held-out points from the nearest training point.
        unknown: why the functional has no value, where it has none.
    """

    steps: list[int]
    columns: dict[str, list[float]]
    frames: Tensor
    held_out: float
    unknown: str = ""

    def table(self, rows: int = 11) -> str:
        """At most `rows` of the moments, a line each, and what is to be said of them all."""
        width = max(14, *(len(name) + 2 for name in self.columns))
        lines = [f"{'step':>6}" + "".join(f"{name:>{width}}" for name in self.columns)]
        for k in torch.linspace(0, len(self.steps) - 1, min(rows, len(self.steps))).round().long().tolist():
            lines.append(f"{self.steps[k]:>6}" + "".join(f"{row[k]:>{width}.4g}" for row in self.columns.values()))
        return "\n".join([*lines, *self.remarks()])

    def remarks(self) -> list[str]:
        """Whether the functional fell, and how near the particles came to the training points."""
        values, nearest = self.columns["functional"], self.columns["nearest"][-1]
        first, last = values[0], values[-1]
        if math.isnan(last):
            fell = ": ".join(filter(None, ["the functional has no value that can be computed", self.unknown]))
        else:
            fell = f"the functional {'fell' if last < first else 'DID NOT FALL'}: {first:.4g} to {last:.4g}"
        kind = "are copies of them" if nearest < COPIED * self.held_out else "are no copies of them"
        return [
            fell,
            f"memorisation: particles are {nearest:.3g} from the nearest training point, held-out points "
            f"{self.held_out:.3g} (medians), so most {kind}; a flow on a finite data set can memorise it",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, as plain data; None for what is not known."""
        columns = {name: [None if math.isnan(x) else x for x in row] for name, row in self.columns.items()}
        return {"step": self.steps, **columns, "nearest_of_held_out": self.held_out}


def follow(
    flow: Flow,
    particles: Tensor,
    steps: int,
    step_size: float,
    train: Tensor,
    test: Tensor,
    generator: torch.Generator | None = None,
    frames: int = 41,
    log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
) -> Run:
    """Run `flow` and look at it at about `frames` moments, the first and the last among them.

    Args:
        train, test: training and held-out points (M, *shape), to measure memorisation.
        log: called with (step, figures) at each of these moments.
    """
    if frames < 2:
        raise UserError(f"frames is {frames}, expected at least 2, the first and the last")
    shown = set(torch.linspace(0, steps, frames).round().long().tolist())
    kept: list[Moment] = []
    unknown = ""
    columns: dict[str, list[float]] = {"time": [], "functional": [], "nearest": []}
    for moment in flow.moments(particles, steps, step_size, generator):
        if moment.step not in shown:
            continue
        kept.append(moment)
        try:
            value = moment.value()
        except UserError as error:
            value, unknown = math.nan, str(error)
        nearest = float(nearest_distance(moment.particles, train).median())
        figures = {"time": moment.time, "functional": value, "nearest": nearest}
        for name, figure in figures.items():
            columns[name].append(figure)
        log(moment.step, {name: figure for name, figure in figures.items() if not math.isnan(figure)})
    held_out = float(nearest_distance(test, train).median())
    steps, seen = [moment.step for moment in kept], torch.stack([moment.particles.cpu() for moment in kept])
    return Run(steps, columns, seen, held_out, unknown)
