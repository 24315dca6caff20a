"""The density on a grid of cells, in 1, 2 or 3 dimensions, by conservative finite volumes with fitted exponentials."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.changes import turning_times
from diffusion.fokker_planck.equation import FokkerPlanck, checked
from diffusion.fokker_planck.evolution import evolve, rising
from diffusion.fokker_planck.jump_process import JumpProcess, Ledger
from diffusion.fokker_planck.jumps import Jumps, jumps_at
from diffusion.fokker_planck.laws import Law, log_density
from diffusion.fokker_planck.observables import (
    current,
    entropy_production,
    pairs,
    warn_if_at_walls,
    warn_if_coarse,
    warn_if_cut,
    warn_of_leaps,
)
from diffusion.fokker_planck.rates_in_time import RatesInTime
from diffusion.fokker_planck.stationary import stationary

LOST = 1e-6  # of the mass of a law, that may be outside the domain


@dataclass(frozen=True)
class GridSolution:
    """The density at K times; with a batch of B starts, B follows K in every shape but that of `mass_error`.

    Attributes:
        density: (K, *cells), at the centres of the cells; times their volume it sums to the mass.
        grid: the centres of the cells along each coordinate.
        times: (K,).
        absorbed: (K,), mass that has left through absorbing faces.
        steps: in time; an equation that does not change, or by a factor only, needs one between two times.
        time_error: estimate of the error of the last density that the steps made, in L1.
        put_back: mass, over that at the start, that was moved to put right what rounding in all exponentials lost,
            gained or made negative, or in one dimension the fourth order.
        box: of the solver.
        jumps: the rates at the K times, or one for all.
    """

    density: Tensor
    grid: tuple[Tensor, ...]
    times: Tensor
    absorbed: Tensor
    steps: int
    time_error: float
    put_back: float
    box: Box
    jumps: list[Jumps]

    @cached_property
    def mass_error(self) -> Tensor:
        """(K,), largest |mass + absorbed - mass at the start| over that at the start."""
        mass = self.density.sum(tuple(range(-self.box.dim, 0))) * self.box.volume + self.absorbed
        return ((mass - mass[0]).abs() / mass[0]).reshape(len(mass), -1).amax(1)

    @cached_property
    def current(self) -> Tensor:
        """(K, d, *cells), probability per unit of time and area, at the centres."""
        return self._flows(current, self.box.dim, *self.box.cells)

    @cached_property
    def entropy_production(self) -> Tensor:
        """(K,), in nats per unit of time: sum (a - b) log(a / b) over the pairs of cells.

        Here a and b are the mass that jumps one way and the other (Schnakenberg 1976). What is absorbed is not counted.
        """
        return self._flows(entropy_production)

    def _flows(self, of: Callable[[Box, Jumps, Tensor], Tensor], *shape: int) -> Tensor:
        masses = self.density * self.box.volume
        each = pairs(self.jumps, masses.reshape(len(self.times), -1, self.box.number))
        return torch.cat([of(self.box, *pair) for pair in each]).reshape(*self.density.shape[: -self.box.dim], *shape)


class GridSolver:
    """Solves a Fokker-Planck equation on a box of equal cells.

    Of fourth order in the width h of a cell in one dimension, see `lines`, if drift and noise are smooth, the cells
    resolve the start, there is no mass at walls, and no more than H = int f / D = 32 goes around a circle; otherwise of
    second order, as currents and entropy production always are. There what moves is spread by more than its noise D, by
    the share (w / 2) coth(w / 2) - 1 with w = f h / D: 8 % at w = 1, 31 % at 2, beyond which the grid is called too
    coarse; at rest nothing is. Of first order where noise leaps, where a full matrix meets a reflecting wall with mass
    at it, and along coordinates without noise. Mass is kept to rounding, no density is negative, a Gibbs state is
    stationary, and so is a constant current in one dimension. In time it is exact where the equation does not change,
    or by a factor only; otherwise steps of order 4 are chosen by a tolerance; with a part of second order in time,
    which is to the error in space as the square of the step is to 1. Densities below about 1e-14 of the highest are
    rounding noise.

    Args:
        equation: the equation; asked for points of the domain only.
        domain: (low, high) of each of 1 to 3 coordinates.
        cells: along each coordinate, or one number for all; 256, 128, 48 in 1, 2, 3 dimensions unless given.
        boundary: "reflecting", "absorbing" or "periodic", of each coordinate or one for all.
        device: where everything is computed; starts are moved there.

    Raises:
        UserError: see `Box`.
    """

    def __init__(
        self,
        equation: FokkerPlanck,
        domain: Sequence[tuple[float, float]],
        cells: int | Sequence[int] | None = None,
        boundary: str | Sequence[str] = "reflecting",
        device: torch.device | str | None = None,
    ):
        self.equation = checked(equation)
        self.box = Box(domain, cells, boundary, device)

    def density(self, law: Law, lost: float = LOST) -> Tensor:
        """A law's density at the centres (*cells), scaled to mass 1; its means over cells that do not resolve it.

        Raises:
            UserError: more than `lost` of its mass is outside the domain, or it is too narrow for the cells.
        """
        values = self.box.densities(lambda x: log_density(law, x))
        mass = float(values.sum()) * self.box.volume
        if not math.isfinite(mass):
            bad = int(values.nan_to_num(math.inf).argmax())
            raise UserError(f"the density at the start is not finite near x={self.box.centres[bad].tolist()}")
        if abs(mass - 1) > lost:
            larger = "fold the law into the periodic" if "periodic" in self.box.boundary else "take a larger"
            raise UserError(
                f"the density at the start has the mass {mass:.8g} on the domain, expected 1 to {lost:.1g}: "
                + (f"{larger} domain" if mass < 1 else "it is too narrow for the cells, take more of them")
                + ("" if mass > 1 else ", or more cells if it is narrower than one")
            )
        return (values / mass).reshape(self.box.cells)

    def solve(
        self, start: Law | Tensor, times: Sequence[float] | Tensor, tolerance: float = 1e-6, steps: int | None = None
    ) -> GridSolution:
        """The density at rising `times`, the first of which is that of the start.

        A push that is over within a 256th of the time, or is in a hundredth of the domain only, may not be seen: give
        times around it.

        Args:
            start: a law, or densities (*cells) or (B, *cells), of any mass.
            tolerance: of the error in L1 that steps in time make.
            steps: of equal length between each two times, instead of steps chosen by the tolerance.

        Warns:
            the grid is too coarse for the drift or its swings, or the `steps` are for the tolerance; mass has come to
            lie at reflecting walls, or at ends of a period that differ.

        Raises:
            UserError: values that are negative, not finite or of another shape; times that do not rise; a law that
                reaches beyond the domain; a tolerance that cannot be met.
        """
        times = rising(times)
        values, single = self._start(start)
        box, number = self.box, len(values)
        state = values * box.volume
        if "absorbing" in box.boundary:
            state = torch.cat([state, state.new_zeros(number, 1)], 1)
        mass = state.sum(1)
        states, taken, error, ledger = state[None], 0, 0.0, Ledger()
        rates = RatesInTime(self.equation, box, times[0], ledger)
        if len(times) > 1:
            states, taken, error = evolve(
                rates.means,
                state,
                times,
                norm=lambda difference: float((difference.abs().sum(1) / mass).max()),
                tolerance=tolerance,
                steps=steps,
                stops=turning_times(self.equation, box.centres, times[0], times[-1]) if rates.changing else (),
            )
        cells = states[:, :, : box.number]
        jumps = [rates.at(t) for t in (times if rates.changing else times[:1])]
        warn_if_coarse(box, [*pairs(jumps, cells), *rates.coarsest.values()], stacklevel=2)
        for time, (at, masses) in zip(times, pairs(jumps, cells), strict=False):
            if any(sum(map(abs, e)) > 1 for e in at.rates):  # a full matrix
                warn_of_leaps(self.equation, box.axes, time, masses, stacklevel=2)
        warn_if_cut(box, cells, self.equation, times[-1], stacklevel=2)
        if len(times) > 1:
            warn_if_at_walls(box, cells, self.equation, times, stacklevel=2)
        batch = () if single else (number,)
        return GridSolution(
            density=(cells / box.volume).reshape(len(times), *batch, *box.cells),
            grid=box.axes,
            times=torch.tensor(times, dtype=torch.float64, device=box.device),
            absorbed=states[:, :, box.number :].sum(2).reshape(len(times), *batch),
            steps=taken,
            time_error=error,
            put_back=ledger.put_back,
            box=box,
            jumps=jumps,
        )

    def stationary(self, time: float = 0.0) -> GridSolution:
        """The density (1, *cells) of mass 1 that the equation, as it is at one time, keeps.

        In closed form in one dimension and where nothing flows at rest, otherwise by a sparse factorisation; see
        `stationary`.

        Raises:
            UserError: a face is absorbing; the grid falls into parts between which nothing moves, or so little that
                rounding decides how much mass each has.
        """
        jumps = jumps_at(self.equation, self.box, float(time))
        mass = stationary(JumpProcess(self.box, jumps))
        values = (mass / self.box.volume).reshape(self.box.cells)
        return self.solve(values, [float(time)])

    def _start(self, start: Law | Tensor) -> tuple[Tensor, bool]:
        """Densities (B, n), and whether there is no B."""
        cells = self.box.cells
        if not isinstance(start, Tensor):
            if not hasattr(start, "log_prob"):
                kind = type(start).__name__
                raise UserError(f"the start is {kind}, expected a law with log_prob, or densities {cells}")
            return self.density(start).reshape(1, -1), True
        if tuple(start.shape[-len(cells) :]) != cells or start.dim() > len(cells) + 1 or start.numel() == 0:
            raise UserError(f"the start has shape {tuple(start.shape)}, expected {cells} or (B, {str(cells)[1:]}")
        values = start.detach().to(self.box.device, torch.float64).reshape(-1, self.box.number)
        if not bool(torch.isfinite(values).all()) or not bool((values >= 0).all()) or not bool(values.any(1).all()):
            raise UserError(
                f"the start has values from {float(values.min()):.3g} to {float(values.max()):.3g}, expected finite "
                "densities, not negative and not all 0"
            )
        return values, start.dim() == len(cells)
