"""Denoised, noise, velocity and score of an affine field: all conversions between them, and nowhere else.

Given (x, t), the conditional means of x0 ("denoised"), z ("noise") and of the velocity obey two linear equations,

    x        = alpha  denoised + sigma  noise
    velocity = alpha' denoised + sigma' noise

for every base law, because x_t is linear in (x0, z). The same equations hold without the means, for one x0.
"""

from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """What is known of the field line through x, (B, *shape) each."""

    denoised: Tensor
    noise: Tensor
    velocity: Tensor


def from_denoised(schedule, x: Tensor, denoised: Tensor) -> Estimate:
    """Noise and velocity from E[x0|x]. `schedule` holds alpha, sigma, alpha_dot, sigma_dot at t."""
    noise = (x - schedule.alpha * denoised) / schedule.sigma
    return Estimate(denoised, noise, schedule.alpha_dot * denoised + schedule.sigma_dot * noise)


def from_noise(schedule, x: Tensor, noise: Tensor) -> Estimate:
    """Denoised and velocity from E[z|x]; undetermined where alpha is 0."""
    denoised = (x - schedule.sigma * noise) / schedule.alpha
    return Estimate(denoised, noise, schedule.alpha_dot * denoised + schedule.sigma_dot * noise)


def from_velocity(schedule, x: Tensor, velocity: Tensor) -> Estimate:
    """Denoised and noise from the velocity. The determinant is positive because sigma / alpha rises."""
    determinant = schedule.alpha * schedule.sigma_dot - schedule.sigma * schedule.alpha_dot
    denoised = (schedule.sigma_dot * x - schedule.sigma * velocity) / determinant
    noise = (schedule.alpha * velocity - schedule.alpha_dot * x) / determinant
    return Estimate(denoised, noise, velocity)


def score_from_noise(schedule, noise: Tensor) -> Tensor:
    """grad log p_t(x) = -E[z|x] / sigma: for a Gaussian base only (Tweedie's formula)."""
    return -noise / schedule.sigma


def noise_from_score(schedule, score: Tensor) -> Tensor:
    """E[z|x] from the score: for a Gaussian base only."""
    return -schedule.sigma * score
