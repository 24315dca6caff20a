"""Single-step methods of orders 1 to 4 on the arc."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.samplers.arc import column, slope
from diffusion.samplers.base import Model, Velocity, endpoint, whole
from diffusion.samplers.on_arc import OnArc


class Tableau(NamedTuple):
    """Of an explicit Runge-Kutta method: where stages lie, what each is made of, and the step."""

    places: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    step: tuple[float, ...]


TABLEAUS = {
    1: Tableau((0,), ((),), (1,)),  # Euler
    2: Tableau((0, 2 / 3), ((), (2 / 3,)), (1 / 4, 3 / 4)),  # Ralston 1962
    3: Tableau((0, 1 / 2, 3 / 4), ((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),  # Ralston 1962
    4: Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),  # Kutta 1901
}


@dataclass(frozen=True)
class RungeKutta(OnArc):
    """Steps that remember nothing: order (steps - 1) + 1 evaluations in all.

    On the arc (see diffusion.samplers.arc) these are exponential integrators, as single-step DPM-Solver is (Lu et al.
    2022, arXiv 2206.00927); stages lie evenly in its angle, on any grid. Multistep needs fewer evaluations where the
    model is smooth; a method without memory suffers less where it is not.

    Args:
        steps: number of times from T to t_min; the last step, from t_min to the data, is the field's endpoint.
        order: 1 to 4, evaluations in a step.
    """

    steps: int = 6
    order: int = 3

    def __post_init__(self):
        super().__post_init__()
        whole(self.steps, "steps", 2)
        whole(self.order, "order", 1)
        if self.order not in TABLEAUS:
            raise UserError(f"sampler has order={self.order}, expected 1, 2, 3 or 4")

    def solve(self, velocity: Velocity, x: Tensor, model: Model) -> Tensor:
        arc, tableau = self.arc(model, x), TABLEAUS[self.order]
        times = self.times(model, x, self.steps)
        ends, places = arc.at(times), torch.tensor(tableau.places, dtype=torch.float64)
        stages = arc.times((ends.angle[:, :-1, None] + ends.angle.diff()[:, :, None] * places).flatten(1))
        at, widths = arc.at(stages).to(x), ends.angle.diff().to(x)
        stages, radius = stages.to(x), ends.radius.to(x)
        state = x / column(radius, 0, x)
        for n in range(self.steps - 1):
            width, slopes = column(widths, n, x), []
            for k, weights in enumerate(tableau.stages):
                stage = n * len(places) + k
                here = state + width * sum(weight * s for weight, s in zip(weights, slopes, strict=True))
                slopes.append(slope(velocity, here * column(at.radius, stage, x), stages, at, stage))
            state = state + width * sum(weight * s for weight, s in zip(tableau.step, slopes, strict=True))
        return endpoint(velocity, state * column(radius, -1, x), model.field, times[0, -1])
