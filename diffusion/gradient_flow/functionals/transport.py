"""Entropic optimal transport between two sets of points, some rows of the matrix of costs at a time."""

import math
import warnings
from collections.abc import Callable

import torch
from geomloss import SamplesLoss
from torch import Tensor

from diffusion.gradient_flow.functionals.base import chunks
from diffusion.gradient_flow.functionals.kernels import spread

SWEEPS = 50
PLAIN = 10
LEAST = 1e-6
ROUNDED = 1e-3
"""Errors of the marginals by rounding that are passed over."""
SUBSET = 1000
"""Points of each set whose transport is annealed."""


class Rows:
    """A matrix, known by its blocks of rows: made when they are asked for, or kept where one is all of it."""

    def __init__(self, make: Callable[[slice], Tensor], parts: list[slice]):
        self._make, self._whole = make, make(parts[0]) if len(parts) == 1 else None

    def __getitem__(self, part: slice) -> Tensor:
        return self._make(part) if self._whole is None else self._whole


class Transport:
    """Of points x (N, d) to points y (M, d), each with the same weight, at the cost |x - y|^p / p and the temperature
    blur^p. It is known by its potential g (M,) on y. Where x is y there is one potential for both sides.

    Memory O(CHUNK + (N + M) d); costs that do not fit in are computed anew for each use of them. Places are about the
    mean of y, far from which products of coordinates would lose the costs' digits.
    """

    def __init__(self, x: Tensor, y: Tensor, blur: float, p: int):
        centre = y.detach().mean(0)
        self.own, self.blur, self.p, self.eps = x is y, blur, p, blur**p
        self.x = x - centre
        self.y = self.x if self.own else y - centre
        self.parts = list(chunks(len(x), len(y)))
        self._costs = Rows(self._cost, self.parts)

    def softmin(self, g: Tensor) -> Tensor:
        """The potential on x that belongs to g: -eps log mean_j exp((g_j - c_ij) / eps), (N,)."""
        sums = [(g - self._costs[part]).div_(self.eps).logsumexp(1) for part in self.parts]
        return -self.eps * (torch.cat(sums) - math.log(len(g)))

    def value(self, g: Tensor) -> Tensor:
        """OT(x, y), ()."""
        return self.softmin(g).mean() + g.mean()

    def slope(self, g: Tensor) -> Tensor:
        """The gradient in x of the potential that belongs to g, (N, d)."""
        slopes = []
        for part in self.parts:
            costs, x = self._costs[part], self.x[part]
            plan = (g - costs).div_(self.eps).softmax(1)
            if self.p == 1:
                plan = torch.where(costs > 0, plan / costs, 0)
            slopes.append(plan.sum(1, keepdim=True) * x - plan @ self.y)
        return torch.cat(slopes)

    @torch.no_grad()
    def solve(self, g: Tensor | None, scaling: float, tolerance: float, iterations: int) -> Tensor:
        """The potential on y, (M,), from a start, or from that of `_annealed`.

        An iteration on potentials, which no start upsets, is followed by SWEEPS on scalings u and v of its plan, one
        pass over the plan each. Those of one potential for both sides are averaged (Feydy et al. 2019, section 3.1);
        others, from the PLAIN first on, over-relaxed as is best for the rate at which these converged (Lehmann, von
        Renesse, Sambale and Uschmajew 2022, arXiv 2012.12562).
        """
        g = self._annealed(scaling) if g is None else g
        floor, relaxation = self._floor(tolerance), 1.0
        if floor > max(ROUNDED, tolerance):
            warnings.warn(
                f"in {g.dtype} the marginals of the Sinkhorn divergence can be right to {floor:.1e} only, expected "
                f"{tolerance:.0e}; give it a larger blur, or double precision",
                stacklevel=3,
            )
        for done in range(0, iterations, SWEEPS):
            before, f = g, self.softmin(g)
            g = (f + g) / 2 if self.own else self._back(f)
            error = _off(((before - g) / self.eps).exp())
            if error < floor:
                return g
            plan = self._plan(g if self.own else f, g)
            u, v = torch.ones_like(f), torch.ones_like(g)
            for sweep in range(1, min(SWEEPS, iterations - done)):
                power = relaxation if sweep > PLAIN else 1.0
                u, fresh = self._sweep(plan, u, v, power)
                last, error = error, _off(v / fresh)
                if not LEAST < float(fresh.min()) <= float(fresh.max()) < 1 / LEAST:
                    relaxation = 1.0
                    break
                if error < floor:
                    return g + self.eps * fresh.log()
                if sweep == PLAIN:
                    relaxation = 2 / (1 + math.sqrt(max(1e-4, 1 - error / last)))
                v = (v * fresh).sqrt() if self.own else v ** (1 - power) * fresh**power
            g = g + self.eps * v.log()
        warnings.warn(
            f"after {iterations} iterations the marginals of the Sinkhorn divergence are wrong by {error:.1e}, "
            f"expected {tolerance:.0e}; give it a larger blur or more iterations",
            stacklevel=3,
        )
        return g

    def _sweep(self, plan: Rows, u: Tensor, v: Tensor, power: float) -> tuple[Tensor, Tensor]:
        """u after a relaxed step, and v after a plain one from there."""
        rows, columns = [], torch.zeros_like(v)
        for part in self.parts:
            block = plan[part]
            row = v[part] if self.own else u[part] ** (1 - power) * (len(v) / (block @ v)) ** power
            columns += block.T @ row
            rows.append(row)
        return torch.cat(rows), len(u) / columns

    def _plan(self, f: Tensor, g: Tensor) -> Rows:
        """exp((f_i + g_j - c_ij) / eps), N M times the plan."""
        return Rows(lambda part: self._costs[part].sub(g).sub_(f[part, None]).div_(-self.eps).exp_(), self.parts)

    def _back(self, f: Tensor) -> Tensor:
        """The potential on y that belongs to f."""
        total = torch.full_like(self.y[:, 0], -torch.inf)
        for part in self.parts:
            total = torch.logaddexp(total, (f[part, None] - self._costs[part]).div_(self.eps).logsumexp(0))
        return -self.eps * (total - math.log(len(f)))

    def _annealed(self, scaling: float) -> Tensor:
        """A potential on y, of geomloss's annealing of the temperature between at most SUBSET points of each set."""
        x, y = spread(self.x.detach(), SUBSET), spread(self.y.detach(), SUBSET)
        both = torch.cat([x, y])
        diameter = max(float((both.amax(0) - both.amin(0)).norm()), self.blur)  # 0 where all points are one
        options = {"p": self.p, "blur": self.blur, "scaling": scaling, "backend": "tensorized", "diameter": diameter}
        with torch.enable_grad():  # geomloss leaves it switched on
            f, _ = SamplesLoss("sinkhorn", debias=False, potentials=True, **options)(x, y)
        return Transport(self.y, x, self.blur, self.p).softmin(f.detach().flatten())

    def _cost(self, part: slice) -> Tensor:
        x, y = self.x[part], self.y
        if self.p == 1:
            return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.addmm(y.square().sum(1) / 2, x, y.T, alpha=-1).add_(x.square().sum(1)[:, None] / 2)

    def _floor(self, tolerance: float) -> float:
        """The tolerance, or what rounding of the costs allows."""
        most = float(self.x.norm(dim=1).max() + self.y.norm(dim=1).max()) ** self.p / self.p
        return max(tolerance, 4 * torch.finfo(self.x.dtype).eps * (1 + most / self.eps))


def _off(marginal: Tensor) -> float:
    """The error of a marginal of ones."""
    return float((marginal - 1).abs().mean())
