"""Samples of a process at several times: what the weak form averages over, and its integrals over time."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.scaled_functions import Samples

ELEMENTS = 2**21  # numbers in one chunk of a matrix


def quadrature(times: Sequence[float], degree: int) -> Tensor:
    """Weights (K,) of the integral over [times[0], times[-1]] of a function known at the K rising `times`.

    Between two times it is that of the polynomial through the `degree` + 1 times around them: exact for polynomials of
    that degree, and of an error of order degree + 1, or degree + 2 if the degree is even, in the distance of the times.
    """
    times = np.asarray(times, dtype=np.float64)
    weights = np.zeros(len(times))
    for i in range(len(times) - 1):
        first = min(max(i - degree // 2, 0), len(times) - 1 - degree)
        middle, half = (times[i] + times[i + 1]) / 2, (times[i + 1] - times[i]) / 2
        reach = max(times[first + degree] - times[first], 2 * half)
        nodes, high = (times[first : first + degree + 1] - middle) / reach, half / reach
        powers = np.arange(degree + 1)
        integrals = (high ** (powers + 1) - (-high) ** (powers + 1)) / (powers + 1)
        weights[first : first + degree + 1] += reach * np.linalg.solve(np.vander(nodes, increasing=True).T, integrals)
    return torch.from_numpy(weights)


class Average(NamedTuple):
    """A mean over independent points, and how uncertain it is."""

    mean: Tensor  # (Q,)
    variance: Tensor  # (Q,) of the mean
    covariance: Tensor  # (J, J) of the mean of the first J


def average(rows: Callable[[slice], Tensor], number: int, chunk: int, joint: int) -> Average:
    """The mean of `rows(part)` (n, Q) over all parts of `number` points, with the covariance of the first `joint`."""
    shift = total = squares = products = None
    for start in range(0, number, chunk):
        value = rows(slice(start, min(start + chunk, number))).detach()
        if shift is None:  # sums of what is near zero lose no digits
            shift, total, squares = value.mean(0), torch.zeros_like(value[0]), torch.zeros_like(value[0])
            products = value.new_zeros(joint, joint)
        value = value - shift
        total += value.sum(0)
        squares += value.square().sum(0)
        products += value[:, :joint].T @ value[:, :joint]
    mean, scale = total / number, 1 / (number * (number - 1))
    outer = torch.outer(mean[:joint], mean[:joint])
    variance = ((squares - number * mean.square()) * scale).clamp_min(0)
    return Average(shift + mean, variance, (products - number * outer) * scale)


class Snapshots:
    """Points at rising times.

    Args:
        samples: (K, N, d), or K tensors (N_k, d).
        times: K of them, rising.
        paths: row i is the same particle at all times; otherwise all points are independent.

    Raises:
        UserError: shapes do not agree, times do not rise, a point is not finite, fewer than two times or points.
    """

    def __init__(self, samples: Samples, times: Sequence[float] | Tensor, paths: bool = False):
        try:
            self.times = torch.as_tensor(times, dtype=torch.float64).reshape(-1).tolist()
            self.parts, self.paths = [torch.as_tensor(part) for part in samples], paths
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"times are to be numbers, and samples tensors (N, d), one for each: {str(error).splitlines()[0]}"
            ) from None
        shapes = [tuple(part.shape) for part in self.parts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] or shape[0] < 2 for shape in shapes):
            raise UserError(f"samples have shapes {shapes[:4]}, expected (N, d) with N at least 2, once for each time")
        if len(shapes) != len(self.times) or len(shapes) < 2:
            raise UserError(
                f"there are {len(shapes)} snapshots and {len(self.times)} times, expected as many, 2 or more"
            )
        rise = all(earlier < later for earlier, later in itertools.pairwise(self.times))
        if not rise or not all(map(math.isfinite, self.times)):
            raise UserError(f"times are {self.times}, expected finite ones that rise")
        if any(part.is_complex() for part in self.parts):
            raise UserError("samples are complex, expected real numbers")
        if paths and len(set(shapes)) > 1:
            raise UserError(f"snapshots of paths have {sorted({s[0] for s in shapes})} points, expected equal numbers")
        for t, part in zip(self.times, self.parts, strict=True):
            if not bool(part.isfinite().all()):
                bad = int((~part.isfinite()).any(1).nonzero()[0])
                raise UserError(
                    f"the sample at time {t:g}, row {bad}, is {part[bad].tolist()}, expected finite numbers"
                )

    @property
    def dim(self) -> int:
        return self.parts[0].shape[1]

    @property
    def points(self) -> int:
        """The least number of independent points at a time."""
        return min(map(len, self.parts))

    def integral(self, degree: int | None) -> tuple[Tensor, Tensor]:
        """Weights (K,) of the integral over time, and those of an estimate of its error.

        The estimate is a quarter of what the integral changes by when every second time is left out. Where the times
        resolve the change of the function it is too high; where they hardly do it is near the error.

        Args:
            degree: at most K - 1; 5 or K - 1, if None.
        """
        most = len(self.times) - 1
        degree = min(5, most) if degree is None else degree
        if not isinstance(degree, int) or not 1 <= degree <= most:
            raise UserError(f"degree is {degree} with {most + 1} times, expected a whole number from 1 to {most}")
        weights, rough = quadrature(self.times, degree), torch.zeros(most + 1, dtype=torch.float64)
        kept = sorted({*range(0, most, 2), most})
        if most == 1:
            return weights, weights - quadrature(self.times, 0)
        rough[kept] = quadrature([self.times[k] for k in kept], min(degree, len(kept) - 1))
        return weights, (weights - rough) / 4

    def averages(self, rows: Callable[[int, Tensor], Tensor], width: int, joint: int) -> list[Average]:
        """Means of `rows(k, x)` (n, Q) over the points of each time; of their sum over all k, if these are paths.

        The means of the list are independent of each other.

        Args:
            width: the number of elements that a point needs in memory.
            joint: see `average`.
        """
        chunk = max(1, ELEMENTS // max(width, joint, self.dim))

        def points(k: int, part: slice) -> Tensor:
            return self.parts[k][part].double()

        if self.paths:
            everything = range(len(self.parts))
            return [average(lambda p: sum(rows(k, points(k, p)) for k in everything), self.points, chunk, joint)]
        return [
            average(lambda part, k=k: rows(k, points(k, part)), len(self.parts[k]), chunk, joint)
            for k in range(len(self.parts))
        ]
