"""Paths of an SDE dx = f dt + g dw by explicit schemes, each of a declared weak order, and of its probability flow."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchdiffeq import odeint

from diffusion.errors import UserError
from diffusion.fokker_planck.asking import shown
from diffusion.fokker_planck.equation import FokkerPlanck, act
from diffusion.fokker_planck.evolution import rising

ASTRAY = 0.1  # standard deviations: the error of the steps in mean and standard deviation that is warned of
FOLLOWED = 1024  # paths, at most, that are also followed by steps of half the length
LEAST = 128  # of these, otherwise an eighth of all
DOUBT = 3.0  # standard errors
FEW = 16  # paths, of fewer of which only an error of GROSS can be told
GROSS = 0.5


class Noise(NamedTuple):
    """The randomness of a step of length h.

    Attributes:
        increments: (B, d), of the Wiener processes: mean 0, variance h, and further moments like the Gaussian's up to
            the fifth.
        signs: (B, d, d) antisymmetric, independent +1 or -1 above the diagonal; only the second order reads it.
    """

    increments: Tensor
    signs: Tensor


def euler_maruyama(equation: FokkerPlanck, x: Tensor, t: float, h: float, noise: Noise) -> Tensor:
    """Weak order 1, strong order 1/2."""
    return x + h * equation.drift(x, t) + act(equation.diffusion(x, t), noise.increments)


def platen(equation: FokkerPlanck, x: Tensor, t: float, h: float, noise: Noise) -> Tensor:
    """Weak order 2 for every noise: Kloeden & Platen 1992, eq. 15.1.3, with time as one more coordinate.

    With b_j the columns of g, Y = x + h f + sum_j b_j w_j, R_r = x + h f +- b_r sqrt(h) and U_r = x +- b_r sqrt(h), the
    drift is averaged over x and Y, and b_j takes the part of its change that R_j and U_r, r != j, show. It needs g at
    4 d + 1 places, and f at 2.
    """
    f, g, dim = equation.drift(x, t), equation.diffusion(x, t), x.shape[1]
    g = g[:, None].expand_as(x) if g.dim() == 1 else g
    w, root = noise.increments, h**0.5
    areas = h * (noise.signs - torch.eye(dim, dtype=x.dtype, device=x.device))
    total, skewed = 4 * g, torch.zeros_like(x)
    for r in range(dim):
        column = torch.zeros_like(x)
        if g.dim() == 3:
            column = g[:, :, r]
        else:
            column[:, r] = g[:, r]
        up, down = (
            _with_column(
                equation.diffusion(x + sign * root * column, t),
                equation.diffusion(x + h * f + sign * root * column, t + h),
                r,
                g,
            )
            for sign in (1, -1)
        )
        total = total + up + down - 2 * g
        skewed = skewed + act(up - down, w * w[:, r : r + 1] + areas[:, r])
    following = equation.drift(x + h * f + act(g, w), t + h)
    return x + 0.5 * h * (f + following) + 0.25 * (act(total, w) + skewed / root)


def _with_column(others: Tensor, own: Tensor, r: int, like: Tensor) -> Tensor:
    """`others` with the column `r` of `own`, in the form of g, (B, d) or (B, d, d)."""
    others, own = (v[:, None].expand_as(like) if v.dim() == 1 else v for v in (others, own))
    mask = torch.zeros(like.shape[-1], dtype=torch.bool, device=like.device)
    mask[r] = True
    return torch.where(mask, own, others)


SCHEMES: dict[int, Callable[[FokkerPlanck, Tensor, float, float, Noise], Tensor]] = {1: euler_maruyama, 2: platen}


def simulate(
    equation: FokkerPlanck,
    x: Tensor,
    times: Sequence[float] | Tensor,
    steps: int,
    generator: torch.Generator | None,
    order: int,
) -> Tensor:
    """See FokkerPlanck.simulate."""
    times = rising(times)
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"simulate has steps={steps}, expected a whole number of at least 1")
    if not isinstance(x, Tensor) or x.dim() != 2 or not len(x) or not x.is_floating_point():
        kind = f"{shown(x)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"paths start from {kind}, expected points (B, d), floating-point, one or more")
    if order not in SCHEMES:
        raise UserError(f"simulate has order={order}, expected a weak order of {' or '.join(map(str, SCHEMES))}")
    paths, halved = [x], _Halved(equation, x, order)
    for start, stop in itertools.pairwise(times):
        h = (stop - start) / steps
        for n in range(steps):
            noise = _noise(x, h, order, generator)
            halved.step(start + n * h, h, noise.increments)
            x = SCHEMES[order](equation, x, start + n * h, h, noise)
            if lost := int((~x.isfinite()).any(1).sum()):
                raise UserError(
                    f"{lost} of {len(x)} paths are not finite at t={start + (n + 1) * h:.6g}, after steps of {h:.3g}; "
                    "take more steps"
                )
        paths.append(x)
        halved.compare(x, stop)
    halved.warn(steps, stacklevel=3)
    return torch.stack(paths)


class _Halved:
    """Some of the paths by two steps for each of theirs, with the same Wiener processes: the laws must agree."""

    def __init__(self, equation: FokkerPlanck, x: Tensor, order: int):
        self.equation, self.order = equation, order
        number = min(len(x), max(LEAST, len(x) // 8), FOLLOWED)
        self._rows = slice(0, None, -(-len(x) // max(1, number)) or 1)
        self._start = self._x = x[self._rows].detach()
        self._reach = x.new_zeros(())  # the largest mean distance from the start
        self._generator = torch.Generator(x.device).manual_seed(0)  # of how the processes go between two steps
        self._worst, self._at = 0.0, 0.0

    @torch.no_grad()
    def step(self, t: float, h: float, increments: Tensor) -> None:
        """Go on by `h`, with the whole step's `increments` (B, d): halves, and a Brownian bridge between."""
        bridge = _noise(self._x, h / 4, self.order, self._generator)
        for sign, begin in ((1, t), (-1, t + h / 2)):
            signs = bridge.signs if sign > 0 else _noise(self._x, h, self.order, self._generator).signs
            noise = Noise(increments[self._rows] / 2 + sign * bridge.increments, signs)
            self._x = SCHEMES[self.order](self.equation, self._x, begin, h / 2, noise)
        self._reach = torch.maximum(self._reach, (self._x - self._start).abs().mean(0))

    @torch.no_grad()
    def compare(self, x: Tensor, t: float) -> None:
        """Keep by how much mean and standard deviation of `x` (B, d) are off, by Richardson's rule, if it is more.

        In standard deviations, or in mean distances from the start where these are 0; less what may be chance.
        """
        x, y = x[self._rows], self._x
        scale, gap = y.std(0, correction=0), x - y
        scale = torch.where(scale > 0, scale, self._reach)
        chance = min(DOUBT / len(x) ** 0.5, 0.5) * gap.std(0, correction=0)
        off = torch.maximum(gap.mean(0).abs(), (x.std(0, correction=0) - y.std(0, correction=0)).abs()) - chance
        off = off.clamp_min(0) / (1 - 0.5**self.order)
        figures = torch.where(off > 0, off / scale, 0.0)
        if not float(figures.max()) <= self._worst:
            self._worst, self._at = float(figures.max()), t

    def warn(self, steps: int, stacklevel: int) -> None:
        """Warn where that is more than ASTRAY."""
        if not self._worst <= (ASTRAY if len(self._x) >= FEW else GROSS):
            warnings.warn(
                f"the mean or standard deviation of the paths at t={self._at:.6g} is off by at least {self._worst:.2g} "
                f"standard deviations, because {steps} steps are too few; take {2 * steps} or more",
                RuntimeWarning,
                stacklevel=stacklevel + 1,
            )


