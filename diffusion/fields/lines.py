"""Field lines, followed by the velocity alone: for pictures of any field, labelled or not."""

import torch
from torch import Tensor

from diffusion.fields.base import Field


@torch.no_grad()
def follow(field: Field, x0: Tensor, number: int, seed: int = 0, steps: int = 256) -> tuple[Tensor, Tensor]:
    """`number` lines from one data point: times (steps + 1,) from t_min to T and places (steps + 1, number, *shape).

    The lines begin at draws of x_t at t_min; the classical Runge-Kutta method follows them in the field's clock.

    Args:
        x0: (*shape), one data point.
    """
    start = x0.double().expand(number, *x0.shape)
    times = field.clock(2 * steps + 1)
    x = field.sample(start, field.t_min, torch.Generator().manual_seed(seed))
    places = [x]
    for t, middle, t_next in zip(times[:-2:2].tolist(), times[1:-1:2].tolist(), times[2::2].tolist(), strict=True):
        # In the clock u, dx/du = v dt/du; with rho = 1 these are the usual weights.
        speed = [s ** (1 - 1 / field.rho) * field.rho for s in (t, middle, t_next)]
        du = t_next ** (1 / field.rho) - t ** (1 / field.rho)
        a = speed[0] * field.velocity(x, t, start)
        b = speed[1] * field.velocity(x + du / 2 * a, middle, start)
        c = speed[1] * field.velocity(x + du / 2 * b, middle, start)
        d = speed[2] * field.velocity(x + du * c, t_next, start)
        x = x + du / 6 * (a + 2 * b + 2 * c + d)
        places.append(x)
    return times[::2], torch.stack(places)
