"""The objective of one-step generators: samples chase where the velocity of a functional moves them."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.objectives import Batch


class Sample(NamedTuple):
    """phi of points (M, *k), and their classes (M,), if there are any."""

    phi: Tensor
    label: Tensor | None


class Chase:
    """Regression of G(z) on stop_grad(x + step velocity(x)) at x = G(z), for the functional of each batch of data.

    The gradient of the mean square (phi(G(z)) - stop_grad(phi(x) + step v))^2 over N particles and k coordinates is
    2 step / k times that of F[phi(x_1) ... phi(x_N)] through G, by velocity = -N dF/dx_i; so the weights go downhill on
    F, and for a functional without a value, downhill along its field (Deng et al. 2026, arXiv 2602.04770, eq. 6; Han et
    al. 2026, arXiv 2605.11755).

    A batch is a sample of the data, and F[q] to a sample is least at a law that is not the data's: particles are drawn
    to the middles of what they may be matched with. A second sample q' of G, as many as the batch has points and no
    gradient through it, is drawn to in the same way; with

        v = velocity of F(data) - velocity of F(q')

    this cancels, and the mean velocity is 0 where G has the law of the data (the estimate of Han et al. from two
    batches, for any functional). The loss, without its gradient, is F(data) - F(q') likewise.

    Args:
        generator: to be trained.
        functional: data (M, k) -> Functional, such as functools.partial(SinkhornDivergence, blur=0.5). Give it its
            widths: what it would take from its points differs from the data to q', and q' may be one point at first.
        particles: samples of G a step, of each process and each part of a batch; None: as many as the batch has points.
        step: of the flow, in the functional's time. It scales the gradient, which Adam does not see and clipping does.
        features: phi, (N, *shape) -> (N, *k), in torch operations; None is the identity.
        debias: whether the velocity towards a second sample of G is taken off.
        log_value: whether the loss is the functional's value, False: the mean square of step velocity, for what has no
            value, or a costly one. The gradient is the same; the test loss, by which a trainer knows its best
            checkpoint, is not.
        label_dropout: share of particles of a conditional generator whose class is hidden; their functional is that of
            the whole batch, the others' that of their class. Second samples are told what their particles are.

    Raises:
        UserError: an option is out of its range, or the generator is not a OneStepGenerator.
    """

    def __init__(
        self,
        generator: OneStepGenerator,
        functional: Callable[[Tensor], Functional],
        particles: int | None = None,
        step: float = 1.0,
        features: Callable[[Tensor], Tensor] | None = None,
        debias: bool = True,
        log_value: bool = True,
        label_dropout: float = 0.1,
    ):
        if not isinstance(generator, OneStepGenerator):
            raise UserError(f"the generator is a {type(generator).__name__}, expected a OneStepGenerator")
        if particles is not None and (not isinstance(particles, int) or isinstance(particles, bool) or particles < 1):
            raise UserError(f"particles is {particles!r}, expected a whole number of 1 or more, or null")
        if not isinstance(step, int | float) or not 0 < step < math.inf:
            raise UserError(f"step is {step!r}, expected a positive number")
        for name, function in (("functional", functional), ("features", features)):
            if not callable(function) and (name, function) != ("features", None):
                raise UserError(f"{name} is {function!r}, expected a function, such as my_module.{name}")
        if not 0 <= label_dropout <= 1:
            raise UserError(f"label_dropout is {label_dropout}, expected a probability")
        self.shape, self.num_classes = generator.shape, generator.num_classes
        self.functional, self.features = functional, features or nn.Identity()
        self.particles, self.step, self.debias, self.log_value = particles, step, debias, log_value
        self.label_dropout = label_dropout

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """Square error (N, *k), by its gradient; with log_value its mean is the functional."""
        number = self.particles or len(batch.x)
        label = self._labels(batch, number)
        phi = self.features(self._draw(network, batch, label, number))
        here = phi.detach()
        with torch.no_grad():
            others = self._others(network, batch, label)
            data = Sample(self.features(batch.x), batch.label)
            velocity, value = self._downhill(here, label, data, others, batch.generator)
        error = (phi - (here + self.step * velocity)).square()
        return error - error.detach() + value if self.log_value else error

    def _draw(self, network: nn.Module, batch: Batch, label: Tensor | None, number: int) -> Tensor:
        z = torch.randn((number, *self.shape), generator=batch.generator, device=batch.generator.device)
        return network(z.to(batch.x), label)

    def _labels(self, batch: Batch, number: int) -> Tensor | None:
        """Those of the batch, over and over, some hidden: the class `num_classes`."""
        if not self.num_classes:
            return None
        label = batch.label[torch.arange(number, device=batch.x.device) % len(batch.label)]
        chance = torch.rand(number, generator=batch.generator, device=batch.generator.device)
        return label.where(chance.to(batch.x.device) >= self.label_dropout, self.num_classes)

    def _others(self, network: nn.Module, batch: Batch, label: Tensor | None) -> Sample | None:
        """phi of the second sample, one particle for each point of the batch, of its class; then as many whose class is
        hidden, if that of some particles is."""
        if not self.debias:
            return None
        number, told = len(batch.x), None
        if label is not None:
            told = batch.label
            if (label == self.num_classes).any():
                number, told = 2 * number, torch.cat([told, torch.full_like(told, self.num_classes)])
        return Sample(self.features(self._draw(network, batch, told, number)), told)

    def _downhill(
        self,
        x: Tensor,
        label: Tensor | None,
        data: Sample,
        others: Sample | None,
        randomness: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The velocity and, with log_value, the value: of particles of classes, the mean of those of each class."""
        if label is None:
            return self._towards(x, data.phi, others.phi if others else None, randomness)
        velocity, total = torch.empty_like(x), x.new_zeros(())
        for kind in label.unique():
            mine = label == kind
            there = data.phi if kind == self.num_classes else data.phi[data.label == kind]
            more = others.phi[others.label == kind] if others else None
            velocity[mine], value = self._towards(x[mine], there, more, randomness)
            total += value * mine.double().mean().to(total)
        return velocity, total

    def _towards(
        self, x: Tensor, data: Tensor, others: Tensor | None, randomness: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        twin = randomness.clone_state()
        functional = self.functional(data)
        if others is None:
            functional = functional.fitted(x, randomness)
        else:  # fitted by the same draws, which cancel best
            functional = functional.relative().fitted(x, randomness)
            functional = functional + -1.0 * self.functional(others).relative().fitted(x, twin)
        velocity = functional.velocity(x)
        return velocity, functional.value(x) if self.log_value else x.new_zeros(())
