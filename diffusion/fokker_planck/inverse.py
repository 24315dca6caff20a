"""The inverse problem: drift and diffusion, linear in a dictionary, from samples at several times.

With f = sum_j theta_j f_j and a = sum_j theta_j a_j every test function phi and every function psi of time gives one
equation that is linear in theta,

    psi E[phi](T) - psi E[phi](0) = int (psi' E[phi] + psi sum_j theta_j E[L_j phi]) dt,

whose means over samples have a known covariance S(theta). The coefficients are those of the generalised method of
moments (Hansen 1982): two steps, then updated until S, and the part of the chance of the slopes that goes with that of
the residuals, are those of the estimate itself (Hansen, Heaton and Yaron 1996, in the form of Kleibergen 2005), which
takes away the bias of many equations.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.dictionaries import Term, named
from diffusion.fokker_planck.equation import FokkerPlanck, Function, checked
from diffusion.fokker_planck.moment_equations import Rates, equations, estimate, time_weights
from diffusion.fokker_planck.scaled_functions import Samples, TestFunctions
from diffusion.fokker_planck.snapshots import Snapshots
from diffusion.fokker_planck.weak import COARSE, exceeded

FEW = 40  # times as many samples at a time as independent equations: with fewer, standard errors are too small


@dataclass(frozen=True)
class Fit:
    """Coefficients of a drift and of a rate of covariance a = g g^T.

    Attributes:
        drift, diffusion: the terms.
        coefficients: (p,), those of the drift first.
        covariance: (p, p) of the coefficients.
        misfit: Hansen's J, the residuals in units of their covariance: chi-square with `degrees` degrees of freedom
            where the truth is in the dictionary.
        condition: number of the equations, each coefficient in its own unit.
        quadrature_error: (p,), an estimate of what the integrals over time put them off by, see `Snapshots.integral`.
        points: the least number of samples at a time.
        known: the part of the equation that was not fitted.
    """

    drift: tuple[Term, ...]
    diffusion: tuple[Term, ...]
    coefficients: Tensor
    covariance: Tensor
    misfit: float
    degrees: int
    condition: float
    quadrature_error: Tensor
    points: int
    known: FokkerPlanck | None

    @property
    def drift_coefficients(self) -> Tensor:
        return self.coefficients[: len(self.drift)]

    @property
    def diffusion_coefficients(self) -> Tensor:
        return self.coefficients[len(self.drift) :]

    @property
    def standard_errors(self) -> Tensor:
        """(p,)."""
        return self.covariance.diagonal().sqrt()

    @property
    def p_value(self) -> float:
        """The probability of a misfit as large if the truth is in the dictionary; 1 where there are few points."""
        return exceeded(self.misfit, self.degrees, self.points)

    def equation(self) -> FokkerPlanck:
        """The fitted equation; it raises a UserError where its covariance is not positive semi-definite."""

        def drift(x: Tensor, t: Tensor) -> Tensor:
            total = torch.zeros_like(x) if self.known is None else self.known.drift(x, t[0])
            for term, coefficient in zip(self.drift, self.drift_coefficients.tolist(), strict=True):
                total = total + coefficient * FokkerPlanck(term, 0.0).drift(x, t[0])
            return total

        def covariance(x: Tensor, t: Tensor) -> Tensor:
            total = torch.zeros_like(x[:, 0]) if self.known is None else self.known.covariance(x, t[0])
            for term, coefficient in zip(self.diffusion, self.diffusion_coefficients.tolist(), strict=True):
                total = _sum(total, coefficient * FokkerPlanck(term, term).diffusion(x, t[0]))
            return total

        return FokkerPlanck.from_covariance(drift, covariance)

    def table(self) -> str:
        """One line a term, and the misfit."""
        names = [term.name for term in (*self.drift, *self.diffusion)]
        width = max(map(len, names))
        lines = [f"{'term':<{width}} {'value':>11} {'error':>9} {'time rule':>9}"]
        columns = (self.coefficients.tolist(), self.standard_errors.tolist(), self.quadrature_error.tolist())
        lines += [
            f"{name:<{width}} {v:>11.5g} {e:>9.2g} {q:>9.2g}" for name, v, e, q in zip(names, *columns, strict=True)
        ]
        lines.append(
            f"misfit {self.misfit:.1f} of {self.degrees}, p = {self.p_value:.2g}; condition {self.condition:.2g}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the functions, as plain data."""
        return {
            "terms": [term.name for term in (*self.drift, *self.diffusion)],
            "coefficients": self.coefficients.tolist(),
            "standard_errors": self.standard_errors.tolist(),
            "covariance": self.covariance.tolist(),
            "misfit": self.misfit,
            "degrees_of_freedom": self.degrees,
            "p_value": self.p_value,
            "condition": self.condition,
            "quadrature_error": self.quadrature_error.tolist(),
            "points": self.points,
        }


