"""Products of bases in one, two and three coordinates: every map acts on one axis at a time."""

import math
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Basis

CHUNK = 1 << 22  # numbers held at once where the functions are evaluated at many points


def along(matrix: Tensor, values: Tensor, axis: int) -> Tensor:
    """The product of a matrix (M, N) with the axis `axis` of `values` (B, N_1, ..., N_d), counted from 0 after B."""
    shape = values.shape
    before, size = math.prod(shape[: axis + 1]), shape[axis + 1]
    new = (*shape[: axis + 1], len(matrix), *shape[axis + 2 :])
    if axis + 2 == len(shape):
        return (values.reshape(before, size) @ matrix.mT).reshape(new)
    return (matrix @ values.reshape(before, size, -1)).reshape(new)


def total_degree(bases: Sequence[Basis]) -> Tensor:
    """The modes of a sparse product, a mask (N_1, ..., N_d): degrees with sum_i k_i / K_i <= 1, K_i the highest."""
    return sum(_axes([b.degrees / max(1, int(b.degrees[-1])) for b in bases])) <= 1 + 1e-12


def hyperbolic_cross(bases: Sequence[Basis]) -> Tensor:
    """The modes of a sparse product, a mask (N_1, ..., N_d): degrees with prod_i (k_i + 1) <= the highest K_i + 1.

    N log(N)^(d-1) of them, for densities with bounded mixed derivatives (Zenger 1991).
    """
    most = max(int(b.degrees[-1]) for b in bases) + 1
    return math.prod(_axes([b.degrees + 1 for b in bases])) <= most


def _axes(vectors: list[Tensor]) -> list[Tensor]:
    return [v.reshape([-1 if j == i else 1 for j in range(len(vectors))]) for i, v in enumerate(vectors)]


class Product:
    """The product of one basis for each coordinate, or a part of its modes.

    A function is held by its numbers at the nodes (n,), in rows (B, n), or where there is a mask by the coefficients
    of the modes in it: its *state*.

    Args:
        bases: of the d coordinates.
        keep: mask (N_1, ..., N_d) of the modes to keep, from `total_degree` or `hyperbolic_cross`; all unless given.

    Attributes:
        shape: (N_1, ..., N_d).
        points: the nodes (n, d).
        roots: root of the weight of each node (n,).
        derivatives: the derivative along each axis, of numbers at the nodes, (N_i, N_i).
    """

    def __init__(self, bases: Sequence[Basis], keep: Tensor | None = None, device: torch.device | str | None = None):
        bases = tuple(bases) if isinstance(bases, Iterable) else (bases,)
        self.bases, self.device = bases, device
        if not 1 <= len(bases) <= 3 or not all(isinstance(basis, Basis) for basis in bases):
            raise UserError(
                f"bases are {list(bases)!r}, expected one of Hermite, Fourier, Legendre for 1 to 3 coordinates"
            )
        self.shape = tuple(basis.order for basis in self.bases)
        rules = [basis.rule() for basis in self.bases]
        self.nodes = tuple(rule.nodes.to(device) for rule in rules)
        self.modes = [rule.modes.to(device) for rule in rules]
        self.derivatives = [rule.derivative.to(device) for rule in rules]
        self.points = torch.stack(torch.meshgrid(*self.nodes, indexing="ij"), -1).reshape(-1, len(self.bases))
        self.roots = reduce(lambda a, b: (a[:, None] * b).reshape(-1), [rule.roots.to(device) for rule in rules])
        if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != self.shape):
            raise UserError(f"keep is {keep.dtype} {tuple(keep.shape)}, expected a mask (bool) of shape {self.shape}")
        if keep is not None and not bool(keep.reshape(-1)[0]):
            raise UserError("keep leaves out the first mode, expected it kept: it holds the mass")
        self.keep = None if keep is None else keep.to(device)

    @property
    def dim(self) -> int:
        return len(self.bases)

    @property
    def size(self) -> int:
        """Unknowns of a state."""
        return math.prod(self.shape) if self.keep is None else int(self.keep.sum())

    def numbers(self, state: Tensor) -> Tensor:
        """Those at the nodes (B, N_1, ..., N_d), of states (B, size)."""
        if self.keep is None:
            return state.reshape(-1, *self.shape)
        return self.from_modes(self.coefficients(state))

    def state(self, numbers: Tensor) -> Tensor:
        """(B, size), of numbers at the nodes: for a part of the modes, the projection on it."""
        if self.keep is None:
            return numbers.reshape(len(numbers), -1)
        return self.to_modes(numbers)[:, self.keep]

    def coefficients(self, state: Tensor) -> Tensor:
        """(B, N_1, ..., N_d), of states (B, size)."""
        if self.keep is None:
            return self.to_modes(self.numbers(state))
        coefficients = state.new_zeros(len(state), *self.shape)
        coefficients[:, self.keep] = state
        return coefficients

    def to_modes(self, numbers: Tensor) -> Tensor:
        for axis, modes in enumerate(self.modes):
            numbers = along(modes.mT, numbers, axis)
        return numbers

    def from_modes(self, coefficients: Tensor) -> Tensor:
        for axis, modes in enumerate(self.modes):
            coefficients = along(modes, coefficients, axis)
        return coefficients

    def log_tilt(self, x: Tensor) -> Tensor:
        """Log of the product of the tilts (M,), at `x` (M, d)."""
        return sum(basis.log_tilt(x[:, i]) for i, basis in enumerate(self.bases))

    def tilt_slope(self, x: Tensor) -> Tensor:
        """Its gradient (M, d)."""
        return torch.stack([basis.tilt_slope(x[:, i]) for i, basis in enumerate(self.bases)], 1)

    def holds(self, x: Tensor) -> Tensor:
        """Whether the points (M, d) are in the domain."""
        return torch.stack([basis.holds(x[:, i]) for i, basis in enumerate(self.bases)], 1).all(1)

    def evaluate(self, coefficients: Tensor, x: Tensor) -> Tensor:
        """sum_k c_k phi_k(x), (M,), of coefficients (N_1, ..., N_d) at `x` (M, d)."""
        rows = max(1, CHUNK // math.prod(self.shape[1:]))
        return torch.cat([self._evaluate(coefficients, part) for part in x.split(rows)])

    def _evaluate(self, coefficients: Tensor, x: Tensor) -> Tensor:
        total = self.bases[0].functions(x[:, 0]) @ coefficients.reshape(self.shape[0], -1)
        for i, basis in enumerate(self.bases[1:], 1):
            total = torch.einsum("mk,mkr->mr", basis.functions(x[:, i]), total.reshape(len(x), basis.order, -1))
        return total[:, 0]

    def moments(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Means and their standard errors (N_1, ..., N_d), of phi_k(x) times `weights` (M,), over samples (M, d)."""
        total, squares = 0, 0
        rows = max(1, CHUNK // math.prod(self.shape[:-1]))
        for part, weight in zip(x.split(rows), weights.split(rows), strict=True):
            rest, last = weight[:, None], self.bases[-1].functions(part[:, -1])
            for i, basis in enumerate(self.bases[:-1]):
                rest = (rest[:, :, None] * basis.functions(part[:, i])[:, None]).reshape(len(part), -1)
            total, squares = total + rest.mT @ last, squares + rest.square().mT @ last.square()
        mean = (total / len(x)).reshape(self.shape)
        spread = (squares / len(x)).reshape(self.shape) - mean.square()
        return mean, (spread.clamp_min(0) / max(1, len(x) - 1)).sqrt()
