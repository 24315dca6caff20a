"""The density on a grid of cells, in 1, 2 or 3 dimensions, by conservative finite volumes with fitted exponentials."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.box import Box, gauss
from diffusion.fokker_planck.equation import FokkerPlanck
from diffusion.fokker_planck.evolution import evolve, rising
from diffusion.fokker_planck.jump_process import JumpProcess, Ledger
from diffusion.fokker_planck.jumps import jumps_at, mean_jumps
from diffusion.fokker_planck.laws import Law
from diffusion.fokker_planck.observables import current, entropy_production, warn_if_at_walls, warn_if_coarse
from diffusion.fokker_planck.stationary import stationary

LOST = 1e-6  # of the mass of a law, that may be outside the domain
MOMENTS, MORE, FEW = 7, 16, 64  # moments at which all cells, and at which few cells are asked whether anything changes
TIME_POINTS = 4  # of Gauss' rule over a step in time


class GridSolution(NamedTuple):
    """The density at K times; with a batch of B starts, B follows K in every shape but that of `mass_error`.

    Attributes:
        density: (K, *cells), mean of each cell, per unit of volume.
        grid: the centres of the cells along each coordinate.
        times: (K,).
        mass_error: (K,), largest |mass + absorbed - mass at the start| over that at the start.
        current: (K, d, *cells), probability per unit of time and area, at the centres.
        entropy_production: (K,), in nats per unit of time: sum (a - b) log(a / b) over the pairs of cells, a and b the
            mass that jumps one way and the other (Schnakenberg 1976). What is absorbed is not counted.
        absorbed: (K,), mass that has left through absorbing faces.
        steps: in time; an equation that does not change, or by a factor only, needs one between two times.
        time_error: estimate of the error of the last density that the steps made, in L1.
        put_back: mass, over that at the start, that rounding in all exponentials lost, gained or made negative, and
            that was put right.
    """

    density: Tensor
    grid: tuple[Tensor, ...]
    times: Tensor
    mass_error: Tensor
    current: Tensor
    entropy_production: Tensor
    absorbed: Tensor
    steps: int
    time_error: float
    put_back: float


class GridSolver:
    """Solves a Fokker-Planck equation on a box of equal cells.

    Second order in the width of a cell; first where a full matrix meets a reflecting wall with mass at it. Mass is kept
    to rounding, no density is negative, a Gibbs state is stationary, and so is a constant current in one dimension. In
    time it is exact where the equation does not change, or by a factor only; otherwise steps of second order are chosen
    by a tolerance. Densities below about 1e-14 of the highest are rounding noise.

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
        self.equation = equation
        self.box = Box(domain, cells, boundary, device)

    def density(self, law: Law, lost: float = LOST) -> Tensor:
        """The means (*cells) of a law's density over the cells, scaled to mass 1.

        Raises:
            UserError: more than `lost` of its mass is outside the domain, or it is too narrow for the cells.
        """
        values = self.box.averages(law.log_prob)
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).nonzero()[0, 0])
            raise UserError(f"the density at the start is not finite near x={self.box.centres[bad].tolist()}")
        mass = float(values.sum()) * self.box.volume
        if abs(mass - 1) > lost:
            raise UserError(
                f"the density at the start has the mass {mass:.8g} on the domain, expected 1 to {lost:.1g}: "
                + ("take a larger domain" if mass < 1 else "it is too narrow for the cells, take more of them")
                + ("" if mass > 1 else ", or more cells if it is narrower than one")
            )
        return (values / mass).reshape(self.box.cells)

    def solve(
        self, start: Law | Tensor, times: Sequence[float] | Tensor, tolerance: float = 1e-6, steps: int | None = None
    ) -> GridSolution:
        """The density at rising `times`, the first of which is that of the start.

        Args:
            start: a law, or densities (*cells) or (B, *cells), of any mass.
            tolerance: of the error in L1 that steps in time make.
            steps: of equal length between each two times, instead of steps chosen by the tolerance.

        Warns:
            the grid is too coarse for the drift, or the `steps` are for the tolerance.

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
        fixed = steps is None and self._unchanging(times)
        at_start = jumps_at(self.equation, box, times[0])
        if len(times) > 1:
            process = JumpProcess(box, at_start, ledger) if fixed else None
            states, taken, error = evolve(
                (lambda t, u: process) if fixed else (lambda t, u: self._mean(t, u, ledger)),
                state,
                times,
                norm=lambda difference: float((difference.abs().sum(1) / mass).max()),
                tolerance=tolerance,
                steps=steps,
            )
        cells = states[:, :, : box.number]
        if fixed:
            each = [(at_start, cells.reshape(-1, box.number))]
        else:
            each = list(zip([at_start] + [jumps_at(self.equation, box, t) for t in times[1:]], cells, strict=True))
        warn_if_coarse(box, each, stacklevel=2)
        if "reflecting" in box.boundary and len(times) > 1:
            warn_if_at_walls(box, cells[[0, -1]], self.equation.drift(box.centres, times[-1]), stacklevel=2)
        absorbed = states[:, :, box.number :].sum(2)
        shape = (len(times), number)
        result = GridSolution(
            density=(cells / box.volume).reshape(*shape, *box.cells),
            grid=box.axes,
            times=torch.tensor(times, dtype=torch.float64, device=box.device),
            mass_error=((states.sum(2) - mass).abs() / mass).amax(1),
            current=torch.cat([current(box, *pair) for pair in each]).reshape(*shape, box.dim, *box.cells),
            entropy_production=torch.cat([entropy_production(box, *pair) for pair in each]).reshape(shape),
            absorbed=absorbed,
            steps=taken,
            time_error=error,
            put_back=ledger.put_back,
        )
        if not single:
            return result
        batched = ("density", "current", "entropy_production", "absorbed")
        return result._replace(**{name: getattr(result, name)[:, 0] for name in batched})

    def stationary(self, time: float = 0.0) -> GridSolution:
        """The density (1, *cells) of mass 1 that the equation, as it is at one time, keeps.

        In closed form where nothing flows at rest, otherwise by a sparse factorisation; see `stationary`.

        Raises:
            UserError: a face is absorbing, or the grid falls into parts between which nothing moves.
        """
        jumps = jumps_at(self.equation, self.box, float(time))
        mass = stationary(JumpProcess(self.box, jumps))
        values = (mass / self.box.volume).reshape(self.box.cells)
        return self.solve(values, [float(time)])

    def _mean(self, start: float, stop: float, ledger: Ledger) -> JumpProcess:
        if start == stop:
            return JumpProcess(self.box, jumps_at(self.equation, self.box, start), ledger)
        nodes, weights = gauss(TIME_POINTS)
        middle, half = (start + stop) / 2, (stop - start) / 2
        parts = [jumps_at(self.equation, self.box, middle + half * float(node)) for node in nodes]
        return JumpProcess(self.box, mean_jumps([float(weight) / 2 for weight in weights], parts), ledger)

    def _unchanging(self, times: list[float]) -> bool:
        """Whether the equation is the same at both ends of the time and irregular moments between.

        At some moments all centres are asked, at more of them a few. A push that is over between two moments, about a
        twentieth of the time, is not seen; `steps` makes the solver look at every step.
        """
        x, turn = self.box.centres, (math.sqrt(5) - 1) / 2
        few = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:FEW].to(x.device)]
        shares = [0.0, 1.0] + [k * turn % 1 for k in range(1, MOMENTS + MORE - 1)]
        if len(times) == 1:
            return True
        for points, some in ((x, shares[:MOMENTS]), (few, [0.0, *shares[MOMENTS:]])):
            first = None
            for share in some:
                t = times[0] + (times[-1] - times[0]) * share
                now = self.equation.drift(points, t), self.equation.diffusion(points, t)
                first = first or now
                if not all(torch.equal(a, b) for a, b in zip(now, first, strict=True)):
                    return False
        return True

    def _start(self, start: Law | Tensor) -> tuple[Tensor, bool]:
        """Densities (B, n), and whether there is no B."""
        cells = self.box.cells
        if not isinstance(start, Tensor):
            return self.density(start).reshape(1, -1), True
        if tuple(start.shape[-len(cells) :]) != cells or start.dim() > len(cells) + 1 or start.numel() == 0:
            raise UserError(f"the start has shape {tuple(start.shape)}, expected {cells} or (B, {str(cells)[1:]}")
        values = start.to(self.box.device, torch.float64).reshape(-1, self.box.number)
        if not bool(torch.isfinite(values).all()) or not bool((values >= 0).all()) or not bool(values.any(1).all()):
            raise UserError(
                f"the start has values from {float(values.min()):.3g} to {float(values.max()):.3g}, expected finite "
                "densities, not negative and not all 0"
            )
        return values, start.dim() == len(cells)
