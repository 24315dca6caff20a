"""The Markov chain of jumps between cells as an operator: products, and its exponential without a negative density."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import zgtsv
from scipy.special import ive
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.box import Box
from diffusion.fokker_planck.evolution import NEGLIGIBLE, talbot, uniformised
from diffusion.fokker_planck.jumps import Jumps

GROWTH = 1e2  # of the terms of a series, which costs as many digits
CHECKED_EVERY = 8  # terms
FEW_JUMPS = 64  # for which uniformisation is as cheap as the series
CHUNK = 256.0  # jumps by uniformisation, before the series is tried again
POLES = 28, 24  # of the rational approximation, and of the one that it is compared with
AGREEMENT = 1e-11  # of the two, relative to the mass; the finer is better by two digits, unless rounding is reached


@dataclass
class Ledger:
    """What several processes note together: mass that rounding took, relative to all, and that was put back."""

    put_back: float = 0.0


class JumpProcess:
    """The generator A of the chain: columns sum to 0, and nothing but the diagonal is negative.

    A state (B, n) holds the mass of each cell, or (B, n + 1), with the absorbed mass last, where the box has an
    absorbing face. Products are sums over bands: index differences s, with the rates up, from i to i + s, and down.

    On a line with ends, and on a CPU, `advance` takes a rational approximation, by tridiagonal solves: it is good to
    rounding unless drift is much larger than noise, which two numbers of poles show by their difference. Otherwise it
    takes the series of Chebyshev polynomials as far as these do not grow, which is far where drift is small next to
    noise; where they grow, it halves the step, and in the end uniformises. The series leaves noise of about 1e-16 times
    the growth for each term, up to about 1e-11 of the mass, the rational approximation 1e-13: what is negative is set
    to 0 and the mass is restored. Densities below that are noise, too; uniformisation has none.
    """

    def __init__(self, box: Box, jumps: Jumps, ledger: Ledger | None = None):
        self.jumps, self.ledger = jumps, ledger or Ledger()
        n = self.number = box.number
        self.absorbing = "absorbing" in box.boundary
        self.bands: dict[int, tuple[Tensor, Tensor]] = {}
        for e, (forward, backward) in jumps.rates.items():
            for shift, mask in box.neighbours(e).shifts:
                size = abs(shift)
                if shift > 0:
                    up, down = ((rate * mask)[: n - size] for rate in (forward, backward))
                else:
                    up, down = ((rate * mask)[size:] for rate in (backward, forward))
                if size in self.bands:
                    up, down = self.bands[size][0] + up, self.bands[size][1] + down
                self.bands[size] = up, down
        self.exit = jumps.lost.clone()
        for size, (up, down) in self.bands.items():
            self.exit[: n - size] += up
            self.exit[size:] += down
        self.rate = float(self.exit.max())
        if not math.isfinite(self.rate):
            raise UserError(f"the rates of the grid are not finite: {self.rate}; is the drift bounded on the domain?")
        self._line = set(self.bands) == {1} and box.device.type == "cpu"
        self._step = math.inf

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
        following = self._rational(state, duration) if self._line and self.rate * duration > 1 else None
        if following is not None:
            return self._kept(following, state)
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

    def _kept(self, following: Tensor, state: Tensor) -> Tensor:
        """`following` without what is negative, of the mass of `state`; how much was put right is noted."""
        mass, kept = state.sum(1, keepdim=True), following.clamp_min(0)
        wrong = (following.sum(1, keepdim=True) - mass).abs() + (kept - following).sum(1, keepdim=True)
        self.ledger.put_back += float((wrong / mass.clamp_min(1e-300)).max())
        kept *= mass / kept.sum(1, keepdim=True).clamp_min(1e-300)
        if self.absorbing:
            torch.maximum(kept[:, self.number :], state[:, self.number :], out=kept[:, self.number :])
        return kept

    def _rational(self, state: Tensor, duration: float) -> Tensor | None:
        """Talbot's rule; None where it is not exact. What is absorbed, int lost . exp(s A) state ds, has w / z for w.

        Both are scaled to the mass before they are compared. Beside the agreement they are allowed a rounding for each
        jump: so far does a last digit of the rates move the answer.
        """
        up, down = (duration * rates.numpy().astype(complex) for rates in self.bands[1])
        diagonal, lost = -duration * self.exit.numpy(), duration * self.jumps.lost.numpy()
        start = state.numpy()[:, : self.number].T.astype(complex)
        results, masses = [], []
        for number in POLES:
            total, integral = np.zeros(start.shape), np.zeros(start.shape)
            for z, w in zip(*talbot(number), strict=True):
                found = zgtsv(up, diagonal - z, down, start, overwrite_d=True)[3].reshape(start.shape)
                total += (w * found).real
                if self.absorbing:
                    integral += (w / z * found).real
            following = np.vstack([total, state.numpy()[:, self.number :].T + lost @ integral][: 1 + self.absorbing])
            with np.errstate(all="ignore"):
                results.append(following / following.sum(0))
                masses.append(following.sum(0))
        gap = np.abs(results[0] - results[1]).sum(0)
        if not (gap <= AGREEMENT + np.finfo(float).eps * self.rate * duration).all():
            return None
        return torch.from_numpy(np.ascontiguousarray((results[0] * masses[0]).T))

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
