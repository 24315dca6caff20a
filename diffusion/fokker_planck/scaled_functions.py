"""What test functions of the weak form are: their values, and how the operator of an equation acts on them.

    L phi = f . grad phi + 1/2 tr(a Hess phi)

with the drift f and the rate of covariance a = g g^T.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError

Samples = Tensor | Sequence[Tensor]


def pooled(samples: Samples) -> Tensor:
    """All points (N, d) of snapshots: of (N, d), (K, N, d) or a list of (N_k, d).

    Raises:
        UserError: they are of other shapes, fewer than two, or not finite.
    """
    parts = [samples] if isinstance(samples, Tensor) else list(samples)
    shapes = [tuple(part.shape) for part in parts]
    if not parts or any(len(shape) not in (2, 3) or shape[-1] != shapes[0][-1] for shape in shapes):
        raise UserError(f"samples have shapes {shapes}, expected (N, d), (K, N, d) or a list of (N, d)")
    points = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]).double()
    if len(points) < 2 or not bool(points.isfinite().all()):
        raise UserError(f"samples are {len(points)} points, some perhaps not finite; expected two or more finite ones")
    return points


def frame(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    """The points, their mean (d,) and their standard deviation (d,); 1 where all points agree."""
    points = pooled(samples)
    scale = points.std(0)
    return points, points.mean(0), scale.where(scale > 0, 1.0)


def drawn(points: Tensor, number: int, generator: torch.Generator) -> Tensor:
    if number < 1:
        raise UserError(f"the number of test functions is {number}, expected at least 1")
    index = torch.randint(len(points), (number,), generator=generator, device=generator.device)
    return points[index.to(points.device)]


class TestFunctions(ABC):
    """K functions phi of points x (N, d), twice differentiable."""

    __test__ = False  # the name says nothing to pytest

    @property
    @abstractmethod
    def number(self) -> int:
        """K."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """phi (N, K)."""

    @abstractmethod
    def slope(self, x: Tensor, v: Tensor) -> Tensor:
        """v . grad phi (N, K), for v (N, d)."""

    @abstractmethod
    def curvature(self, x: Tensor, a: Tensor) -> Tensor:
        """1/2 tr(a Hess phi) (N, K), for a (N,), the same in all directions, (N, d), diagonal, or (N, d, d)."""

    def rate(self, x: Tensor, f: Tensor, a: Tensor) -> Tensor:
        """L phi (N, K), for f (N, d) and a as in `curvature`."""
        return self.slope(x, f) + self.curvature(x, a)


class Together(TestFunctions):
    """The functions of several families, one after the other."""

    def __init__(self, *families: TestFunctions):
        if not families or not all(isinstance(family, TestFunctions) for family in families):
            kinds = [type(family).__name__ for family in families]
            raise UserError(f"Together has {kinds}, expected one or more families of test functions")
        self.families = families

    @property
    def number(self):
        return sum(family.number for family in self.families)

    def value(self, x):
        return torch.cat([family.value(x) for family in self.families], 1)

    def slope(self, x, v):
        return torch.cat([family.slope(x, v) for family in self.families], 1)

    def curvature(self, x, a):
        return torch.cat([family.curvature(x, a) for family in self.families], 1)


class Scaled(TestFunctions):
    """Functions of y = (x - centre) / scale, both (d,). A subclass states them and their derivatives in y, with a as
    (N, d) or (N, d, d) in the units of y."""

    def __init__(self, centre: Tensor, scale: Tensor):
        if centre.dim() != 1 or scale.shape != centre.shape or not bool((scale > 0).all()):
            got = f"shapes {tuple(centre.shape)} and {tuple(scale.shape)}, least scale {float(scale.min()):.3g}"
            raise UserError(f"centre and scale have {got}; expected (d,) twice and positive scales")
        self.centre, self.scale = centre, scale

    @abstractmethod
    def _value(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, y: Tensor, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _curvature(self, y: Tensor, a: Tensor) -> Tensor: ...

    def value(self, x):
        return self._value(self._moved(x))

    def slope(self, x, v):
        return self._slope(self._moved(x), v / self.scale.to(x))

    def curvature(self, x, a):
        scale = self.scale.to(x)
        if a.dim() == 3:
            return self._curvature(self._moved(x), a / torch.outer(scale, scale))
        return self._curvature(self._moved(x), (a[:, None] if a.dim() == 1 else a) / scale.square())

    def _moved(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != len(self.centre):
            expected = f"(N, {len(self.centre)})"
            raise UserError(f"points have shape {tuple(x.shape)}, expected {expected} for these test functions")
        return (x - self.centre.to(x)) / self.scale.to(x)
