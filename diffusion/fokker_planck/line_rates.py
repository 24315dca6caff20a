"""Rates of the jumps along lines from the centres of cells to those of others, at the mean drift and noise.

Coordinates with noise of their own are lines; a full matrix is first split into lines by Selling's decomposition.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box, line_rule, off_line, split_rule
from diffusion.fokker_planck.equation import FokkerPlanck, act
from diffusion.fokker_planck.selling import selling
from diffusion.fokker_planck.stepping import Rule, weighted

POINTS = 4  # of Gauss' rule between two centres
STEEPEST = 700.0  # largest difference of psi between two centres: less noise than that is as good as none
THINNEST = 1e-3  # least ratio of the eigenvalues of a full matrix, in units of cells
TINY = 1e-300
BENT, SMALL = 0.1, 1e-8  # share of a slope, and slope, by which it may bend along a line; if it does, it is in
PARTS = 16  # parts that it is looked at,
FEW, MANY = 8, 1 / 8  # lines, or share of them, at most
LESS = 30.0  # times less noise at a centre than around it is no noise of the cell

Offset = tuple[int, ...]
Array = TypeVar("Array", Tensor, np.ndarray)


def namespace(array: Tensor | np.ndarray):
    """numpy or torch: functions that both have, under one name, are written once."""
    return np if isinstance(array, np.ndarray) else torch


def as_array(values: Array) -> Array:
    """The same numbers, of numpy on CPUs, which takes less time for each of many small calls; of torch elsewhere."""
    return values.numpy() if isinstance(values, Tensor) and values.device.type == "cpu" else values


def mean_coefficients(equation: FokkerPlanck, x: Tensor, rules: Sequence[Rule], full: bool) -> Tensor:
    """Drift and covariance at points `x` (m, d), weighted means by P rules, (P, m, d + d^2).

    If not full, the diagonal of the covariance only, (P, m, d + d).
    """
    dim = x.shape[1]

    def at(times: list[Tensor | float]) -> Tensor:
        drift, a = equation.over(x, times)
        if a.dim() == 4:
            a = a.flatten(2) if full else a.diagonal(dim1=2, dim2=3)
        else:
            a = a.reshape(*a.shape[:2], -1).expand(-1, -1, dim)
            a = a.diag_embed().flatten(2) if full else a
        return torch.cat([drift, a], 2).detach()

    if len(rules) == len(rules[0]) == 1:
        return at([rules[0][0][0]])
    return weighted(rules, at, x.numel())


def both_ways(w: Array) -> Array:
    """b(-w) and b(w), (P, 2, m), with b(w) = w / (exp(w) - 1), which is 1 at 0, for w (P, m)."""
    xp = namespace(w)
    size = xp.clip(abs(w), TINY, None)
    return (size / xp.expm1(size))[:, None] + xp.clip(xp.stack([w, -w], 1), 0, None)


def _bend(slope: Array) -> Array:
    """By how much slopes (P, m, POINTS) differ from the nearest linear function, (P, m)."""
    off = off_line(POINTS, getattr(slope, "device", "cpu"))
    return namespace(slope).amax(abs(slope @ (off if isinstance(slope, Tensor) else off.numpy())), -1)


class Lines(NamedTuple):
    """What is known of m lines, (P, m) each.

    Attributes:
        w: the increase of phi.
        correction: the mean of exp(-phi) over that of a straight phi.
        usual: the harmonic mean of D.
        thin: D below which there is as good as no noise.
        swing: by how much the slope of phi bends, next to itself and 1.
        rough: whether it bends so much that more points are to be looked at.
    """

    w: Array
    correction: Array
    usual: Array
    thin: Array
    swing: Array
    rough: Array


class Axes:
    """Noise of its own along each coordinate, by P rules at once. Lengths are in cells, numbers `as_array`."""

    def __init__(self, equation: FokkerPlanck, box: Box, rules: Sequence[Rule]):
        self.equation, self.box, self.rules = equation, box, rules
        self.offsets = [tuple(int(i == j) for j in range(box.dim)) for i in range(box.dim)]
        self.rule, self.fine = line_rule(POINTS, box.device), split_rule(POINTS, PARTS, box.device)
        ways = []  # of each line: offset, sign or 0, cells, length
        for e in self.offsets:
            ways.append((e, 0, box.neighbours(e).ends[0], 1.0))
            for sign in (1, -1) if "absorbing" in box.boundary else ():
                out = box.neighbours(tuple(sign * step for step in e))
                ways.append((e, sign, out.lost, sign * out.fraction[:, None]))
        places = [self._places(e, start, step, self.rule) for e, _, start, step in ways]
        drift, half = self._asked(torch.cat([box.centres, *places]))
        self.lines: dict[tuple[Offset, int], Lines] = {}
        done = box.number
        for e, sign, start, step in ways:
            part = slice(done, done + POINTS * len(start))
            done, axis = part.stop, e.index(1)
            lines = self._lines(drift[:, part, axis], half[:, part, axis], step, self.rule)
            if bool(lines.rough.any()):
                lines = self._looked_at(e, start, step, lines)
            self.lines[e, sign] = lines
        self.half, self.ways, self._known = half[:, : box.number], ways, {}

    def _places(self, e: Offset, start: Tensor, step: Tensor | float, rule) -> Tensor:
        return self.box.along(start, (step * rule[0])[..., None] * self.box.steps[e.index(1)])

    def _asked(self, x: Tensor) -> tuple[Array, Array]:
        """Drift and D, in cells and squares of them, at `x` (m, d): (P, m, d) each."""
        found = mean_coefficients(self.equation, x, self.rules, full=False)
        dim = self.box.dim
        return as_array(found[:, :, :dim] / self.box.spacing), as_array(found[:, :, dim:] * (self.box.per_square / 2))

    def between(self, e: Offset, ends: Tensor) -> tuple[Array, Array, Array]:
        """Both rates (P, 2, m) of the lines from one cell to another, (2, m), w (P, m), and how much each swings."""
        line = self.lines[e, 0]
        return (
            self._noise(e, line, ends, several=True) * both_ways(line.w) / line.correction[:, None],
            line.w,
            line.swing,
        )

    def leaving(self, e: Offset, sign: int, start: Tensor, fraction: Tensor) -> Array:
        """The rate (P, m) from the cells to the face that is the `fraction` of a cell away, along `sign` e."""
        line = self.lines[e, sign]
        return (
            self._noise(e, line, start, several=False)
            * both_ways(line.w)[:, 0]
            / (line.correction * as_array(fraction))
        )

    def _noise(self, e: Offset, line: "Lines", cells: Tensor, several: bool) -> Array:
        """D in the cells at one end of the lines, or several; where it is as good as none, that of the lines."""
        own = self.half[:, as_array(cells), e.index(1)]
        usual, thin = (values[:, None] if several else values for values in (line.usual, line.thin))
        if not bool((own < usual / LESS).any()):
            return own
        own = self._own(e)[:, as_array(cells)]
        return namespace(own).where(own < namespace(own).minimum(2 * thin, usual), usual, own)

    def _own(self, e: Offset) -> Array:
        """D (P, n) at the centres; where it is next to 0 there but not on either side, the less of these."""
        if e not in self._known:
            own = self.half[..., e.index(1)]
            xp, least = namespace(own), own * 0 + math.inf
            for other, sign, start, _ in self.ways:
                for cells in (self.box.neighbours(e).ends if sign == 0 else (start,)) if other == e else ():
                    cells = as_array(cells)
                    least[:, cells] = xp.minimum(least[:, cells], self.lines[e, sign].usual)
            self._known[e] = xp.where(own < least / LESS, least, own)
        return self._known[e]

    def _looked_at(self, e: Offset, start: Tensor, step: Tensor | float, lines: "Lines") -> "Lines":
        """With more points on those that are rough, unless they are many."""
        (rough,) = namespace(lines.w).where(lines.rough.any(0))
        if len(rough) <= max(FEW, MANY * len(start)):
            some = torch.as_tensor(rough)
            length, axis = step[some] if isinstance(step, Tensor) else step, e.index(1)
            drift, d = self._asked(self._places(e, start[some], length, self.fine))
            found = self._lines(drift[..., axis], d[..., axis], length, self.fine)
            for values, finer in zip(lines[:3], found[:3], strict=True):
                values[:, rough] = finer
        return lines

    def _lines(self, drift: Array, d: Array, step: Tensor | float, rule) -> "Lines":
        """Of drift and D at the nodes of a rule along m lines of the length `step`, (P, m n)."""
        nodes, weights, integrals = map(as_array, rule)
        way, d = (values.reshape(len(self.rules), -1, len(nodes)) for values in (drift, d))
        way = way * (as_array(step) if isinstance(step, Tensor) else step)
        xp = namespace(way)
        thin = xp.amax(abs(way), -1) / STEEPEST
        d = xp.maximum(d, thin[..., None] + TINY)
        slope = way / d
        w = slope @ weights
        bent, straight = (xp.exp(-phi) @ weights for phi in (slope @ integrals.T, w[..., None] * nodes))
        usual = 1 / ((1 / d) @ weights)
        lines = Lines(w, xp.clip(bent / straight, 0.5, 2.0), usual, thin, thin, thin > 0)
        if rule is not self.rule:
            return lines
        bend, size = _bend(slope), xp.amax(abs(slope), -1)
        return lines._replace(swing=bend / (1 + size), rough=bend > BENT * size + SMALL)


class Matrix:
    """A full matrix, split into lines by Selling's decomposition; for one rule."""

    def __init__(self, equation: FokkerPlanck, box: Box, rule: Rule, stacklevel: int):
        self.equation, self.box, self.rule = equation, box, rule
        drift, a = self._asked(box.centres)
        self.constant = bool((a == a[:1]).all())
        a = a[:1] if self.constant else a
        floored, share = self._floored(a, drift[: len(a)] / box.spacing)
        if share > 1e-12 and all(weight > 0 for _, weight in rule):  # others are not the noise of the equation
            warnings.warn(
                f"the noise is nearly confined to a line or plane, up to {share:.2g} of its largest eigenvalue was "
                "added in the other directions; more equal cells, or coordinates along the noise, would need less",
                stacklevel=stacklevel + 1,
            )
        self.weights = selling(floored)
        self.offsets = list(self.weights)
        self.inverse = torch.linalg.inv(floored) if self.constant else None

    def _floored(self, a: Tensor, drift: Tensor) -> tuple[Tensor, float]:
        """D in units of cells with its eigenvalues kept from 0, and the largest share that this added."""
        half = a / (2 * self.box.spacing[:, None] * self.box.spacing)
        values, vectors = torch.linalg.eigh(half)
        largest = values[:, -1:]
        least = THINNEST * largest + drift.norm(dim=1, keepdim=True) * (largest <= 0) / STEEPEST + TINY
        if bool((values >= least).all()):
            return half, 0.0
        share = min(1.0, float(((least - values).clamp_min(0) / largest.clamp_min(TINY)).max()))
        return (vectors * torch.maximum(values, least)[:, None]) @ vectors.mT, share

    def between(self, e: Offset, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rho = (self._rho(e, ends[0]) + self._rho(e, ends[1])) / 2
        w, swing = self._line(ends[0], e, 1.0)
        return rho * both_ways(w[None]), w[None], swing[None]

    def leaving(self, e: Offset, sign: int, start: Tensor, fraction: Tensor) -> Tensor:
        w, _ = self._line(start, e, sign * fraction[:, None])
        return self._rho(e, start) * both_ways(w[None])[:, 0] / fraction

    def _asked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Drift (m, d) and covariance (m, d, d)."""
        dim = self.box.dim
        (found,) = mean_coefficients(self.equation, x, [self.rule], full=True)
        return found[:, :dim], found[:, dim:].reshape(-1, dim, dim)

    def _rho(self, e: Offset, cells: Tensor) -> Tensor:
        return self.weights[e].expand(len(cells)) if self.constant else self.weights[e][cells]

    def _line(self, start: Tensor, e: Offset, step: Tensor | float) -> tuple[Tensor, Tensor]:
        """The increase of psi (m,), the integral of D^-1 (f - 1/2 div a) along the line, and how much that swings."""
        nodes, weights, _ = line_rule(POINTS, self.box.device)
        vector = torch.tensor(e, dtype=torch.float64, device=self.box.device)
        x = self.box.along(start, (step * nodes)[..., None] * vector * self.box.spacing)
        flow, a = self._asked(x)
        if self.constant:
            inverse = self.inverse.expand(len(x), -1, -1)
        else:
            for time, weight in self.rule:
                flow = flow - weight / 2 * self.equation.covariance_divergence(x, time).detach()
            inverse = torch.linalg.inv(self._floored(a, flow / self.box.spacing)[0])
        slope = (act(inverse, flow / self.box.spacing) * vector).sum(1).reshape(-1, POINTS)
        slope = slope * step
        return (slope @ weights).clamp(-STEEPEST, STEEPEST), _bend(slope) / (1 + slope.abs().amax(-1))
