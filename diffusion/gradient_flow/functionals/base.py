"""Functionals F[q] of a probability law q, which is seen only through particles drawn from it.

Notation, here and in all of this package: x_1 ... x_N are the particles and q their law, each with weight 1/N;
dF/dq is the first variation, a function of x that is known up to a constant; and the velocity -grad dF/dq is the
direction in which the particles move downhill in the geometry of Wasserstein-2 (Jordan, Kinderlehrer and Otto 1998;
Ambrosio, Gigli and Savare 2008, ch. 11). For a functional that is defined on particles, velocity = -N dF/dx_i.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError

CHUNK = 2**22
"""Pairs of points whose kernel is in memory at a time."""


class Functional(ABC):
    """F[q]. Particles are (N, *shape), of any dtype and device; results have theirs."""

    @abstractmethod
    def value(self, particles: Tensor) -> Tensor:
        """F (), up to the constant that the functional says.

        Raises:
            UserError: it cannot be computed from what is known.
        """

    @abstractmethod
    def velocity(self, particles: Tensor) -> Tensor:
        """-grad dF/dq at each particle, (N, *shape)."""

    @abstractmethod
    def first_variation(self, particles: Tensor) -> Tensor:
        """dF/dq at each particle, (N,), up to a constant.

        Raises:
            UserError: as `value`.
        """

    def fitted(self, particles: Tensor, generator: torch.Generator | None = None) -> Functional:
        """This functional with what it learns, or draws at random, made anew for `particles`; flows ask once a step.

        What was learned before is where learning starts from.
        """
        return self

    def fault(self, particles: Tensor) -> str | None:
        """What is not finite at which of the particles, in words, such as "the score is nan at particle 3"."""
        return not_finite(f"the velocity of {type(self).__name__}", self.velocity(particles), particles)

    def relative(self) -> Functional:
        """This functional up to a term of the particles alone, where it costs less without.

        The term is the same whatever the data: the difference of a functional of two data sets does not have it.
        """
        return self

    def terms(self) -> tuple[Term, ...]:
        """The functionals, with their weights, of which this one is the sum."""
        return (Term(1.0, self),)

    def __add__(self, other: Functional) -> Sum:
        return Sum(self.terms() + other.terms())

    def __mul__(self, weight: float) -> Sum:
        return Sum(tuple(Term(weight * term.weight, term.functional) for term in self.terms()))

    __rmul__ = __mul__


class Term(NamedTuple):
    weight: float
    functional: Functional


@dataclass(frozen=True)
class Sum(Functional):
    """sum_k weight_k F_k. Write it 0.5 * F + G."""

    parts: tuple[Term, ...]

    def __post_init__(self):
        for part in self.parts:
            if not (isinstance(part.functional, Functional) and math.isfinite(part.weight)):
                raise UserError(f"a term of a sum is {part}, expected a finite weight and a functional")

    def terms(self):
        return self.parts

    def value(self, particles):
        return sum(weight * functional.value(particles) for weight, functional in self.parts)

    def velocity(self, particles):
        return sum(weight * functional.velocity(particles) for weight, functional in self.parts)

    def first_variation(self, particles):
        return sum(weight * functional.first_variation(particles) for weight, functional in self.parts)

    def fault(self, particles):
        return next(filter(None, (part.fault(particles) for _, part in self.parts)), None)

    def fitted(self, particles, generator=None):
        return Sum(tuple(Term(weight, part.fitted(particles, generator)) for weight, part in self.parts))

    def relative(self):
        return Sum(tuple(Term(weight, part.relative()) for weight, part in self.parts))


def points_of(particles: Tensor, dim: int | None = None) -> Tensor:
    """Particles (N, *shape) as points (N, d).

    Raises:
        UserError: they are no such tensor, or d is not `dim`.
    """
    if not particles.is_floating_point() or particles.dim() < 2 or not particles.numel():
        raise UserError(
            f"particles are {particles.dtype} of shape {tuple(particles.shape)}, expected floating point (N, *shape)"
        )
    points = particles.flatten(1)
    if dim is not None and points.shape[1] != dim:
        raise UserError(f"particles have {points.shape[1]} coordinates, expected {dim}, as many as the data")
    return points


def not_finite(name: str, values: Tensor, particles: Tensor) -> str | None:
    """Where the first of the values (N, ...) at particles (N, *shape) is that is not finite; None where all are."""
    values = values.detach().reshape(len(values), -1)
    wrong = ~values.isfinite()
    if not bool(wrong.any()):
        return None
    index = int(wrong.any(1).nonzero()[0])
    value = float(values[index][wrong[index]][0])
    return f"{name} is {value} at particle {index}, {particles[index].flatten()[:4].tolist()}"


def check_finite(functional: Functional, particles: Tensor, steps: int = 0) -> None:
    """Refuse particles, after so many steps, at which the functional is not finite.

    Raises:
        UserError: it says what of the functional, and where.
    """
    if fault := functional.fault(particles):
        remedy = "start elsewhere, try a smaller step_size, or mend the function"
        raise UserError(f"{fault}, expected finite numbers, after {steps} steps; {remedy}")


def check_data(data: Tensor) -> None:
    """Refuse what is not a finite floating-point tensor (M, *shape)."""
    if not isinstance(data, Tensor) or not data.is_floating_point() or data.dim() < 2 or not data.numel():
        found = f"{data.dtype} of shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise UserError(f"data is {found}, expected a floating point tensor (M, *shape)")
    if not bool(data.isfinite().all()):
        raise UserError("data has entries that are not finite, expected finite numbers")


def with_data(particles: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
    """Particles (N, *shape) and data (M, *shape) as points (N, d) and (M, d), in single precision or better.

    Raises:
        UserError: as `points_of`, or their dimensions differ.
    """
    x = points_of(particles, data[0].numel())
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, data.detach().to(x).flatten(1)


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows` rows such that each, with `columns` columns, is at most CHUNK pairs, or one row."""
    step = max(1, CHUNK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
