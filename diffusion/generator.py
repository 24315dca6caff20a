"""A generator: a field and the network that has learned it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion import checkpoints, specs
from diffusion.conditional_score import flaw
from diffusion.conditions import class_labels
from diffusion.errors import UserError
from diffusion.fields import AffineField, Field, Gaussian, conversions
from diffusion.likelihood import EXACT_DIVERGENCE, likelihood
from diffusion.preconditioning import MeasuredPreconditioner, Preconditioner
from diffusion.samplers import Heun, Motion, generate
from diffusion.samplers.base import Sampler


class Prediction(NamedTuple):
    """The network's estimate of the field's target, and the size of the error that it is expected to make."""

    target: Tensor  # (B, *shape)
    error: Tensor  # (B, 1, ...): losses are measured in this unit
    score: Tensor | None = None  # (B, *shape), where the network has an output for it
    score_error: Tensor | None = None  # (B, 1, ...)


@runtime_checkable
class Headed(Protocol):
    """A network that says how many outputs it has: one, or a second one for the score."""

    heads: int


def learns_score(field: Field, shape: Sequence[int]) -> bool:
    """Whether a score can be learned beside the velocity, in points of this shape.

    That is so for every field with a density that has neither jumps nor poles (diffusion.conditional_score), but for
    Gaussian noise, for which the score follows from the velocity.
    """
    return flaw(field, shape) is None


def _law(field: Field) -> str:
    return type(field.base if isinstance(field, AffineField) else field).__name__


@specs.recorded
class Generator(nn.Module):
    """A field and a network: velocity, denoised, noise, score and samples, all of the marginal law of the data.

    Times are numbers or (B,), points (B, *shape), labels (B,). Results have the dtype of x; the network keeps its own.

    Args:
        field: any field; denoised and noise need an affine one.
        network: network(x, noise, label) -> output like x, with `num_classes` (see diffusion.networks). With heads=2
            the second output is the score, which for a Gaussian base follows from the first.
        shape: of one data point, such as (1, 8, 8).
    """

    def __init__(self, field: Field, network: nn.Module, shape: Sequence[int]):
        super().__init__()
        self.field, self.network, self.shape = field, network, tuple(shape)
        self.num_classes = network.num_classes
        self.heads = network.heads if isinstance(network, Headed) else 1
        if self.heads not in (1, 2):
            raise UserError(f"the network has heads={self.heads}, expected 1, or 2 to learn a score")
        wrap = Preconditioner if isinstance(field, AffineField) else MeasuredPreconditioner
        self.precondition = wrap(field, self.shape, score=self.heads == 2)

    def calibrate(self, x0: Tensor) -> "Generator":
        """Take the moments of the data, on which the preconditioning rests, from a sample (N, *shape) of it.

        Raises:
            UserError: the network has a second output, and the field no score that it could learn.
        """
        self._check(x0)
        if self.heads == 2 and (why := flaw(self.field, self.shape)):
            found = f"there is no score to learn, {_law(self.field)}: {why}"
            raise UserError(f"the network has heads=2, expected 1: {found}")
        self.precondition.calibrate(x0)
        return self

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Prediction:
        """The conditional mean of the field's target, with the unit in which its error is to be measured."""
        c, score = self.precondition.with_score(x, t) if self.heads == 2 else (self.precondition(x, t), None)
        dtype = next(self.network.parameters()).dtype
        output = self.network((c.scale * c.y).to(dtype), c.noise.to(dtype), label).to(x.dtype)
        first, *rest = output.chunk(self.heads, dim=1)
        target = c.offset + c.skip * c.y + c.out * first
        if score is None:
            return Prediction(target, c.out)
        return Prediction(
            target, c.out, (score.offset + score.skip * c.y + score.out * rest[0]) / score.unit, score.out / score.unit
        )

    def estimate(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> conversions.Estimate:
        """Denoised, noise and velocity together, for one evaluation of the network.

        Raises:
            UserError: the field is not affine; only then are the three linear in each other.
        """
        self._check(x)
        if not isinstance(self.field, AffineField):
            kind = type(self.field).__name__
            raise UserError(f"the field is {kind}, expected an affine one; the others have a velocity only")
        return conversions.from_denoised(self.field.schedule(x, t), x, self(x, t, label).target)

    def denoised(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """E[x0|x_t = x]."""
        return self.estimate(x, t, label).denoised

    def noise(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """E[z|x_t = x]."""
        return self.estimate(x, t, label).noise

    def velocity(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """f_t(x) = E[f_t(x|x0)|x]."""
        self._check(x)
        return self.field.velocity_from_target(x, t, self(x, t, label).target)

    def score(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Tensor:
        """grad log p_t(x).

        Raises:
            UserError: the field is not affine with a Gaussian base, for which alone the score is linear in the denoised
                mean, and the network has no output for it.
        """
        return self.velocity_and_score(x, t, label).score

    def velocity_and_score(self, x: Tensor, t: Tensor | float, label: Tensor | None = None) -> Motion:
        """Both for one evaluation of the network; as `velocity` and `score`."""
        self._check(x)
        if isinstance(self.field, AffineField) and isinstance(self.field.base, Gaussian):
            estimate = self.estimate(x, t, label)
            return Motion(estimate.velocity, conversions.score_from_noise(self.field.schedule(x, t), estimate.noise))
        if self.heads == 1:
            learns = learns_score(self.field, self.shape)
            remedy = "train one with heads=2 (model.heads=2)" if learns else "take a sampler of the ODE"
            raise UserError(
                f"the law of the noise is {_law(self.field)}, expected Gaussian: for others the velocity gives no "
                f"score, and this network has no output for it; {remedy}"
            )
        prediction = self(x, t, label)
        return Motion(self.field.velocity_from_target(x, t, prediction.target), prediction.score)

    def completed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored weights, and what those lack that were stored before a base law's information was."""
        name = "precondition.information"
        before = self.heads == 2 and isinstance(self.precondition, Preconditioner) and name not in weights
        return {**weights, name: torch.tensor(0.0)} if before else dict(weights)

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.shape:
            raise UserError(f"points have shape {tuple(x.shape)}, expected (B, {', '.join(map(str, self.shape))})")

    def sample(
        self,
        number: int,
        sampler: Sampler | None = None,
        seed: int = 0,
        label: Tensor | int | None = None,
        batch_size: int = 1024,
        progress: bool = False,
    ) -> Tensor:
        """`number` samples (number, *shape), float32 on the CPU; images are in [-1, 1] up to the network's error.

        Args:
            sampler: Heun(steps=18) unless given.
            seed: sample i depends on (seed, i) alone, not on `number` or `batch_size`.
            label: one class for all, or (number,).
            batch_size: samples in memory at a time.
        """
        return generate(
            self, (number, *self.shape), sampler or Heun(), seed, self.labels(label, number), batch_size, progress
        )

    def log_likelihood(
        self,
        x: Tensor,
        label: Tensor | int | None = None,
        t: float = 0.0,
        tolerance: float = 5e-4,
        exact_dim: int = EXACT_DIVERGENCE,
        probes: int = 4,
        seed: int = 0,
        batch_size: int = 256,
    ) -> Tensor:
        """log p_t(x) (B,) in nats, float64 on the device of x; `diffusion.likelihood` gives its error as well.

        Args:
            x: (B, *shape); images must be dequantised.
            label: one class for all, or (B,).
            t: 0 for the law of the data, or a time up to the horizon.
            tolerance: of each step of the integration, in nats.
            exact_dim: coordinates up to which the divergence is exact; beyond, an estimate with `probes` and `seed`.
            batch_size: points in memory at a time.
        """
        self._check(x)
        label = self.labels(label, len(x))
        conditions = {} if label is None else {"label": label.to(self.device)}
        randomness = torch.Generator().manual_seed(seed)
        options = {"tolerance": tolerance, "exact_dim": exact_dim, "probes": probes, "batch_size": batch_size}
        found = likelihood(self, x.to(self.device), t, generator=randomness, **options, **conditions)
        return found.nats.to(x.device)

    def labels(self, label: Tensor | int | None, number: int) -> Tensor | None:
        """`label` for each of `number` samples, (number,); None stays None. Raises as `class_labels`."""
        return class_labels(label, number, self.num_classes)

    @property
    def device(self) -> torch.device:
        return self.precondition.centre.device

    @property
    def data_std(self) -> float:
        """Standard deviation per coordinate of the data, which samplers ask for."""
        return float(self.precondition.std)

    @property
    def data_mean(self) -> Tensor | None:
        """Mean of the data (*shape), which samplers ask for; None where classes have means of their own."""
        known = isinstance(self.precondition, Preconditioner) and not self.num_classes
        return self.precondition.centre if known else None

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint from which `load` rebuilds this generator."""
        checkpoints.write(folder, {"model": specs.describe(self)}, {"model": self.state_dict()})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        trust: str | Sequence[str] | None = None,
        **parts: AffineField | nn.Module,
    ) -> "Generator":
        """The generator of a checkpoint, in evaluation mode.

        Args:
            folder: written by `save` or by training, such as outputs/.../checkpoints/last.
            trust: a module of the user's own, or several, such as "my_module", whose functions and classes the
                checkpoint may name. They are imported and called; nothing else outside of this package is.
            parts: ``field`` or ``network``, where these are a user's own objects, which no file can hold.

        Raises:
            UserError: there is no checkpoint, it is damaged, it is not of a generator, or it names what is neither
                part of this package nor of `trust`.
        """
        return checkpoints.restore(folder, (cls,), device, trust, parts)
