"""The Markov chain of jumps between cells as an operator: products, and its exponential without a negative density."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.special import ive
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.evolution import NEGLIGIBLE, uniformised
from diffusion.fokker_planck.jumps import Jumps
from diffusion.fokker_planck.line_rates import Array, namespace
from diffusion.fokker_planck.lines import MANY, Line

GROWTH = 1e2  # of the terms of a series, which costs as many digits
CHECKED_EVERY = 8  # terms
FEW_JUMPS = 64  # for which uniformisation is as cheap as the series
CHUNK = 256.0  # jumps by uniformisation, before the series is tried again


@dataclass
class Ledger:
    """What several processes note together.

    Attributes:
        put_back: mass, relative to all, that rounding took.
        smooth: of which of the first states on a line (B,) the cells resolve the density, see `lines`.
    """

    put_back: float = 0.0
    smooth: np.ndarray | None = None


class JumpProcess:
    """The generator A of the chain: columns sum to 0, and nothing but the diagonal is negative.

    A state (B, n) holds the mass of each cell, or (B, n + 1), with the absorbed mass last, where the box has an
    absorbing face. Products are sums over bands: index differences s, with the rates up, from i to i + s, and down.

    In one dimension `advance` takes a rational approximation, by tridiagonal solves on the CPU (many states are then
    multiplied by a matrix, on the device), and M^-1 A for A, see `lines`, which is of fourth order in space: it is good
    to rounding unless drift is much larger than noise. Otherwise it takes the series of Chebyshev polynomials as far as
    these do not grow, which is far where drift is small next to noise; where they grow, it halves the step, and in the
    end uniformises. The series leaves noise of about 1e-16 times the growth for each term, up to about 1e-11 of the
    mass, the rational approximation 1e-13: what is negative is set to 0 and the mass is restored. Densities below that
    are noise, too; uniformisation has none.
    """

    def __init__(self, box: Box, jumps: Jumps, ledger: Ledger | None = None):
        self.box, self.jumps, self.ledger, self.number = box, jumps, ledger or Ledger(), box.number
        self.absorbing = "absorbing" in box.boundary
        self._line: Line | None = None
        if box.dim == 1:
            (up, down), drive = (values.cpu().numpy() for of in (jumps.rates, jumps.drives) for values in of.values())
            self._line = Line(up, down, drive, jumps.lost.cpu().numpy() if self.absorbing else None)
        self.rate = float(-self._line.rates[1].min() if self._line else self.exit.max())
        if not math.isfinite(self.rate):
            raise UserError(f"the rates of the grid are not finite: {self.rate}; is the drift bounded on the domain?")
        self._step = math.inf

    @cached_property
    def bands(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Rates up and down, of each difference of indices."""
        n, bands = self.number, {}
        for e, rates in self.jumps.rates.items():
            shifts = self.box.neighbours(e).shifts
            for shift, mask in shifts:
                size, moved = abs(shift), rates * mask if len(shifts) > 1 else rates
                up, down = (moved[:, : n - size] if shift > 0 else moved[:, size:].flip(0)).unbind()
                if size in bands:
                    up, down = bands[size][0] + up, bands[size][1] + down
                bands[size] = up, down
        return bands

    @cached_property
    def exit(self) -> Tensor:
        """The rate (n,) at which each cell is left."""
        total = self.jumps.lost.clone()
        for size, (up, down) in self.bands.items():
            total[: self.number - size].add_(up)
            total[size:].add_(down)
        return total

    @property
    def at_rest(self) -> np.ndarray | None:
        """The masses (n,) that a chain in one dimension keeps, see `lines`; None where they are not known there."""
        return self._line.at_rest if self._line else None

    def apply(self, state: Tensor) -> Tensor:
        """A state."""
        result = torch.empty_like(state)
        n = self.number
        cells, out = state[:, :n], result[:, :n]
        torch.mul(cells, -self.exit, out=out)
        for size, (up, down) in self.bands.items():
            out[:, size:].addcmul_(cells[:, : n - size], up)
            out[:, : n - size].addcmul_(cells[:, size:], down)
        if self.absorbing:
            result[:, n] = cells @ self.jumps.lost
        return result

    def advance(self, state: Tensor, duration: float) -> Tensor:
        """exp(duration A) state.

        Raises:
            UserError: it is not finite.
        """
        following = self._on_line(state, duration) if self._line and self.rate > 0 else None
        if following is not None:
            return following
        left = duration
        while left > 1e-14 * duration and self.rate > 0:
            step = min(left, self._step)
            following = None
            if self.rate * step > FEW_JUMPS:
                following, possible = self._series(state, step)
                self._step = possible if following is not None else min(possible, step / 2)
            else:
                step = min(left, CHUNK / self.rate)
                following = uniformised(self.apply, state, step, self.rate)
                self._step = 8 * step
            if following is not None:
                state, left = self._kept(following, state), left - step
        if not bool(torch.isfinite(state).all()):
            raise UserError(f"the density is not finite after a step of {duration:.3g}")
        return state

    def _on_line(self, state: Tensor, duration: float) -> Tensor | None:
        if self.ledger.smooth is None:
            self.ledger.smooth = self._line.smooth(state.cpu().numpy())
        smooth = self.ledger.smooth
        if len(state) <= MANY * state.shape[1]:
            states = state.cpu().numpy()
            found = self._line.advance(states, duration, smooth)
            return None if found is None else torch.from_numpy(self._kept(found, states)).to(state)
        following = torch.empty_like(state)
        for kind in np.unique(smooth):
            matrix = self._line.matrix(duration, kind)
            if matrix is None:
                return None
            rows = torch.from_numpy(smooth == kind).to(state.device)
            following[rows] = state[rows] @ torch.from_numpy(matrix).to(state)
        return self._kept(following, state)

    def _kept(self, following: Array, state: Array) -> Array:
        """`following` without what is negative, of the mass of `state`; how much that changes is noted."""
        xp = namespace(state)
        mass, kept = state.sum(1), xp.clip(following, 0, None)
        kept *= (mass / kept.sum(1))[:, None]
        self.ledger.put_back += float((abs(kept - following).sum(1) / mass).max())
        if self.absorbing:
            kept[:, self.number :] = xp.maximum(kept[:, self.number :], state[:, self.number :])
        return kept

    def _series(self, state: Tensor, duration: float) -> tuple[Tensor | None, float]:
        """The sum of I_k(z) T_k(1 + A / rate), z = rate duration, and the longest step that is possible.

        None where the terms grow: T_k like exp(c k) makes terms up to exp(c^2 z / 2). What is summed is
        +T_0 +T_1 -T_2 -T_3 +T_4 ..., which needs no subtraction in place.
        """
        z = self.rate * duration
        weights = ive(range(int(14 * math.sqrt(z) + 40)), z)
        n, scale = self.number, 2 / self.rate
        diagonal, lost = 2 - scale * self.exit, scale * self.jumps.lost
        bands = [(size, scale * up, scale * down) for size, (up, down) in self.bands.items()]
        before, now = state.clone(), state + self.apply(state) / self.rate
        programme = []  # the views of one buffer that a product reads, and of the other that it adds to
        for source, sink in ((now, before), (before, now)):
            moves = [(sink[:, :n], source[:, :n], diagonal)]
            for size, up, down in bands:
                moves.append((sink[:, size:n], source[:, : n - size], up))
                moves.append((sink[:, : n - size], source[:, size:n], down))
            programme.append((sink, source, moves))
        total = float(weights[0]) * before + 2 * float(weights[1]) * now
        mass = state.abs().sum(1)
        for k in range(2, len(weights)):
            sign = 1 if k % 2 else -1
            sink, source, moves = programme[k % 2]
            for into, of, rates in moves:
                into.addcmul_(of, rates, value=sign)
            if self.absorbing:
                sink[:, n] += sign * (2 * source[:, n] + source[:, :n] @ lost)
            total.add_(sink, alpha=2 * float(weights[k]) * (1 if k % 4 < 2 else -1))
            if k % CHECKED_EVERY == 0:
                growth = float((sink.abs().sum(1) / mass).max())
                possible = 2 * math.log(GROWTH) / max(math.log(max(growth, 1.0)) / k, 1e-9) ** 2 / self.rate
                if not weights[k] * growth <= GROWTH:
                    return None, possible
                if weights[k] * growth < NEGLIGIBLE:
                    return total, possible
        return None, possible
