"""The log ratio log p/q of the target's density to that of the particles."""

import copy
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion.data.base import TensorData, fixed_split
from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import check_data, points_of
from diffusion.objectives import Batch, DensityRatio
from diffusion.randomness import derive_seed
from diffusion.trainer import Trainer

TRAINER = Trainer(
    steps=100, batch_size=256, learning_rate=1e-2, warmup=10, weight_decay=0.5, ema_decay=0.98, checkpoint_every=20
)


class Ratio(ABC):
    """log p/q of a target p and the law q of the particles that it was fitted to."""

    @abstractmethod
    def log_ratio(self, particles: Tensor) -> Tensor:
        """log p/q (N,) at `particles` (N, *shape), differentiable in them."""

    def fitted(self, particles: Tensor, generator: torch.Generator | None = None) -> "Ratio":
        """The ratio to the law of these particles, from what is known so far."""
        return self


@dataclass(frozen=True)
class GivenRatio(Ratio):
    """A ratio that stays as it is.

    Args:
        function: (N, *shape) -> (N,).
    """

    function: Callable[[Tensor], Tensor]

    def log_ratio(self, particles):
        return self.function(particles)


class RatioNetwork(nn.Module):
    """x^T A x + n(x), (B, *shape) -> (B,), with n smooth, of two hidden layers: 0 at the start.

    The quadratic form is all that the ratio of two Gaussians needs, and what n lacks far from the points.

    Args:
        shape: of a point.
        width: of the hidden layers.
        seed: of the first weights.
    """

    def __init__(self, shape: Sequence[int], width: int = 128, seed: int = 0):
        super().__init__()
        dim = math.prod(shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layers = [nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
        self.body, self.form = nn.Sequential(*layers), nn.Parameter(torch.zeros(dim, dim))
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.body(x)[:, 0] + (x @ self.form * x).sum(1)


@dataclass(frozen=True)
class ClassifierRatio(Ratio):
    """The logit of a classifier of data against particles (Sugiyama, Suzuki and Kanamori 2012, ch. 4).

    One in ten of both sets, always the same, is held out. Of the averaged weights at each of the trainer's checkpoints,
    and of those before training, the ones with the least loss there are kept, so that a ratio that starts to know
    single points is not used. Training starts from the weights of the last time.

    Args:
        data: draws of p, (M, *shape), M at least 2.
        network: (B, *shape) -> (B,) or (B, 1), float32, smooth; None: RatioNetwork. It is not changed.
        trainer: of each fit. checkpoint_every is how often weights are compared.
        first: of the first fit, which has more to learn; None: `trainer` with three times the steps.
        fits: how often it was fitted.

    Raises:
        UserError: no such data; the network's output has another shape; log_ratio before the first fit; particles of
            another shape than the data.
    """

    data: Tensor
    network: nn.Module | None = None
    trainer: Trainer = TRAINER
    first: Trainer | None = None
    fits: int = 0

    def __post_init__(self):
        check_data(self.data)
        if len(self.data) < 2:
            raise UserError(f"data is of {len(self.data)} point, expected at least 2: one is held out")
        network = RatioNetwork(self.data.shape[1:], seed=self.trainer.seed) if self.network is None else self.network
        with torch.no_grad():
            found = tuple(network(self._inputs(network, self.data[:2])).shape)
        if found not in ((2,), (2, 1)):
            raise UserError(f"the ratio's network has output {found} for 2 points, expected (2,) or (2, 1)")
        object.__setattr__(self, "network", network)

    def log_ratio(self, particles):
        if self.fits == 0:
            raise UserError("the ratio was never fitted; call fitted(particles) on the functional, or run a flow")
        self._check(particles)
        return self.network(self._inputs(self.network, particles)).view(-1).to(particles)

    def fitted(self, particles, generator=None):
        """Trained to tell the data from `particles`; the order of the examples differs from fit to fit."""
        self._check(particles)
        trainer = self.trainer if self.fits else self.first or replace(self.trainer, steps=3 * self.trainer.steps)
        trainer = replace(trainer, seed=derive_seed(trainer.seed, "fit", self.fits))
        sets = [(self.data, 1), (particles.detach(), 0)]
        train, test = (
            _pool([(points[fixed_split(len(points))[part]], label) for points, label in sets]) for part in (0, 1)
        )
        objective = DensityRatio(len(self.data), len(particles))
        network = copy.deepcopy(self.network).train().requires_grad_(True)
        best = _Best(objective, test)
        best(0, copy.deepcopy(network).eval())
        with tempfile.TemporaryDirectory() as folder:
            trainer.fit(network, objective, train, folder, callbacks=[best], progress=False)
        return replace(self, network=best.network.requires_grad_(False), fits=self.fits + 1)

    def _check(self, particles: Tensor) -> None:
        points_of(particles)
        if particles.shape[1:] != self.data.shape[1:]:
            raise UserError(
                f"particles have shape {tuple(particles.shape[1:])}, expected {tuple(self.data.shape[1:])}, as the data"
            )

    @staticmethod
    def _inputs(network: nn.Module, points: Tensor) -> Tensor:
        return points.to(next(network.parameters()))


class _Best:
    """Keeps the weights with the least loss on held-out examples."""

    def __init__(self, objective: DensityRatio, data: TensorData):
        self.objective, self.data = objective, data
        self.loss, self.network = float("inf"), None

    @torch.no_grad()
    def __call__(self, step: int, network: nn.Module) -> None:
        device = next(network.parameters()).device
        parts = torch.arange(len(self.data)).split(4096)
        total = sum(
            float(self.objective(network, Batch(x.to(device), label.to(device), None)).sum())
            for x, label in self.data.batches(parts)
        )
        if total < self.loss:
            self.loss, self.network = total, copy.deepcopy(network)


def _pool(sets: list[tuple[Tensor, int]]) -> TensorData:
    points = torch.cat([points.float().cpu() for points, _ in sets])
    return TensorData(points, torch.cat([torch.full((len(points),), label) for points, label in sets]), 2)
