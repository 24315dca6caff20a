"""Adaptive integration by torchdiffeq."""

from dataclasses import dataclass

import torch
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from diffusion.errors import UserError
from diffusion.samplers.base import Sampler


@dataclass(frozen=True)
class Adaptive(Sampler):
    """Any method of torchdiffeq, in the field's clock u = t^(1/rho).

    In t itself a field that runs over decades (80 to 0.002) has all its features in the last thousandth: the error
    estimate of the first step sees none of them, and the solver jumps over everything. In the clock they are spread
    evenly. Fixed-step methods of torchdiffeq take `steps` equal steps of the clock.

    Args:
        method: of torchdiffeq, such as dopri5, dopri8, bosh3, rk4.
        rtol, atol: tolerances of one step, relative and absolute.
        steps: for torchdiffeq's fixed-step methods.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int = 40

    def __post_init__(self):
        if self.method not in SOLVERS:
            raise UserError(f"method is {self.method!r}, expected one of torchdiffeq's: {', '.join(sorted(SOLVERS))}")

    def integrate(self, velocity, x, field):
        rho = field.rho
        ends = torch.tensor([field.horizon, field.t_min], dtype=x.dtype, device=x.device)

        def even_steps(slope, x, u):
            grid = torch.linspace(float(u[0]), float(u[-1]), self.steps + 1, dtype=u.dtype, device=u.device)
            grid[0], grid[-1] = u[0], u[-1]
            return grid

        def slope(u, x):
            t = u.pow(rho).clamp(field.t_min, field.horizon)
            return velocity(x, t) * (rho * u.pow(rho - 1))

        fixed = issubclass(SOLVERS[self.method], FixedGridODESolver)
        options = {"grid_constructor": even_steps} if fixed else None
        span = ends ** (1 / rho)
        return odeint(slope, x, span, rtol=self.rtol, atol=self.atol, method=self.method, options=options)[-1]
