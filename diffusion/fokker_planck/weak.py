"""Is this the equation of these samples? The weak form over test functions, in any number of dimensions.

For every test function phi, E phi(x_T) - E phi(x_0) = int_0^T E[L phi](t) dt with L phi = f . grad phi
+ 1/2 tr(a Hess phi). The means are over samples, the integral is a quadrature over the times at which there are some.
Where samples are reflected by a wall this holds only for phi whose slope across the wall vanishes there.
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import special
from torch import Tensor

from diffusion.fokker_planck.equation import FokkerPlanck, Function
from diffusion.fokker_planck.scaled_functions import Samples, TestFunctions
from diffusion.fokker_planck.snapshots import Snapshots

CHANCE = 1e-3  # that the right equation fails
ROUNDING = 1e-10  # of the largest standard error; one that is smaller says nothing
COARSE = 0.5  # standard errors that the integral over time may be off before there is a warning
SWING = 0.5  # of its root mean square, that drift or covariance may be off between two times from a straight line
ASKED = 256  # points, at which they are asked between times
RANK = (
    1e-3  # of the largest eigenvalue of a correlation matrix; below, combinations live on few samples and are left out
)


def whitening(covariance: Tensor) -> Tensor:
    """W (r, K) with W covariance W^T = 1, r the rank of the covariance (K, K)."""
    error = covariance.diagonal().clamp_min(0).sqrt()
    kept = (error > ROUNDING * error.max()).nonzero()[:, 0]
    error = error[kept]
    eigenvalues, vectors = torch.linalg.eigh(covariance[kept][:, kept] / torch.outer(error, error))
    strong = eigenvalues > RANK * eigenvalues[-1:]
    whole = covariance.new_zeros(int(strong.sum()), len(covariance))
    whole[:, kept] = vectors[:, strong].T / eigenvalues[strong, None].sqrt() / error
    return whole


def quadratic_form(value: Tensor, covariance: Tensor) -> tuple[float, int]:
    """value^T covariance^-1 value and its degrees of freedom, the rank of the covariance."""
    white = whitening(covariance)
    return float((white @ value).square().sum()), len(white)


def exceeded(statistic: float, degrees: int, points: int) -> float:
    """The probability that a quadratic form of means over so many points is as large by chance (Hotelling's law).

    1 where there are too few points to know, or no degrees of freedom.
    """
    left = points - degrees
    if degrees <= 0 or left < degrees:
        return 1.0
    return float(special.fdtrc(degrees, left, statistic * left / (degrees * (points - 1))))


@dataclass(frozen=True)
class WeakResidual:
    """Residuals of the weak form, E phi(x_T) - E phi(x_0) - int E[L phi] dt, for each of K test functions.

    Attributes:
        residual: (K,).
        covariance: (K, K) of the residuals.
        quadrature_error: (K,), an estimate of that of the integral over time, see `Snapshots.integral`; chance has its
            part in it.
        quadrature_share: root mean square of that error in standard errors, without the part of chance.
        points: the least number of samples at a time.
        times: of the samples.
    """

    residual: Tensor
    covariance: Tensor
    quadrature_error: Tensor
    quadrature_share: float
    points: int
    times: tuple[float, ...]

    @property
    def standard_error(self) -> Tensor:
        """(K,)."""
        error = self.covariance.diagonal().clamp_min(0).sqrt()
        return error.clamp_min(max(ROUNDING * float(error.max()), torch.finfo(error.dtype).tiny))

    @property
    def z(self) -> Tensor:
        """(K,) residuals in standard errors: normal of variance 1 for the right equation."""
        return self.residual / self.standard_error

    @property
    def limit(self) -> float:
        """What the largest |z| of the right equation exceeds with a probability of at most CHANCE / 2 (Bonferroni).

        By Student's law, for standard errors are found from as few as `points` samples.
        """
        return float(-special.stdtrit(self.points - 1, CHANCE / (4 * len(self.residual))))

    @property
    def chi_square(self) -> tuple[float, int]:
        """Of all residuals together, with their correlations, and its degrees of freedom."""
        return quadratic_form(self.residual, self.covariance)

    @property
    def p_value(self) -> float:
        """The probability that chi_square is as large for the right equation; 1 where there are few points."""
        return exceeded(*self.chi_square, self.points)

    @property
    def passed(self) -> bool:
        """Whether neither test refuses the equation; the right one is refused with a probability of CHANCE."""
        return bool(self.z.abs().max() <= self.limit) and self.p_value >= CHANCE / 2

    def table(self, rows: int = 8) -> str:
        """The `rows` largest |z|, one a line, and the verdict."""
        lines = [f"{'function':>8} {'residual':>10} {'error':>10} {'time rule':>10} {'z':>8}"]
        for k in self.z.abs().argsort(descending=True)[:rows].tolist():
            figures = (float(v[k]) for v in (self.residual, self.standard_error, self.quadrature_error))
            lines.append(f"{k:>8}" + "".join(f" {v:>10.2e}" for v in figures) + f" {float(self.z[k]):>8.2f}")
        statistic, degrees = self.chi_square
        about = (
            f"{len(self.residual)} test functions, at least {self.points:,} points at each of {len(self.times)} times"
        )
        verdict = "passed" if self.passed else "refused"
        lines.append(f"{about}: max |z| {float(self.z.abs().max()):.2f}, below {self.limit:.2f} if right")
        lines.append(f"chi-square {statistic:.1f} of {degrees}, p = {self.p_value:.2g}: {verdict}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the covariance, as plain data."""
        statistic, degrees = self.chi_square
        columns = {"residual": self.residual, "standard_error": self.standard_error, "z": self.z}
        return {
            "passed": self.passed,
            "limit": self.limit,
            "max_z": float(self.z.abs().max()),
            "rms_z": float(self.z.square().mean().sqrt()),
            "chi_square": statistic,
            "degrees_of_freedom": degrees,
            "p_value": self.p_value,
            "quadrature_share": self.quadrature_share,
            "points": self.points,
            "times": list(self.times),
            **{
                name: column.tolist()
                for name, column in (columns | {"quadrature_error": self.quadrature_error}).items()
            },
        }


def weak_residual(
    samples: Samples,
    times: Sequence[float] | Tensor,
    drift: Function,
    diffusion: Function,
    test_functions: TestFunctions,
    paths: bool = False,
    degree: int | None = None,
) -> WeakResidual:
    """Residuals of dx = drift dt + diffusion dw on samples of x at several times, with standard errors.

    Args:
        samples: (K, N, d), or K tensors (N_k, d); independent of each other unless `paths`.
        times: K of them, rising. The integral over time uses no others: they must resolve how E[L phi] changes.
        drift, diffusion: as in `FokkerPlanck`.
        paths: row i is the same particle at all times. The standard error is that of the statistic of whole paths,
            whose chance is that of the noise alone, int grad phi . g dw: smaller over short times.
        degree: of the polynomials that are integrated over time, up to K - 1; 5 or K - 1, unless given.

    Raises:
        UserError: samples and times do not fit, or drift and diffusion have wrong shapes.

    Warns:
        the times are too coarse: the quadrature may be off by more than COARSE standard errors, or drift or diffusion
            swing between them.
    """
    snapshots = Snapshots(samples, times, paths)
    equation, number = FokkerPlanck(drift, diffusion), test_functions.number
    weights, doubt = snapshots.integral(degree)
    _warn_of_swings(equation, snapshots)
    ends = [-1.0] + [0.0] * (len(weights) - 2) + [1.0]

    def rows(k: int, x: Tensor) -> Tensor:
        t = snapshots.times[k]
        rate = test_functions.rate(x, equation.drift(x, t), equation.covariance(x, t))
        residual = -float(weights[k]) * rate
        if ends[k]:
            residual = residual + ends[k] * test_functions.value(x)
        return torch.cat([residual, float(doubt[k]) * rate], 1)

    averages = snapshots.averages(rows, width=2 * number, joint=number)
    mean = sum(part.mean for part in averages)
    variance, covariance = sum(part.variance for part in averages), sum(part.covariance for part in averages)
    error = variance[:number].clamp_min(torch.finfo(variance.dtype).tiny)
    excess = (mean[number:].square() - variance[number:]) / error
    share = math.sqrt(max(float(excess.mean()), 0.0))
    if share > COARSE:
        warnings.warn(
            f"the integral over {len(weights)} times may be off by {share:.2g} standard errors, to judge by leaving "
            "out every second time: take more times",
            stacklevel=2,
        )
    return WeakResidual(mean[:number], covariance, mean[number:].abs(), share, snapshots.points, tuple(snapshots.times))


def _warn_of_swings(equation: FokkerPlanck, snapshots: Snapshots) -> None:
    """Warn where drift or covariance, at the same points, do something between two times that these do not show.

    Nothing is said of functions that are known at the times only.
    """
    for name, function in (("drift", equation.drift), ("covariance", equation.covariance)):
        gaps, sizes = [], []
        for part, (start, stop) in zip(snapshots.parts, itertools.pairwise(snapshots.times), strict=False):
            x = part[:ASKED].double()
            first, last = function(x, start), function(x, stop)
            sizes.append(first.square().mean())
            for share in (0.25, 0.5, 0.75):
                try:
                    between = function(x, start + share * (stop - start))
                except Exception:  # of the user's own code
                    return
                gaps.append((between - torch.lerp(first, last, share)).square().mean())
        gap, size = float(max(gaps)) ** 0.5, float(sum(sizes) / len(sizes)) ** 0.5
        if gap > SWING * size:
            warnings.warn(
                f"between the times the {name} is {gap:.2g} off from what it is at them, where its size is {size:.2g}: "
                "the integral over time does not see that, take more times",
                stacklevel=3,
            )
