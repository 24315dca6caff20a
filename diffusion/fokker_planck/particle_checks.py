"""Where particles are not to be trusted: steps too long, scores that do not fit, particles that run away."""

import warnings

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fokker_planck.learned_score import LearnedScore

FAR = 1e8  # times the particles' first distance from 0: there they have run away
COARSE = 0.1  # nats: the error of the steps in time that is warned of
ASTRAY = 0.1  # standard deviations: the same of the places


def step_error(now: Tensor, then: Tensor, h: float) -> float:
    """Size of the error of Heun's step of `h` in the log density, nats, from its rates at both ends (N,).

    The difference to Euler's step, times the share by which the rates change.
    """
    change = (then - now).abs().mean() / 2
    return float(h * change.square() / (now.abs().mean() + change).clamp_min(1e-300))


def place_error(now: Tensor, then: Tensor, h: float, before: Tensor, after: Tensor) -> float:
    """Size of the error of Heun's step of `h` in the places, from the velocities (N, d) at both ends.

    As `step_error`, for each coordinate, in units of the smaller of the places' standard deviations `before` and
    `after` (N, d); that of the worst coordinate. Where steps grow instead of decay it is above 1 at each of them.
    """
    speed, change = now.square().mean(0).sqrt(), (then - now).square().mean(0).sqrt() / 2
    scale = torch.minimum(before.std(0), after.std(0)).clamp_min(1e-300)
    return float((h * change.square() / (speed + change).clamp_min(1e-300) / scale).max())


def warn_of_steps(error: float, astray: float, t: float, steps: int, dim: int) -> None:
    """Warn where the sum of all steps' errors up to `t` is too large.

    Args:
        error: in the log density, warned of above COARSE, or a tenth of that for each coordinate.
        astray: in the places, see `place_error`, warned of above ASTRAY.
    """
    if not (error <= COARSE * max(1.0, 0.1 * dim) and astray <= ASTRAY):
        warnings.warn(
            f"the log densities at t={t:.6g} are off by about {error:.2g}, and the places by {astray:.2g} standard "
            f"deviations, because {steps} steps are too few for this drift; take {2 * steps} or more",
            RuntimeWarning,
            stacklevel=3,
        )


def warn_of_score(x: Tensor, score: LearnedScore, t: float) -> None:
    """Warn where a score is not that of the law of `x` (N, d), which it never saw: E s . (x - m) = -d (Stein).

    By more than 10 % and 4 standard errors; m is the score's own mean.
    """
    values, dim = (score(x) * (x - score.mean)).sum(1), x.shape[1]
    found, error = float(values.mean()), float(values.std() / len(x) ** 0.5) if len(x) > 1 else 0.0
    if not abs(found + dim) <= max(0.1 * dim, 4 * error):
        warnings.warn(
            f"the score learned at t={t:.6g} does not fit the particles: E s.(x - m) is {found:.3g}, expected {-dim}; "
            "take more particles, more steps, or a larger hidden",
            RuntimeWarning,
            stacklevel=3,
        )


def check_places(
    x: Tensor, log_density: Tensor, score: Tensor, t: float, h: float, n: int = 0, far: float = torch.inf
) -> None:
    """Raise where what moves the particles is not finite, or some have gone further than `far` from 0.

    Args:
        h: length of the step that led there.
        n: its number, from 0.
    """
    fine = torch.cat([x, log_density[:, None], score], 1).isfinite().all(1) & (x.abs().amax(1) <= far)
    if lost := int((~fine).sum()):
        raise UserError(
            f"{lost} of {len(fine)} particles have a place, density or score that is not finite at t={t:.6g}, after a "
            f"step of {h:.3g} (step {n + 1}); take more steps, or check the drift and the start law"
        )
