"""Whether the steps of a run with noise were short enough, by the particles that it ended with."""

import warnings
from collections.abc import Callable

from torch import Tensor

EXCESS = 5.0
"""Times what noise balances: a pull so strong, at steps that do not reduce it, is of a law as far off."""


def warn_of_steps(
    particles: Tensor, drift: Tensor, noise: float, size: float, longest: Callable[[float], float]
) -> None:
    """Warn, from `Flow.finish`, of steps so long that particles go apart, or stay, where the drift draws them together.

    With the drift D, A = -E D.(x - m) and B = E |D - E D|^2, a step h of Euler takes the spread S = E |x - m|^2 of the
    particles x about their mean m to

        S - 2 h A + h^2 B + 2 h tau tr P,

    whatever D is: nearer only where h (B / A) < 2, and at rest where h (B / A) / 2 = 1 - tau tr P / A. In the law that
    drift and noise have in common A is tau tr P (by parts: the virial theorem), so particles at rest with A above
    EXCESS times that have a law that is as far off; of those on the way to rest, of which A may be anything, short
    steps have h (B / A) << 1. Where D is linear B / A is a mean of its rates: of steps that are unstable, the rate in
    whose direction alone particles go apart.

    Particles that are one, or in one place, say nothing.

    Args:
        drift: D at the particles, (N, *shape).
        noise: tau tr P.
        size: h of the last step.
        longest: rate L -> the longest step that is stable where D = -L x.
    """
    x, drift = particles.flatten(1), drift.flatten(1)
    gaps = x - x.mean(0)
    unit = float(gaps.abs().max())  # squares of what has grown for long are infinite
    gaps, drift = gaps / unit, (drift - drift.mean(0)) / unit
    inwards = -float((drift * gaps).sum(1).mean())
    if not inwards * unit * unit > EXCESS * noise:
        return
    rate = float(drift.square().sum(1).mean()) / inwards
    if size > (1 - 1 / EXCESS) * longest(rate):
        warnings.warn(
            f"the steps are too long: the particles are {unit * float(gaps.square().sum(1).mean()) ** 0.5:.3g} from "
            f"their mean, and a step of {size:.3g} takes them no nearer to it, where the drift draws them at the rate "
            f"{rate:.3g}; a step_size divided by {2 * size / longest(rate):.3g} would do there",
            stacklevel=4,
        )
