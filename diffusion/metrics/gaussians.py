"""Distances between Gaussian laws in closed form, in float64."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError


class GaussianLaw(NamedTuple):
    """N(mean, covariance).

    Attributes:
        mean: (d,).
        covariance: (d, d), symmetric, no eigenvalue below 0.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, points: Tensor) -> "GaussianLaw":
        """The Gaussian of the mean and the covariance of `points` (N, *shape), each of weight 1/N, in float64.

        Raises:
            UserError: they are no such points.
        """
        if points.dim() < 2 or not points.numel():
            raise UserError(f"points have shape {tuple(points.shape)}, expected (N, *shape)")
        points = points.detach().double().flatten(1)
        mean = points.mean(0)
        return cls(mean, (points - mean).T @ (points - mean) / len(points))

    def checked(self, name: str = "the law") -> "GaussianLaw":
        """The law in float64, its covariance exactly symmetric.

        Raises:
            UserError: shapes that do not belong together, numbers that are not finite, a covariance that is not
                symmetric or has a negative eigenvalue, beyond the rounding of its dtype; the message has `name`.
        """
        mean, covariance = (torch.as_tensor(part).detach() for part in self)
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)) or len(mean) == 0:
            raise UserError(
                f"{name} has mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)}, "
                "expected (d,) and (d, d)"
            )
        rounding = torch.finfo(covariance.dtype).eps if covariance.is_floating_point() else 0.0
        mean, covariance = mean.double(), covariance.double()
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise UserError(f"{name} has a mean or a covariance that is not finite, expected numbers")
        slack = 10 * len(mean) * rounding * float(covariance.abs().max())
        skew = float((covariance - covariance.T).abs().max())
        if skew > slack:
            raise UserError(
                f"{name} has a covariance that differs from its transpose by {skew:.3g}, expected a symmetric matrix"
            )
        covariance = (covariance + covariance.T) / 2
        least = float(torch.linalg.eigvalsh(covariance)[0])
        if least < -slack:
            raise UserError(f"{name} has a covariance with the eigenvalue {least:.3g}, expected none below 0")
        return GaussianLaw(mean, covariance)

    def root(self, name: str = "the law") -> Tensor:
        """The lower triangular L (d, d) with L L^T = covariance.

        Raises:
            UserError: the covariance is singular in float64.
        """
        root, info = torch.linalg.cholesky_ex(self.covariance)
        alone = root.diagonal().square() / self.covariance.diagonal()  # shares that no other coordinate tells
        if int(info) or not float(alone.min()) > 10 * len(alone) * torch.finfo(alone.dtype).eps:
            raise UserError(
                f"{name} has a singular covariance, expected a positive definite one; only the Wasserstein distance "
                "is finite or defined there"
            )
        return root


def gaussian_kl(a: GaussianLaw, b: GaussianLaw) -> float:
    r"""KL(a || b) in nats.

    .. math:: \frac12 \sum_i (\lambda_i - 1 - \log \lambda_i) + \frac12 |L_b^{-1}(\mu_a - \mu_b)|^2

    with lambda_i the eigenvalues of L_b^-1 S_a L_b^-T: each term is at least 0 and nothing large cancels.

    Args:
        a, b: laws on the same space, or pairs (mean, covariance).

    Raises:
        UserError: the laws differ in dimension, a covariance is singular, or see `GaussianLaw.checked`.
    """
    a, b = _pair(a, b)
    root = b.root("the second law")
    ratios = _relative(a.root("the first law"), root)
    shift = torch.linalg.solve_triangular(root, (a.mean - b.mean)[:, None], upper=False)
    excess = ratios.square() - 1
    return ((excess - 2 * ratios.log()).sum().item() + shift.square().sum().item()) / 2


def gaussian_bhattacharyya(a: GaussianLaw, b: GaussianLaw) -> float:
    r"""The Bhattacharyya distance, -log of the integral of sqrt(a b), in nats.

    .. math:: \frac18 (\mu_a-\mu_b)^T S^{-1} (\mu_a-\mu_b) + \frac12 \log\frac{\det S}{\sqrt{\det S_a \det S_b}}

    with S = (S_a + S_b) / 2 (Kailath 1967, doi:10.1109/TCOM.1967.1089532). With the lambda_i of `gaussian_kl` the
    second term is half the sum of log cosh(log(lambda_i) / 2).

    Args:
        a, b: laws on the same space, or pairs (mean, covariance).

    Raises:
        UserError: as `gaussian_kl`.
    """
    a, b = _pair(a, b)
    ratios = _relative(a.root("the first law"), b.root("the second law"))
    middle = torch.linalg.cholesky((a.covariance + b.covariance) / 2)
    shift = torch.linalg.solve_triangular(middle, (a.mean - b.mean)[:, None], upper=False)
    logs = ratios.log()
    volume = (torch.logaddexp(logs, -logs) - math.log(2)).sum()
    return max(0.0, volume.item() / 2) + shift.square().sum().item() / 8


def gaussian_wasserstein(a: GaussianLaw, b: GaussianLaw) -> float:
    r"""The Wasserstein-2 distance, in units of the points; its square is the Frechet distance.

    .. math:: W_2^2 = |\mu_a - \mu_b|^2 + \min_{O^T O = 1} \|R_a - O R_b\|^2,\quad S = R^T R

    The best O is U V^T where R_a R_b^T = U s V^T (the minimum is then tr S_a + tr S_b - 2 sum(s), the Bures distance:
    Bhatia, Jain & Lim 2019, arXiv:1712.01504, thm 1). The difference is formed before it is squared, so that near laws
    keep their digits. Covariances may be singular, point masses included.

    Args:
        a, b: laws on the same space, or pairs (mean, covariance).

    Raises:
        UserError: the laws differ in dimension, or see `GaussianLaw.checked`.
    """
    a, b = _pair(a, b)
    root_a, root_b = _any_root(a.covariance), _any_root(b.covariance)
    left, _, right = torch.linalg.svd(root_a @ root_b.T)
    return math.hypot((a.mean - b.mean).norm().item(), (root_a - left @ right @ root_b).norm().item())


def _pair(a: GaussianLaw, b: GaussianLaw) -> tuple[GaussianLaw, GaussianLaw]:
    a, b = GaussianLaw(*a).checked("the first law"), GaussianLaw(*b).checked("the second law")
    if len(a.mean) != len(b.mean):
        raise UserError(f"the laws have {len(a.mean)} and {len(b.mean)} dimensions, expected the same number")
    return a, b


def _relative(root_a: Tensor, root_b: Tensor) -> Tensor:
    """Square roots (d,) of the eigenvalues of S_b^-1 S_a, from the Cholesky factors of both."""
    return torch.linalg.svdvals(torch.linalg.solve_triangular(root_b, root_a, upper=False))


def _any_root(covariance: Tensor) -> Tensor:
    """R (d, d) with R^T R = covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T
