"""Does a velocity carry the data along the field's path? The weak continuity equation, asked of a trained network.

For every test function phi, d/dt E[phi(x_t)] = E[v(x_t, t) . grad phi(x_t)] if the velocity v moves the marginal law
of the field's own x_t. The left side is E[f_t(x_t|x0) . grad phi(x_t)], exactly, so that no sampling by the network
and no differences in time are needed: the residual is the mean of (f_t(x_t|x0) - v(x_t, t)) . grad phi(x_t) over draws
of (x0, x_t). It vanishes for v = E[f|x], whose error at single points may be large.

This is a diagnostic of where a network violates continuity. It does not measure the quality of samples.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.special import ndtri
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.bumps import Bumps
from diffusion.samplers.base import Model

CHANCE = 1e-3  # that an exact velocity exceeds the limit somewhere
ROUNDING = 1e-10  # of the flux; a standard error that is smaller says nothing


@dataclass(frozen=True)
class Audit:
    """Residuals of the weak continuity equation by time.

    Attributes:
        times: (L,), rising, even in the field's clock.
        z: (L, F) residual of each test function in standard errors; normal of variance 1 for an exact velocity.
        share: (L,) root mean square residual over that of f . grad phi; the part due to chance is subtracted.
        draws: of (x0, x_t) at each time.
    """

    times: Tensor
    z: Tensor
    share: Tensor
    draws: int

    @property
    def limit(self) -> float:
        """What the largest |z| of an exact velocity exceeds with probability CHANCE."""
        return float(-ndtri(CHANCE / (2 * self.z.numel())))

    def table(self) -> str:
        """One line for each time: mean square of z, largest |z|, share of the flux that is missing."""
        lines = [f"{'time':>10} {'rms z':>8} {'max |z|':>8} {'share':>8}"]
        for t, z, share in zip(self.times.tolist(), self.z, self.share.tolist(), strict=True):
            largest = float(z.abs().max())
            mark = "  violated" if largest > self.limit else ""
            lines.append(f"{t:>10.4g} {float(z.square().mean().sqrt()):>8.2f} {largest:>8.1f} {share:>8.2%}{mark}")
        about = f"{self.z.shape[1]} test functions, {self.draws:,} draws a time"
        lines.append(
            f"in standard errors; {about}; an exact velocity has rms z near 1 and max |z| below {self.limit:.1f}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        rms = self.z.square().mean(1).sqrt()
        columns = {"time": self.times, "rms_z": rms, "max_z": self.z.abs().amax(1), "share": self.share}
        rows = [dict(zip(columns, row, strict=True)) for row in torch.stack(list(columns.values()), 1).tolist()]
        return {"draws": self.draws, "functions": self.z.shape[1], "limit": self.limit, "times": rows}


@torch.no_grad()
def audit(
    model: Model,
    x0: Tensor,
    times: int = 16,
    draws: int = 8192,
    functions: int = 64,
    seed: int = 0,
    batch_size: int = 1024,
) -> Audit:
    """Weak-form residuals of `model.velocity` along the path of the data `x0` under `model.field`.

    Test functions are Bumps of y = (x - c) / s, with c the mean of the data and s the size of x_t - c. Half of the
    waves have random directions, half the directions between two data points, along which the marginal law has its
    structure; their lengths vary from 1/2 to 8 in units of y.

    Args:
        x0: (N, *shape), the data that the velocity is to carry; the marginal law is that of x_t from a random one.
        times: from t_min to the horizon, even in the field's clock.
        draws: of (x0, x_t) at each time.
    """
    if len(x0) < 2 or times < 2 or draws < 2 or functions < 1 or batch_size < 1:
        got = f"{len(x0)} data points, {times} times, {draws} draws, {functions} functions, batch_size {batch_size}"
        raise UserError(f"cannot audit with {got}; expected at least 2, 2, 2, 1 and 1")
    device, field = model.device, model.field
    randomness = torch.Generator().manual_seed(seed)
    x0 = x0.double().cpu()
    centre, dim = x0.mean(0), x0[0].numel()
    wave = torch.randn(functions, dim, generator=randomness, dtype=torch.float64)
    i, j = torch.randint(len(x0), (2, functions // 2), generator=randomness)
    gap = (x0[i] - x0[j]).flatten(1)
    wave[: functions // 2] = gap.where(gap.norm(dim=1, keepdim=True) > 0, wave[: functions // 2])
    length = 0.5 * 16 ** torch.rand(functions, 1, generator=randomness, dtype=torch.float64)
    phase = math.tau * torch.rand(functions, generator=randomness, dtype=torch.float64)
    phi = Bumps(torch.ones_like(phase), wave / wave.norm(dim=1, keepdim=True) * length, phase)
    clock = field.clock(times)
    z, share = [], []
    for t in clock.tolist():
        pilot = field.sample(x0[torch.randint(len(x0), (1024,), generator=randomness)], t, randomness)
        scale = float((pilot - centre).flatten(1).square().mean(1).median().sqrt())
        residual, flux = [], []
        for start in range(0, draws, batch_size):
            number = min(batch_size, draws - start)
            origin = x0[torch.randint(len(x0), (number,), generator=randomness)]
            x = field.sample(origin, t, randomness)
            v = model.velocity(x.to(device), torch.full((number,), t, dtype=x.dtype, device=device)).to(x)
            f = field.velocity(x, t, origin)
            y = (x - centre).flatten(1) / scale
            residual.append(phi.slope(y, (f - v).flatten(1) / scale))
            flux.append(phi.slope(y, f.flatten(1) / scale))
        residual, flux = torch.cat(residual), torch.cat(flux)
        rounding = ROUNDING * flux.square().mean().sqrt()
        error = (residual.std(0) / math.sqrt(draws)).clamp_min(rounding)
        z.append(residual.mean(0) / error)
        excess = (residual.mean(0).square() - error.square()).mean().clamp_min(0)
        share.append((excess / flux.square().mean()).sqrt())
    return Audit(clock, torch.stack(z), torch.stack(share), draws)
