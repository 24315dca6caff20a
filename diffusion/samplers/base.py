"""What samplers share: the call, the loop over a time grid, the count of evaluations, and sampling in batches.

A model is any object with ``.field`` and ``.velocity(x, t, **conditions)``: a Generator, an exact field, one's own.
States are float64 (float32 on devices without it); the model casts to its own precision.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.errors import UserError
from diffusion.fields.base import Field
from diffusion.samplers.grids import Grid, PowerGrid

Velocity = Callable[[Tensor, Tensor], Tensor]


class Model(Protocol):
    """What a sampler integrates; `device` is asked for by `generate` only."""

    field: Field
    device: torch.device

    def velocity(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """The velocity (B, *shape) at `x` (B, *shape) and the times `t` (B,)."""


class Counted:
    """A model that counts how often its velocity is evaluated, a batch counting as one."""

    def __init__(self, model: Model):
        self.model, self.field, self.device, self.evaluations = model, model.field, model.device, 0

    def velocity(self, x: Tensor, t: Tensor | float, **conditions: Any) -> Tensor:
        self.evaluations += 1
        return self.model.velocity(x, t, **conditions)


class Sampler(ABC):
    """From the prior to the data: integrates dx/dt = f_t(x) from T to t_min and ends with the field's endpoint."""

    @abstractmethod
    def integrate(self, velocity: Velocity, x: Tensor, field: Field) -> Tensor:
        """The state at t_min of the ODE that has state `x` at the horizon."""

    @torch.no_grad()
    def __call__(self, model: Model, x_T: Tensor, **conditions: Any) -> Tensor:
        """Data (B, *shape) from prior draws `x_T` (B, *shape), in the dtype of `x_T`.

        Args:
            conditions: passed to ``model.velocity``, such as ``label``.

        Raises:
            UserError: a state stops being finite; the message names the sample and the time.
        """

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v = model.velocity(x, t.expand(len(x)), **conditions)
            if not bool(torch.isfinite(v).all()):
                bad = int((~torch.isfinite(v)).flatten(1).any(1).nonzero()[0])
                raise UserError(f"velocity of sample {bad} is not finite at t={float(t):.4g}; try more steps")
            return v

        x = self.integrate(velocity, x_T.to(state_dtype(x_T.device)), model.field)
        t_min = torch.tensor(model.field.t_min, dtype=x.dtype, device=x.device)
        return model.field.endpoint(x, t_min, velocity(x, t_min)).to(x_T.dtype)


def state_dtype(device: torch.device) -> torch.dtype:
    """float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class FixedStep(Sampler):
    """The loop of all samplers that stop at the times of a grid.

    Args:
        steps: number of times from T to t_min; the last step, from t_min to the data, is the field's endpoint, so
            there are steps - 1 steps of the method.
        grid: rule that lays the times.
    """

    steps: int = 18
    grid: Grid = field(default_factory=PowerGrid)
    order = 0  # global order of convergence, declared by each method

    def __post_init__(self):
        if self.steps < 2:
            raise UserError(f"sampler has steps={self.steps}, expected at least 2")

    @abstractmethod
    def step(self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        """The state at `t_next` from the state `x` at `t`."""

    def integrate(self, velocity: Velocity, x: Tensor, field: Field) -> Tensor:
        times = self.grid(field, self.steps).to(x)
        for t, t_next in itertools.pairwise(times):
            x = self.step(velocity, x, t, t_next)
        return x


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

    Each sample's prior draw is made on the CPU from its own place in the stream of `seed`, so that with a fixed-step
    sampler sample i is the same whatever the batch size, the number of samples and the device, up to rounding. An
    adaptive sampler controls the error of the batch as a whole, so there it is the same up to the tolerance.

    Args:
        label: (N,) classes, for a conditional model.
        batch_size: samples in memory at a time.
    """
    number = size[0]
    if number < 1 or batch_size < 1:
        raise UserError(f"cannot draw {number} samples in batches of {batch_size}; expected positive numbers")
    randomness = torch.Generator().manual_seed(seed)
    one = (1, *size[1:])
    x_T = torch.cat([model.field.sample_prior(one, randomness, dtype=torch.float64) for _ in range(number)])
    done = []
    with tqdm(total=number, unit="samples", disable=not progress, leave=False) as bar:
        for start in range(0, number, batch_size):
            part = slice(start, start + batch_size)
            x = x_T[part].to(device=model.device, dtype=state_dtype(model.device))
            conditions = {} if label is None else {"label": label[part].to(model.device)}
            done.append(sampler(model, x, **conditions).to(device="cpu", dtype=torch.float32))
            bar.update(len(x))
    return torch.cat(done)
