"""When an equation changes: times that keep steps from passing over a push that comes and goes."""

import torch
from torch import Tensor

from diffusion.fokker_planck.equation import FokkerPlanck

MOMENTS = 256
PLACES = 128
SWING = 0.5  # of the range of what changes, that it moves from one of the times to the next
LEAST = 1.2  # ranges that it moves in all; one, if it only rises or only falls
MOST = 64  # times
ROUNDING = 1e-9  # relative to the largest that drift or noise is


def turning_times(equation: FokkerPlanck, points: Tensor, start: float, stop: float) -> list[float]:
    """Times at which drift or noise, somewhere among the `points` (n, d), have moved by another half of their range.

    They are looked at at MOMENTS times and up to PLACES of the points, so that what is over within a part in MOMENTS of
    the time, or is nearly nowhere, may not be seen. None where all that changes only rises, or only falls: that shows
    at the ends.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:PLACES]
    some = points[order.to(points.device)]
    times = torch.linspace(start, stop, MOMENTS + 2, dtype=torch.float64)[1:-1]
    moved = torch.zeros(MOMENTS - 1, dtype=torch.float64)
    for values in equation.over(some, times.tolist()):  # not under no_grad: a drift may be a derivative by autograd
        course = values.detach().reshape(MOMENTS, -1)
        low, high = course.aminmax(dim=0)
        size = float(torch.maximum(high.max(), -low.min()))
        changing = high - low > ROUNDING * size
        if not bool(changing.all()):
            course, low, high = course[:, changing], low[changing], high[changing]
        moves = course.diff(dim=0).abs_().div_(high - low)
        moves = moves[:, moves.sum(0) > LEAST]
        if moves.numel():
            moved = torch.maximum(moved, moves.amax(1).to(moved))
    moved = moved.cumsum(0)
    total = float(moved[-1])
    if not 0 < total < float("inf"):
        return []
    apart = max(SWING, total / MOST)
    marks = torch.arange(apart / 10, total, apart, dtype=moved.dtype)
    return times[torch.searchsorted(moved, marks)].unique().tolist()
