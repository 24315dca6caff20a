"""Annealing from the first particles' law to a target that is known by its log-density alone."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.weighting import wide
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.flows.ensemble import jumped
from diffusion.gradient_flow.flows.fisher_rao import resampled
from diffusion.gradient_flow.flows.langevin import Draws, Noised, noised
from diffusion.gradient_flow.functionals.base import Functional, points_of
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.targets import ScorePotential

ACCEPTED = 0.6
"""Share of the Langevin proposals at whose acceptance steps are aimed: near 0.574, the best for large d."""


class Known(NamedTuple):
    """Points and what the target says of them.

    Attributes:
        x: (N, d).
        log_density: log p up to a constant (N,), -inf outside the support.
        score: grad log p (N, d).
    """

    x: Tensor
    log_density: Tensor
    score: Tensor

    def taken(self, index: Tensor) -> Known:
        return Known(*(part[index] for part in self))

    def changed(self, index: Tensor, new: Known) -> Known:
        """With `new` (n, ...) in the places `index` (n,)."""
        return Known(*(part.index_copy(0, index, other) for part, other in zip(self, new, strict=True)))


@dataclass(frozen=True)
class Bridge:
    """The path of laws: log pi_s = (1 - s) log N(centre, scale^2) + s log p, up to a constant.

    Attributes:
        centre, scale: of the normal law at s = 0, coordinate by coordinate (d,).
    """

    centre: Tensor
    scale: Tensor

    def gain(self, at: Known) -> Tensor:
        """log p - log N (N,)."""
        return at.log_density + 0.5 * self.standard(at.x).square().sum(1)

    def log_density(self, at: Known, share: float) -> Tensor:
        return share * at.log_density - 0.5 * (1 - share) * self.standard(at.x).square().sum(1)

    def score(self, at: Known, share: float) -> Tensor:
        return share * at.score - (1 - share) * self.standard(at.x) / self.scale

    def standard(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.scale


class Annealing(NamedTuple):
    """Where annealing is.

    Attributes:
        bridge: from the first particles to the target.
        share: s, 1 when the target is reached.
        known: the target at the particles.
        step_size: of the last Langevin move, in units in which the first particles have variance 1.
        accepted, jumped: shares of the particles whose last Langevin move, and last jump, was accepted; NaN before.
        evaluations: of log p and of its gradient, for each particle.
        steps: done.
    """

    bridge: Bridge
    share: float = 0.0
    known: Known | None = None
    step_size: float = math.inf
    accepted: float = math.nan
    jumped: float = math.nan
    evaluations: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Tempered(Flow):
    """A sampler of exp(-U / tau), the minimum of tau * Entropy + E[U], that finds modes.

    Langevin dynamics crosses no wide gap. Here the target moves, along the bridge from the normal law of the first
    particles to p, and particles follow by the flow of KL(q || pi_s) in the Wasserstein-Fisher-Rao metric, split, which
    is annealed sequential Monte Carlo: for a rise of s, birth and death by the weights (p / N)^ds, which is the
    Fisher-Rao flow exactly if q = pi_s (Del Moral, Doucet and Jasra 2006); then one move of each particle that leaves
    pi_s as it is. s rises by as much as costs `loss` of the effective sample size (Zhou, Johansen and Aston 2016, arXiv
    1303.3123); from s = 1 on there are only moves. Each step asks the target once at each particle.

    Moves are Langevin proposals with Metropolis acceptance, of random length about one that is adapted to acceptance;
    and, every `jumps`-th step, jumps to anywhere in the kernel estimate of the density of the other half of the
    particles, with the acceptance that makes them exact (halves as in Foreman-Mackey et al. 2013, arXiv 1202.3665).
    They bring the modes to their weights as long as kernels see the modes' shape, up to some tens of dimensions.

    `step_size` of a run is the largest of a Langevin move, in units in which the first particles have variance 1; 1.0
    does. The first particles should be spread over where the target may be, such as normal and wide. Moment.memory is
    an `Annealing`: only when its `share` is 1 has the target been reached; a run that ends before warns.

    Args:
        functional: tau * Entropy + potentials with log-densities, such as KL(log_prob).
        loss: of the effective sample size at each rise of s, as a share.
        jumps: steps from one jump to the next; 0: none.

    Raises:
        UserError: the functional has no entropy or, in a run, other terms than potentials; the first particles have no
            spread; log p is NaN or +inf, or -inf at all of them.
    """

    functional: Functional
    loss: float = 0.01
    jumps: int = 2

    def __post_init__(self):
        noised(self.functional)
        if not 0 < self.loss < 1:
            raise UserError(f"loss is {self.loss}, expected a number between 0 and 1")
        if not isinstance(self.jumps, int) or self.jumps < 0:
            raise UserError(f"jumps is {self.jumps!r}, expected a whole number: steps between jumps, or 0 for none")

    def subject(self):
        return noised(self.functional)

    def begin(self, particles):
        points = points_of(particles)
        points = points.to(wide(points.device))
        scale = points.std(0, correction=0)
        if not bool((scale > 0).all()):
            index = int((~(scale > 0)).nonzero()[0])
            raise UserError(
                f"the first particles have the spread 0 in coordinate {index}, expected them spread over where the "
                "target may be, such as normal and wide"
            )
        return Annealing(Bridge(points.mean(0), scale))

    def advance(self, moment, step_size, generator):
        target = _Target(noised(moment.functional), moment.particles)
        memory: Annealing = moment.memory
        x = target.points(moment.particles)
        if memory.known is None or not torch.equal(memory.known.x, x):
            memory = memory._replace(known=target.ask(x), evaluations=memory.evaluations + 1)
        origin = None
        if memory.share < 1:
            memory, origin = self._raised(memory, generator)
        draws = Draws(generator)
        if self.jumps and (memory.steps + 1) % self.jumps == 0 and len(x) >= 4:
            known, rate = jumped(memory.known, memory.bridge, memory.share, target.ask, generator)
            memory = memory._replace(known=known, jumped=rate)
        else:
            memory = _moved(memory, target, min(step_size, memory.step_size), step_size, draws)
        memory = memory._replace(evaluations=memory.evaluations + 1, steps=memory.steps + 1)
        particles = memory.known.x.to(moment.particles.dtype).view(moment.particles.shape)
        return replace(moment, particles=particles, time=moment.time + step_size, memory=memory, origin=origin)

    def finish(self, moment, size):
        share = moment.memory.share
        if share < 1:
            warnings.warn(
                f"annealing ended at the share {share:.3g} of the way to the target after {moment.step} steps: the "
                f"particles have another law; take more steps, or a loss above {self.loss:g}",
                stacklevel=3,
            )

    def _raised(self, memory: Annealing, generator: torch.Generator | None) -> tuple[Annealing, Tensor]:
        """After birth and death, at a larger share; and of which particle each is a copy (N,)."""
        gain = memory.bridge.gain(memory.known)
        rise = _rise(gain, 1 - memory.share, self.loss)
        share = 1.0 if rise == 1 - memory.share else memory.share + rise
        chosen = resampled(rise * gain, generator)
        return memory._replace(known=memory.known.taken(chosen), share=share), chosen


@dataclass(frozen=True)
class _Target:
    """The target asked at points (N, d) in wide floats."""

    split: Noised
    like: Tensor

    def __post_init__(self):
        for _, functional in self.split.rest.terms():
            if not isinstance(functional, Potential | ScorePotential):
                raise UserError(
                    f"Tempered has to do with {type(functional).__name__}, expected potentials beside the entropy: "
                    "other functionals have no law of one particle to anneal to"
                )

    def points(self, particles: Tensor) -> Tensor:
        return particles.flatten(1).to(wide(particles.device))

    def ask(self, x: Tensor) -> Known:
        particles = x.to(self.like.dtype).view(-1, *self.like.shape[1:])
        rest, temperature = self.split.rest, self.split.temperature
        with torch.no_grad():
            log_density = -self.points(rest.first_variation(particles)[:, None])[:, 0] / temperature
        return Known(self.points(particles), log_density, self.points(rest.velocity(particles)) / temperature)


def _rise(gain: Tensor, most: float, loss: float) -> float:
    """The largest rise up to `most` at which weights exp(rise * gain) keep 1 - loss of the effective sample size."""
    gain = gain - gain.max()
    gain = gain[gain.isfinite()]

    def kept(rise: float) -> float:
        weights = (rise * gain).exp()
        return float(weights.sum().square() / weights.square().sum()) / max(len(gain), 1)

    if kept(most) >= 1 - loss:
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) >= 1 - loss else (low, middle)
    return high


def _moved(memory: Annealing, target: _Target, usual: float, most: float, draws: Draws) -> Annealing:
    """One Langevin move with Metropolis acceptance, in coordinates in which the bridge starts as a standard normal law.

    Each particle's step has a random length, exp(normal) times the usual one: in modes of unlike widths some fit.
    """
    bridge, share, now = memory.bridge, memory.share, memory.known
    lengths = usual * draws.normal(now.x[:, :1]).exp()
    xi = draws.normal(now.x)
    force = bridge.scale * bridge.score(now, share)
    new = target.ask(now.x + bridge.scale * (lengths * force + (2 * lengths).sqrt() * xi))
    back = xi + (lengths / 2).sqrt() * (
        force + bridge.scale * bridge.score(new, share)
    )  # minus the noise that leads back
    gain = bridge.log_density(new, share) - bridge.log_density(now, share) + (xi.square() - back.square()).sum(1) / 2
    gain = gain.where(new.score.isfinite().all(1) & ~gain.isnan(), -math.inf)
    taken = (draws.uniform(now.x).log() < gain).nonzero()[:, 0]
    rate = float(gain.clamp_max(0).exp().mean())
    usual = min(most, usual * math.exp((rate - ACCEPTED) / 2))
    return memory._replace(known=now.changed(taken, new.taken(taken)), step_size=usual, accepted=rate)
