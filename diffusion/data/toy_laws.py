"""Toy laws in the plane, each with the facts that make it checkable.

Every law has a standard deviation of about 1 in each coordinate, is drawn in float64 from an explicit generator, and
states where its points lie: an exact density, or a curve and the standard deviation of the noise around it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from diffusion.data.base import Splits, TensorData, check_at_least
from diffusion.errors import UserError


class Drawn(NamedTuple):
    """Points (N, 2) in float64 and their component, moon or arm (N,) in int64, None where the law has no such parts."""

    points: Tensor
    label: Tensor | None


class ToyLaw(ABC):
    """A law in the plane; `num_classes` parts, each drawn equally often, 0 if it is not made of parts."""

    num_classes: ClassVar[int]

    @abstractmethod
    def draw(self, size: int, generator: Generator) -> Drawn:
        """`size` independent points."""


@dataclass(frozen=True)
class EightGaussians(ToyLaw):
    """Eight equal Gaussians with means on a circle, the first at (radius, 0), then counter-clockwise."""

    radius: float = 1.4
    std: float = 0.14
    num_classes: ClassVar[int] = 8

    @property
    def means(self) -> Tensor:
        """(8, 2), float64."""
        return self.radius * _direction(torch.arange(8, dtype=torch.float64) * (math.tau / 8))

    def draw(self, size: int, generator: Generator) -> Drawn:
        label = torch.randint(8, (size,), generator=generator)
        return Drawn(self.means[label] + self.std * _normal(size, generator), label)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density (N,) in nats at x (N, 2)."""
        squared = (x[:, None] - self.means.to(x)).square().sum(2)
        exponents = -squared / (2 * self.std**2)
        return exponents.logsumexp(1) - math.log(8 * math.tau * self.std**2)


@dataclass(frozen=True)
class Moons(ToyLaw):
    """Two interleaved half circles, uniform in angle, with Gaussian noise; label 0 is the upper one, 1 the lower.

    Before `centre` is taken off and `scale` divided out, coordinate by coordinate, the moons are (cos a, sin a) and
    (1 - cos a, 1/2 - sin a) with a in [0, pi], plus noise of standard deviation `std`.
    """

    std: float = 0.05
    num_classes: ClassVar[int] = 2
    centre: ClassVar[tuple[float, float]] = (0.5, 0.25)
    scale: ClassVar[tuple[float, float]] = (
        math.sqrt(3 / 4),
        math.sqrt(1 / 2 - (2 / math.pi) ** 2 + (2 / math.pi - 1 / 4) ** 2),
    )

    def draw(self, size: int, generator: Generator) -> Drawn:
        label = torch.randint(2, (size,), generator=generator)
        upper = _direction(math.pi * _uniform(size, generator))
        lower = torch.tensor([1.0, 0.5], dtype=torch.float64) - upper
        points = torch.where(label[:, None] == 0, upper, lower) + self.std * _normal(size, generator)
        return Drawn((points - points.new_tensor(self.centre)) / points.new_tensor(self.scale), label)


@dataclass(frozen=True)
class Checkerboard(ToyLaw):
    """Uniform on the 8 squares (i, j), i + j even, of the 4 by 4 board [-2 side, 2 side]^2.

    Square (i, j) begins at ((i - 2) side, (j - 2) side). The density is 1 / (8 side^2) there and 0 elsewhere.
    """

    side: float = math.sqrt(3) / 2
    num_classes: ClassVar[int] = 0

    def draw(self, size: int, generator: Generator) -> Drawn:
        column = torch.randint(4, (size,), generator=generator)
        row = 2 * torch.randint(2, (size,), generator=generator) + column % 2
        corner = torch.stack([column, row], 1) - 2
        return Drawn(self.side * (corner + torch.rand(size, 2, generator=generator, dtype=torch.float64)), None)


@dataclass(frozen=True)
class SwissRoll(ToyLaw):
    """The spiral a (cos a, sin a) / scale, a uniform in [3 pi / 2, 9 pi / 2], with Gaussian noise (`std`)."""

    scale: float = 7.0
    std: float = 0.03
    num_classes: ClassVar[int] = 0

    def draw(self, size: int, generator: Generator) -> Drawn:
        angle = 1.5 * math.pi * (1 + 2 * _uniform(size, generator))
        return Drawn(angle[:, None] * _direction(angle) / self.scale + self.std * _normal(size, generator), None)


@dataclass(frozen=True)
class Pinwheel(ToyLaw):
    """Five blurred arms that bend as they leave the centre; arm k is label k.

    A point (r, s) with r ~ N(1, radial_std^2) and s ~ N(0, tangential_std^2) is turned by 2 pi k / 5 + rate exp(r),
    then divided by `scale`, which makes the covariance the unit matrix.
    Source: M. Johnson et al., Composing graphical models with neural networks, arXiv 1603.06277.
    """

    radial_std: float = 0.3
    tangential_std: float = 0.1
    rate: float = 0.25
    num_classes: ClassVar[int] = 5

    @property
    def scale(self) -> float:
        return math.sqrt((1 + self.radial_std**2 + self.tangential_std**2) / 2)

    def draw(self, size: int, generator: Generator) -> Drawn:
        label = torch.randint(5, (size,), generator=generator)
        stds = torch.tensor([self.radial_std, self.tangential_std], dtype=torch.float64)
        radial, tangential = (stds * _normal(size, generator) + stds.new_tensor([1.0, 0.0])).unbind(1)
        along = _direction(label * (math.tau / 5) + self.rate * radial.exp())
        across = torch.stack([-along[:, 1], along[:, 0]], 1)
        return Drawn((radial[:, None] * along + tangential[:, None] * across) / self.scale, label)


LAWS: dict[str, ToyLaw] = {
    "8gaussians": EightGaussians(),
    "moons": Moons(),
    "checkerboard": Checkerboard(),
    "swiss_roll": SwissRoll(),
    "pinwheel": Pinwheel(),
}


def toy_law(name: str) -> ToyLaw:
    """The law called `name` in `LAWS`.

    Raises:
        UserError: no law has that name.
    """
    if name not in LAWS:
        raise UserError(f"toy law {name!r} is unknown, expected one of {', '.join(LAWS)}: change law")
    return LAWS[name]


def toy(law: str, size: int = 20000, seed: int = 0) -> Splits:
    """`size` training points and `size` independent test points (N, 2) of the law called `law`, drawn with `seed`.

    Raises:
        UserError: no law has that name, or size is not a positive whole number.
    """
    chosen = toy_law(law)
    check_at_least("size", size, 1)
    generator = torch.Generator().manual_seed(seed)
    train, test = (chosen.draw(size, generator) for _ in range(2))
    return Splits(*(TensorData(points.float(), label, chosen.num_classes) for points, label in (train, test)), law)


def _uniform(size: int, generator: Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _normal(size: int, generator: Generator) -> Tensor:
    return torch.randn(size, 2, generator=generator, dtype=torch.float64)


def _direction(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], 1)
