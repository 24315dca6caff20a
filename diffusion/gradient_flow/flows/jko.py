"""The JKO scheme: implicit steps of the Wasserstein flow, by a map that is trained."""

import copy
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.flows.langevin import Noised, split_of
from diffusion.gradient_flow.functionals.base import Functional, check_finite, points_of
from diffusion.objectives import Batch
from diffusion.randomness import derive_seed
from diffusion.trainer import Trainer

LARGEST_DIM = 32
"""Coordinates up to which log determinants are affordable: each takes d derivatives and d^3 operations a particle."""

TRAINER = Trainer(steps=200, batch_size=256, learning_rate=1e-2, warmup=10, ema_decay=0.95, checkpoint_every=10**6)


@dataclass(frozen=True)
class Proximal:
    """What a JKO flow carries from step to step.

    Attributes:
        network: n of the last step's map T(x) = x + tau n(x).
        transport: E|T(x) - x|^2 / (2 tau) of the last step.
        change: F[T#q] - F[q] in it; nan where the value cannot be computed.
        total: the sum of all changes so far, F less what it was at the start.
    """

    network: nn.Module
    transport: float = 0.0
    change: float = 0.0
    total: float = 0.0

    @property
    def objective(self) -> float:
        """What the step minimised, less what it is where nothing moves: below 0."""
        return self.transport + self.change


@dataclass(frozen=True)
class JKO(Flow):
    r"""Each step is the proximal map, found over maps T(x) = x + tau n(x) with a network n.

    .. math:: \min_T \; E_q |T(x) - x|^2 / (2 \tau) + F[T_\# q]

    (Jordan, Kinderlehrer and Otto 1998; by a network, Mokrov et al. 2021, arXiv:2106.00736). The entropy of T#q is
    exact, E log q - E log|det grad T|, and no density is estimated. All other terms enter by their velocity at the
    moved points of a batch: the gradient of F[T#q] in the weights is that of -E[v(T(x)).T(x)] with v held fixed. What a
    functional learned, or drew at random, is that of the particles before the step. `Moment.memory`, a `Proximal`, has
    the objective and the value's change along the flow; moment.value() leaves the entropy to its estimator.

    Args:
        functional: what falls.
        network: n, (B, *shape) -> (B, *shape), smooth, 0 at the start or nearly so; its dtype is that of the training.
            Each step starts from the map of the last. It is not changed.
        trainer: of each step; its batches are the particles that a velocity sees at once.
        first: of the first step, which has more to learn; None: `trainer`.

    Raises:
        UserError: in a run, the network's output is not like its input; with an entropy, more than 32 coordinates or a
            map that folds space over.
    """

    functional: Functional
    network: nn.Module
    trainer: Trainer = TRAINER
    first: Trainer | None = None

    def subject(self):
        return split_of(self.functional)

    def begin(self, particles):
        dim = points_of(particles).shape[1]
        if self.subject().entropies and dim > LARGEST_DIM:
            raise UserError(
                f"particles have {dim} coordinates, expected at most {LARGEST_DIM} for the log determinants of a JKO "
                "step with an entropy; take Langevin or WassersteinFlow"
            )
        with torch.no_grad():
            found = self.network(particles[:2].to(next(self.network.parameters())))
        if found.shape != particles[:2].shape:
            raise UserError(
                f"the map's network has output {tuple(found.shape)}, expected {tuple(particles[:2].shape)}, as its "
                "input"
            )
        return Proximal(self.network)

    def advance(self, moment, step_size, generator):
        x, split, memory = moment.particles, moment.functional, moment.memory
        if split.rest.terms() and not bool(split.rest.velocity(x).isfinite().all()):
            check_finite(split.rest, x, moment.step)
        objective = JKOObjective(split, step_size)
        trainer = self.trainer if moment.step else self.first or self.trainer
        trainer = replace(trainer, seed=derive_seed(trainer.seed, "step", moment.step))
        network = copy.deepcopy(memory.network).train().requires_grad_(True)
        points = _Points(x.to(next(network.parameters())))
        with tempfile.TemporaryDirectory() as folder:
            network = trainer.fit(network, objective, points, folder, progress=False).requires_grad_(False)
        moved, log_det = objective.moved(network, x)
        transport = float((moved - x).flatten(1).square().sum(1).mean()) / (2 * step_size)
        try:
            change = float(split.rest.value(moved) - split.rest.value(x)) - split.temperature * float(log_det.mean())
        except UserError:
            change = math.nan
        memory = Proximal(network, transport, change, memory.total + change)
        return replace(moment, particles=moved, time=moment.time + step_size, memory=memory)


class JKOObjective:
    """|n|^2 / 2 - v(x + tau n).n - temperature log|det grad T| / tau, one number a point (B,), with v held fixed.

    Its gradient in the weights is that of the step's objective on the batch, over tau.

    Args:
        split: entropies and the other terms.
        step_size: tau.
    """

    def __init__(self, split: Noised, step_size: float):
        self.split, self.step_size = split, step_size

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        tau, x = self.step_size, batch.x
        if self.split.entropies:
            slope, jacobian = _with_jacobian(network, x)
            log_det = torch.linalg.slogdet(_eye(jacobian) + tau * jacobian).logabsdet
        else:
            slope, log_det = network(x), x.new_zeros(len(x))
        velocity = self.split.rest.velocity((x + tau * slope).detach())
        kinetic = slope.flatten(1).square().sum(1) / 2
        return kinetic - (slope * velocity).flatten(1).sum(1) - self.split.temperature * log_det / tau

    def moved(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """T(x) (N, *shape) and log det grad T (N,), 0 without an entropy.

        Raises:
            UserError: a determinant is not positive.
        """
        inputs = x.to(next(network.parameters()))
        if not self.split.entropies:
            with torch.no_grad():
                return x + self.step_size * network(inputs).to(x), x.new_zeros(len(x))
        with torch.no_grad():
            parts = [_with_jacobian(network, part) for part in inputs.split(1024)]
        slope, jacobian = (torch.cat(part) for part in zip(*parts, strict=True))
        sign, log_det = torch.linalg.slogdet(_eye(jacobian) + self.step_size * jacobian)
        if not bool((sign > 0).all()):
            raise UserError(
                f"the map folds space over at particle {int((sign <= 0).nonzero()[0])}, expected a positive "
                "determinant everywhere; take a smaller step_size or a lower learning rate"
            )
        return x + self.step_size * slope.to(x), log_det.to(x)


def _with_jacobian(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """n(x) (B, *shape) and dn/dx (B, d, d)."""
    shape = x.shape[1:]

    def one(point: Tensor) -> tuple[Tensor, Tensor]:
        value = network(point.view(1, *shape))[0]
        return value.flatten(), value

    jacobian, value = torch.func.vmap(torch.func.jacrev(one, has_aux=True))(x.flatten(1))
    return value, jacobian


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class _Points:
    """The particles as data of the trainer, in the dtype of the network."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device) -> "_Points":
        return _Points(self.values.to(device))

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, None]]:
        for indices in order:
            yield self.values[indices.to(self.values.device)], None
