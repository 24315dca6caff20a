"""Base laws: how the noise z of an affine field x_t = alpha_t x0 + sigma_t z is distributed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import scipy.special
import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.specs import recorded


def check_dim(size: Sequence[int], dim: int | None) -> None:
    """Refuse points of shape `size` = (B, *shape) that do not have `dim` coordinates, where that is given."""
    if dim is not None and math.prod(size[1:]) != dim:
        raise UserError(
            f"points of shape {tuple(size[1:])} have {math.prod(size[1:])} coordinates, but this field was built "
            f"for dim={dim}; give the field the number of data coordinates"
        )


class Scales(NamedTuple):
    """A Gaussian scale mixture, z = R eps with eps ~ N(0, I) and R one of K values."""

    value: Tensor  # (K,) R, float64
    log_weight: Tensor  # (K,) log-probability of each


class Law(ABC):
    """A law of z. A law of one's own needs `draw` and `log_prob`, and `scales` if it has no variance.

    As the base of an affine field it is centred; as the prior of a trajectory field it may lie anywhere.

    Attributes:
        std: standard deviation per coordinate (root mean square over coordinates), infinite where there is none.
        dim: number of coordinates where the law is tied to one, otherwise None.
        stability: a, where r z + (1 - r^a)^(1/a) z' of two independent draws has the law of z, for every r from 0 to 1;
            None where no a is known.
    """

    std: float = 1.0
    dim: int | None = None
    stability: float | None = None

    @abstractmethod
    def draw(
        self,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Independent draws, of shape `size` = (B, *shape)."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density (B,) of `z` (B, *shape), in nats."""

    @property
    def scales(self) -> "Scales":
        """z seen as a Gaussian whose scale is drawn first: what preconditioning needs to know of the law.

        One scale, `std`, for every law with a variance and independent coordinates, where the radius of z says nothing.
        """
        return Scales(torch.tensor([self.std], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    def _check(self, size: Sequence[int]) -> None:
        check_dim(size, self.dim)


class IsotropicLaw(Law):
    """A law whose density depends on the length of z alone."""

    @abstractmethod
    def log_prob_at(self, squared: Tensor, dim: int) -> Tensor:
        """Log-density in nats where |z|^2 = `squared`, of any shape, in `dim` coordinates."""

    def log_prob(self, z):
        self._check(z.shape)
        z = z.flatten(1)
        return self.log_prob_at(z.square().sum(1), z.shape[1])


def _place(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device | str | None:
    """Draws are made where their generator lives, unless told otherwise."""
    return generator.device if device is None and generator is not None else device


@recorded
class Gaussian(IsotropicLaw):
    """z ~ N(0, I)."""

    stability = 2.0

    def __init__(self, dim: int | None = None):
        self.dim = dim

    def draw(self, size, generator=None, dtype=None, device=None):
        self._check(size)
        return torch.randn(size, generator=generator, dtype=dtype, device=_place(generator, device))

    def log_prob_at(self, squared, dim):
        return -0.5 * (squared + dim * math.log(2 * math.pi))


@recorded
class StudentT(IsotropicLaw):
    """The isotropic Student-t law with `dof` = D degrees of freedom in `dim` = d dimensions.

    z = sqrt(D) eps_x / |eps_D| with eps_x ~ N(0, I_d), eps_D ~ N(0, I_D): a Gaussian whose scale R = sqrt(D) / |eps_D|
    is drawn anew for each point. This is the perturbation of PFGM++ (Xu et al. 2023, arXiv 2302.04265, sec. 3), with
    r = sigma sqrt(D). D = 1 is the field of a point mass in d + 1 dimensions, gravity; D -> infinity is Gaussian.
    """

    def __init__(self, dof: float, dim: int):
        if not (dof > 0 and math.isfinite(dof)):
            raise UserError(f"Student-t law has dof {dof}, expected a positive number; for infinity use Gaussian()")
        if dim < 1:
            raise UserError(f"Student-t law has dim {dim}, expected the number of data coordinates, at least 1")
        self.dof, self.dim = float(dof), int(dim)
        self.std = math.sqrt(dof / (dof - 2)) if dof > 2 else math.inf
        self.stability = 1.0 if dof == 1 else None  # exp(-|k|) is the characteristic function: scales add up

    def draw(self, size, generator=None, dtype=None, device=None):
        self._check(size)
        options = {"dtype": dtype, "device": _place(generator, device)}
        eps = torch.randn(size, generator=generator, **options)
        half = torch.full((size[0], *[1] * (len(size) - 1)), self.dof / 2, **options)
        chi2 = 2 * torch._standard_gamma(half, generator=generator)
        # In single precision chi2 can underflow to 0 for D < 1; the smallest normal number keeps z finite.
        return eps * (self.dof / chi2.clamp_min(torch.finfo(eps.dtype).tiny)).sqrt()

    def log_prob_at(self, squared, dim):
        dof = self.dof
        constant = math.lgamma((dof + dim) / 2) - math.lgamma(dof / 2) - 0.5 * dim * math.log(dof * math.pi)
        return constant - 0.5 * (dof + dim) * torch.log1p(squared / dof)

    @property
    def scales(self):
        """1 / R^2 is Gamma(D/2, rate D/2): a trapezoidal rule in its logarithm, over all but 1e-9 of either tail.

        Its spacing is at most 0.1 in log R, and three quarters of the law's own width where that is narrower.
        """
        half = self.dof / 2
        tails = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
        low, high = (torch.from_numpy(scipy.special.gammaincinv(half, tails.numpy())) / half).log().tolist()
        nodes = max(17, math.ceil((high - low) / 0.2))
        log_precision = torch.linspace(low, high, nodes, dtype=torch.float64)
        log_weight = half * (log_precision - log_precision.exp())
        return Scales((-log_precision / 2).exp(), log_weight.log_softmax(0))


class Product(Law):
    """Independent coordinates, each with the given one-dimensional law of torch.distributions.

    Args:
        marginal: a centred scalar distribution with `icdf` and a finite `stddev`, such as Laplace(0., 1.).
    """

    def __init__(self, marginal: torch.distributions.Distribution):
        if marginal.batch_shape or marginal.event_shape:
            raise UserError(f"Product law got a distribution of shape {tuple(marginal.batch_shape)}, expected a scalar")
        self.marginal, self.std = marginal, float(marginal.stddev)
        if not math.isfinite(self.std):
            raise UserError(f"Product law of {type(marginal).__name__} has no variance; write a Law with scales")

    def draw(self, size, generator=None, dtype=None, device=None):
        uniform = torch.rand(size, generator=generator, dtype=dtype, device=_place(generator, device))
        half_ulp = torch.finfo(uniform.dtype).eps / 4  # keeps the quantile function off its poles at 0 and 1
        return self.marginal.icdf(uniform.clamp(half_ulp, 1 - 2 * half_ulp))

    def log_prob(self, z):
        inside = self.marginal.support.check(z)
        log_prob = self.marginal.log_prob(z.where(inside, self.marginal.mean.to(z)))
        return log_prob.where(inside, -math.inf).flatten(1).sum(1)


@recorded
def uniform(half_width: float = math.sqrt(3)) -> Product:
    """The uniform law on the cube [-half_width, half_width]^d; of unit variance unless told otherwise."""
    if not 0 < half_width < math.inf:
        raise UserError(f"uniform law has half_width {half_width}, expected a positive number")
    end = torch.tensor(half_width, dtype=torch.float64)
    return Product(torch.distributions.Uniform(-end, end, validate_args=False))


@recorded
def laplace(scale: float = math.sqrt(0.5)) -> Product:
    """Independent Laplace coordinates, of variance 2 scale^2; of unit variance unless told otherwise."""
    if not 0 < scale < math.inf:
        raise UserError(f"Laplace law has scale {scale}, expected a positive number")
    scale = torch.tensor(scale, dtype=torch.float64)
    return Product(torch.distributions.Laplace(torch.zeros_like(scale), scale))
