"""Kernels k(x, y) of pairs of points, with the sums of their gradients in closed form."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.errors import UserError

SUBSET = 2000
"""Points from which a bandwidth is estimated."""


class Kernel(ABC):
    """k(x, y), symmetric. Points are (n, d) and (m, d)."""

    @abstractmethod
    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """k, (n, m), differentiable in x and in y."""

    @abstractmethod
    def slopes(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_j grad_x k(x, y_j), (n, d)."""

    @abstractmethod
    def slopes_there(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_j grad_y k(x, y_j), (n, d)."""

    def fitted(self, points: Tensor) -> Kernel:
        """This kernel with what it takes from the data, (M, d)."""
        return self


@dataclass(frozen=True)
class Function(Kernel):
    """A kernel of the user's own: (n, d), (m, d) -> (n, m), symmetric, in torch operations."""

    function: Callable[[Tensor, Tensor], Tensor]

    def matrix(self, x, y):
        values = self.function(x, y)
        if not isinstance(values, Tensor) or values.shape != (len(x), len(y)):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(f"the kernel returned {found}, expected a tensor {(len(x), len(y))}, one number a pair")
        return values

    @torch.enable_grad()
    def slopes(self, x, y):
        x = x.detach().requires_grad_()
        values = self.matrix(x, y.detach())
        if not values.requires_grad:
            raise UserError("the kernel has no derivative in x; expected torch operations, not under no_grad")
        return torch.autograd.grad(values.sum(), x)[0]

    @torch.enable_grad()
    def slopes_there(self, x, y):
        """By a shift of all y and d + 1 derivatives: of sum_i w_i k_i in the shift, and of that in w."""
        shift = y.new_zeros(y.shape[1], requires_grad=True)
        weights = y.new_ones(len(x), requires_grad=True)
        values = self.matrix(x.detach(), y.detach() + shift).sum(1)
        slopes = torch.autograd.grad(weights @ values, shift, create_graph=True)[0]
        return torch.stack([torch.autograd.grad(part, weights, retain_graph=True)[0] for part in slopes], 1)


class Radial(Kernel):
    """A function of the squared distance."""

    @abstractmethod
    def profile(self, squared: Tensor) -> Tensor:
        """k."""

    @abstractmethod
    def derivative(self, squared: Tensor) -> Tensor:
        """dk / d(squared distance); at 0, any finite number."""

    def matrix(self, x, y):
        return self.profile(_squared_distances(x, y))

    def slopes(self, x, y):
        weights = self.derivative(_squared_distances(x, y))
        centre = y.mean(0)  # far from the origin, differences of products are rough
        return 2 * (weights.sum(1, keepdim=True) * (x - centre) - weights @ (y - centre))

    def slopes_there(self, x, y):
        return -self.slopes(x, y)


@dataclass(frozen=True)
class Scaled(Radial):
    """The sum of a radial kernel over several bandwidths, the products of `bandwidth` and each of `scales`.

    Args:
        bandwidth: h, in units of distance; by default the median distance between data points (Gretton et al. 2012).
        scales: factors of it, one a kernel.

    Raises:
        UserError: they are not positive, or the data are all in one place and no bandwidth is given.
    """

    bandwidth: float | None = None
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise UserError(f"bandwidth is {self.bandwidth}, expected a positive number, or none for the median")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise UserError(f"scales are {self.scales}, expected positive numbers, one a kernel of the sum")

    @abstractmethod
    def shape(self, ratio: Tensor) -> Tensor:
        """k for one bandwidth, of (distance / bandwidth)^2."""

    @abstractmethod
    def shape_derivative(self, ratio: Tensor) -> Tensor:
        """The derivative of `shape`."""

    def fitted(self, points):
        return self if self.bandwidth is not None else replace(self, bandwidth=median_distance(points))

    def profile(self, squared):
        return sum(self.shape(squared / area) for area in self._areas())

    def derivative(self, squared):
        return sum(self.shape_derivative(squared / area) / area for area in self._areas())

    def _areas(self) -> list[float]:
        if self.bandwidth is None:
            raise UserError("the kernel has no bandwidth, expected a number, or a call of fitted with data")
        return [(scale * self.bandwidth) ** 2 for scale in self.scales]


@dataclass(frozen=True)
class Gaussian(Scaled):
    """exp(-r^2 / (2 h^2))."""

    def shape(self, ratio):
        return (-ratio / 2).exp()

    def shape_derivative(self, ratio):
        return -(-ratio / 2).exp() / 2


@dataclass(frozen=True)
class InverseMultiquadric(Scaled):
    """(1 + r^2 / h^2)^(-1/2)."""

    def shape(self, ratio):
        return (1 + ratio).rsqrt()

    def shape_derivative(self, ratio):
        return -((1 + ratio).rsqrt() ** 3) / 2


@dataclass(frozen=True)
class Riesz(Radial):
    """-r^power, 0 < power < 2; power 1 is the energy distance (Hertrich et al., Generative Sliced MMD Flows with Riesz
    Kernels, 2023). Conditionally positive definite, without a bandwidth. Two points in one place do not push.

    Raises:
        UserError: a power that is not between 0 and 2.
    """

    power: float = 1.0

    def __post_init__(self):
        if not 0 < self.power < 2:
            raise UserError(f"power is {self.power}, expected a number between 0 and 2, without them")

    def profile(self, squared):
        return -torch.where(squared == 0, 1, squared).pow(self.power / 2) * (squared != 0)

    def derivative(self, squared):
        return -self.power / 2 * torch.where(squared == 0, math.inf, squared).pow(self.power / 2 - 1)


def kernel_of(kernel: Kernel | Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    """A kernel, or a function of two sets of points as one.

    Raises:
        UserError: it is neither.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if callable(kernel) and not isinstance(kernel, Tensor | type):
        return Function(kernel)
    raise UserError(f"the kernel is {type(kernel).__name__}, expected a Kernel or a function of two sets of points")


def median_distance(points: Tensor) -> float:
    """The median distance between two of (M, d) points, or of 2000 spread evenly among them.

    Raises:
        UserError: it is zero.
    """
    distances = torch.nn.functional.pdist(spread(points, SUBSET).double())
    median = float(distances.median()) if len(distances) else 0.0
    if not median > 0:
        raise UserError(f"the median distance of {len(points)} data points is {median}, expected a positive number; "
                        "give the kernel a bandwidth")  # fmt: skip
    return median


def spread(points: Tensor, number: int) -> Tensor:
    """The points, or `number` spread evenly among them."""
    return points[torch.linspace(0, len(points) - 1, min(len(points), number), device=points.device).round().long()]


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m), by differences: exactly zero for equal points."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
