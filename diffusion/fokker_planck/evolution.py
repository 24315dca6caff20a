"""Linear equations du/dt = A(t) u: exponentials of operators, and steps in time that keep what exponentials keep.

A step is a product of exponentials of weighted means of A over parts of it: Magnus' series (Magnus 1954; Blanes et al.
2009, arXiv 0810.5488) without its commutators, of order 4, see `stepping`. It is exact, in one step of any length,
where A does not change in time or changes by a factor only; and where A generates a Markov chain so do the sums that a
step is made of (see `jumps` for noise that would be negative), so that it keeps the mass and no density becomes
negative.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ive
from scipy.stats import poisson
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.stepping import Means, Operator, step

NEGLIGIBLE = 1e-17
MOST_STEPS = 100_000
SHORTEST = 1e-290  # time
NEAR = 1e-6  # of all the time: no step is to end so near to a time
JUMPS = 0.1  # of the tolerance, kept for steps that do not resolve how A changes,
ONE_JUMP = 0.02  # of what is left of it for one of them

__all__ = [
    "Evolution",
    "Operator",
    "chebyshev",
    "evolve",
    "krylov",
    "largest",
    "rising",
    "talbot",
    "uniformised",
]


class Evolution(NamedTuple):
    """What `evolve` returns.

    Attributes:
        states: (K, B, n), at the K times.
        steps: taken in all.
        error: estimate of the error of the last state that the steps made, in the given norm.
    """

    states: Tensor
    steps: int
    error: float


def rising(times: Sequence[float] | Tensor) -> list[float]:
    """Times as numbers.

    Raises:
        UserError: there are none, or they do not rise or are not finite.
    """
    try:
        times = torch.as_tensor(times, dtype=torch.float64).reshape(-1).tolist()
    except (TypeError, ValueError):
        raise UserError(f"times are {times!r}, expected rising finite numbers, the first that of the start") from None
    rises = all(later - earlier > SHORTEST for earlier, later in itertools.pairwise(times))
    if not times or not rises or not all(map(math.isfinite, times)):
        raise UserError(f"times are {times}, expected rising finite numbers, the first that of the start")
    return times


def evolve(
    means: Means,
    state: Tensor,
    times: Sequence[float],
    norm: Callable[[Tensor], float],
    tolerance: float = 1e-8,
    steps: int | None = None,
    stops: Sequence[float] = (),
) -> Evolution:
    """States (K, B, n) at the rising `times`, from `state` (B, n) at the first of them.

    Args:
        means: the weighted means of A by each of several rules.
        norm: of a difference of states.
        tolerance: of the error at the last time; the errors of the steps add up to no more.
        steps: of equal length between each two times, instead of steps chosen by the tolerance.
        stops: other times at which steps that are chosen by the tolerance are to end, see `changes`.

    Warns:
        the estimated error of a fixed number of steps is above the tolerance.

    Raises:
        UserError: the tolerance is not met with MOST_STEPS steps, or is no positive number.
    """
    numbers = isinstance(tolerance, int | float) and isinstance(steps, int | None)
    if not numbers or not tolerance > 0 or (steps is not None and steps < 1):
        raise UserError(f"tolerance is {tolerance} and steps is {steps}, expected positive numbers, or no steps")
    states, number, error, total = [state], 0, 0.0, times[-1] - times[0]
    proposed, kept, grow = total, JUMPS * tolerance, 5.0
    apart = [stop for stop in stops if min(abs(stop - time) for time in times) > NEAR * total]
    for start, stop in itertools.pairwise(times if steps else sorted({*times, *apart})):
        t = start
        while t < stop:
            left = stop - t
            h = (stop - start) / steps if steps else min(left, proposed)
            if left - h < 1e-9 * (stop - start):
                h = left
            following, step_error, smooth = step(means, state, t, h, norm)
            number += 1
            if steps is None:
                allowed = (1 - JUMPS) * tolerance * h / total
                if not smooth:
                    allowed = max(allowed, ONE_JUMP * kept)
                wanted = 0.9 * (allowed / max(step_error, 1e-300)) ** (1 / 4)
                if not step_error <= allowed:
                    if number > MOST_STEPS or h < 1e-14 * total:
                        raise UserError(
                            f"the equation cannot be solved to {tolerance:.1g}: at t={t:.6g} a step of {h:.2g} has the "
                            f"error {step_error:.2g}; try a larger tolerance"
                        )
                    proposed, grow = h * (max(0.2, wanted) if smooth else 0.2), 1.0
                    continue
                proposed, grow = h * min(grow, max(0.2, wanted)), 5.0
                kept -= 0 if smooth else step_error
            state, t, error = following, stop if h == left else t + h, error + step_error
        if stop in times:
            states.append(state)
    if steps and error > tolerance:
        warnings.warn(
            f"{steps} steps between times are too coarse: the estimated error is {error:.2g}, above the tolerance "
            f"{tolerance:.2g}; take more steps, or let the tolerance choose them",
            stacklevel=3,
        )
    return Evolution(torch.stack(states), number, error)


def chebyshev(apply: Callable[[Tensor], Tensor], state: Tensor, duration: float, bound: float) -> Tensor:
    """exp(duration A) state, for A with a real spectrum in [-bound, 0]; about 6 sqrt(bound duration) products.

    The series of Chebyshev polynomials (Tal-Ezer & Kosloff 1984), to rounding.
    """
    z = duration * bound / 2
    weights = ive(range(int(12 * math.sqrt(z) + 40)), z)
    number = max(2, int((weights > NEGLIGIBLE).sum()))

    def shifted(u: Tensor) -> Tensor:
        return u + apply(u) * (2 / bound) if bound > 0 else u

    before, now = state, shifted(state)
    total = float(weights[0]) * before + 2 * float(weights[1]) * now
    for weight in weights[2:number]:
        before, now = now, 2 * shifted(now) - before
        total = total + 2 * float(weight) * now
    return total


def uniformised(apply: Callable[[Tensor], Tensor], state: Tensor, duration: float, rate: float) -> Tensor:
    """exp(duration A) state, for the generator A of a Markov chain that leaves no state faster than `rate`.

    A Poisson mean of powers of the positive matrix 1 + A / rate (Jensen 1953): no negative number ever arises. About
    rate duration products.
    """
    jumps = rate * duration
    weights = poisson(jumps).pmf(range(int(jumps + 9 * math.sqrt(jumps)) + 30))
    total = float(weights[0]) * state
    for weight in weights[1:]:
        state = state + apply(state) / rate
        if weight > 0:
            total = total + float(weight) * state
    return total / float(weights.sum())


@lru_cache
def talbot(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Poles z and weights w, (number / 2,) complex, with exp(x) = Re sum w / (x - z) for x <= 0, to 3.9^-number.

    The midpoint rule on a contour around the negative axis, cotangent-shaped after Talbot, with the constants of
    Trefethen, Weideman & Schmelzer (2006, "Talbot quadratures and rational approximations", section 3); `number` is
    even, and up to about 30: beyond, rounding grows. Of each conjugate pair of poles one is given.
    """
    a, b, c, d = 0.5017, 0.6407, -0.6122, 0.2645j
    theta = np.pi * np.arange(1, number, 2) / number
    z = number * (a * theta / np.tan(b * theta) + c + d * theta)
    slope = number * (a / np.tan(b * theta) - a * b * theta / np.sin(b * theta) ** 2 + d)
    return z, 2j / number * np.exp(z) * slope


