"""Chains on a line or a circle: the exponential by tridiagonal solves, and what makes it of fourth order in space.

Fitted rates R act on a smooth density as the equation's operator A does, up to an error of second order that is known:
with the current J, the flow from one centre to the next is J + h^2 / 12 (J'' - phi' J') + O(h^4), phi' = f / D, so that

    R p = A p + h^2 / 12 (q' - phi' q)' + O(h^4),    q = A p,

whatever the noise. With S the chain of the same drift and of noise D = 1, whose rates are b(-w) and b(w) in cells, this
is R = (1 + S / 12) A: M p' = R p with M = 1 + S / 12 is a compact scheme (Collatz 1960, "Mehrstellenverfahren"). The
columns of S sum to 0 and nothing but p' meets it, so that the mass and all that is at rest are kept as they are by R.
At walls that hold mass M is only of second order. exp(t M^-1 R) may be negative where a density is too rough for its
cells, which M^-1 p shows: for such M is 1, and it is between cells where next to nothing jumps.

Talbot's rule is for exponents near the negative axis: beyond 8 to either side it is wrong, and beyond 30 it gives 0
whatever the number of poles. On a line they are real, or next to it. On a circle what goes around, H = int f / D, turns
them: the k-th is (2 pi k i H - (2 pi k)^2) t / L^2, L = int dx / sqrt(D), for large k. So t is cut into parts of less
than a turn, and all waves are looked at, in the densities of two single cells. Where so much goes around that there are
too many parts, the series of `JumpProcess` takes over, for R; S fades before. All numbers are numpy's, on the CPU.
"""

import math
from functools import cached_property, lru_cache

import numpy as np
from scipy.linalg import block_diag
from scipy.linalg.lapack import zgtsv

from diffusion.fokker_planck.evolution import talbot

POLES = 28, 24  # of the rational approximation, and of the one that it is compared with
MANY = 8  # times as many states as cells, for which the matrix of the exponential is worth while
BATCH = 2**18  # numbers in states for which all poles are taken at once
EPSILON = float(np.finfo(float).eps)
AGREEMENT = 1e-11  # of the two, relative to the mass; the finer is better by two digits, unless rounding is reached
ROUNDED = 1e-6  # at most, if it is
SHORTEST = 1 / 256  # part of a duration, or of one that is not beyond TURN
TURN = 5.0  # to which the first exponent may be turned
STRONG = 32.0, 64.0  # H between which S fades, and beyond which too many parts would be needed
SETTLED = 1e-14  # of the mass, that is not at rest
FEW = 16.0  # times as frequent as between two cells are jumps next to them, above which S fades there
STEEP = 2 / np.tanh(1)  # b(-w) + b(w) at w = 2, beyond which S fades: M is to be far from singular
ROUGH = 1e-3  # of the mass, that M^-1 p may have below 0


