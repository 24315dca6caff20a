"""Single-step methods of orders 1 to 4 on the arc."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.base import Field
from diffusion.samplers.arc import Places, column, slope
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


class Stages(NamedTuple):
    """The plan: where stages lie, one step after the other, and the steps between the times of the grid."""

    times: Tensor  # (rows, order (steps - 1))
    at: Places  # (rows, order (steps - 1))
    widths: Tensor  # (rows, steps - 1) in the angle
    radius: Tensor  # (rows, steps)
    last: Tensor  # (), t_min


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

    def plan(self, model: Model, x: Tensor) -> Stages:
        arc, times = self.arc(model, x), self.times(model, x, self.steps)
        ends, places = arc.at(times), torch.tensor(TABLEAUS[self.order].places, dtype=torch.float64)
        widths = ends.angle.diff()
        stages = arc.times((ends.angle[:, :-1, None] + widths[:, :, None] * places).flatten(1))
        return Stages(stages.to(x), arc.at(stages).to(x), widths.to(x), ends.radius.to(x), times[0, -1].to(x))

    def follow(self, plan: Stages, velocity: Velocity, x: Tensor, field: Field) -> Tensor:
        tableau = TABLEAUS[self.order]
        state = x / column(plan.radius, 0, x)
        for n in range(self.steps - 1):
            width, slopes = column(plan.widths, n, x), []
            for k, weights in enumerate(tableau.stages):
                stage = n * self.order + k
                here = state + width * sum(weight * s for weight, s in zip(weights, slopes, strict=True))
                slopes.append(slope(velocity, here * column(plan.at.radius, stage, x), plan.times, plan.at, stage))
            state = state + width * sum(weight * s for weight, s in zip(tableau.step, slopes, strict=True))
        return endpoint(velocity, state * column(plan.radius, -1, x), field, plan.last)
