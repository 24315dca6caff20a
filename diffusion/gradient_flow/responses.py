"""What a scheme of Langevin dynamics makes of a Gaussian under a quadratic potential: its bias, without sampling."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Moment
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.metrics.gaussians import GaussianLaw


def gaussian_laws(flow: Langevin, start: GaussianLaw, steps: int, step_size: float) -> list[GaussianLaw]:
    """The exact law of the particles before the first and after each of `steps` steps of `flow`.

    Each step is affine in particles and noise where the drift is affine. So a run of 1 + d + R particles, one for the
    mean, one for each coordinate of the start and one for each of the R normal numbers that a particle of the run
    meets, shows what the scheme, as it is programmed, makes of each of them; the mean and covariance follow.

    Args:
        flow: its functional has a drift that is affine and of each particle alone, its preconditioner is constant.
        start: of the particles, in float64.

    Raises:
        UserError: the run is not affine.
    """
    root, dim = torch.linalg.cholesky(start.covariance), len(start.mean)
    numbers = _count(flow, start.mean, steps, step_size)
    rows = 1 + dim + numbers * dim
    particles = start.mean.repeat(rows + 1, 1)
    particles[1 : 1 + dim] += root.T
    particles[rows] += root.sum(1)  # the last particle meets everything at once: a check
    met = 0

    def normal(like: Tensor) -> Tensor:
        nonlocal met
        noise = torch.zeros_like(like)
        first = 1 + dim + met * dim
        noise[first : first + dim] = torch.eye(dim, dtype=like.dtype)
        noise[rows] = 1.0
        met += 1
        return noise

    laws = []
    for moment in _run(flow, particles, steps, step_size, normal):
        mean, change = moment.particles[0], moment.particles[1:rows] - moment.particles[0]
        error = (moment.particles[rows] - mean - change.sum(0)).abs().max()
        if not error <= 1e-9 * (1 + change.abs().sum(0).max()):
            raise UserError(
                f"the steps are not affine, by {error:.2g}, expected a quadratic potential and no Metropolis"
            )
        laws.append(GaussianLaw(mean, change.T @ change))
    return laws


def _run(
    flow: Langevin, particles: Tensor, steps: int, step_size: float, normal: Callable[[Tensor], Tensor]
) -> Iterator[Moment]:
    def uniform(like: Tensor) -> Tensor:
        return torch.full_like(like[:, 0], 0.5)

    moment = Moment(particles, flow.subject().fitted(particles), memory=flow.begin(particles))
    yield moment
    for _ in range(steps):
        moment = flow.stepped(moment, step_size, normal, uniform)
        yield moment


def _count(flow: Langevin, mean: Tensor, steps: int, step_size: float) -> int:
    """Normal numbers that a coordinate meets."""
    calls = 0

    def normal(like: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(like)

    for _ in _run(flow, mean[None], steps, step_size, normal):
        pass
    return calls
