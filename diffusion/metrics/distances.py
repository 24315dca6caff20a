"""Distances between two sets of points. Sets are (N, k) and (M, k), one point a row; all sums run in float64.

Every distance has a bias or a spread that depends on N and M: compare two figures only where both sizes agree.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError

BLOCK_ROWS = 4096
"""Rows of a block of pairwise distances: 4096 x 4096 float64 values are 128 MB."""


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of generated points inside the real manifold, of real points inside the generated one."""

    precision: float
    recall: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Wasserstein-2 distance between the Gaussians fitted to the two sets.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(S_a) + \mathrm{tr}(S_b) - 2\,\mathrm{tr}(S_a S_b)^{1/2}

    With S = R^T R, where R comes from a QR decomposition of the centred set, the last trace is the sum of the singular
    values of R_a R_b^T. No covariance is formed and no square root of a rounding error is taken, so that singular
    covariances (fewer points than features) lose no digits. In Inception features this is the FID: Heusel et al. 2017
    (arXiv:1706.08500), eq. 6.

    Args:
        a, b: (N, k) and (M, k), N and M at least 2.

    Returns:
        The distance in squared units of the features, at least 0. Biased upwards by finite N and M.

    Raises:
        UserError: the sets are not two matrices of equal width with at least 2 rows.
    """
    a, b = _checked(a, b, rows=2)
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    shift = (a.mean(0) - b.mean(0)).square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max(0.0, (shift + root_a.square().sum() + root_b.square().sum() - 2 * cross).item())


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / k + 1)^3; unbiased, so it may be negative.

    In Inception features this is the KID: Binkowski et al. 2018 (arXiv:1801.01401), eq. 4 for two sizes.

    Args:
        a, b: (N, k) and (M, k), N and M at least 2.

    Raises:
        UserError: the sets are not two matrices of equal width with at least 2 rows.
    """
    a, b = _checked(a, b, rows=2)

    def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
        return sum((rows @ y.T / x.shape[1] + 1).pow(3).sum() for rows in x.split(BLOCK_ROWS))

    def mean_of_distinct(x: Tensor) -> Tensor:
        diagonal = (x.square().mean(1) + 1).pow(3).sum()
        return (kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    return (mean_of_distinct(a) + mean_of_distinct(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Fidelity and coverage by nearest neighbours: Kynkaanniemi et al. 2019 (arXiv:1904.06991), eq. 1 and 2.

    A set's manifold is the union of closed balls about its points, each reaching to the point's k-th nearest neighbour
    in the same set. Memory is bounded by blocks of rows; time grows with (N + M)^2.

    Args:
        real, fake: (N, d) and (M, d), each with more than k rows.
        k: neighbours, at least 1. More make both figures larger.

    Raises:
        UserError: k is below 1, or the sets are not two matrices of equal width with more than k rows.
    """
    if k < 1:
        raise UserError(f"k is {k} neighbours, expected at least 1; 3 is customary")
    real, fake = _checked(real, fake, rows=k + 1)

    def covered(points: Tensor, manifold: Tensor) -> float:
        # A point is its own nearest neighbour at distance 0, hence k + 1.
        radius = torch.cat([_pairwise(rows, manifold).kthvalue(k + 1).values for rows in manifold.split(BLOCK_ROWS)])
        inside = [(_pairwise(rows, manifold) <= radius).any(1) for rows in points.split(BLOCK_ROWS)]
        return torch.cat(inside).double().mean().item()

    return PrecisionRecall(precision=covered(fake, real), recall=covered(real, fake))


def sliced_wasserstein(a: Tensor, b: Tensor, generator: torch.Generator, projections: int = 256) -> float:
    r"""Sliced Wasserstein-2 distance: the root of the mean of W_2^2 over random directions.

    .. math:: W_2^2(a, b) = \int_0^1 |F_a^{-1}(q) - F_b^{-1}(q)|^2 dq

    on each line (Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3). Empirical quantile functions are piecewise
    constant, so the integral is a finite sum, exact for unequal sizes too.

    Args:
        a, b: (N, k) and (M, k).
        generator: draws the directions, uniform on the sphere; the same seed gives the same directions.
        projections: number of directions, at least 1.

    Returns:
        The distance in units of the points; a shift of one set by s adds |s| / sqrt(k) in the mean.

    Raises:
        UserError: the sets are not two matrices of equal width, one of them is empty, or projections is below 1.
    """
    if projections < 1:
        raise UserError(f"projections is {projections}, expected at least 1; 256 is usually enough")
    a, b = _checked(a, b, rows=1)
    n, m = len(a), len(b)
    directions = torch.randn(a.shape[1], projections, generator=generator, device=generator.device, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=0).to(a.device)
    # Quantile levels in units of 1 / (n m), where both functions jump at whole numbers.
    levels = torch.cat([torch.arange(n + 1) * m, torch.arange(m) * n]).unique().to(a.device)
    start, width = levels[:-1], levels.diff().double() / (n * m)
    quantiles_a, quantiles_b = (a @ directions).sort(0).values, (b @ directions).sort(0).values
    squared = width @ (quantiles_a[start // m] - quantiles_b[start // n]).square()
    return squared.mean().sqrt().item()


def nearest_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance from each sample to the nearest reference point.

    Matrix products find the candidates, differences measure them, so that nothing cancels in the result: an exact copy
    is at 0. (Only where reference points lie within about 1e-8 of their norm from each other may the second nearest be
    measured.)

    Args:
        samples: (N, *shape).
        reference: (M, *shape), M at least 1.

    Returns:
        (N,) float64.

    Raises:
        UserError: the sets differ in width, or the reference is empty.
    """
    samples, reference = samples.flatten(1), reference.flatten(1)
    if samples.shape[1] != reference.shape[1] or len(reference) == 0:
        raise UserError(
            f"samples {tuple(samples.shape)} and reference {tuple(reference.shape)}: expected the same width and at "
            f"least one reference point; pass both in the same units"
        )
    nearest = samples.new_full((len(samples),), math.inf, dtype=torch.float64)
    for block in reference.split(BLOCK_ROWS):
        block = block.double()
        norms = block.square().sum(1)
        found = []
        for rows in samples.split(BLOCK_ROWS):
            rows = rows.double()
            candidate = torch.addmm(norms, rows, block.T, alpha=-2).argmin(1)
            found.append((rows - block[candidate]).norm(dim=1))
        nearest = torch.minimum(nearest, torch.cat(found))
    return nearest


def _covariance_root(x: Tensor) -> Tensor:
    """R with R^T R = the unbiased covariance of x (N, k); (min(N, k), k)."""
    return torch.linalg.qr(x - x.mean(0), mode="r").R / math.sqrt(len(x) - 1)


def _pairwise(a: Tensor, b: Tensor) -> Tensor:
    """Distances (N, M) by differences: equal points are at 0, and every distance is the same from either end."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(a: Tensor, b: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64, after a check that they are matrices of the same width with enough rows."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < rows:
        raise UserError(
            f"sets of shape {tuple(a.shape)} and {tuple(b.shape)}: expected two matrices of the same width with at "
            f"least {rows} rows; pass one point a row"
        )
    return a.double(), b.double()
