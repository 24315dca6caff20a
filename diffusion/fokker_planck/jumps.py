"""The Fokker-Planck equation on a grid as jumps between cells, at rates that fit the exponentials between them.

Along a line the current is J = -D exp(psi) d(p exp(-psi)), psi' = (f - D') / D with D = a / 2, and a current that is
constant from one centre to the next takes p from x_k to x_(k+1) at the rate 1 / (h int exp(psi(x_k) - psi) / D)
(Scharfetter & Gummel 1969; Allen & Southwell 1955). With phi' = f / D this is D_k / (h int exp(phi_k - phi)): D is not
differentiated. Rates of both directions have the ratio exp(psi_(k+1) - psi_k), so that a Gibbs state is stationary, to
rounding; their upwind limit for vanishing noise is |f| / h. Coordinates with noise of their own are lines; a full
matrix is first split into lines by Selling's decomposition.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box, line_rule, off_line
from diffusion.fokker_planck.equation import FokkerPlanck, act
from diffusion.fokker_planck.selling import selling
from diffusion.fokker_planck.stepping import Rule, weighted

POINTS = 4  # of Gauss' rule between two centres
STEEPEST = 700.0  # largest difference of psi between two centres: less noise than that is as good as none
THINNEST = 1e-3  # least ratio of the eigenvalues of a full matrix, in units of cells
TINY = 1e-300
LESS = 30.0  # times less noise at a centre than around it is no noise of the cell

Offset = tuple[int, ...]
Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class Jumps:
    """Rates, per unit of time, out of each cell x of a box.

    Attributes:
        rates: for each offset e: (2, n), from x to x + e and from x + e to x; 0 where x + e is no cell.
        lost: (n,), through absorbing faces.
        way: (d, n), the same times the way from the centre to the face.
        drives: for each offset e: (n,), the increase of phi (of psi, for a full matrix) from x to x + e, or 0.
        swings: (n,), by how much what drives the jumps differs, on the way from one cell to the next, from the nearest
            linear function, next to itself or to the noise of a cell; large where it is not resolved.
    """

    rates: dict[Offset, Tensor]
    lost: Tensor
    way: Tensor
    drives: dict[Offset, Tensor]
    swings: Tensor

    def scaled(self, factor: float) -> "Jumps":
        """All rates times a factor."""
        rates = {e: factor * rates for e, rates in self.rates.items()}
        return Jumps(rates, factor * self.lost, factor * self.way, self.drives, self.swings)


def jumps_at(equation: FokkerPlanck, box: Box, time: Tensor | float, stacklevel: int = 2) -> Jumps:
    """The rates at one time.

    Warns:
        a full matrix is so nearly singular that noise had to be added.
    """
    return mean_jumps(equation, box, [[(time, 1.0)]], stacklevel + 1)[0]


def mean_jumps(equation: FokkerPlanck, box: Box, rules: Sequence[Rule], stacklevel: int = 2) -> list[Jumps]:
    """The rates of drifts and covariances that are weighted means, by each of the rules.

    Warns:
        a full matrix is so nearly singular that noise had to be added.
    """
    if box.dim > 1:
        a = mean_coefficients(equation, box.centres, rules, full=True)[:, :, box.dim :]
        if bool(a.reshape(-1, box.dim, box.dim)[:, ~torch.eye(box.dim, dtype=torch.bool, device=box.device)].any()):
            found = []
            for rule in rules:
                found.extend(_jumps(box, _Matrix(equation, box, rule, stacklevel + 1), 1))
            return found
    return _jumps(box, _Axes(equation, box, rules), len(rules))


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


def _jumps(box: Box, lines: "_Axes | _Matrix", number: int) -> list[Jumps]:
    """Of so many rates that the lines give at once."""
    rates, drives = {}, {}
    lost, way, swings = (box.centres.new_zeros(number, *shape, box.number) for shape in ((), (box.dim,), ()))
    swinging = as_array(swings)  # a view, as all of these
    for e in lines.offsets:
        found = box.neighbours(e)
        start = as_array(found.ends[0])
        rates[e], drives[e] = box.centres.new_zeros(number, 2, box.number), box.centres.new_zeros(number, box.number)
        if len(start):
            both, drive, swing = map(as_array, lines.between(e, found.ends))
            as_array(rates[e])[..., start], as_array(drives[e])[:, start] = both, drive
            swinging[:, start] = namespace(swing).maximum(swinging[:, start], swing)
        for sign in (1, -1) if "absorbing" in box.boundary else ():
            signed = tuple(sign * step for step in e)
            out = box.neighbours(signed)
            if len(out.lost):
                leaving = torch.as_tensor(lines.leaving(e, sign, out.lost, out.fraction))
                lost[:, out.lost] += leaving
                vector = box.spacing * torch.tensor(signed, dtype=torch.float64, device=box.device)
                way[..., out.lost] += vector[:, None] * (leaving * out.fraction)[:, None]
    return [
        Jumps(
            {e: values[k] for e, values in rates.items()},
            lost[k],
            way[k],
            {e: values[k] for e, values in drives.items()},
            swings[k],
        )
        for k in range(number)
    ]


def namespace(array: Tensor | np.ndarray):
    """numpy or torch: functions that both have, under one name, are written once."""
    return np if isinstance(array, np.ndarray) else torch


def as_array(values: Array) -> Array:
    """The same numbers, of numpy on CPUs, which takes less time for each of many small calls; of torch elsewhere."""
    return values.numpy() if isinstance(values, Tensor) and values.device.type == "cpu" else values


def both_ways(w: Array) -> Array:
    """b(-w) and b(w), (P, 2, m), with b(w) = w / (exp(w) - 1), which is 1 at 0, for w (P, m)."""
    xp = namespace(w)
    size = xp.clip(abs(w), TINY, None)
    return (size / xp.expm1(size))[:, None] + xp.clip(xp.stack([w, -w], 1), 0, None)


def _swing(slope: Array) -> Array:
    """By how much slopes (P, m, POINTS) differ from the nearest linear function, next to themselves and 1, (P, m)."""
    xp, off = namespace(slope), off_line(POINTS, getattr(slope, "device", "cpu"))
    return xp.amax(abs(slope @ (off if xp is torch else off.numpy())), -1) / (1 + xp.amax(abs(slope), -1))


class _Lines(NamedTuple):
    """What is known of m lines, (P, m) each.

    Attributes:
        w: the increase of phi.
        correction: the mean of exp(-phi) over that of a straight phi.
        usual: the harmonic mean of D.
        thin: D below which there is as good as no noise.
        swing: see `_swing`.
    """

    w: Array
    correction: Array
    usual: Array
    thin: Array
    swing: Array


class _Axes:
    """Noise of its own along each coordinate, by P rules at once. Lengths are in cells, numbers `as_array`."""

    def __init__(self, equation: FokkerPlanck, box: Box, rules: Sequence[Rule]):
        self.box, dim = box, box.dim
        self.offsets = [tuple(int(i == j) for j in range(dim)) for i in range(dim)]
        self.rule = line_rule(POINTS, box.device)
        ways = []  # of each line: offset, sign or 0, cells, length
        for e in self.offsets:
            ways.append((e, 0, box.neighbours(e).ends[0], 1.0))
            for sign in (1, -1) if "absorbing" in box.boundary else ():
                out = box.neighbours(tuple(sign * step for step in e))
                ways.append((e, sign, out.lost, sign * out.fraction[:, None]))
        places = [
            box.along(start, (step * self.rule[0])[..., None] * box.steps[e.index(1)]) for e, _, start, step in ways
        ]
        found = mean_coefficients(equation, torch.cat([box.centres, *places]), rules, full=False)
        drift, half = as_array(found[:, :, :dim]), as_array(found[:, :, dim:] * (box.per_square / 2))
        self.lines: dict[tuple[Offset, int], _Lines] = {}
        done, own = box.number, half[:, : box.number]
        for e, sign, start, step in ways:
            axis, part = e.index(1), slice(done, done + POINTS * len(start))
            done = part.stop
            d, f = (values[:, part, axis].reshape(len(rules), -1, POINTS) for values in (half, drift))
            way = f * ((as_array(step) if sign else 1.0) / box.widths[axis])
            self.lines[e, sign] = self._lines(way, d)
        self.half = [self._own(e, own[..., e.index(1)], ways) for e in self.offsets]

    def between(self, e: Offset, ends: Tensor) -> tuple[Array, Array, Array]:
        """Both rates (P, 2, m) of the lines from one cell to another, (2, m), w (P, m), and how much each swings."""
        line = self.lines[e, 0]
        return self._noise(e, line, ends, 1) * both_ways(line.w) / line.correction[:, None], line.w, line.swing

    def leaving(self, e: Offset, sign: int, start: Tensor, fraction: Tensor) -> Array:
        """The rate (P, m) from the cells to the face that is the `fraction` of a cell away, along `sign` e."""
        line = self.lines[e, sign]
        return self._noise(e, line, start, 0) * both_ways(line.w)[:, 0] / (line.correction * as_array(fraction))

    def _noise(self, e: Offset, line: "_Lines", cells: Tensor, dim: int) -> Array:
        """D in the cells at the ends of lines; that of the lines where it is as good as none and theirs is not."""
        own = self.half[e.index(1)][:, as_array(cells)]
        usual, thin = (values[:, None] if dim else values for values in (line.usual, line.thin))
        return namespace(own).where(own < namespace(own).minimum(thin, usual / LESS), usual, own)

    def _own(self, e: Offset, own: Array, ways: list) -> Array:
        """D (P, n) at the centres; where it is next to 0 there but not on either side, the less of these."""
        xp, least = namespace(own), own * 0 + math.inf
        for other, sign, start, _ in ways:
            if other == e:
                usual = self.lines[e, sign].usual
                for cells in self.box.neighbours(e).ends if sign == 0 else (start,):
                    cells = as_array(cells)
                    least[:, cells] = xp.minimum(least[:, cells], usual)
        return xp.where(own < least / LESS, least, own)

    def _lines(self, way: Array, d: Array) -> "_Lines":
        """Of what drives along lines, in cells, and D there, both (P, m, POINTS)."""
        nodes, weights, integrals = map(as_array, self.rule)
        xp = namespace(way)
        thin = xp.amax(abs(way), -1) / STEEPEST
        d = xp.maximum(d, thin[..., None] + TINY)
        slope = way / d
        w = slope @ weights
        bent, straight = (xp.exp(-phi) @ weights for phi in (slope @ integrals.T, w[..., None] * nodes))
        return _Lines(w, xp.clip(bent / straight, 0.5, 2.0), 1 / ((1 / d) @ weights), thin, _swing(slope))


class _Matrix:
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
        return ((slope * step) @ weights).clamp(-STEEPEST, STEEPEST), _swing(slope * step)
