"""The density expanded in test functions: spectral accuracy where it is smooth."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.asking import at_any_time
from diffusion.fokker_planck.bases import Basis, Fourier
from diffusion.fokker_planck.changes import turning_times
from diffusion.fokker_planck.equation import FokkerPlanck, checked
from diffusion.fokker_planck.evolution import evolve, rising
from diffusion.fokker_planck.expansion import Expansion, GalerkinSolution
from diffusion.fokker_planck.gibbs import GibbsRoot
from diffusion.fokker_planck.laws import Law, log_density
from diffusion.fokker_planck.observables import warn_of_leaps
from diffusion.fokker_planck.products import Product
from diffusion.fokker_planck.stepping import Means, Rule, weighted
from diffusion.fokker_planck.weak_form import Tilt, WeakOperator, coefficients, plain_tilt

REMEMBERED = 3  # operators
IRREGULAR = 0.618034
EPSILON = 1.1e-16  # rounding of float64
OVERFLOW = 600.0  # log
UNUSABLE = 1e-2  # error in L1


class WeakSolver(ABC):
    """What solvers in test functions share: the start, the evolution of its coefficients, and what is looked at.

    Attributes:
        product: of the bases.
        symmetrised: whether p is expanded over the root of the Gibbs density.
        lost: mass outside the domain above which there is a warning.
    """

    order = 4  # in time
    product: Product
    symmetrised: bool = False
    lost: float = 1e-6

    @abstractmethod
    def _expansion(self, times: list[float]) -> tuple[Expansion, Tilt]:
        """The functions that the density is expanded in, and chi at the nodes."""

    @abstractmethod
    def _means(self, tilt: Tilt, times: list[float]) -> tuple[Means, Sequence[float]]:
        """The mean operators over times, the same one where they are the same, and where steps are to end."""

    @abstractmethod
    def _cut_axes(self, times: list[float]) -> list[int]:
        """Periodic axes at whose ends drift or covariance differ, at the times or between them."""

    def solve(
        self,
        start: Law | Tensor,
        times: Sequence[float] | Tensor,
        tolerance: float = 1e-8,
        steps: int | None = None,
    ) -> GalerkinSolution:
        """The density at the rising `times`, from `start` at the first of them.

        Args:
            start: a law, or samples (M, d) of it.
            tolerance: of the error in time, in L1, and of that by rounding.
            steps: of equal length between each two times, instead of chosen by the tolerance.

        Warns:
            the domain loses mass; the coefficients have not decayed; the density reaches the ends of a
            period; mass comes to lie at a wall.

        Raises:
            UserError: the equation or the start is not fit for the bases; the message has the figure.
        """
        times = rising(times)
        expansion, tilt = self._expansion(times)
        if isinstance(start, Tensor):
            state, errors = self._from_samples(start, expansion)
        else:
            state, errors = self._from_law(start, tilt, tolerance), None
        steady = torch.zeros((), dtype=state.dtype, device=state.device)
        if self.symmetrised:
            steady = (state @ tilt.mass) / (tilt.mass @ tilt.mass)
            state = state - steady * tilt.mass
        size = self.product.roots * tilt.log.exp()

        def norm(difference: Tensor) -> float:
            return float((size * self.product.numbers(difference).reshape(-1)).abs().sum())

        means, stops = self._means(tilt, times)
        evolution = evolve(means, state[None], times, norm, tolerance, steps, stops)
        solution = GalerkinSolution.of(expansion, tilt, times, evolution, float(steady), errors)
        solution.warn_where_coarse(self._cut_axes(times))
        solution.warn_if_at_walls()
        self._look_at_equation(solution)
        return solution

    @abstractmethod
    def _look_at_equation(self, solution: GalerkinSolution) -> None:
        """Warn of drift or noise that the functions do not resolve, and of noise that leaps."""

    def _from_law(self, law: Law, tilt: Tilt, tolerance: float) -> Tensor:
        points, roots = self.product.points, self.product.roots
        log_start = log_density(law, points).detach()
        log_ratio = log_start - tilt.log
        if not bool((log_start < torch.inf).all()) or (not self.symmetrised and float(log_ratio.max()) > OVERFLOW):
            raise UserError("the start is infinite, or far wider than the basis: p / chi overflows; take a wider basis")
        held = float((roots.square() * log_start.exp()).sum())
        if held <= 0:
            raise UserError(
                "the start has no mass at the nodes, expected it inside the domain and wider than their gaps"
            )
        self._warn_of_loss(1 - held)
        numbers = roots * log_ratio.clamp_max(OVERFLOW).exp() / held
        if self.symmetrised:
            numbers = self._capped(numbers, tilt, tolerance)
        return self.product.state(numbers.reshape(1, *self.product.shape))[0]

    def _from_samples(self, samples: Tensor, expansion: Expansion) -> tuple[Tensor, Tensor]:
        """The state whose coefficients are means of the test functions, and their standard errors."""
        if samples.dim() != 2 or samples.shape[1] != self.product.dim or len(samples) < 2:
            raise UserError(
                f"samples have shape {tuple(samples.shape)}, expected (M, {self.product.dim}), M at least 2"
            )
        samples = samples.to(self.product.points)
        if not bool(torch.isfinite(samples).all()):
            raise UserError("the samples are not all finite")
        inside = self.product.holds(samples)
        self._warn_of_loss(1 - float(inside.double().mean()))
        samples = samples[inside]
        if len(samples) < 2:
            raise UserError("fewer than 2 samples are inside the domain, expected it to hold nearly all")
        means, errors = self.product.moments(samples, (-expansion.log_chi(samples)).exp())
        if not bool(torch.isfinite(means).all()):
            raise UserError("a test function overflows at a sample: the samples are far wider than the basis")
        numbers = self.product.from_modes(means[None])
        return self.product.state(numbers)[0], errors

    def _warn_of_loss(self, loss: float) -> None:
        if abs(loss) > self.lost:
            warnings.warn(
                f"the domain and its nodes hold {1 - loss:.8g} of the mass at the start, which differs from 1 by "
                f"{abs(loss):.2g}, above {self.lost:.2g}; it is scaled to 1: take a wider domain or more functions",
                stacklevel=4,
            )

    def _capped(self, numbers: Tensor, tilt: Tilt, tolerance: float) -> Tensor:
        """p / sqrt(pi), cut off at the height that costs the least.

        Far out it is large where the start is wider than pi, and rounding is relative to the largest number. The mass
        cut off and eps |u| |c|, a bound of what rounding costs in L1, are balanced.
        """
        roots, chi = self.product.roots, tilt.log.exp()
        c, u = (chi * roots).norm(), numbers / roots
        caps = torch.logspace(-float(c.log10()), max(float(u.max().log10()), -float(c.log10())), 64, dtype=u.dtype)
        capped = torch.minimum(u, caps.to(u)[:, None]) * roots
        cost = (numbers - capped) @ (chi * roots) + EPSILON * capped.norm(dim=1) * c
        best = int(cost.argmin())
        if float(cost[best]) > tolerance:
            message = (
                f"the start is wide beside the Gibbs density pi: p / sqrt(pi) is so large that rounding may cost "
                f"{float(cost[best]):.2g} (L1), above the tolerance {tolerance:.2g}; take symmetrised=False"
            )
            if float(cost[best]) > UNUSABLE:
                raise UserError(message)
            warnings.warn(message, stacklevel=4)
        return capped[best] / (capped[best] @ (chi * roots))


class GalerkinSolver(WeakSolver):
    """Solves the weak form of an equation in a product of bases, see `weak_form`.

    The mass is kept to rounding. Where the operator does not change in time, or by a factor only, the solution is exact
    in time; otherwise steps of order 4 are chosen by the tolerance. The density may be negative where it is small: how
    much is reported, and `GalerkinSolution.positive` takes it away.

    Args:
        equation: in d = 1, 2 or 3 coordinates.
        bases: of the d coordinates: Hermite, Fourier (periodic) or Legendre (reflecting).
        symmetrised: expand p / sqrt(pi), for a reversible equation of Gibbs density pi: the operator is symmetric, the
            stationary state is kept exactly, and many unknowns cost less. For starts that are not much wider than pi,
            and domains that end where sqrt(pi) is next to nothing (Fourier) or p is (Legendre).
        keep: mask of the modes to keep, from `total_degree(bases)` or `hyperbolic_cross(bases)`.
        lost: mass outside the domain above which there is a warning.
        device: where to compute.
    """

    def __init__(
        self,
        equation: FokkerPlanck,
        bases: Sequence[Basis],
        symmetrised: bool = False,
        keep: Tensor | None = None,
        lost: float = 1e-6,
        device: torch.device | str | None = None,
    ):
        self.equation, self.symmetrised, self.lost = checked(equation), symmetrised, lost
        self.product = Product(bases, keep, device)

    def matrix(self, time: float = 0.0) -> Tensor:
        """A of du/dt = A u at a time, (size, size), for states as `Product` holds them."""
        _, tilt = self._expansion([time])
        return WeakOperator(self.product, tilt, coefficients(self.equation, self.product, tilt, [time])[0]).matrix()

    def _expansion(self, times: list[float]) -> tuple[Expansion, Tilt]:
        points = self.product.points
        self.equation.drift(points[:1], times[0])  # first of all, whether it has as many coordinates as there are bases
        if self.symmetrised:
            root = GibbsRoot(self.equation, self.product, times[0])
            return Expansion(self.product, root), Tilt.of(self.product, root(points), root.slopes, symmetrised=True)
        return Expansion(self.product, self.product.log_tilt), plain_tilt(self.product)

    def _cut_axes(self, times: list[float]) -> list[int]:
        between = [times[0] + (times[-1] - times[0]) * (k * IRREGULAR % 1) for k in range(1, 8)]
        return [
            i
            for i, basis in enumerate(self.product.bases)
            if isinstance(basis, Fourier) and any(self._is_cut(i, basis, time) for time in times + between)
        ]

    def _look_at_equation(self, solution: GalerkinSolution) -> None:
        last = float(solution.times[-1])
        solution.warn_of_swings("drift", lambda x: self.equation.drift(x, last))
        noise = self.equation.covariance(self.product.points, last)
        if not bool((noise == noise[:1]).all()):
            solution.warn_of_swings("noise", lambda x: self.equation.covariance(x, last).reshape(len(x), -1))
        masses = solution.values.reshape(len(solution.times), -1) * solution.weights.reshape(-1)
        warn_of_leaps(self.equation, self.product.nodes, float(solution.times[0]), masses, stacklevel=3)

    def _is_cut(self, axis: int, basis: Fourier, time: float) -> bool:
        low = self.product.points[:: max(1, len(self.product.points) // 64)].clone()
        high = low.clone()
        low[:, axis], high[:, axis] = basis.low, basis.high
        for function in (self.equation.drift, self.equation.covariance):
            gap = function(low, time) - function(high, time)
            if float(gap.abs().max()) > 1e-9 * float(function(self.product.points, time).abs().max()):
                return True
        return False

    def _means(self, tilt: Tilt, times: list[float]) -> tuple[Means, Sequence[float]]:
        always = at_any_time(lambda time: coefficients(self.equation, self.product, tilt, [time])[0])
        if always is not None or len(times) < 2:
            one = None if always is None else WeakOperator(self.product, tilt, always)
            return lambda rules: [one] * len(rules), ()
        known: list[WeakOperator] = []

        def operator(new: Tensor) -> WeakOperator:
            scale = float(new.abs().max())
            for before in known:
                if before.values.shape == new.shape and float((before.values - new).abs().max()) <= 1e-15 * scale:
                    return before
            known.append(WeakOperator(self.product, tilt, new))
            del known[:-REMEMBERED]
            return known[-1]

        def at(times: list[float]) -> Tensor:
            return coefficients(self.equation, self.product, tilt, times)

        def means(rules: Sequence[Rule]) -> list[WeakOperator]:
            return [operator(values) for values in weighted(rules, at, self.product.points.numel())]

        return means, turning_times(self.equation, self.product.points, times[0], times[-1])
