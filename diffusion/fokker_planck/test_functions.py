"""Families of test functions for the weak form, closed under gradient and Laplacian: every term in closed form.

All are functions of y = (x - centre) / scale, coordinate by coordinate, and `adapted` takes both from samples. Neither
gradients nor Hessians are formed: memory is that of some N K numbers, and of N d^2 where a is a full matrix.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.scaled_functions import Samples, Scaled, TestFunctions, Together, drawn, frame

__all__ = ["GaussianBumps", "HermitePolynomials", "RandomFourier", "TestFunctions", "Together"]


class GaussianBumps(Scaled):
    """phi = exp(-|y - c|^2 / (2 width^2)).

    Args:
        centre, scale: (d,), of y.
        centres: c, (K, d).
        width: (K,).
    """

    def __init__(self, centre: Tensor, scale: Tensor, centres: Tensor, width: Tensor):
        super().__init__(centre, scale)
        if centres.shape != (len(width), len(centre)) or not bool((width > 0).all()):
            shapes = f"{tuple(centres.shape)} and {tuple(width.shape)}"
            raise UserError(f"centres and width have shapes {shapes}, expected (K, {len(centre)}), and (K,) above 0")
        self.centres, self.width = centres, width

    @classmethod
    def adapted(cls, samples: Samples, number: int, generator: torch.Generator, width: float = 1.0) -> "GaussianBumps":
        """Bumps about samples, of width sqrt(d) `width` / 2 to sqrt(d) `width` standard deviations.

        Two points are sqrt(2 d) standard deviations apart; narrower bumps would be empty in many dimensions.
        """
        points, centre, scale = frame(samples)
        centres = (drawn(points, number, generator) - centre) / scale
        options = {"generator": generator, "device": generator.device, "dtype": torch.float64}
        share = 2 ** -torch.rand(number, **options)
        return cls(centre, scale, centres, math.sqrt(len(centre)) * width * share.to(centres))

    @property
    def number(self):
        return len(self.width)

    def _value(self, y):
        c = self.centres.to(y)
        squares = y.square().sum(1)[:, None] - 2 * y @ c.T + c.square().sum(1)
        return (-squares / (2 * self.width.to(y).square())).exp()

    def _slope(self, y, v):
        along = (v * y).sum(1)[:, None] - v @ self.centres.to(y).T
        return -self._value(y) * along / self.width.to(y).square()

    def _curvature(self, y, a):
        c, width = self.centres.to(y), self.width.to(y)
        if a.dim() == 3:
            a = (a + a.mT) / 2
            ay, trace = (a @ y[:, :, None])[:, :, 0], a.diagonal(dim1=1, dim2=2).sum(1)
            outer = a.flatten(1) @ (c[:, :, None] * c[:, None]).flatten(1).T
        else:
            ay, trace, outer = a * y, a.sum(1), a @ c.square().T
        form = (ay * y).sum(1)[:, None] - 2 * ay @ c.T + outer  # (y - c)^T a (y - c)
        return self._value(y) * (form / width**4 - trace[:, None] / width.square()) / 2


class RandomFourier(Scaled):
    """phi = cos(wave . y + phase).

    Args:
        centre, scale: (d,), of y.
        wave: (K, d).
        phase: (K,).
    """

    def __init__(self, centre: Tensor, scale: Tensor, wave: Tensor, phase: Tensor):
        super().__init__(centre, scale)
        if wave.shape != (len(phase), len(centre)):
            shapes = f"{tuple(wave.shape)} and {tuple(phase.shape)}"
            raise UserError(f"wave and phase have shapes {shapes}, expected (K, {len(centre)}) and (K,)")
        self.wave, self.phase = wave, phase

    @classmethod
    def adapted(
        cls, samples: Samples, number: int, generator: torch.Generator, shortest: float = 0.5, longest: float = 2.0
    ) -> "RandomFourier":
        """Waves in random directions, of `shortest` to `longest` radians a standard deviation, even in the log."""
        _, centre, scale = frame(samples)
        return cls.drawn(centre, scale, number, generator, shortest, longest)

    @classmethod
    def drawn(
        cls, centre: Tensor, scale: Tensor, number: int, generator: torch.Generator, shortest: float, longest: float
    ) -> "RandomFourier":
        """As `adapted`, about a given centre and scale."""
        if not isinstance(number, int) or number < 1 or not 0 < shortest <= longest:
            got = f"number={number}, shortest={shortest} and longest={longest}"
            raise UserError(f"random waves have {got}; expected a whole number of 1 or more, 0 < shortest <= longest")
        options = {"generator": generator, "device": generator.device, "dtype": centre.dtype}
        wave = torch.randn(number, len(centre), **options)
        length = shortest * (longest / shortest) ** torch.rand(number, 1, **options)
        phase = math.tau * torch.rand(number, **options)
        return cls(centre, scale, (wave / wave.norm(dim=1, keepdim=True) * length).to(centre), phase.to(centre))

    @classmethod
    def periodic(cls, domain: Sequence[tuple[float, float]], degree: int) -> "RandomFourier":
        """All real waves of a periodic box, of total degree 1 to `degree`: the cosine and the sine of each."""
        low, high = torch.tensor(domain, dtype=torch.float64).T
        waves = [
            k for k in itertools.product(range(-degree, degree + 1), repeat=len(low)) if 0 < sum(map(abs, k)) <= degree
        ]
        waves = [k for k in waves if next(n for n in k if n) > 0]  # one of each k, -k
        wave = torch.tensor(waves, dtype=torch.float64).repeat_interleave(2, 0)
        phase = torch.tensor([0.0, -math.pi / 2], dtype=torch.float64).repeat(len(waves))
        return cls(low, (high - low) / math.tau, wave, phase)

    @property
    def number(self):
        return len(self.phase)

    def _angle(self, y: Tensor) -> Tensor:
        return y @ self.wave.to(y).T + self.phase.to(y)

    def _value(self, y):
        return self._angle(y).cos()

    def _slope(self, y, v):
        return -self._angle(y).sin() * (v @ self.wave.to(y).T)

    def _curvature(self, y, a):
        wave = self.wave.to(y)
        both = (wave[:, :, None] * wave[:, None]).flatten(1) if a.dim() == 3 else wave.square()
        return -self._angle(y).cos() * (a.flatten(1) @ both.T) / 2


class HermitePolynomials(Scaled):
    """Products of normalised Hermite polynomials He_n(y_i) / sqrt(n!), of total degree 1 to `degree`.

    Orthonormal where y is a standard normal. They are not bounded: for laws with light tails.

    Args:
        centre, scale: (d,), of y.
        degree: the highest; there are (d + degree)! / (d! degree!) - 1 functions.
    """

    def __init__(self, centre: Tensor, scale: Tensor, degree: int):
        super().__init__(centre, scale)
        if not isinstance(degree, int) or degree < 1:
            raise UserError(f"degree is {degree}, expected a whole number of at least 1")
        self.degree = degree
        dims = [
            chosen
            for total in range(1, degree + 1)
            for chosen in itertools.combinations_with_replacement(range(len(centre)), total)
        ]
        slots = [sorted({(i, chosen.count(i)) for i in chosen}) for chosen in dims]
        slots = [slot + [(0, 0)] * (min(degree, len(centre)) - len(slot)) for slot in slots]
        self._slots = torch.tensor(slots)  # (K, S, 2): coordinate and order of each factor; order 0 is no factor

    @classmethod
    def adapted(cls, samples: Samples, degree: int) -> "HermitePolynomials":
        """About the mean of the samples, in their standard deviations."""
        _, centre, scale = frame(samples)
        return cls(centre, scale, degree)

    @property
    def number(self):
        return len(self._slots)

    def _factors(self, y: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
        """The coordinates (K, S), and for each factor itself and its two derivatives, (N, K) each."""
        table = [torch.ones_like(y), y]
        for n in range(1, self.degree):
            table.append((y * table[n] - math.sqrt(n) * table[n - 1]) / math.sqrt(n + 1))
        none = torch.zeros_like(y)
        first = [none] + [math.sqrt(n) * table[n - 1] for n in range(1, self.degree + 1)]
        second = [none] + [math.sqrt(n) * first[n - 1] for n in range(1, self.degree + 1)]
        coordinate, order = self._slots.to(y.device).unbind(2)
        column = order * y.shape[1] + coordinate
        tables = [torch.cat(t[: self.degree + 1], 1) for t in (table, first, second)]
        return coordinate, [[t[:, column[:, s]] for t in tables] for s in range(column.shape[1])]

    def _value(self, y):
        _, factors = self._factors(y)
        return math.prod(factor[0] for factor in factors)

    def _slope(self, y, v):
        coordinate, factors = self._factors(y)
        total = 0
        for s in range(len(factors)):
            total = total + v[:, coordinate[:, s]] * _product(factors, {s: 1})
        return total

    def _curvature(self, y, a):
        coordinate, factors = self._factors(y)
        total = 0
        for s, r in itertools.product(range(len(factors)), repeat=2):
            i, j = coordinate[:, s], coordinate[:, r]
            if s == r:
                total = total + (a[:, i, i] if a.dim() == 3 else a[:, i]) * _product(factors, {s: 2})
            elif a.dim() == 3:
                total = total + a[:, i, j] * _product(factors, {s: 1, r: 1})
        return total / 2


def _product(factors: list[list[Tensor]], derived: dict[int, int]) -> Tensor:
    """The product over all factors, some of them differentiated as often as `derived` says."""
    return math.prod(factor[derived.get(s, 0)] for s, factor in enumerate(factors))
