"""The moment equations of `inverse`, their covariance, and the coefficients that solve them."""

import torch
from numpy.polynomial import Legendre
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.dictionaries import Term
from diffusion.fokker_planck.equation import FokkerPlanck, Function
from diffusion.fokker_planck.scaled_functions import TestFunctions
from diffusion.fokker_planck.snapshots import Snapshots
from diffusion.fokker_planck.weak import exceeded, quadratic_form, whitening

SINGULAR = 1e8  # the largest condition number
CHANCE = 1e-3  # that coefficients which are not identifiable pass as such
UPDATES, CONVERGED = 50, 1e-6  # in standard errors
TURNING = 25  # updates, after which the weights are kept: their rank may go to and fro


class Rates:
    """Columns (n, K, C) at each point: phi, the rate of what is known, and that of each term."""

    def __init__(self, drift: list[Term], diffusion: list[Term], known: FokkerPlanck | None, phi: TestFunctions):
        self.phi, self.known, self.fixed = phi, known, 1 if known is None else 2
        self.drift = [(term.name, FokkerPlanck(term, 0.0)) for term in drift]
        self.diffusion = [(term.name, FokkerPlanck(term, term)) for term in diffusion]
        self.columns = self.fixed + len(drift) + len(diffusion)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        columns = [self.phi.value(x)]
        if self.known is not None:
            columns.append(self.phi.rate(x, self.known.drift(x, t), self.known.covariance(x, t)))
        columns += [self.phi.slope(x, _of(name, term.drift, x, t)) for name, term in self.drift]
        columns += [self.phi.curvature(x, _of(name, term.diffusion, x, t)) for name, term in self.diffusion]
        return torch.stack(columns, 2)


def _of(name: str, term: Function, x: Tensor, t: float) -> Tensor:
    try:
        return term(x, t)
    except UserError as error:
        raise UserError(f"the term {name!r}: {error}") from error


def time_weights(times: list[float], weights: Tensor, moments: int, columns: int) -> Tensor:
    """(K, M, C): the factor of each column at each time, for psi the first M Legendre polynomials."""
    window = (times[0], times[-1])
    at = torch.tensor(times, dtype=torch.float64)
    ends = torch.zeros_like(at)
    ends[0], ends[-1] = -1, 1
    factors = torch.empty(len(times), moments, columns, dtype=torch.float64)
    for m in range(moments):
        psi = Legendre.basis(m, window)
        value, slope = torch.from_numpy(psi(at.numpy())), torch.from_numpy(psi.deriv()(at.numpy()))
        factors[:, m] = -(weights * value)[:, None]
        factors[:, m, 0] = ends * value - weights * slope
    return factors


def equations(snapshots: Snapshots, rates: Rates, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The means (R, C) of all columns of the R = M K equations, and their covariances (R, C, R, C)."""
    _, moments, columns = factors.shape
    number = rates.phi.number
    if snapshots.paths:
        size = moments * number * columns

        def rows(k: int, x: Tensor) -> Tensor:
            return torch.einsum("mc,nfc->nmfc", factors[k].to(x), rates(x, snapshots.times[k])).flatten(1)

        (whole,) = snapshots.averages(rows, size, size)
        shape = (moments * number, columns)
        return whole.mean.view(shape), whole.covariance.view(*shape, *shape)
    size, mean, covariance = number * columns, 0, 0
    parts = snapshots.averages(lambda k, x: rates(x, snapshots.times[k]).flatten(1), size, size)
    for part, factor in zip(parts, factors, strict=True):
        factor = factor.to(part.mean)
        own = part.covariance.view(number, columns, number, columns)
        mean = mean + torch.einsum("mc,fc->mfc", factor, part.mean.view(number, columns))
        covariance = covariance + torch.einsum("mc,le,fcge->mfclge", factor, factor, own)
    shape = (moments * number, columns)
    return mean.reshape(shape), covariance.reshape(*shape, *shape)


def _check(mean: Tensor, covariance: Tensor, fixed: int, white: Tensor, points: int, names: list[str]) -> float:
    """The condition number, or a UserError: some combination of terms changes nothing but by chance."""
    slopes = mean[:, fixed:]
    size = (white @ slopes).norm(dim=0)
    if len(white) < len(names) or not bool((size > 0).all()):
        idle = [name for name, s in zip(names, size.tolist(), strict=True) if not s > 0]
        why = f"the term {idle[0]!r} does nothing" if idle else f"they have {len(white)} independent equations"
        raise UserError(f"{len(names)} coefficients are not identifiable: {why}; take more test functions, fewer terms")
    _, values, vectors = torch.linalg.svd(white @ slopes / size, full_matrices=False)
    condition = float(values[0] / values[-1].clamp_min(torch.finfo(values.dtype).tiny))
    weakest = vectors[-1] / size
    chance = torch.einsum("c,e,rcse->rs", weakest, weakest, covariance[:, fixed:, :, fixed:])
    likely = exceeded(*quadratic_form(slopes @ weakest, chance), points) if condition < SINGULAR else 1.0
    if likely > CHANCE:
        share = weakest / weakest.abs().max()
        parts = [f"{v:+.2g} ({name})" for name, v in zip(names, share.tolist(), strict=True) if abs(v) > 0.01]
        raise UserError(
            f"the coefficients are not identifiable: {' '.join(parts)} has no effect on these samples beyond chance "
            f"(condition number {condition:.2g}); take fewer terms, or other times, test functions or a known part"
        )
    return condition


def estimate(mean: Tensor, covariance: Tensor, fixed: int, points: int, names: list[str]):
    """Coefficients (p,), their covariance, J and its degrees of freedom, the condition, and d theta / d residual."""
    slopes, theta = mean[:, fixed:], mean.new_zeros(len(names))
    for update in range(UPDATES):
        full = torch.cat([mean.new_ones(fixed), theta])
        with_residual = torch.einsum("e,rcse->rcs", full, covariance)
        if update <= TURNING:
            white = whitening(torch.einsum("c,rcs->rs", full, with_residual))
        if update == 0:
            condition = _check(mean, covariance, fixed, white, points, names)
        residual = white.T @ (white @ (mean @ full))
        purged = slopes
        if update > 1:
            purged = slopes - torch.einsum("rcs,s->rc", with_residual[:, fixed:], residual)
        weighted = white.T @ (white @ purged)
        gain = -torch.linalg.solve(weighted.T @ slopes, weighted.T)
        step = gain @ (mean @ full)
        spread = torch.linalg.inv(purged.T @ weighted)
        if update > 1 and bool((step.abs() <= CONVERGED * spread.diagonal().sqrt()).all()):
            misfit = float((white @ (mean @ full)).square().sum())
            return theta, spread, misfit, len(white) - len(names), condition, gain
        theta = theta + step
    raise UserError(
        f"the fit does not settle in {UPDATES} updates (the last changed it by "
        f"{float((step / spread.diagonal().sqrt()).abs().max()):.2g} standard errors): take fewer terms, fewer test "
        "functions or more samples"
    )
