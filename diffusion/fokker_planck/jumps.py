"""The Fokker-Planck equation on a grid as jumps between cells, at rates that fit the exponentials between them.

Along a line the current is J = -D exp(psi) d(p exp(-psi)), psi' = (f - D') / D with D = a / 2, and a current that is
constant from one centre to the next takes p from x_k to x_(k+1) at the rate 1 / (h int exp(psi(x_k) - psi) / D)
(Scharfetter & Gummel 1969; Allen & Southwell 1955). With phi' = f / D this is D_k / (h int exp(phi_k - phi)): D is not
differentiated. Rates of both directions have the ratio exp(psi_(k+1) - psi_k), so that a Gibbs state is stationary, to
rounding; their upwind limit for vanishing noise is |f| / h. Coordinates with noise of their own are lines; a full
matrix is first split into lines by Selling's decomposition.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.fokker_planck.box import Box, line_rule, off_line
from diffusion.fokker_planck.equation import FokkerPlanck, act
from diffusion.fokker_planck.selling import selling

POINTS = 4  # of Gauss' rule between two centres
STEEPEST = 700.0  # largest difference of psi between two centres: less noise than that is as good as none
THINNEST = 1e-3  # least ratio of the eigenvalues of a full matrix, in units of cells
TINY = 1e-300

Offset = tuple[int, ...]


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


def mean_jumps(weights: Sequence[float], parts: Sequence[Jumps]) -> Jumps:
    """The weighted sum."""
    if len(parts) == 1:
        return parts[0]
    rates: dict[Offset, Tensor] = {}
    drives: dict[Offset, Tensor] = {}
    for weight, part in zip(weights, parts, strict=True):
        for total, values in ((rates, part.rates), (drives, part.drives)):
            for e, value in values.items():
                total[e] = total[e] + weight * value if e in total else weight * value
    lost = sum(weight * part.lost for weight, part in zip(weights, parts, strict=True))
    way = sum(weight * part.way for weight, part in zip(weights, parts, strict=True))
    return Jumps(rates, lost, way, drives, torch.stack([part.swings for part in parts]).amax(0))


def jumps_at(equation: FokkerPlanck, box: Box, time: Tensor | float, stacklevel: int = 2) -> Jumps:
    """The rates at one time.

    Warns:
        a full matrix is so nearly singular that noise had to be added.
    """
    a = equation.covariance(box.centres, time)
    if a.dim() == 3 and not bool((a - torch.diag_embed(a.diagonal(dim1=1, dim2=2))).any()):
        a = a.diagonal(dim1=1, dim2=2)
    lines = _Matrix(equation, box, time, a, stacklevel + 1) if a.dim() == 3 else _Axes(equation, box, time, a)
    rates: dict[Offset, Tensor] = {}
    drives: dict[Offset, Tensor] = {}
    lost = torch.zeros(box.number, dtype=torch.float64, device=box.device)
    way = torch.zeros(box.dim, box.number, dtype=torch.float64, device=box.device)
    swings = torch.zeros(box.number, dtype=torch.float64, device=box.device)
    for e in lines.offsets:
        found = box.neighbours(e)
        rates[e] = torch.zeros(2, box.number, dtype=torch.float64, device=box.device)
        drives[e] = torch.zeros(box.number, dtype=torch.float64, device=box.device)
        if found.ends.numel():
            both, drive, swing = lines.between(e, found.ends)
            rates[e].index_copy_(1, found.ends[0], both.detach())
            drives[e][found.ends[0]] = drive.detach()
            swings[found.ends[0]] = torch.maximum(swings[found.ends[0]], swing.detach())
        for sign in (1, -1) if "absorbing" in box.boundary else ():
            signed = tuple(sign * step for step in e)
            out = box.neighbours(signed)
            if len(out.lost):
                leaving = lines.leaving(e, sign, out.lost, out.fraction).detach()
                lost[out.lost] += leaving
                vector = box.spacing * torch.tensor(signed, dtype=torch.float64, device=box.device)
                way[:, out.lost] += vector[:, None] * (leaving * out.fraction)
    return Jumps(rates, lost, way, drives, swings)


def both_ways(w: Tensor) -> Tensor:
    """b(-w) and b(w), (2, m), with b(w) = w / (exp(w) - 1), which is 1 at 0."""
    size = w.abs().clamp_min(TINY)
    return size / torch.expm1(size) + torch.stack([w, -w]).clamp_min(0)


def _swing(slope: Tensor) -> Tensor:
    """By how much slopes (m, POINTS) differ from the nearest linear function, next to themselves and 1, (m,)."""
    return (slope @ off_line(POINTS, slope.device)).abs().amax(1) / (1 + slope.abs().amax(1))


class _Axes:
    """Noise of its own along each coordinate: `a` is (n,) or (n, d). Lengths are in cells."""

    def __init__(self, equation: FokkerPlanck, box: Box, time: float, a: Tensor):
        self.equation, self.box, self.time = equation, box, time
        self.half_per_square = box.per_square / 2
        self.half = self._half(a)
        self.offsets = [tuple(int(i == j) for j in range(box.dim)) for i in range(box.dim)]

    def between(self, e: Offset, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both rates (2, m) of the lines from one cell to another, (2, m), w, and by how much each swings (m,)."""
        axis = e.index(1)
        w, correction, usual, swing = self._line(ends[0], axis, 1.0)
        return self._own(ends, axis, usual) * both_ways(w) / correction, w, swing

    def leaving(self, e: Offset, sign: int, start: Tensor, fraction: Tensor) -> Tensor:
        """The rate (m,) from the cells to the face that is the `fraction` of a cell away, along `sign` e."""
        axis = e.index(1)
        w, correction, usual, _ = self._line(start, axis, sign * fraction[:, None])
        return self._own(start, axis, usual) * both_ways(w)[0] / (correction * fraction)

    def _own(self, cells: Tensor, axis: int, usual: Tensor) -> Tensor:
        """D in the cells; where it vanishes, for instance because the noise is 0 in a point, that of the line."""
        own = self.half[cells, axis]
        return torch.where(own < usual / 30, usual, own)

    def _line(self, start: Tensor, axis: int, step: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The increase of phi, the mean of exp(-phi) over that of a straight phi, the harmonic mean of D, the swing."""
        nodes, weights, integrals = line_rule(POINTS, self.box.device)
        x = self.box.along(start, (step * nodes)[..., None] * self.box.steps[axis])
        d = self._half(self.equation.covariance(x, self.time))[:, axis].reshape(-1, POINTS)
        way = self.equation.drift(x, self.time)[:, axis].reshape(-1, POINTS) * (step / self.box.widths[axis])
        d = torch.maximum(d, way.abs().amax(1, keepdim=True) / STEEPEST + TINY)
        slope = way / d
        w = slope @ weights
        phi = torch.stack([slope @ integrals.T, torch.outer(w, nodes)])
        bent, straight = (phi.neg().exp() @ weights).unbind()
        return w, (bent / straight).clamp(0.5, 2.0), (d.reciprocal() @ weights).reciprocal(), _swing(slope)

    def _half(self, a: Tensor) -> Tensor:
        """D (m, d) of a covariance."""
        a = a.diagonal(dim1=1, dim2=2) if a.dim() == 3 else a
        return a.reshape(len(a), -1) * self.half_per_square


class _Matrix:
    """A full matrix `a` (n, d, d), split into lines by Selling's decomposition."""

    def __init__(self, equation: FokkerPlanck, box: Box, time: float, a: Tensor, stacklevel: int):
        self.equation, self.box, self.time = equation, box, time
        self.constant = bool((a == a[:1]).all())
        a = a[:1] if self.constant else a
        here = box.centres[: len(a)]
        floored, share = self._floored(a, equation.drift(here, time) / box.spacing)
        if share > 1e-12:
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
        return rho * both_ways(w), w, swing

    def leaving(self, e: Offset, sign: int, start: Tensor, fraction: Tensor) -> Tensor:
        return self._rho(e, start) * both_ways(self._line(start, e, sign * fraction[:, None])[0])[0] / fraction

    def _rho(self, e: Offset, cells: Tensor) -> Tensor:
        return self.weights[e].expand(len(cells)) if self.constant else self.weights[e][cells]

    def _line(self, start: Tensor, e: Offset, step: Tensor | float) -> tuple[Tensor, Tensor]:
        """The increase of psi (m,), the integral of D^-1 (f - 1/2 div a) along the line, and how much that swings."""
        nodes, weights, _ = line_rule(POINTS, self.box.device)
        vector = torch.tensor(e, dtype=torch.float64, device=self.box.device)
        x = self.box.along(start, (step * nodes)[..., None] * vector * self.box.spacing)
        flow = self.equation.drift(x, self.time)
        if self.constant:
            inverse = self.inverse.expand(len(x), -1, -1)
        else:
            flow = flow - self.equation.covariance_divergence(x, self.time) / 2
            inverse = torch.linalg.inv(
                self._floored(self.equation.covariance(x, self.time), flow / self.box.spacing)[0]
            )
        slope = (act(inverse, flow / self.box.spacing) * vector).sum(1).reshape(-1, POINTS)
        return ((slope * step) @ weights).clamp(-STEEPEST, STEEPEST), _swing(slope * step)
