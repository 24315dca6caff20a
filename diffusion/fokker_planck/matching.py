"""The weak form as an objective of the shared trainer: a drift is learned from samples at several times."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.data.base import TensorData
from diffusion.errors import UserError
from diffusion.fokker_planck.equation import FokkerPlanck, Function
from diffusion.fokker_planck.scaled_functions import Samples, frame
from diffusion.fokker_planck.snapshots import Snapshots
from diffusion.fokker_planck.test_functions import RandomFourier
from diffusion.objectives import Batch


def paired(samples: Samples) -> TensorData:
    """Data for the trainer: K snapshots (K, N, d) as N examples (K, d), one point of each time, float32."""
    if not isinstance(samples, Tensor):
        number = min(map(len, samples))
        samples = torch.stack([part[:number] for part in samples])
    return TensorData(samples.transpose(0, 1).float().contiguous())


class WeakMatching:
    """Squared weak residuals of a network f(x, t), estimated without bias from examples (K, d).

    At each step random waves phi and random cosines psi of time are drawn. The residual of one example,

        r = [psi phi](T) - [psi phi](0) - int psi' phi + psi (f . grad phi + 1/2 tr(g g^T Hess phi)) dt,

    has a mean that vanishes for the right f. The mean over pairs of different examples of r_i r_j is the square of it,
    in which the variance of r has no part; single losses, and their mean near the end, may be negative.

    The weak form determines f up to what moves no density: f p_t is known up to fields without divergence.

    Args:
        samples: those of the training, for the centre and scale of the waves.
        times: K of them, rising; the integral uses no others, and `weak_residual` tells whether they suffice.
        diffusion: g, as in `FokkerPlanck`.
        functions: how many are drawn a step.
        shortest, longest: waves, in radians a standard deviation.
        half_turns: the largest number of half periods of psi over all times.
    """

    def __init__(
        self,
        samples: Samples,
        times: Sequence[float] | Tensor,
        diffusion: Function,
        functions: int = 64,
        shortest: float = 0.5,
        longest: float = 4.0,
        half_turns: int = 2,
    ):
        snapshots = Snapshots(samples, times)
        _, self.centre, self.scale = frame(samples)
        self.times = torch.tensor(snapshots.times, dtype=torch.float64)
        self.weights, _ = snapshots.integral(None)
        self.equation = FokkerPlanck(lambda x, t: torch.zeros_like(x), diffusion)
        self.functions, self.shortest, self.longest = functions, shortest, longest
        if half_turns < 0 or functions < 1:
            raise UserError(f"WeakMatching has functions={functions} and half_turns={half_turns}, expected 1 and 0 up")
        self.half_turns = half_turns

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """r_i times the mean of the other r_j, (B, functions)."""
        x = batch.x
        if x.dim() != 3 or x.shape[1] != len(self.times) or len(x) < 2:
            expected = f"two or more of ({len(self.times)}, {len(self.centre)})"
            raise UserError(f"examples have shape {tuple(x.shape)}, expected {expected}: one point of each time")
        random = batch.generator
        phi = RandomFourier.drawn(
            self.centre.to(random.device),
            self.scale.to(random.device),
            self.functions,
            random,
            self.shortest,
            self.longest,
        )
        ends, inner = self._time_factors(random)
        points = x.flatten(0, 1)
        t = self.times.to(x).repeat(len(x))
        with torch.no_grad():
            noise = torch.stack([self._curvature(phi, x[:, k], k) for k in range(x.shape[1])], 1)
            value = phi.value(points).view_as(noise)
        slope = phi.slope(points, network(points, t)).view_as(noise)
        residual = (ends.to(x) * value - inner.to(x) * (slope + noise)).sum(1)
        return residual * (residual.sum(0) - residual) / (len(residual) - 1)

    def _time_factors(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(K, functions): what phi and L phi are multiplied with at each time."""
        options = {"generator": random, "device": random.device}
        turns = torch.randint(self.half_turns + 1, (self.functions,), **options)
        phase = math.tau * torch.rand(self.functions, dtype=torch.float64, **options)
        times, weights = self.times.to(random.device), self.weights.to(random.device)[:, None]
        rate = math.pi * turns / (times[-1] - times[0])
        angle = (times - times[0])[:, None] * rate + phase
        psi = angle.cos()
        ends = weights * rate * angle.sin()
        ends[0], ends[-1] = ends[0] - psi[0], ends[-1] + psi[-1]
        return ends, weights * psi

    def _curvature(self, phi: RandomFourier, x: Tensor, k: int) -> Tensor:
        return phi.curvature(x, self.equation.covariance(x, self.times[k]))
