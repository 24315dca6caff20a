"""Further problems with a full matrix of noise, for the tests of the grid solver."""

import dataclasses

import torch

from diffusion.fokker_planck import FokkerPlanck
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.problems import Problem

SHEAR = torch.tensor([[1.2, 0.0], [0.7, 0.5]], dtype=torch.float64)


def sheared(problem: Problem, g: torch.Tensor = SHEAR) -> Problem:
    """The same stationary density, with the constant noise g (d, d): f = a grad log p / 2."""
    a = g @ g.T

    def drift(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(problem.log_stationary(x).sum(), x)
        return slope @ a.T / 2

    equation = FokkerPlanck(drift, lambda x, t: g.expand(len(x), -1, -1))
    return dataclasses.replace(problem, equation=equation)


def bent_noise() -> Problem:
    """Noise along and across a direction that turns with the place; the stationary density is exp(-|x|^2 / 2)."""

    def g(x):
        angle = 0.4 * x[:, 0] + 0.3 * x[:, 1].sin()
        along = torch.stack([angle.cos(), angle.sin()], 1)
        across = torch.stack([-angle.sin(), angle.cos()], 1)
        return torch.stack([1.2 * along, 0.6 * across], 2)

    def covariance(x, t):
        return g(x) @ g(x).mT

    def drift(x, t):
        total = torch.zeros_like(x)
        for j in range(2):
            direction = torch.zeros_like(x)
            direction[:, j] = 1
            total = total + torch.func.jvp(lambda x: covariance(x, t), (x,), (direction,))[1][:, :, j]
        return (total - (covariance(x, t) @ x[:, :, None])[:, :, 0]) / 2

    return Problem(
        FokkerPlanck(drift, lambda x, t: g(x)),
        gaussian([0.8, -0.5], 0.5),
        ((-5.0, 5.0), (-5.0, 5.0)),
        1.0,
        log_stationary=lambda x: -x.square().sum(1) / 2,
    )
