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
    "variance_exploding": variance_exploding,
    "variance_preserving": variance_preserving,
    "linear": linear,
    "gravity": gravity,
}


class Problem(NamedTuple):
    model: GaussianMixture
    x_T: Tensor  # (B, 2) at the horizon
    x_0: Tensor  # (B, 2) the field's estimate from the state at t_min


@functools.cache
def solved(name: str, **options) -> Problem:
    """Six samples of the three-mode mixture, by an eighth-order method with tolerance 1e-13 in the logarithm of t.

    Args:
        options: of the field, such as t_min. With t_min=1e-6 the estimate is the limit at t = 0 to twelve digits.
    """
    model = mixture(BUILD[name](2, **options))
    field = model.field
    x_T = field.sample_prior((6, 2), torch.Generator().manual_seed(2), dtype=torch.float64)

    def slope(u, x):
        t = np.exp(u)
        return t * model.velocity(torch.from_numpy(x).view(-1, 2), t).flatten().numpy()

    ends = np.log([field.horizon, field.t_min])
    solution = solve_ivp(slope, ends, x_T.flatten().numpy(), "DOP853", rtol=1e-13, atol=1e-13)
    assert solution.success
    x = torch.from_numpy(solution.y[:, -1]).view(-1, 2)
    return Problem(model, x_T, model.denoised(x, field.t_min))


def error(sampler, problem: Problem) -> float:
    """Root mean square distance from the solution."""
    return float((sampler(problem.model, problem.x_T) - problem.x_0).square().sum(1).mean().sqrt())
