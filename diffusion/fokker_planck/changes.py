"""When an equation changes: times that keep steps from passing over a push that comes and goes."""

import torch
from torch import Tensor

from diffusion.fokker_planck.equation import FokkerPlanck

MOMENTS = 256
PLACES = 256
AT_ONCE = 16_384  # points in time and space
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
    with torch.no_grad():
        found = [equation.over(some, part.tolist()) for part in times.split(max(2, AT_ONCE // len(some)))]
    for parts in zip(*found, strict=True):
        most = max(part.dim() for part in parts)
        course = torch.cat([_widened(part, most, some.shape[1]) for part in parts]).reshape(MOMENTS, -1)
        low, high = course.aminmax(dim=0)
        changing = high - low > ROUNDING * course.abs().max()
        moves = course[:, changing].diff(dim=0).abs() / (high - low)[changing]
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


def _widened(values: Tensor, dim: int, coordinates: int) -> Tensor:
    """Noise (K, n), (K, n, d) or (K, n, d, d) in the shape of so many dimensions."""
    if values.dim() == 2 < dim:
        values = values[..., None].expand(-1, -1, coordinates)
    return values.diag_embed() if values.dim() == 3 < dim else values