def _sum(first: Tensor, second: Tensor) -> Tensor:
    """Of two matrices, each as (B,), (B, d) or (B, d, d), in the shape of the larger."""
    if first.dim() > second.dim():
        first, second = second, first
    if first.dim() == 1 and second.dim() > 1:
        first = first[:, None].expand(-1, second.shape[1])
    if first.dim() == 2 and second.dim() == 3:
        first = torch.diag_embed(first)
    return first + second


def fit(
    samples: Samples,
    times: Sequence[float] | Tensor,
    drift: Sequence[Function],
    diffusion: Sequence[Function],
    test_functions: TestFunctions,
    paths: bool = False,
    known: FokkerPlanck | None = None,
    time_moments: int | None = None,
    degree: int | None = None,
) -> Fit:
    """Fit dx = f dt + g dw to samples of x at several times, with f and a = g g^T linear in a dictionary.

    Args:
        samples, times, paths, degree: as in `weak_residual`.
        drift: functions (x, t) -> (N, d), perhaps `Term`s.
        diffusion: functions (x, t) -> (N,), (N, d) or (N, d, d), terms of a, not of g.
        test_functions: with `time_moments` there are number * time_moments equations, which should be more than the
            coefficients and far fewer than the samples.
        known: a part of f and a that is added to what is fitted.
        time_moments: number of polynomials of time in the equations; 2 or K - 1, unless given.

    Raises:
        UserError: bad samples, as in `weak_residual`; a term of the wrong shape; coefficients that are not
            identifiable: the message names the combination and the condition number.

    Warns:
        the times are too coarse: the quadrature may move a coefficient by more than COARSE standard errors; or there
            are less than FEW times as many samples at each time as independent equations.
    """
    snapshots = Snapshots(samples, times, paths)
    drift, diffusion = named(drift, "drift"), named(diffusion, "diffusion")
    names = [term.name for term in (*drift, *diffusion)]
    moments = min(2, len(snapshots.times) - 1) if time_moments is None else time_moments
    if not names or not isinstance(moments, int) or not 1 <= moments < len(snapshots.times):
        raise UserError(
            f"fit has {len(names)} terms and time_moments={moments}, expected 1 or more, up to the times - 1"
        )
    rates = Rates(drift, diffusion, None if known is None else checked(known), test_functions)
    weights, doubt = snapshots.integral(degree)
    factors = time_weights(snapshots.times, weights, moments, rates.columns)
    mean, covariance = equations(snapshots, rates, factors)
    found = estimate(mean, covariance, rates.fixed, snapshots.points, names)
    theta, spread, misfit, degrees, condition, gain = found
    full = torch.cat([mean.new_ones(rates.fixed), theta])
    doubtful = (time_weights(snapshots.times, weights + doubt, moments, rates.columns) - factors).to(mean)

    def moved(k: int, x: Tensor) -> Tensor:
        values = torch.einsum("mc,nfc,c->nmf", doubtful[k], rates(x, snapshots.times[k]), full)
        return values.flatten(1) @ gain.T

    parts = snapshots.averages(moved, test_functions.number * rates.columns, len(theta))
    off = sum(part.mean for part in parts)
    certain = (off.square() - 4 * sum(part.variance for part in parts)).clamp_min(0)
    share = float((certain / spread.diagonal()).max().sqrt())
    if share > COARSE:
        warnings.warn(
            f"the integral over {len(weights)} times may put a coefficient off by {share:.2g} standard errors, judged "
            "by leaving out every second time: take more times",
            stacklevel=2,
        )
    if snapshots.points < FEW * (degrees + len(theta)):
        warnings.warn(
            f"{snapshots.points} samples at a time are few for {degrees + len(theta)} independent equations, expected "
            f"{FEW} times as many or more: standard errors may be up to 1.5 times too small; take fewer test functions",
            stacklevel=2,
        )
    return Fit(
        tuple(drift), tuple(diffusion), theta, spread, misfit, degrees, condition, off.abs(), snapshots.points, known
    )
