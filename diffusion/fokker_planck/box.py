"""A box cut into equal cells, and which cell a jump leads to: the geometry of the grid solver."""

import math
import operator
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from diffusion.errors import UserError

BOUNDARIES = ("reflecting", "absorbing", "periodic")
USUAL_CELLS = {1: 256, 2: 128, 3: 48}
START_POINTS = {1: 4, 2: 3, 3: 2}  # Gauss points an axis, for the cell averages of a law
AT_ONCE = 1_000_000  # points
CELLS_HOLD = 1e-7  # by which the mass of a law may differ from 1 before more points are taken


class Neighbours(NamedTuple):
    """Where the jump by one offset leads from each cell.

    Attributes:
        ends: (2, m), indices of the cells from which it leads to a cell, and of those.
        target: (n,), the index of the cell that it leads to; the cell itself where there is none.
        shifts: the differences of the indices that occur, each with the cells (n,) where it does.
        lost: indices of the cells where it leads through an absorbing face.
        fraction: of the jump, up to the face, for those.
    """

    ends: Tensor
    target: Tensor
    shifts: list[tuple[int, Tensor]]
    lost: Tensor
    fraction: Tensor


class Box:
    """Cells of equal size, numbered along the last coordinate first.

    Args:
        domain: (low, high) of each coordinate.
        cells: for each coordinate, or one number for all.
        boundary: "reflecting", "absorbing" or "periodic", for each coordinate or one for all.

    Raises:
        UserError: more than three coordinates, an empty domain, fewer than 3 cells, an unknown boundary.
    """

    def __init__(
        self,
        domain: Sequence[tuple[float, float]],
        cells: int | Sequence[int] | None = None,
        boundary: str | Sequence[str] = "reflecting",
        device: torch.device | str | None = None,
    ):
        try:
            self.domain = tuple((float(low), float(high)) for low, high in domain)
        except (TypeError, ValueError):
            raise UserError(f"the domain is {domain!r}, expected (low, high) of each coordinate") from None
        self.dim = len(self.domain)
        if self.dim not in USUAL_CELLS:
            raise UserError(f"the domain has {self.dim} coordinates, a grid is for 1, 2 or 3; use particles beyond")
        for low, high in self.domain:
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise UserError(f"the domain has the interval ({low}, {high}), expected finite low < high")
        cells = USUAL_CELLS[self.dim] if cells is None else cells
        counts = cells if isinstance(cells, Sequence | np.ndarray | Tensor) else (cells,) * self.dim
        try:
            self.cells = tuple(map(operator.index, counts))
        except TypeError:
            raise UserError(f"cells is {cells!r}, expected whole numbers") from None
        if len(self.cells) != self.dim or min(self.cells) < 3:
            raise UserError(f"cells is {cells}, expected at least 3 for each of the {self.dim} coordinates")
        several = isinstance(boundary, Sequence) and not isinstance(boundary, str)
        self.boundary = tuple(boundary) if several else (boundary,) * self.dim
        if len(self.boundary) != self.dim or any(word not in BOUNDARIES for word in self.boundary):
            raise UserError(
                f"boundary is {boundary!r}, expected one of {', '.join(BOUNDARIES)}, for all or each of the "
                f"{self.dim} coordinates"
            )
        try:
            self.device = torch.device(device or "cpu")
        except (RuntimeError, TypeError):
            raise UserError(f"device is {device!r}, expected one such as 'cpu' or 'cuda'") from None
        self.number = math.prod(self.cells)
        self.widths = tuple((high - low) / n for (low, high), n in zip(self.domain, self.cells, strict=True))
        self.volume = math.prod(self.widths)

    def _tensor(self, values) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float64, device=self.device)

    @cached_property
    def spacing(self) -> Tensor:
        """(d,)."""
        return self._tensor(self.widths)

    @cached_property
    def per_square(self) -> Tensor:
        """(d,), of a cell along each coordinate."""
        return self._tensor([h**-2 for h in self.widths])

    @cached_property
    def steps(self) -> Tensor:
        """(d, d), to the next cell along each coordinate."""
        return self.spacing.diag()

    @cached_property
    def axes(self) -> tuple[Tensor, ...]:
        """The centres along each coordinate."""
        return tuple(
            self._tensor(low + h * (np.arange(n) + 0.5))
            for (low, _), h, n in zip(self.domain, self.widths, self.cells, strict=True)
        )

    @cached_property
    def centres(self) -> Tensor:
        """(n, d)."""
        return torch.cartesian_prod(*self.axes).reshape(-1, self.dim)

    @property
    def walls(self) -> Tensor:
        """(n,), how many reflecting faces each cell has."""
        return _walls(self.cells, self.boundary, self.device)

    def wrapped(self, x: Tensor) -> Tensor:
        """Points (..., d), those beyond a periodic face moved to where they come in again."""
        if "periodic" not in self.boundary:
            return x
        low, high = self._tensor(self.domain).T
        periodic = torch.tensor([word == "periodic" for word in self.boundary], device=self.device)
        return torch.where(periodic, low + torch.remainder(x - low, high - low), x)

    def along(self, cells: Tensor, steps: Tensor) -> Tensor:
        """Points (m P, d) away from the centres of m cells by `steps` (P, d), or (m, P, d)."""
        return self.wrapped(self.centres.index_select(0, cells)[:, None] + steps).reshape(-1, self.dim)

    def densities(self, log_prob) -> Tensor:
        """exp(log_prob(x)) (n,) at the centres, or the means over the cells, if the mass of these is another."""
        values = log_prob(self.centres).detach().to(self.centres).exp()
        mass = float(values.sum()) * self.volume
        if abs(mass - 1) < CELLS_HOLD:
            return values
        means = self.averages(log_prob)
        return values if abs(mass - float(means.sum()) * self.volume) < CELLS_HOLD else means

    def averages(self, log_prob) -> Tensor:
        """Means (n,) over the cells of the density exp(log_prob(x)), by Gauss and Legendre's rule."""
        total = self._averages(log_prob, START_POINTS[self.dim])
        if self.dim == 3 and not abs(float(total.sum()) * self.volume - 1) < CELLS_HOLD:  # perhaps for want of points
            total = self._averages(log_prob, 2 * START_POINTS[self.dim])
        return total

    def _averages(self, log_prob, points: int) -> Tensor:
        places, shares = cell_rule(self.dim, points, self.device)
        steps, many, total = self.spacing * places, max(1, AT_ONCE // self.number), 0.0
        for k in range(0, len(shares), many):
            x = (self.centres + steps[k : k + many, None]).reshape(-1, self.dim)
            values = log_prob(x).detach().to(shares).exp()
            total = total + shares[k : k + many] @ values.reshape(-1, self.number)
        return total

    def neighbours(self, offset: tuple[int, ...]) -> Neighbours:
        """Where the jump by `offset`, a whole number of cells along each coordinate, leads."""
        return _neighbours(offset, self.cells, self.boundary, self.device)


@lru_cache(maxsize=16)
def _walls(cells: tuple[int, ...], boundary: tuple[str, ...], device: torch.device) -> Tensor:
    """(n,), how many reflecting faces each cell has."""
    faces = np.zeros(cells)
    for axis, word in enumerate(boundary):
        if word == "reflecting":
            faces.swapaxes(axis, 0)[:: cells[axis] - 1] += 1
    return torch.from_numpy(faces.reshape(-1)).to(device)


@lru_cache(maxsize=64)
def _neighbours(
    offset: tuple[int, ...], cells: tuple[int, ...], boundary: tuple[str, ...], device: torch.device
) -> Neighbours:
    number = math.prod(cells)
    target = index = np.arange(number)
    inside = np.ones(number, bool)
    lost = np.zeros(number, bool)
    first = np.full(number, math.inf)  # share of the jump, to the face that is crossed
    behind = number
    for step, n, word in zip(offset, cells, boundary, strict=True):
        behind //= n
        if step == 0:
            continue
        place = index // behind % n
        there = place + step
        if word == "periodic":
            there = there % n
        else:
            beyond = there >= n if step > 0 else there < 0
            inside &= ~beyond
            if "absorbing" in boundary:
                gap = (n - 0.5 - place) / step if step > 0 else (place + 0.5) / -step
                nearer = beyond & (gap < first)
                first[nearer], lost[nearer] = gap[nearer], word == "absorbing"
        target = target + (there - place) * behind
    target = np.where(inside, target, index)
    by = target - index
    shifts = np.unique(by[inside]) if "periodic" in boundary else by[inside][:1]
    start = np.flatnonzero(inside)

    def moved(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Neighbours(
        moved(np.array([start, target[start]])),
        moved(target),
        [(int(s), moved(inside & (by == s))) for s in shifts if s != 0],
        moved(np.flatnonzero(lost)),
        moved(first[lost]),
    )


@lru_cache
def gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss and Legendre's nodes and weights on [-1, 1]."""
    return leggauss(points)


@lru_cache
def cell_rule(dim: int, points: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Nodes (N, d) in [-1/2, 1/2]^d and weights (N,) of means over a cell, with so many points along each axis."""
    nodes, weights = (torch.from_numpy(v).to(device) / 2 for v in gauss(points))
    places = torch.cartesian_prod(*[nodes] * dim).reshape(-1, dim)
    return places, torch.cartesian_prod(*[weights] * dim).reshape(len(places), -1).prod(1)


@lru_cache
def line_rule(points: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Gauss and Legendre's nodes and weights on [0, 1], and the matrix of integrals from 0 to each node.

    The entry (q, r) is the integral from 0 to node q of the polynomial that is 1 at node r and 0 at the others.
    """
    nodes, weights = (torch.from_numpy(v) for v in gauss(points))
    nodes, weights = (nodes + 1) / 2, weights / 2
    powers = torch.arange(points, dtype=torch.float64)
    values = nodes[:, None] ** powers
    integrals = nodes[:, None] ** (powers + 1) / (powers + 1)
    integrals = torch.linalg.solve(values, integrals, left=False)
    return nodes.to(device), weights.to(device), integrals.to(device)


@lru_cache
def split_rule(points: int, parts: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """`line_rule` in each of so many equal parts."""
    nodes, weights, integrals = line_rule(points, device)
    eye = torch.eye(parts, dtype=torch.float64, device=device)
    before = torch.kron(torch.ones_like(eye).tril(-1), weights.expand(points, -1))
    places = (torch.arange(parts, device=device)[:, None] + nodes).reshape(-1) / parts
    return places, weights.repeat(parts) / parts, (torch.kron(eye, integrals) + before) / parts


@lru_cache
def off_line(points: int, device: torch.device | str = "cpu") -> Tensor:
    """The matrix that leaves of values (m, points) at the nodes of `line_rule` what no linear function has."""
    nodes = line_rule(points, device)[0]
    basis, _ = torch.linalg.qr(torch.stack([torch.ones_like(nodes), nodes], 1))
    return torch.eye(points, dtype=torch.float64, device=device) - basis @ basis.mT
