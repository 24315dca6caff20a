"""When an equation changes: times that keep steps from passing over a push that comes and goes."""

import torch
from torch import Tensor

from diffusion.fokker_planck.equation import FokkerPlanck

MOMENTS = 256
PLACES = 8
SWING = 0.5  # of the range of what changes, that it moves from one of the times to the next
LEAST = 1.2  # ranges that it moves in all; one, if it only rises or only falls
MOST = 64  # times


def turning_times(equation: FokkerPlanck, points: Tensor, start: float, stop: float) -> list[float]:
    """Times at which drift or noise, at some of the `points` (n, d), have moved by another half of their range.

    They are looked at at MOMENTS times, so that what is over within a part in MOMENTS of the time may not be seen. None
    where all that changes only rises, or only falls: that shows at the ends.
    """
    some = points[torch.linspace(0, len(points) - 1, PLACES).round().long().unique()]
    times = torch.linspace(start, stop, MOMENTS + 2, dtype=torch.float64)[1:-1]
    course = torch.cat([values.detach().reshape(MOMENTS, -1) for values in equation.over(some, times.tolist())], 1)
    low, high = course.aminmax(dim=0)
    changing = high - low > 1e-12 * torch.maximum(high.abs(), low.abs())
    if not bool(changing.any()):
        return []
    moved = (course[:, changing].diff(dim=0).abs() / (high - low)[changing]).cumsum(0)
    moved = moved[:, moved[-1].argmax()].cpu().contiguous()
    total = float(moved[-1])
    if not LEAST < total < float("inf"):
        return []
    apart = max(SWING, total / MOST)
    marks = torch.arange(apart / 10, total, apart, dtype=moved.dtype)
    return times[torch.searchsorted(moved, marks)].unique().tolist()