def largest(apply: Callable[[Tensor], Tensor], like: Tensor, products: int = 12) -> float:
    """An upper bound of the spectrum of -A, for a symmetric A of states like `like` (1, n): for `chebyshev`.

    The largest Ritz value of some steps of Lanczos and the last off-diagonal (Zhou & Li 2011).
    """
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    now, before, beta, diagonal, betas = noise.to(like) / float(noise.norm()), torch.zeros_like(like), 0.0, [], []
    for _ in range(min(products, like.shape[1])):
        following = -apply(now) - beta * before
        diagonal.append(float((following * now).sum()))
        following = following - diagonal[-1] * now
        beta = float(following.norm())
        betas.append(beta)
        if beta < 1e-14 * max(map(abs, diagonal)):
            break
        before, now = now, following / beta
    off = torch.tensor(betas[:-1], dtype=torch.float64)
    ritz = torch.linalg.eigvalsh(torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, -1))
    return max(0.0, float(ritz[-1])) + beta


def krylov(
    apply: Callable[[Tensor], Tensor], state: Tensor, duration: float, tolerance: float = 1e-14, size: int = 60
) -> Tensor:
    """exp(duration A) state, for any A, by Arnoldi's method with as many substeps as the tolerance asks for.

    Args:
        tolerance: of the error over the whole duration, relative to the norm of the state (Saad 1992, eq. 27).
        size: most products in a substep.

    Raises:
        UserError: A is so large, or so far from normal, that MOST_STEPS substeps do not do.
    """
    done, tau = 0.0, duration
    for _ in range(MOST_STEPS):
        length = float(state.norm())
        if done >= duration or length == 0:
            return state
        basis, hessenberg, residual = _arnoldi(apply, state / length, size)
        number = len(hessenberg)
        augmented = torch.zeros(number + 1, number + 1, dtype=torch.float64)
        augmented[:number, :number], augmented[0, number] = hessenberg, 1
        tau = min(tau, duration - done)
        while True:
            exponential = torch.linalg.matrix_exp(tau * augmented)
            error = abs(residual * float(exponential[number - 1, number]))
            if error <= tolerance * tau / duration:
                break
            tau = tau * max(0.2, 0.9 * (tolerance * tau / duration / error) ** (1 / number))
        column = (length * exponential[:number, 0]).to(state)
        state, done, tau = (column @ basis).reshape(state.shape), done + tau, 1.5 * tau
        if duration - done < 1e-14 * duration:
            return state
    raise UserError(f"the exponential over {duration:.3g} needs over {MOST_STEPS} substeps; take fewer functions")


def _arnoldi(apply: Callable[[Tensor], Tensor], unit: Tensor, size: int) -> tuple[Tensor, Tensor, float]:
    """Orthonormal vectors (m, B n), A among them (m, m), and the length of what A adds to them."""
    basis = unit.new_empty(min(size, unit.numel()) + 1, unit.numel())
    hessenberg = torch.zeros(len(basis), len(basis) - 1, dtype=torch.float64)
    basis[0] = unit.reshape(-1)
    for j in range(len(basis) - 1):
        image = apply(basis[j].reshape(unit.shape)).reshape(-1)
        norm = float(image.norm())
        for _ in range(2):
            parts = basis[: j + 1] @ image
            image = image - parts @ basis[: j + 1]
            hessenberg[: j + 1, j] += parts.cpu()
        left = float(image.norm())
        if left <= 1e-15 * norm:
            return basis[: j + 1], hessenberg[: j + 1, : j + 1], 0.0
        hessenberg[j + 1, j] = left
        basis[j + 1] = image / left
    return basis[:-1], hessenberg[:-1], float(hessenberg[-1, -1])
