"""Velocity and score of a model, for as few evaluations of it as there can be."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField, Gaussian, conversions
from diffusion.fields.base import Field


class Motion(NamedTuple):
    """f_t(x) and grad log p_t(x), (B, *shape) each."""

    velocity: Tensor
    score: Tensor


@runtime_checkable
class Joint(Protocol):
    """A model that gives both for one evaluation."""

    def velocity_and_score(self, x: Tensor, t: Tensor, **conditions: Any) -> Motion: ...


@runtime_checkable
class Scored(Protocol):
    """A model that has a score of its own."""

    def score(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor: ...


def gaussian(field: Field) -> bool:
    """Whether the score is linear in the velocity."""
    return isinstance(field, AffineField) and isinstance(field.base, Gaussian)


def motion(model, x: Tensor, t: Tensor | float, **conditions: Any) -> Motion:
    """Velocity and score at `x` (B, *shape) and the times `t` (B,).

    The score of an affine field with a Gaussian base follows from the velocity.

    Raises:
        UserError: the field is another one and the model has no score.
    """
    field = model.field
    if gaussian(field):
        velocity, schedule = model.velocity(x, t, **conditions), field.schedule(x, t)
        noise = conversions.from_velocity(schedule, x, velocity).noise
        return Motion(velocity, conversions.score_from_noise(schedule, noise))
    if isinstance(model, Joint):
        return Motion(*model.velocity_and_score(x, t, **conditions))
    if isinstance(model, Scored):
        return Motion(model.velocity(x, t, **conditions), model.score(x, t, **conditions))
    law = type(field.base if isinstance(field, AffineField) else field).__name__
    raise UserError(
        f"{type(model).__name__} has no score, and with {law} none follows from its velocity; take a sampler of the ODE"
    )