class Line:
    """The generator of a chain on a line of n cells, or on a circle, and M.

    Args:
        up, down: rates (n,) to the next cell, and from that back; the cell next to the last is the first, if any.
        drive: w (n,), the increase of phi to the next cell.
        lost: rates (n,) through absorbing ends, or None: states have one number more for what these take.
    """

    def __init__(self, up: np.ndarray, down: np.ndarray, drive: np.ndarray, lost: np.ndarray | None = None):
        self.up, self.down, self.drive, self.lost, self.number = up, down, drive, lost, len(up)
        self.rates = _generator(up, down)
        if lost is not None:
            self.rates[1] -= lost
        size = np.maximum(np.abs(drive), 1e-300)
        back = size / np.expm1(size)
        both = 2 * back + size
        share = np.minimum(2 - both / STEEP, 1)
        jumps = up + down
        most = np.maximum(np.maximum(jumps, np.append(jumps[1:], jumps[0])), np.append(jumps[-1], jumps[:-1]))
        share = np.minimum(share, FEW * jumps / np.maximum(most, 1e-300) - 1)
        fading = (STRONG[1] - abs(self._around)) / (STRONG[1] - STRONG[0])
        share = np.maximum(np.minimum(share, fading), 0) / 24
        self.compact = _generator(share * (both + drive), share * (both - drive))
        self.compact[1] += 1
        self._looked_at: dict[bool, float] = {}  # the longest part that is right for all waves, without M and with it

    def smooth(self, states: np.ndarray) -> np.ndarray:
        """Of which of the states (B, n) the cells resolve the density, (B,)."""
        masses = states[:, : self.number]
        (found,) = _solved(self.compact[:, None] + 0j, masses.T[None] + 0j).real
        return -np.minimum(found, 0).sum(0) <= ROUGH * masses.sum(1)

    def advance(self, states: np.ndarray, duration: float, smooth: np.ndarray) -> np.ndarray | None:
        """The states (B, n), or (B, n + 1), after the duration, for the exponential of M^-1 R; of R where not smooth.

        Talbot's rule, for parts of the duration where it is not exact, as two numbers of poles show by their
        difference: where drift is much larger than noise, or goes around a circle. None where that does not do, and
        where too much goes around.
        """
        result = np.empty_like(states)
        for compact, rows in ((self.compact, smooth), (None, ~smooth)):
            found = self._advance(states[rows], duration, compact)
            if found is None:
                return None
            result[rows] = found
        return result

    def matrix(self, duration: float, smooth: bool) -> np.ndarray | None:
        """That by which states are multiplied from the right, for many states, all smooth or all not."""
        size = self.number + (self.lost is not None)
        return self._advance(np.eye(size), duration, self.compact if smooth else None)

    def _advance(self, states: np.ndarray, duration: float, compact: np.ndarray | None) -> np.ndarray | None:
        if abs(self._around) > STRONG[1]:
            return None
        (number, size), states = states.shape, states.copy()
        many = max(1, BATCH // size)
        first = 2.0 ** -max(0, math.ceil(math.log2(max(duration * self._turning, 1e-300) / TURN)))
        for k in range(0, number, many):
            left, step = 1.0, first
            while left > 0:
                found = self._rational(states[k : k + many], step * duration, compact)
                if found is not None:
                    states[k : k + many], left = found, left - step
                    if step < 1 and self._settled(found):
                        break
                elif step > SHORTEST * first:
                    step /= 2
                else:
                    return None
        return states

    def _settled(self, states: np.ndarray) -> bool:
        """Whether all is at rest."""
        if self.at_rest is None:
            return False
        mass = states.sum(1, keepdims=True)
        return bool((np.abs(states - self.at_rest * mass).sum(1) <= SETTLED * mass[:, 0]).all())

    @cached_property
    def _around(self) -> float:
        """H, the sum of log(up / down) around a circle; 0 where it is not closed."""
        if ((self.up == 0) & (self.down == 0)).any():
            return 0.0
        with np.errstate(divide="ignore"):
            return float((np.log(self.up) - np.log(self.down)).sum(dtype=np.longdouble))

    @cached_property
    def _turning(self) -> float:
        """2 pi H / L^2, with D from the product of the two rates, (D (w / 2) / sinh(w / 2))^2."""
        if self._around == 0 or not math.isfinite(self._around):
            return 0.0
        half = np.maximum(np.abs(self.drive) / 2, 1e-300)
        noise = np.sqrt(self.up) * np.sqrt(self.down) * np.sinh(half) / half
        return math.tau * abs(self._around) / float((noise**-0.5).sum()) ** 2

    def _rational(self, states: np.ndarray, duration: float, compact: np.ndarray | None) -> np.ndarray | None:
        """What is absorbed, int lost . exp(s A) state ds, has w / z for w.

        Results are scaled to the mass before they are compared. Beside the agreement they are allowed a rounding for
        each jump: so far does a last digit of the rates move the answer. What is at rest stays as it is, without these.
        """
        poles, weights = _rules(self.lost is not None)
        masses = states[:, : self.number].T
        looked = self._turning > 0 and duration > self._looked_at.get(compact is None, 0.0)
        if looked:
            masses = np.concatenate([masses, np.eye(self.number)[:, [0, self.number // 2]]], 1)
        still = None if self.at_rest is None else self.at_rest[:, None] * masses.sum(0)
        start = masses if still is None else masses - still
        found = _resolvents(poles, duration * self.rates, compact, start)
        results = (weights @ found.reshape(len(poles), -1)).real.reshape(len(weights), *start.shape)
        if self.lost is not None:
            absorbed = states[:, self.number] + duration * self.lost @ results[len(POLES) :]
            results = np.concatenate([results[: len(POLES)], absorbed[:, None]], 1)
        elif still is not None:
            results += still
        with np.errstate(all="ignore"):
            fine, coarse = results / results.sum(1, keepdims=True)
            rounded = min(AGREEMENT + EPSILON * duration * -self.rates[1].min(), ROUNDED)
            if not (np.abs(fine - coarse).sum(0) <= rounded).all():
                return None
        if looked:
            self._looked_at[compact is None] = duration
        return results[0, :, : len(states)].T

    @cached_property
    def at_rest(self) -> np.ndarray | None:
        """The law (n,) that the chain keeps; None where mass is lost or a jump is impossible.

        With the current J = p_k up_k - p_(k+1) down_k and h the sums of log(up / down), p_k exp(-h_k) falls from one
        cell to the next by J s_k, s_k = exp(-h_(k+1)) / down_k, and around a circle by the factor exp(-h_n): it is J
        times (s_k + ... + s_(n-1)) + (s_0 + ... + s_(n-1)) / (exp(h_n) - 1). Between ends there is no current.
        """
        jumps = self.up[:-1].all() and self.down[:-1].all()
        circle = self.up[-1] > 0 and self.down[-1] > 0
        if self.lost is not None or not jumps or (not circle and (self.up[-1] > 0 or self.down[-1] > 0)):
            return None
        up, down = np.log(self.up[: None if circle else -1]), np.log(self.down[: None if circle else -1])
        logs = np.zeros(len(up) + 1, np.longdouble)
        np.cumsum(up - down, dtype=np.longdouble, out=logs[1:])
        if circle:
            around, logs = logs[-1], logs[:-1]
        if circle and around != 0:
            turned = around < 0
            if turned:  # the other way around, from cell 0 on
                up, down = down[::-1], up[::-1]
                logs, around = np.append(logs[:1], logs[:0:-1] - around), -around
            steps = -np.append(logs[1:], around) - down
            tails = np.logaddexp.accumulate(steps[::-1])[::-1]
            logs = logs + np.logaddexp(tails - tails[0], -around - np.log(-np.expm1(-around)))
            logs = np.append(logs[:1], logs[:0:-1]) if turned else logs
        law = np.exp((logs - logs.max()).astype(float))
        return law / law.sum()


def _generator(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The bands (3, n) of a chain without losses: the entries (k + 1, k), (k, k) and (k, k + 1), modulo n."""
    bands = np.array([up, -up, down])
    bands[1, 1:] -= down[:-1]
    bands[1, 0] -= down[-1]
    return bands


@lru_cache
def _rules(integrals: bool) -> tuple[np.ndarray, np.ndarray]:
    """The poles z of all the rules, and weights w of each; with integrals also w / z."""
    rules = [talbot(number) for number in POLES]
    poles, weights = np.concatenate([z for z, _ in rules]), block_diag(*(w for _, w in rules))
    return poles, np.vstack([weights, weights / poles]) if integrals else weights


def _resolvents(z: np.ndarray, rates: np.ndarray, compact: np.ndarray | None, start: np.ndarray) -> np.ndarray:
    """(R - z M)^-1 M start, (poles, n, B), for bands (3, n) and start (n, B)."""
    bands = np.empty((3, len(z), rates.shape[1]), complex)
    bands[:] = rates[:, None]
    if compact is None:
        bands[1] -= z[:, None]
    else:
        bands -= compact[:, None] * z[:, None]
        low, middle, high = compact[:, :, None]
        product = middle * start
        product[1:] += low[:-1] * start[:-1]
        product[:-1] += high[:-1] * start[1:]
        product[0] += low[-1] * start[-1]
        product[-1] += high[-1] * start[0]
        start = product
    known = np.empty((len(z), *start.shape), complex)
    known[:] = start
    return _solved(bands, known)


def _solved(bands: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The solutions (P, n, B) for P matrices of bands (3, P, n), which are overwritten: one system, a block for each.

    What joins the last cell to the first is a matrix of rank 1 (Sherman & Morrison 1950).
    """
    low, middle, high = bands
    first, last = low[:, -1].copy(), high[:, -1].copy()  # entries (0, n - 1) and (n - 1, 0)
    low[:, -1] = high[:, -1] = 0
    circle = first.any() or last.any()
    if circle:
        pivot = -middle[:, 0]
        middle[:, 0] -= pivot
        middle[:, -1] -= first * last / pivot
        column = np.zeros((*known.shape[:2], 1), complex)
        column[:, 0, 0], column[:, -1, 0] = pivot, last
        known = np.concatenate([known, column], 2)
    shape, (low, middle, high) = known.shape, bands.reshape(3, -1)
    known = known.reshape(-1, shape[2])
    found = zgtsv(low[:-1], middle, high[:-1], known, overwrite_dl=1, overwrite_d=1, overwrite_du=1, overwrite_b=1)[3]
    found = found.reshape(shape)
    if circle:
        ends = found[:, 0] + (first / pivot)[:, None] * found[:, -1]
        found = found[:, :, :-1] - found[:, :, -1:] * (ends[:, :-1] / (1 + ends[:, -1:]))[:, None]
    return found