def _noise(x: Tensor, h: float, order: int, generator: torch.Generator | None) -> Noise:
    options = {"dtype": x.dtype, "device": x.device}
    increments = h**0.5 * torch.randn(x.shape, generator=generator, **options)
    if order == 1:
        return Noise(increments, x.new_zeros(()))
    coins = torch.randint(0, 2, (*x.shape, x.shape[1]), generator=generator, **options)
    upper = (2 * coins - 1).triu(1)
    return Noise(increments, upper - upper.mT)


def follow(
    equation: FokkerPlanck,
    x: Tensor,
    times: Sequence[float] | Tensor,
    score: Callable[[Tensor, float], Tensor],
    tolerance: float = 1e-8,
) -> Tensor:
    """See `FokkerPlanck.follow`."""
    times = torch.as_tensor(times, dtype=x.dtype, device=x.device).reshape(-1)
    gaps = times.diff()
    if not len(times) or not (bool((gaps > 0).all()) or bool((gaps < 0).all())):
        raise UserError(f"times are {times.tolist()}, expected rising or falling ones")
    if not tolerance > 0:
        raise UserError(f"tolerance is {tolerance}, expected a positive number")
    if len(times) == 1:
        return x[None]
    reached = float(times[0])

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        nonlocal reached
        reached, s = float(t), score(x, float(t))
        found = equation.velocity(x, t, s)
        if not bool(torch.isfinite(s).all()):
            bad = int((~torch.isfinite(s)).any(1).nonzero()[0])
            raise UserError(f"the score is not finite at t={reached:.6g}, x={x[bad].tolist()}")
        return found

    with torch.no_grad():
        # No step goes beyond the times, where the equation may not be defined.
        try:
            return odeint(velocity, x, times, rtol=tolerance, atol=tolerance, options={"step_t": times[1:]})
        except AssertionError as error:  # torchdiffeq's, when a step is as good as 0
            raise UserError(
                f"the probability flow cannot be followed beyond t={reached:.6g}: {error}; does the velocity grow "
                "without bound there?"
            ) from error
