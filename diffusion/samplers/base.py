"""What samplers share: the call, the loop over a time grid, the count of evaluations, and sampling in batches.

A model is any object with ``.field`` and ``.velocity(x, t, **conditions)``: a Generator, an exact field, one's own.
States are float64 (float32 on devices without it); the model casts to its own precision. Samplers that draw random
numbers take them from a torch.Generator, or from one for each sample.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.errors import UserError
from diffusion.fields.base import Field
from diffusion.randomness import derive_seed
from diffusion.samplers.arc import data_mean, data_std
from diffusion.samplers.grids import Grid, PowerGrid, a_grid
from diffusion.samplers.scores import Joint, Motion, motion

Velocity = Callable[[Tensor, Tensor], Tensor]

MOST = 1_000_000  # of any whole number that is an option


class Model(Protocol):
    """What a sampler integrates; `device` is asked for by `generate` only."""

    field: Field
    device: torch.device

    def velocity(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The velocity (B, *shape) at `x` (B, *shape) and the times `t` (B,)."""


class Counted:
    """A model that counts how often it is evaluated: `evaluations` in batches, `points` in points.

    Velocity and score together count as one where the model gives both at once.
    """

    def __init__(self, model: Model):
        self.model, self.field = model, model.field
        self.data_std, self.data_mean = data_std(model), data_mean(model)
        self.evaluations = self.points = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    def velocity(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        self._count(1, x)
        return self.model.velocity(x, t, **conditions)

    def score(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        self._count(1, x)
        return self.model.score(x, t, **conditions)

    def velocity_and_score(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Motion:
        self._count(1 if isinstance(self.model, Joint) else 2, x)
        return motion(self.model, x, t, **conditions)

    def _count(self, number: int, x: Tensor) -> None:
        self.evaluations += number
        self.points += number * len(x)


Randomness = torch.Generator | Sequence[torch.Generator] | None


class Sampler(ABC):
    """From the prior at T to the data; most go to t_min and end with the field's estimate from there."""

    @abstractmethod
    def __call__(self, model: Model, x_T: Tensor, generator: Randomness = None, **conditions: Any) -> Tensor:
        """Data (B, *shape) from prior draws `x_T` (B, *shape), in the dtype of `x_T`.

        Args:
            generator: of the random numbers, or one for each sample; for samplers that draw any. None is torch's own.
            conditions: passed to the model, such as ``label``.

        Raises:
            UserError: a state stops being finite; the message names the sample and the time.
        """


def shaped(value: object, name: str, x: Tensor) -> Tensor:
    """`value` (B, *shape) itself, of a model asked at `x` (B, *shape).

    Raises:
        UserError: it is no tensor, or of another shape.
    """
    if not isinstance(value, Tensor) or value.shape != x.shape:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise UserError(
            f"{name}(x, t) of the model has {found} for x of shape {tuple(x.shape)}, expected a tensor like x"
        )
    return value


def started(x_T: Tensor) -> Tensor:
    """Prior draws in the precision of states.

    Raises:
        UserError: they are no batch of floating-point points.
    """
    if x_T.dim() < 2 or len(x_T) == 0 or not x_T.is_floating_point():
        raise UserError(
            f"x_T has shape {tuple(x_T.shape)} and type {x_T.dtype}, expected (B, *shape) with B at least 1, "
            "floating-point"
        )
    return x_T.to(state_dtype(x_T.device))


def finite(value: Tensor, name: str, t: Tensor | float) -> Tensor:
    """`value` (B, *shape) itself.

    Raises:
        UserError: some of it is not finite; the message names the first such sample and the time.
    """
    _check(torch.isfinite(value).flatten(1).all(1)[None], torch.as_tensor(t).expand(1, len(value)), name)
    return value


def _check(finite: Tensor, times: Tensor, name: str) -> None:
    """Raise an error that names the first evaluation, and in it the first sample, that is not `finite`, both (n, B)."""
    if not bool(finite.all()):
        evaluation, sample = (~finite).nonzero()[0].tolist()
        t = float(times[evaluation, sample])
        raise UserError(f"{name} of sample {sample} is not finite at t={t:.4g}; try more steps")


class Outcome(NamedTuple):
    """What a solver has made of a batch, and at each evaluation whether the velocity was finite."""

    x_0: Tensor  # (B, *shape)
    finite: Tensor  # (evaluations, B)
    times: Tensor  # (evaluations, B)

    def checked(self) -> Tensor:
        """x_0.

        Raises:
            UserError: a velocity was not finite; the message names the sample and the time.
        """
        _check(self.finite, self.times, "velocity")
        return self.x_0


class Evaluations:
    """The velocity of a model, with a record of where it is finite that stays on the device: nothing waits for it."""

    def __init__(self, model: Model, conditions: dict[str, Any]):
        self.model, self.conditions, self.finite, self.times = model, conditions, [], []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x).expand(len(x))
        velocity = shaped(self.model.velocity(x, t, **self.conditions), "velocity", x)
        self.finite.append(torch.isfinite(velocity).flatten(1).all(1))
        self.times.append(t)
        return velocity

    def outcome(self, x_0: Tensor) -> Outcome:
        return Outcome(x_0, torch.stack(self.finite), torch.stack(self.times))


class ODESampler(Sampler):
    """Integrates dx/dt = f_t(x); nothing is random but the prior draw.

    Whether the velocities were finite is asked once, at the end.
    """

    @abstractmethod
    def solve(self, velocity: Velocity, x: Tensor, model: Model) -> Tensor:
        """x_0 of the ODE that has state `x` at the horizon; of the model, its field and std are asked for only."""

    @torch.no_grad()
    def __call__(self, model: Model, x_T: Tensor, generator: Randomness = None, **conditions: Any) -> Tensor:
        velocity = Evaluations(model, conditions)
        x_0 = self.solve(velocity, started(x_T), model)
        return velocity.outcome(x_0).checked().to(x_T.dtype)


class PlannedSampler(ODESampler):
    """A sampler that knows before it starts where it will evaluate: a plan of tensors, and a loop that follows it.

    The loop asks for no values, so that a device never waits for the host in it, and diffusion.samplers.capture can
    make it one CUDA graph.
    """

    @abstractmethod
    def plan(self, model: Model, x: Tensor) -> tuple:
        """Times, weights and what else the loop takes from states `x` at the horizon, in the dtype and on the device
        of `x`: a named tuple of tensors, or of tuples of them, the same in shape for states of the same shape.
        """

    @abstractmethod
    def follow(self, plan: tuple, velocity: Velocity, x: Tensor, field: Field) -> Tensor:
        """x_0 of the ODE that has state `x` at the horizon."""

    def solve(self, velocity: Velocity, x: Tensor, model: Model) -> Tensor:
        return self.follow(self.plan(model, x), velocity, x, model.field)


def whole(value: int, name: str, least: int) -> None:
    """Check an option that is a whole number.

    Raises:
        UserError: it is not, less than the least, or more than MOST.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"sampler has {name}={value!r}, expected a whole number")
    if value < least:
        raise UserError(f"sampler has {name}={value}, expected at least {least}")
    if value > MOST:
        raise UserError(f"sampler has {name}={value}, expected at most {MOST}")


def state_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class Stops(NamedTuple):
    """The plan of a sampler that stops at the times of a grid."""

    times: Tensor  # (steps,)


@dataclass(frozen=True)
class FixedStep(PlannedSampler):
    """The loop of all ODE samplers that stop at the times of a grid.

    Args:
        steps: number of times from T to t_min; the last step, from t_min to the data, is the field's endpoint, so
            there are steps - 1 steps of the method.
        grid: rule that lays the times.
    """

    steps: int = 18
    grid: Grid = field(default_factory=PowerGrid)
    order = 0  # global order of convergence, declared by each method

    def __post_init__(self):
        whole(self.steps, "steps", 2)
        a_grid(self.grid)

    @abstractmethod
    def step(self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at `t_next` from the state `x` at `t`."""

    def plan(self, model: Model, x: Tensor) -> Stops:
        return Stops(self.grid(model.field, self.steps).to(x))

    def follow(self, plan: Stops, velocity: Velocity, x: Tensor, field: Field) -> Tensor:
        for t, t_next in itertools.pairwise(plan.times):
            x = self.step(velocity, x, t, t_next)
        return endpoint(velocity, x, field, plan.times[-1])


def endpoint(velocity: Velocity, x: Tensor, field: Field, t: Tensor) -> Tensor:
    """The field's estimate of x_0 from the state at `t`, 0-dimensional or (B,): one evaluation."""
    return field.endpoint(x, t, velocity(x, t))


def generate(
    model: Model,
    size: Sequence[int],
    sampler: Sampler,
    seed: int = 0,
    label: Tensor | None = None,
    batch_size: int = 1024,
    progress: bool = False,
) -> Tensor:
    """`size` = (N, *shape) samples, float32 on the CPU.

    Each sample's prior draw is made on the CPU from its own place in the stream of `seed`, and what a stochastic
    sampler draws on the way from a stream of its own, so that with a fixed-step sampler sample i is the same whatever
    the batch size, the number of samples and the device, up to rounding. So it is with AdaptiveMultistep; Adaptive
    controls the error of the batch as a whole, so there it is the same up to the tolerance.

    Args:
        label: (N,) classes, for a conditional model.
        batch_size: samples in memory at a time.
    """
    number = size[0]
    if number < 1 or batch_size < 1:
        raise UserError(f"cannot draw {number} samples in batches of {batch_size}; expected positive numbers")
    randomness = torch.Generator().manual_seed(seed)
    one, done = (1, *size[1:]), []
    with tqdm(total=number, unit="samples", disable=not progress, leave=False) as bar:
        for start in range(0, number, batch_size):
            part = slice(start, min(start + batch_size, number))
            draws = [model.field.sample_prior(one, randomness, dtype=torch.float64) for _ in range(number)[part]]
            x = torch.cat(draws).to(device=model.device, dtype=state_dtype(model.device))
            conditions = {} if label is None else {"label": label[part].to(model.device)}
            own = [torch.Generator().manual_seed(derive_seed(seed, "path", start + i)) for i in range(len(x))]
            try:
                x_0 = sampler(model, x, own, **conditions)
            except UserError as error:
                if start == 0:
                    raise
                raise UserError(f"in the batch from sample {start} on, {error}") from error
            done.append(x_0.to(device="cpu", dtype=torch.float32))
            bar.update(len(x))
    return torch.cat(done)
