"""What the samplers are tested on: exact problems, and their solutions to nearly the last digit."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from problems import GaussianMixture, mixture
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.fields import gravity, linear, variance_exploding, variance_preserving

BUILD = {
    "variance_exploding": lambda: variance_exploding(2),
    "variance_preserving": lambda: variance_preserving(2),
    "linear": lambda: linear(2),
    "gravity": lambda: gravity(2),
}


class Problem(NamedTuple):
    model: GaussianMixture
    x_T: Tensor  # (B, 2) at the horizon
    x: Tensor  # (B, 2) at t_min


@functools.cache
def solved(name: str) -> Problem:
    """Six samples of the three-mode mixture, by an eighth-order method with tolerance 1e-13 in the logarithm of t."""
    model = mixture(BUILD[name]())
    field = model.field
    x_T = field.sample_prior((6, 2), torch.Generator().manual_seed(2), dtype=torch.float64)

    def slope(u, x):
        t = np.exp(u)
        return t * model.velocity(torch.from_numpy(x).view(-1, 2), t).flatten().numpy()

    ends = np.log([field.horizon, field.t_min])
    solution = solve_ivp(slope, ends, x_T.flatten().numpy(), "DOP853", rtol=1e-13, atol=1e-13)
    assert solution.success
    return Problem(model, x_T, torch.from_numpy(solution.y[:, -1]).view(-1, 2))


def error(sampler, problem: Problem) -> float:
    """Root mean square distance of the state at t_min from the solution."""
    x = sampler.integrate(problem.model.velocity, problem.x_T, problem.model.field)
    return float((x - problem.x).square().sum(1).mean().sqrt())
