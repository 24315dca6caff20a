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
from diffusion.gradient_flow.functionals.base import Functional, check_data, with_data
from diffusion.gradient_flow.functionals.kernels import median_distance

SWEEPS = 50
PLAIN = 10
LEAST = 1e-6


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
    Iterations at the final temperature follow until the marginals are right, more of them the smaller the blur.
    `fitted` keeps the potentials, and iterations start from these on the particles that moved. Memory O((N + M)^2).

    Args:
        data: (M, *shape).
        blur: in units of distance; by default a fifth of the median distance between data points.
        p: 1 or 2.
        scaling: factor between successive blurs of the annealing.
        tolerance: sum of the absolute errors of a marginal of mass 1, in single precision as near as that allows. The
            velocity is off by a share of about as much.
        iterations: the most that may follow the annealing; more are warned of.
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
        start = Start(*self._potentials(x, y), self._constant(y))
        return replace(self, data=self.data.to(particles.device), start=start)

    def value(self, particles):
        x, y = self._inputs(particles)
        with torch.no_grad():
            (data, own), constant = self._potentials(x, y), self._constant(y)
        across = self._softmin(self._costs(x, y), data).mean() + data.mean()
        inside = self._softmin(self._costs(x, x), own).mean() + own.mean()
        return (across - inside / 2 - constant).to(particles.dtype)

    @torch.no_grad()
    def velocity(self, particles):
        x, y = self._inputs(particles)
        data, own = self._potentials(x, y)
        velocity = self._pull(x, x, own) - self._pull(x, y, data)
        return velocity.to(particles.dtype).view_as(particles)

    @torch.no_grad()
    def first_variation(self, particles):
        x, y = self._inputs(particles)
        data, own = self._potentials(x, y)
        across = self._softmin(self._costs(x, y), data)
        return (across - self._softmin(self._costs(x, x), own)).to(particles.dtype)

    def _potentials(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`data` and `own` of a Start for these particles."""
        data = None if self.start is None else self.start.data.to(x)
        own = None if self.start is None or len(self.start.own) != len(x) else self.start.own.to(x)
        return self._potential(x, y, data), self._potential(x, x, own, own=True)

    def _constant(self, y: Tensor) -> Tensor:
        return self._potential(y, y, None, own=True).mean() if self.start is None else self.start.constant.to(y)

    def _potential(self, x: Tensor, y: Tensor, g: Tensor | None, own: bool = False) -> Tensor:
        """The potential on y of the transport from x to y; `own`: the one potential of that from x to itself.

        An iteration on potentials, which no start upsets, is followed by SWEEPS on scalings u and v of its plan, two
        products of a matrix and a vector each. Those of `own` are averaged (Feydy et al., section 3.1); others, from
        the PLAIN first on, over-relaxed as is best for the rate at which these converged (Lehmann, von Renesse, Sambale
        and Uschmajew 2022, arXiv 2012.12562).
        """
        costs, eps = self._costs(x, y), self.blur**self.p
        if g is None:
            f, g = self._annealed(x, y)
            g = (f + g) / 2 if own else g
        floor, relaxation = self._floor(costs), 1.0
        for done in range(0, self.iterations, SWEEPS):
            before, f = g, self._softmin(costs, g)
            g = (f + g) / 2 if own else self._softmin(costs.T, f)
            error = _off(((before - g) / eps).exp())
            if error < floor:
                return g
            plan = (((g if own else f)[:, None] + g - costs) / eps).exp()
            u, v = torch.ones_like(f), torch.ones_like(g)
            for sweep in range(1, min(SWEEPS, self.iterations - done)):
                power = relaxation if sweep > PLAIN else 1.0
                u = v if own else u ** (1 - power) * (len(v) / (plan @ v)) ** power
                fresh = len(u) / (plan.T @ u)
                last, error = error, _off(v / fresh)
                if not LEAST < float(fresh.min()) <= float(fresh.max()) < 1 / LEAST:
                    relaxation = 1.0
                    break
                if error < floor:
                    return g + eps * fresh.log()
                if sweep == PLAIN and not own:
                    relaxation = 2 / (1 + math.sqrt(max(1e-4, 1 - error / last)))
                v = (v * fresh).sqrt() if own else v ** (1 - power) * fresh**power
            g = g + eps * v.log()
        warnings.warn(
            f"after {self.iterations} iterations the marginals of the Sinkhorn divergence are wrong by {error:.1e}, "
            f"expected {self.tolerance:.0e}; give it a larger blur or more iterations",
            stacklevel=3,
        )
        return g

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

    def _floor(self, costs: Tensor) -> float:
        """The tolerance, or what rounding allows."""
        return max(
            self.tolerance, 4 * torch.finfo(costs.dtype).eps * (1 + float(costs.abs().max()) / self.blur**self.p)
        )

    def _inputs(self, particles: Tensor) -> tuple[Tensor, Tensor]:
        """Particles and data, about the data's mean, far from which products of coordinates lose the costs' digits."""
        x, y = with_data(particles, self.data)
        if not bool(x.isfinite().all()):
            raise UserError("particles have entries that are not finite, expected finite numbers")
        centre = y.mean(0)
        return x - centre, y - centre


def _off(marginal: Tensor) -> float:
    """The error of a marginal of ones."""
    return float((marginal - 1).abs().mean())
