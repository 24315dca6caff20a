"""The energy distance, by slices and sorting."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.gradient_flow.functionals.slices import Sliced, argsort, mean_projection, unsorted


@dataclass(frozen=True, eq=False)
class EnergyDistance(Sliced):
    """F[q] = 2 E|x - y| - E|x - x'| - E|y - y'|, x ~ q, y ~ data (Szekely and Rizzo 2013).

    On a line F = 2 int (Q - P)^2 ds, where Q and P are the distribution functions of particles and data, and the
    velocity is 4 (Q - P), each taken at the middle of its jump. In d dimensions |x| is the mean of |theta . x| over
    directions theta, divided by its value for a unit vector, so F is the mean of the slices' energies so divided
    (Hertrich, Wald, Altekruger and Hagemann, Generative Sliced MMD Flows with Riesz Kernels, 2023).
    """

    def unit(self, dim):
        return mean_projection(dim)

    def cost(self, x, y):
        stairs = _Stairs(x, y)
        return 2 * (stairs.height[:, 1:-1].square() * stairs.places.diff(dim=1)).sum(1)

    def push(self, x, y):
        stairs = _Stairs(x, y)
        return unsorted(2 * stairs.middle(), stairs.order)[:, : x.shape[1]]

    def variation(self, x, y):
        stairs = _Stairs(x, y)
        climb = (stairs.height[:, 1:-1] * stairs.places.diff(dim=1)).cumsum(1, dtype=torch.float64)
        climb = torch.nn.functional.pad(climb, (1, 0)).to(x.dtype)
        return unsorted(-4 * climb, stairs.order)[:, : x.shape[1]]


class _Stairs:
    """Q - P of particles (L, N) and data (L, M).

    Attributes:
        order: of the N + M points, particles first.
        places: the points in this order.
        height: Q - P before all of them and after each, (L, N + M + 1).
    """

    def __init__(self, x: Tensor, y: Tensor):
        joint = torch.cat([x, y], 1)
        self.order = argsort(joint)
        self.places = joint.gather(1, self.order)
        total = joint.shape[1]
        exact = x.dtype if total < 2**24 else torch.float64
        passed = (self.order < x.shape[1]).cumsum(1, dtype=exact)
        rest = torch.arange(1, total + 1, dtype=exact, device=x.device) - passed
        height = (passed / x.shape[1] - rest / y.shape[1]).to(x.dtype)
        self.height = torch.nn.functional.pad(height, (1, 0))

    def middle(self) -> Tensor:
        """The sum of the heights on both sides of each point, (L, N + M); points at one place have one jump."""
        before, after = self.height[:, :-1], self.height[:, 1:]
        same = self.places[:, 1:] == self.places[:, :-1]
        if not bool(same.any()):
            return before + after
        at = torch.arange(before.shape[1], device=before.device)
        edge = torch.nn.functional.pad(~same, (1, 0), value=True)
        first = torch.where(edge, at, 0).cummax(1).values
        last = torch.where(edge.roll(-1, 1), at, len(at)).flip(1).cummin(1).values.flip(1)
        return before.gather(1, first) + after.gather(1, last)
