"""The Sinkhorn divergence: optimal transport, blurred, without the bias of the blur."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, check_data, with_data
from diffusion.gradient_flow.functionals.kernels import median_distance
from diffusion.gradient_flow.functionals.transport import Transport


class Start(NamedTuple):
    """What iterations start from.

    Attributes:
        data: the potential on the data of the transport from particles to these, (M,).
        own: that of the transport from particles to themselves, (N,); None where there is none.
        constant: () -> OT(P, P) / 2, (), computed when it is first asked for.
    """

    data: Tensor
    own: Tensor | None
    constant: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class SinkhornDivergence(Functional):
    """F[q] = OT(q, P) - OT(q, q) / 2 - OT(P, P) / 2, P the data, where OT is entropic optimal transport with the cost
    |x - y|^p / p and the temperature blur^p (Genevay, Peyre and Cuturi 2018; Feydy et al. 2019).

    blur -> 0 gives W_p^p / p; a large blur, for p = 2, half the squared distance of the means. The first variation is
    the difference of the potentials of OT(q, P) and OT(q, q) (Feydy et al., eq. 26), and for p = 2 the velocity is that
    of the barycentric projections of both plans.

    geomloss anneals the temperature, for 1000 points at most, which is a start but no solution: its gradient is off by
    some per cent. Iterations at the final temperature follow until the marginals are right, more of them the smaller
    the blur. `fitted` keeps the potentials, and iterations start from these on the particles that moved. An iteration
    costs O(N (N + M) d) where costs are more than base.CHUNK numbers, and O(N (N + M)) where they are kept.

    Args:
        data: (M, *shape).
        blur: in units of distance; by default a fifth of the median distance between data points.
        p: 1 or 2.
        scaling: factor between successive blurs of the annealing.
        tolerance: sum of the absolute errors of a marginal of mass 1, in single precision as near as that allows. The
            velocity is off by a share of about as much.
        iterations: the most that may follow the annealing; more are warned of.
        own: whether there is the term OT(q, q) / 2.
        start: set by `fitted`.

    Raises:
        UserError: a bad value, or particles of another dimension.
    """

    data: Tensor
    blur: float | None = None
    p: int = 2
    scaling: float = 0.5
    tolerance: float = 1e-4
    iterations: int = 2000
    own: bool = True
    start: Start | None = None

    def __post_init__(self):
        check_data(self.data)
        if self.p not in (1, 2):
            raise UserError(f"p is {self.p}, expected 1 or 2")
        if self.blur is None:
            object.__setattr__(self, "blur", 0.2 * median_distance(self.data.flatten(1)))
        if not 0 < self.blur < math.inf:
            raise UserError(f"blur is {self.blur}, expected a positive number, or none for a fifth of the median")
        if not 0 < self.scaling < 1:
            raise UserError(f"scaling is {self.scaling}, expected a number between 0 and 1, without them")
        if not 0 < self.tolerance < 1:
            raise UserError(f"tolerance is {self.tolerance}, expected a number between 0 and 1, without them")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise UserError(f"iterations is {self.iterations!r}, expected a whole number of 1 or more")

    def relative(self):
        return replace(self, own=False)

    @torch.no_grad()
    def fitted(self, particles, generator=None):
        x, y = self._inputs(particles)
        potentials = [g for _, g in self._solved(x, y)]
        constant = Constant(self, y) if self.start is None else self.start.constant
        start = Start(potentials[0], potentials[1] if self.own else None, constant)
        return replace(self, data=self.data.to(particles.device), start=start)

    def value(self, particles):
        x, y = self._inputs(particles)
        parts = zip((1, -0.5), self._solved(x, y), strict=False)
        constant = self._constant(y) if self.start is None else self.start.constant().to(y)
        return (sum(weight * transport.value(g) for weight, (transport, g) in parts) - constant).to(particles.dtype)

    @torch.no_grad()
    def velocity(self, particles):
        x, y = self._inputs(particles)
        parts = zip((-1, 1), self._solved(x, y), strict=False)
        velocity = sum(sign * transport.slope(g) for sign, (transport, g) in parts)
        return velocity.to(particles.dtype).view_as(particles)

    @torch.no_grad()
    def first_variation(self, particles):
        x, y = self._inputs(particles)
        parts = zip((1, -1), self._solved(x, y), strict=False)
        return sum(sign * transport.softmin(g) for sign, (transport, g) in parts).to(particles.dtype)

    def _solved(self, x: Tensor, y: Tensor) -> list[tuple[Transport, Tensor]]:
        """The transport to the data and its potential; then, with `own`, those of the transport to the particles."""
        data = None if self.start is None else self.start.data.to(x)
        solved = [self._solve(x, y, data)]
        if self.own:
            own = None if self.start is None else self.start.own
            solved.append(self._solve(x, x, own.to(x) if own is not None and len(own) == len(x) else None))
        return solved

    def _solve(self, x: Tensor, y: Tensor, start: Tensor | None) -> tuple[Transport, Tensor]:
        transport = Transport(x, y, self.blur, self.p)
        return transport, transport.solve(start, self.scaling, self.tolerance, self.iterations)

    @torch.no_grad()
    def _constant(self, y: Tensor) -> Tensor:
        return self._solve(y, y, None)[1].mean()

    def _inputs(self, particles: Tensor) -> tuple[Tensor, Tensor]:
        x, y = with_data(particles, self.data)
        if not bool(x.isfinite().all()):
            raise UserError("particles have entries that are not finite, expected finite numbers")
        return x, y


@dataclass(frozen=True, eq=False)
class Constant:
    """() -> OT(P, P) / 2 of a functional whose data are the points P (M, d), computed once, when it is asked for."""

    functional: SinkhornDivergence
    points: Tensor

    def __call__(self) -> Tensor:
        return self._found

    @cached_property
    def _found(self) -> Tensor:
        return self.functional._constant(self.points)
