"""A score learned by a network, which goes on learning as the particles move."""

from __future__ import annotations

import copy
import math
import tempfile
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion import checkpoints
from diffusion.data import TensorData
from diffusion.errors import UserError
from diffusion.gradient_flow.scores.base import ScoreEstimator
from diffusion.gradient_flow.scores.kernel_family import Frame
from diffusion.networks import MLP
from diffusion.objectives import Batch
from diffusion.trainer import Trainer

FIRST = Trainer(
    steps=400, batch_size=256, learning_rate=2e-3, warmup=20, ema_decay=0.95, checkpoint_every=20, test_examples=4096
)
TESTS = 2000  # at least so many points, with repetitions, are held out


@dataclass(frozen=True)
class Denoising:
    """Denoising score matching (Vincent 2011) of s(v) = n(v) - v at one noise level, of a law of unit covariance.

    Noisy points v = (u + sigma e) / c with c^2 = 1 + sigma^2 have unit covariance again, so a Gaussian's score stays -v
    at every sigma. Each point is taken with e and with -e: the mean of |s|^2 / 2 + c s . e / sigma over the two has a
    variance that stays finite as sigma goes to 0, where it becomes |s|^2 / 2 + e . grad (s . e), whose mean is the loss
    of score matching (Song et al. 2019, arXiv 1905.07088).
    """

    noise: float

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        u, c = batch.x, math.sqrt(1 + self.noise**2)
        e = torch.randn(u.shape, generator=batch.generator, device=u.device, dtype=u.dtype)
        v = torch.cat([u + self.noise * e, u - self.noise * e]) / c
        first, second = (network(v, no_level(v)) - v).chunk(2)
        return (first.square() + second.square()) / 4 + c * e * (first - second) / (2 * self.noise)


def no_level(v: Tensor) -> Tensor:
    """Noise features (B, 2) of a network that knows one noise level only."""
    return v.new_zeros(len(v), 2)


@dataclass(frozen=True)
class NetworkScore(ScoreEstimator):
    """grad log q = root^-T (n(u) - u), u the whitened particles: their Gaussian's score, corrected by a network n.

    The network is trained by denoising score matching when it is fitted, and from then on further with each fit; n
    begins at 0. A share of the particles is held out, and of the checkpoints the one of the lowest loss there is kept:
    a network that is trained for longer learns the particles by heart. Where the flow asks for the score between fits
    the particles are whitened anew, so that what is Gaussian of it is always that of the particles.

    Args:
        trainer: of the first fit.
        refit_steps: updates of each later fit.
        noise: standard deviation of the noise in whitened coordinates.
        held_out: share of the particles that tells when to stop, drawn anew with each fit.
        width, depth: of the network, an MLP.
        network: as trained so far.

    Raises:
        UserError: an option is out of its range; the particles span no volume; it was never fitted; a value, as there
            is a score only.
    """

    trainer: Trainer = FIRST
    refit_steps: int = 20
    noise: float = 0.1
    held_out: float = 0.2
    width: int = 64
    depth: int = 2
    network: MLP | None = None

    def __post_init__(self):
        if not isinstance(self.refit_steps, int) or self.refit_steps < 1:
            raise UserError(f"refit_steps is {self.refit_steps!r}, expected a whole number of 1 or more")
        if not 0 < self.noise < math.inf:
            raise UserError(f"noise is {self.noise}, expected a positive number")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}, expected a share of the particles, between 0 and 1")

    def fitted(self, particles, generator=None):
        u = Frame.of(particles.detach()).u.float()
        trainer = self._trainer(generator)
        order = torch.randperm(len(u), generator=torch.Generator().manual_seed(trainer.seed)).to(u.device)
        tests, points = u[order].tensor_split([max(1, round(self.held_out * len(u)))])
        tests = tests.repeat(-(-TESTS // len(tests)), 1)
        network = self._new(u.shape[1], trainer.seed) if self.network is None else copy.deepcopy(self.network)
        network = network.train().requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            network = trainer.fit(
                network, Denoising(self.noise), TensorData(points), folder, TensorData(tests), progress=False
            )
            checkpoints.load_weights(network, checkpoints.read_tensors(f"{folder}/best", "model"), folder)
        return replace(self, network=network.requires_grad_(False).to(u.device))

    def _trainer(self, generator: torch.Generator | None) -> Trainer:
        trainer = self.trainer
        if self.network is not None:
            steps = self.refit_steps
            every = min(trainer.checkpoint_every, steps)
            trainer = replace(trainer, steps=steps, warmup=min(trainer.warmup, steps // 2), checkpoint_every=every)
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
            trainer = replace(trainer, seed=seed)
        return trainer

    def value(self, particles):
        raise self._no_density()

    def log_density(self, particles):
        raise self._no_density()

    @torch.no_grad()
    def score(self, particles):
        if self.network is None:
            raise UserError("the score network has learned nothing yet; call fitted(particles), or run a flow")
        frame = Frame.of(particles)
        u = frame.u.float()
        score = frame.unwhitened(self.network(u, no_level(u)).to(frame.u) - frame.u)
        return score.to(particles.dtype).view(particles.shape)

    def _new(self, dim: int, seed: int) -> MLP:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return MLP((dim,), self.width, self.depth)

    @staticmethod
    def _no_density() -> UserError:
        return UserError(
            "a score network knows no density, expected an estimator with a value such as Blob() or GaussianScore()"
        )
