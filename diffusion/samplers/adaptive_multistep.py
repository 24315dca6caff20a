"""Adaptive multistep integration, for each sample on its own."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.adaptive_adams import Arrived, integrate, root_mean_square
from diffusion.conditions import of_points
from diffusion.errors import UserError
from diffusion.samplers.arc import Arc, data_std, noise_scales
from diffusion.samplers.base import Model, Randomness, Sampler, shaped, started, whole
from diffusion.samplers.clock import Clock
from diffusion.samplers.on_arc import compare

BAND, SCALE = (0.4, 3.0), 1.0  # of the clock and the arc, in std of the data, by measurement in 2 and 64 dimensions

LARGEST = 0.01  # correction by the corrector, of x / radius, whatever the tolerance


@dataclass(frozen=True)
class AdaptiveMultistep(Sampler):
    """Adams methods of variable step and order (diffusion.adaptive_adams) for x / radius (diffusion.samplers.arc).

    Each sample has its own steps, orders, error control and end; the model is called with those that are still on
    their way. So samples that cross between modes get the evaluations that they need and the others are not slowed
    down, an error is not hidden in the mean over a batch, and a sample is the same, up to rounding, whatever batch it
    is in. The clock log((t + a) / (t + b)), between the noise of 0.4 and 3 std of the data, spreads the features of
    the ODE, and no step is longer than a twentieth of it, so that none passes over all modes unseen. Where the std that
    is told or assumed is far from that of the samples, there is a warning.

    On Gaussian mixtures of 2 and 64 dimensions the defaults take 31 to 51 evaluations of a sample, 43 to 66 calls of
    the model. The median error is one tolerance; root mean square errors are mostly 1e-5 to 1e-4, and at most 4.2e-4,
    since the few samples near a border between modes magnify what they are off by (benchmarks/samplers.py).

    Args:
        rtol, atol: tolerances of one step, relative and absolute, of x / radius in the root mean square over the
            coordinates of a sample.
        max_evaluations: for a sample. When these are spent, the field's estimate of the data from where the sample is
            is returned, with a warning.
        std: as for Multistep.
    """

    rtol: float = 5.5e-6
    atol: float = 5.5e-6
    max_evaluations: int = 1000
    std: float | None = None

    def __post_init__(self):
        if not (math.isfinite(self.rtol + self.atol) and min(self.rtol, self.atol) >= 0 < max(self.rtol, self.atol)):
            raise UserError(f"sampler has rtol={self.rtol} and atol={self.atol}, expected positive numbers")
        if self.std is not None and not self.std > 0:
            raise UserError(f"sampler has std={self.std}, expected a positive number, or null")
        whole(self.max_evaluations, "max_evaluations", 4)

    @torch.no_grad()
    def __call__(self, model: Model, x_T: Tensor, generator: Randomness = None, **conditions: Any) -> Tensor:
        """Conditions that are tensors (B, ...) go with their samples, as labels do; others are for all."""
        start, shape, field = started(x_T), x_T.shape, model.field
        std, noise = self.std or data_std(model), noise_scales(model.field, start)
        clock = Clock.of_noise(field, tuple(level * std for level in BAND), noise)

        def places(t: Tensor, index: Tensor):
            return Arc(field, SCALE * std, noise[index] if len(noise) > 1 else noise).at(t)

        def velocity(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            """(b, n) at `x` (b, n) and the times `t` (b, 1)."""
            some = of_points(conditions, index, len(start))
            x = x.view(-1, *shape[1:])
            value = shaped(model.velocity(x, t[:, 0].to(x), **some), "velocity", x).to(x).flatten(1)
            bad = (~value.isfinite()).any(1).nonzero()[:, 0].cpu()
            if len(bad):
                raise UserError(
                    f"velocity of sample {int(index[bad[0]])} is not finite at t={float(t[bad[0]]):.4g} "
                    f"({len(bad)} such); expected finite ones"
                )
            return value

        def slope(u: Tensor, y: Tensor, index: Tensor) -> Tensor:
            own = clock.rows(index)
            t = own.times(u[:, None])
            at = places(t, index)
            x = y * at.radius.to(y)
            return (velocity(x, t, index) - at.drift.to(x) * x) * (own.rate(t) / at.radius).to(x)

        def ratio(off: Tensor, y: Tensor, index: Tensor) -> Tensor:
            return root_mean_square(off) / (self.atol + self.rtol * root_mean_square(y))

        everyone = torch.arange(len(start))
        t_T = clock.times(torch.zeros(1, 1, dtype=torch.float64)).expand(len(start), 1)
        y = start.flatten(1) / places(t_T, everyone).radius.to(start)
        arrived = integrate(slope, y, ratio, self.max_evaluations - 1, LARGEST)
        t = clock.times(arrived.u[:, None])
        if bool((arrived.u < 1).any()):
            self._warn(arrived, t[:, 0])
        x = arrived.y * places(t, everyone).radius.to(start)
        value, x = velocity(x, t, everyone).view(shape), x.view(shape)
        x_0 = field.endpoint(x, t[:, 0].to(x), value)
        if bool((arrived.u == 1).all()):
            compare(x_0, std, stacklevel=3)
        return x_0.to(x_T.dtype)

    def _warn(self, arrived: Arrived, t: Tensor) -> None:
        short = (arrived.u < 1).nonzero()[:, 0]
        where = t[short]
        warnings.warn(
            f"{len(short)} of {len(t)} samples, the first of them sample {int(short[0])}, stopped at "
            f"t={float(where.min()):.4g} to {float(where.max()):.4g} after {self.max_evaluations - 1} of "
            f"{self.max_evaluations} evaluations: all are spent; the results are the field's estimates from "
            "there. Raise max_evaluations, rtol or atol",
            stacklevel=4,
        )
