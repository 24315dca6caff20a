"""What the Galerkin solver returns."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import MOST, Legendre
from diffusion.fokker_planck.evolution import Evolution
from diffusion.fokker_planck.observables import BEYOND
from diffusion.fokker_planck.products import Product, along
from diffusion.fokker_planck.weak_form import Tilt

COARSE = 1e-4  # L1 size of the last coefficients above which the expansion has not decayed
AT_ENDS = 1e-4  # density times length at the ends of a period that the equation does not have
SWING = 0.01  # share of what drives the density, by which it may be missed between nodes
LOOKED_AT = 32  # places
BEYOND_BY_SAMPLES = 0.1  # where the start is of samples, which are never so smooth
TINY = 1e-300


class Expansion(NamedTuple):
    """p = chi (s chi + sum_k c_k phi_k): a product of bases and log chi, points (M, d) -> (M,)."""

    product: Product
    log_chi: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GalerkinSolution:
    """Densities at K times.

    Attributes:
        times: (K,).
        coefficients: c of p = chi (s chi + sum_k c_k phi_k), (K, N_1, ..., N_d).
        steady: s, the weight of the stationary state; 0 but in the symmetrised form.
        nodes: of each axis (N_i,).
        weights: of the nodes (N_1, ..., N_d): integrals over the domain.
        values: densities at the nodes, (K, N_1, ..., N_d).
        mass_error: |mass - 1|, (K,).
        most_negative: the least density at the nodes where that is negative, otherwise 0, (K,).
        truncation: L1 size of the density's part in the last eighth of the degrees along each axis, or as near to what
            a sparse product leaves out, (K, d).
        at_ends: the density at the ends of each axis, over the others, times the length (K, d); in the symmetrised form
            that of p / chi.
        standard_errors: of the coefficients at the first time, where they come from samples.
        steps, error: in time, see `Evolution`.
        expansion: what the coefficients are of.
    """

    times: tuple[float, ...]
    coefficients: Tensor
    steady: float
    nodes: tuple[Tensor, ...]
    weights: Tensor
    values: Tensor
    mass_error: Tensor
    most_negative: Tensor
    truncation: Tensor
    at_ends: Tensor
    standard_errors: Tensor | None
    steps: int
    error: float
    expansion: Expansion

    @classmethod
    def of(
        cls,
        expansion: Expansion,
        tilt: Tilt,
        times: Sequence[float],
        evolution: Evolution,
        steady: float,
        errors: Tensor | None,
    ) -> "GalerkinSolution":
        """From the states (K, 1, size) of an evolution."""
        product, states = expansion.product, evolution.states[:, 0]
        chi = tilt.log.exp()
        numbers = product.numbers(states).reshape(len(states), -1) + steady * chi * product.roots
        coefficients = product.coefficients(states)
        values = (numbers * chi / product.roots).reshape(-1, *product.shape)
        if tilt.symmetrised:  # of p and not of p / chi, which is largest where p is negligible
            truncation = _tails(product, product.to_modes((numbers * chi).reshape(values.shape)), product.roots)
            u = numbers
        else:
            truncation = _tails(product, coefficients, chi * product.roots)
            u = numbers * chi
        return cls(
            times=tuple(times),
            coefficients=coefficients,
            steady=steady,
            nodes=product.nodes,
            weights=product.roots.square().reshape(product.shape),
            values=values,
            mass_error=(numbers @ (chi * product.roots) - 1).abs(),
            most_negative=values.reshape(len(states), -1).amin(1).clamp_max(0),
            truncation=truncation,
            at_ends=_ends(product, (u * product.roots).reshape(values.shape)),
            standard_errors=errors,
            steps=evolution.steps,
            error=evolution.error,
            expansion=expansion,
        )

    def density(self, x: Tensor, k: int = -1) -> Tensor:
        """p (M,) at the points `x` (M, d) and the time of number k; 0 outside the domain."""
        product = self.expansion.product
        if x.dim() != 2 or x.shape[1] != product.dim:
            raise UserError(f"points have shape {tuple(x.shape)}, expected (M, {product.dim})")
        x, (log_chi, coefficients) = x.to(self.values), self._between_nodes
        return torch.where(product.holds(x), log_chi(x).exp() * product.evaluate(coefficients[k], x), 0.0)

    @cached_property
    def _between_nodes(self) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """log chi and c of p = chi sum_k c_k phi_k, for places between the nodes.

        In the symmetrised form chi is the plain one, not sqrt(pi): p / sqrt(pi) may be so large where p is next to
        nothing that its expansion is of use at the nodes alone.
        """
        product = self.expansion.product
        if not self.steady:
            return self.expansion.log_chi, self.coefficients
        roots = product.roots * (-product.log_tilt(product.points)).exp()
        return product.log_tilt, product.to_modes(self.values * roots.reshape(product.shape))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means (K, d) and covariances (K, d, d), by the weights of the nodes."""
        points = self.expansion.product.points
        share = self.values.reshape(len(self.values), -1) * self.weights.reshape(-1)
        mean = share @ points
        second = torch.einsum("kn,ni,nj->kij", share, points, points)
        return mean, second - mean[:, :, None] * mean[:, None]

    def positive(self) -> "PositiveDensity":
        """The densities with what is negative cut off, scaled to mass 1.

        With negative mass m the change is m + m in L1: cut off, and taken from the rest. Masses are by the rule of
        bases of twice the order.
        """
        product = self.expansion.product
        fine = Product([b.of_order(min(2 * b.order, MOST - 1)) for b in product.bases], device=self.values.device)
        log_chi, numbers = self._between_nodes
        for axis, (basis, nodes) in enumerate(zip(product.bases, fine.nodes, strict=True)):
            numbers = along(basis.functions(nodes), numbers, axis)
        values = log_chi(fine.points).exp() * numbers.reshape(len(numbers), -1)
        weights = fine.roots.square()
        return PositiveDensity(self, values.clamp_min(0) @ weights, (-values).clamp_min(0) @ weights)

    def warn_where_coarse(self, cut: Sequence[int] = ()) -> None:
        """Warns where the coefficients have not decayed, or a density reaches the ends of an axis of `cut`."""
        known = self.truncation[1:] if self.standard_errors is not None else self.truncation
        if known.numel() and not float(known.max()) <= COARSE:
            k, axis = divmod(int(known.argmax()), known.shape[1])
            time = self.times[k + len(self.times) - len(known)]
            warnings.warn(
                f"the expansion has not decayed: at t={time:.4g} the last eighth of the degrees of axis {axis} still "
                f"carries {float(known.max()):.2g} (L1), expected below {COARSE:.2g}; take more functions, or a basis "
                "that is nearer to the density",
                stacklevel=3,
            )
        for axis in cut:
            basis = self.expansion.product.bases[axis]
            share = float(self.at_ends[1 if self.steady else 0 :, axis].amax()) if len(self.times) > 1 else 0.0
            if share > AT_ENDS:
                warnings.warn(
                    f"drift or covariance differ at the ends of axis {axis}, from {basis.low} to {basis.high}, which "
                    f"are the same point to Fourier functions, and what is expanded, times the length, is "
                    f"{share:.2g} there, expected below {AT_ENDS:.2g}; take a wider domain, or Legendre functions",
                    stacklevel=3,
                )

    def warn_of_swings(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Warns where a function of points, times the last density, is not what is expanded from its values at nodes.

        It is looked at half-way between nodes, next to those with the most mass.

        Args:
            function: (M, d) -> (M, m).
        """
        product, values = self.expansion.product, self.values[-1].reshape(-1)
        masses = (values * self.weights.reshape(-1)).abs()
        most = masses.topk(min(LOOKED_AT, len(masses))).indices
        places = torch.unravel_index(most, product.shape)
        halves = [(nodes[:-1] + nodes[1:]) / 2 for nodes in product.nodes]
        x = torch.stack([half[i.clamp_max(len(half) - 1)] for half, i in zip(halves, places, strict=True)], 1)
        numbers = values * product.roots * (-product.log_tilt(product.points)).exp()
        parts = product.to_modes((function(product.points).T * numbers).reshape(-1, *product.shape))
        expanded = torch.stack([product.evaluate(part, x) for part in parts], 1) * product.log_tilt(x).exp()[:, None]
        exact = function(x) * self.density(x)[:, None]
        gap, size = (float(masses[most] @ values.abs().sum(1)) for values in (expanded - exact, exact))
        if gap > SWING * size:
            warnings.warn(
                f"the {name} swings faster than the functions: between the nodes, times the density, it is "
                f"{gap / size:.2g} off relative to itself, expected below {SWING:.2g}; take more functions",
                stacklevel=4,
            )

    def warn_if_at_walls(self) -> None:
        """Warns where mass has come to lie at a wall (Legendre): the domain may cut it off.

        The density at the wall, times how far it would go on beyond, or is piled up before: p / |p'|, for nothing
        flows there, D p' = F p; at most a quarter of the domain.
        """
        first, last = self.values[[0, -1]]
        beyond = BEYOND if self.standard_errors is None else BEYOND_BY_SAMPLES
        for axis, basis in enumerate(self.expansion.product.bases):
            if not isinstance(basis, Legendre) or basis.order < 2 or len(self.times) < 2:
                continue
            length, weights = basis.high - basis.low, self.weights.movedim(axis, 0)
            for end, inner, place in ((0, 1, basis.low), (-1, -2, basis.high)):
                before, wall, near = first.select(axis, end), last.select(axis, end), last.select(axis, inner)
                slope = (near - wall).abs() / float((self.nodes[axis][end] - self.nodes[axis][inner]).abs())
                reach = wall / torch.maximum(slope, 4 * wall.abs() / length).clamp_min(TINY)
                across = weights[end] / basis.rule().roots[end].square().to(weights) * reach
                was, found = (float((p * across).sum()) for p in (before, wall))
                if found > beyond and abs(was) < found / (100 if self.standard_errors is None else 10):
                    warnings.warn(
                        f"mass has come to lie at the wall of axis {axis} at {place:.6g}: about {min(found, 1.0):.2g} "
                        "of it would be beyond, if the domain went on; if the wall is not meant to hold it, take a "
                        "wider domain, or Hermite functions",
                        stacklevel=3,
                    )


class PositiveDensity(NamedTuple):
    """max(p, 0) / Z.

    Attributes:
        solution: p.
        scale: Z at each time (K,).
        negative: the mass that was cut off, (K,).
    """

    solution: GalerkinSolution
    scale: Tensor
    negative: Tensor

    def density(self, x: Tensor, k: int = -1) -> Tensor:
        """(M,) at the points `x` (M, d) and the time of number k."""
        return self.solution.density(x, k).clamp_min(0) / self.scale[k]


def _tails(product: Product, coefficients: Tensor, size: Tensor) -> Tensor:
    """L1 norms (K, d) of the parts in the last eighth of the degrees along each axis; `size` is chi sqrt(w) (n,).

    Of a sparse product these are all that are as near to degrees that are left out.
    """
    full = torch.ones(product.shape, dtype=torch.bool, device=coefficients.device)
    keep, tails = full if product.keep is None else product.keep, []
    for axis, basis in enumerate(product.bases):
        first = int((basis.degrees <= int(basis.degrees[-1]) * 7 / 8).sum())
        inner = torch.zeros_like(keep)
        inner.movedim(axis, 0)[:first] = keep.movedim(axis, 0)[len(basis.degrees) - first :]
        part = coefficients * ~inner
        tails.append(product.from_modes(part).reshape(len(part), -1).abs() @ size)
    return torch.stack(tails, 1)


def _ends(product: Product, masses: Tensor) -> Tensor:
    """The larger of the masses at the first and the last node of each axis, times the number of nodes, (K, d)."""
    sums = [
        m.reshape(len(masses), 2, -1).abs().sum(2).amax(1) * product.shape[i]
        for i, m in enumerate(masses.movedim(i + 1, 1)[:, [0, -1]] for i in range(product.dim))
    ]
    return torch.stack(sums, 1)
