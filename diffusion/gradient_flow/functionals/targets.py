"""Targets p of a KL divergence, as potentials E[-log p]: log-densities, scores, and models at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import Field
from diffusion.generator import Generator
from diffusion.gradient_flow.functionals.base import Functional, not_finite, points_of
from diffusion.gradient_flow.functionals.potential import Potential


@runtime_checkable
class Scored(Protocol):
    """A model of a law that depends on time, such as a Generator or an EmpiricalField."""

    field: Field

    def score(self, x: Tensor, t: Tensor | float) -> Tensor: ...


@runtime_checkable
class Dense(Scored, Protocol):
    """One that knows its density."""

    def log_prob(self, x: Tensor, t: Tensor | float) -> Tensor: ...


@dataclass(frozen=True)
class ScorePotential(Functional):
    """F[q] = E[-log p(x)], x ~ q, of a law p that is known by its score.

    Args:
        score: grad log p, (N, *shape) -> (N, *shape).
        log_density: log p up to a constant, (N, *shape) -> (N,), where it is known too; nothing is differentiated.

    Raises:
        UserError: value and first_variation, without a log_density; an answer of another shape.
    """

    score: Callable[[Tensor], Tensor]
    log_density: Callable[[Tensor], Tensor] | None = None

    def value(self, particles):
        return self.first_variation(particles).mean()

    def velocity(self, particles):
        points_of(particles)
        return _answer(self.score(particles.detach()), particles.shape, "score").detach().to(particles.dtype)

    def first_variation(self, particles):
        points_of(particles)
        if self.log_density is None:
            raise UserError(
                "the target is known by its score alone, expected a log-density for a value; its velocity is known, so "
                "flows that ask for no value can follow it"
            )
        return -_answer(self.log_density(particles), particles.shape[:1], "log-density").to(particles.dtype)

    def fault(self, particles):
        fault = not_finite("the score", self.velocity(particles), particles)
        if fault or self.log_density is None:
            return fault
        return not_finite("the negative log-density", self.first_variation(particles), particles)


@dataclass(frozen=True)
class Unknown(Functional):
    """F[q] = E[-log p(x)] of a callable that has not been asked yet whether it gives log p or its gradient.

    It is a Potential or a ScorePotential once it is fitted.

    Args:
        target: (N, *shape) -> (N,) or (N, *shape).

    Raises:
        UserError: an answer of another shape, or (N, 1) in one dimension, which may be either.
    """

    target: Callable[[Tensor], Tensor]

    def fitted(self, particles, generator=None):
        points_of(particles)
        answer = self.target(particles[:1].detach())
        shape = answer.shape if isinstance(answer, Tensor) else None
        if shape == (1,):
            return Potential(_Negative(self.target), "negative log-density")
        if shape == (1, 1) == particles[:1].shape:
            raise UserError(
                "the target's answer for one particle is of shape (1, 1), a log-density or a score; expected (1,) of a "
                "log-density, or ScorePotential(score) as the target"
            )
        if shape == particles[:1].shape:
            return ScorePotential(self.target)
        found = type(answer).__name__ if shape is None else f"of shape {tuple(shape)}"
        raise UserError(
            f"the target's answer for one particle is {found}, expected (1,), a log-density, or "
            f"{tuple(particles[:1].shape)}, a score"
        )

    def value(self, particles):
        return self.fitted(particles).value(particles)

    def velocity(self, particles):
        return self.fitted(particles).velocity(particles)

    def first_variation(self, particles):
        return self.fitted(particles).first_variation(particles)


def potential_of(target: Any, time: float | None = None) -> Functional:
    """E[-log p] of a target as `KL` takes it.

    Raises:
        UserError: it is none, or the time is missing, not wanted, or not one at which the model is defined.
    """
    if isinstance(target, Scored):
        return _of_model(target, time)
    if time is not None:
        kind = type(target).__name__
        raise UserError(f"time is {time}, but the target, a {kind}, has no times; expected a model, or no time")
    if isinstance(target, Functional):
        return target
    if not callable(target):
        raise UserError(
            f"the target is a {type(target).__name__}, expected a log-density or a score as a callable, or a model"
        )
    return Unknown(target)


def _of_model(model: Scored, time: float | None) -> Functional:
    least, most = model.field.t_min, model.field.horizon
    if not (isinstance(time, int | float) and least <= time <= most):
        raise UserError(f"time is {time}, expected a time of the model, from t_min={least:.4g} to {most:.4g}")

    @torch.no_grad()
    def score(x: Tensor) -> Tensor:
        return model.score(x, time)

    if isinstance(model, Generator):
        return ScorePotential(score, lambda x: model.log_likelihood(x, t=time))
    if isinstance(model, Dense):
        return ScorePotential(score, lambda x: model.log_prob(x, time))
    return ScorePotential(score)


@dataclass(frozen=True)
class _Negative:
    log_density: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return -self.log_density(x)


def _answer(answer: Tensor, shape: torch.Size, name: str) -> Tensor:
    if not isinstance(answer, Tensor) or answer.shape != shape:
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UserError(f"the target's {name} has shape {found}, expected {tuple(shape)}")
    return answer
