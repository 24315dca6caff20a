"""The Sinkhorn divergence: optimal transport, blurred, without the bias of the blur."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from geomloss import SamplesLoss
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, points_of
from diffusion.gradient_flow.functionals.kernels import median_distance
from diffusion.gradient_flow.functionals.slices import check_data


class Start(NamedTuple):
    """Potentials from which iterations start.

    Attributes:
        data: of the transport from particles to data, on the data, (M,).
        own: of the transport from particles to themselves, (N,).
        constant: OT(P, P) / 2, ().
    """

    data: Tensor
    own: Tensor
    constant: Tensor


@dataclass(frozen=True, eq=False)
class SinkhornDivergence(Functional):
    """F[q] = OT(q, P) - OT(q, q) / 2 - OT(P, P) / 2, P the data, where OT is entropic optimal transport with the cost
    |x - y|^p / p and the temperature blur^p (Genevay, Peyre and Cuturi 2018; Feydy et al. 2019).

    blur -> 0 gives W_p^p / p; a large blur, for p = 2, half the squared distance of the means. The first variation is
    the difference of the potentials of OT(q, P) and OT(q, q) (Feydy et al., eq. 26), and for p = 2 the velocity is that
    of the barycentric projections of both plans.

    geomloss anneals the temperature, which is a start but no solution: its gradient is off by some per cent.
    Iterations at the final temperature follow until the marginals are right. `fitted` keeps the potentials, and
    iterations start from these on the particles that moved. Memory O((N + M)^2).

    Args:
        data: (M, *shape).
        blur: in units of distance; by default a fifth of the median distance between data points.
        p: 1 or 2.
        scaling: factor between successive blurs of the annealing.
        tolerance: sum of the absolute errors of a marginal of mass 1; in single precision as near as that allows.
        iterations: the most that may follow the annealing; more are warned of.
        start: set by `fitted`.

    Raises:
        UserError: a bad value, or particles of another dimension.
    """

    data: Tensor
    blur: float | None = None
    p: int = 2
    scaling: float = 0.8
    tolerance: float = 1e-4
    iterations: int = 1000
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

    @torch.no_grad()
    def fitted(self, particles, generator=None):
        x, y = self._inputs(particles)
        return replace(self, data=self.data.to(particles.device), start=self._solved(x, y))

    def value(self, particles):
        x, y = self._inputs(particles)
        with torch.no_grad():
            solved = self._solved(x, y)
        across = self._softmin(self._costs(x, y), solved.data).mean() + solved.data.mean()
        inside = self._softmin(self._costs(x, x), solved.own).mean() + solved.own.mean()
        return (across - inside / 2 - solved.constant).to(particles.dtype)

    @torch.no_grad()
    def velocity(self, particles):
        x, y = self._inputs(particles)
        solved = self._solved(x, y)
        velocity = self._pull(x, x, solved.own) - self._pull(x, y, solved.data)
        return velocity.to(particles.dtype).view_as(particles)

    @torch.no_grad()
    def first_variation(self, particles):
        x, y = self._inputs(particles)
        solved = self._solved(x, y)
        across = self._softmin(self._costs(x, y), solved.data)
        return (across - self._softmin(self._costs(x, x), solved.own)).to(particles.dtype)

    def _solved(self, x: Tensor, y: Tensor) -> Start:
        start, size = self.start, len(x)
        warm = start is not None and len(start.data) == len(y)
        g = self._transport(x, y, start.data.to(x) if warm else None)
        own = self._symmetric(x, start.own.to(x) if warm and len(start.own) == size else None)
        return Start(g, own, start.constant.to(x) if warm else self._symmetric(y, None).mean())

    def _transport(self, x: Tensor, y: Tensor, g: Tensor | None) -> Tensor:
        """The potential on y of the transport from x to y, by Sinkhorn's iterations."""
        costs = self._costs(x, y)
        if g is None:
            g = self._annealed(x, y)[1]
        floor = self._floor(costs)
        for _ in range(self.iterations):
            before, g = g, self._softmin(costs.T, self._softmin(costs, g))
            if self._error(before - g) < floor:
                break
        else:
            self._warn(before - g)
        return g

    def _symmetric(self, x: Tensor, f: Tensor | None) -> Tensor:
        """The one potential of the transport from x to x, by averaged iterations (Feydy et al., section 3.1)."""
        costs = self._costs(x, x)
        if f is None:
            f = torch.stack(self._annealed(x, x)).mean(0)
        floor = self._floor(costs)
        for _ in range(self.iterations):
            change = self._softmin(costs, f) - f
            f = f + change / 2
            if self._error(change) < floor:
                break
        else:
            self._warn(change)
        return f

    def _annealed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, y])
        diameter = max(float((both.amax(0) - both.amin(0)).norm()), self.blur)  # 0 where all points are one
        options = {"p": self.p, "blur": self.blur, "scaling": self.scaling, "backend": "tensorized"}
        options["diameter"] = diameter
        loss = SamplesLoss("sinkhorn", debias=False, potentials=True, **options)
        with torch.enable_grad():  # geomloss leaves it switched on
            f, g = loss(x.detach(), y.detach())
        return f.detach().flatten(), g.detach().flatten()

    def _pull(self, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """The gradient in x of the potential that belongs to g, (N, d)."""
        costs = self._costs(x, y)
        plan = ((g - costs) / self.blur**self.p).softmax(1)
        if self.p == 2:
            return x - plan @ y
        plan = torch.where(costs > 0, plan / costs, 0)
        return plan.sum(1, keepdim=True) * x - plan @ y

    def _softmin(self, costs: Tensor, g: Tensor) -> Tensor:
        """-eps log mean_j exp((g_j - c_ij) / eps), (N,)."""
        eps = self.blur**self.p
        return -eps * (((g - costs) / eps).logsumexp(1) - math.log(len(g)))

    def _costs(self, x: Tensor, y: Tensor) -> Tensor:
        if self.p == 1:
            return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return (x.square().sum(1)[:, None] + y.square().sum(1)) / 2 - x @ y.T

    def _error(self, change: Tensor) -> float:
        """Of a marginal, when its potential has to change so much."""
        return float((change / self.blur**self.p).expm1().abs().mean())

    def _floor(self, costs: Tensor) -> float:
        """The tolerance, or what rounding allows."""
        return max(
            self.tolerance, 4 * torch.finfo(costs.dtype).eps * (1 + float(costs.abs().max()) / self.blur**self.p)
        )

    def _warn(self, change: Tensor) -> None:
        warnings.warn(
            f"after {self.iterations} iterations the marginals of the Sinkhorn divergence are wrong by "
            f"{self._error(change):.1e}, expected {self.tolerance:.0e}; give it a larger blur or more iterations",
            stacklevel=2,
        )

    def _inputs(self, particles: Tensor) -> tuple[Tensor, Tensor]:
        """Particles and data, in single precision or better."""
        x = points_of(particles, self.data[0].numel())
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, self.data.to(x).flatten(1)
