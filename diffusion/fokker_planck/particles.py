"""The evolving density by particles that move with the probability flow, in dimensions where grids die.

Particles with the velocity v = f - 1/2 div a - 1/2 a s_t(x) have the densities of the SDE if s_t = grad log p_t; it is
learned on the fly (Maoutsa et al. 2020, arXiv 2006.00702; Boffi & Vanden-Eijnden 2023, arXiv 2206.04642). Along the
particles' paths

    d log p / dt = -div v,        d grad log p / dt = -grad div v - (grad v)^T grad log p,

so that each carries the log density at its place, and the score of the law that the particles truly have, from that of
the start law on. The network is regressed on carried scores: targets without noise, unlike those of implicit or
denoising score matching. What it misses, e = grad log p - s, bounds the error of the law itself: d KL(p || exact) / dt
is -1/2 E|w|_a^2 + 1/2 E w.a e <= 1/8 E|e|_a^2, with w = grad log (p / exact) and |w|_a^2 = w.a w.

What no network resolves stays in the scores for good and spoils later fits; where the flow contracts, so that scores
grow, it grows with them. The targets therefore are scores that keep only a share of it after each step, the less the
more the particles' places contradict them, and the network learns from the places too (Correction.solve_last).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion import devices
from diffusion.errors import UserError
from diffusion.fokker_planck.correction import Correction
from diffusion.fokker_planck.equation import FokkerPlanck, act, checked
from diffusion.fokker_planck.evolution import rising
from diffusion.fokker_planck.laws import Law, log_density
from diffusion.fokker_planck.learned_score import LearnedScore, learn
from diffusion.fokker_planck.particle_checks import (
    FAR,
    check_places,
    place_error,
    step_error,
    warn_of_score,
    warn_of_steps,
)
from diffusion.randomness import derive_seed
from diffusion.trainer import Trainer

CHUNK = 2048  # particles at a time


class State(NamedTuple):
    """What particles carry, or its rates of change."""

    x: Tensor  # (N, d), places
    log_density: Tensor  # (N,)
    score: Tensor  # (N, d), of the particles' own law
    target: Tensor  # (N, d), the same, but partly drawn to the learned one at each step

    def moved(self, duration: float, *rates: "State") -> "State":
        """After `duration` at the mean of the rates."""
        weight = duration / len(rates)
        return State(*(now + weight * sum(slopes) for now, *slopes in zip(self, *rates, strict=True)))


@dataclass(frozen=True)
class ParticleSolution:
    """The solution at K times.

    Attributes:
        times: (K,).
        particles: (K, N, d); the last `held_out` of them were never shown to the network, and are independent draws.
        log_density: of the particles' law at the particles (K, N), nats.
        scores: its gradient there (K, N, d).
        learned: the K scores that moved them, callable at any place.
        held_out: number of particles.
        kl_bound: (K,) bound on KL(particles' law || exact), nats, estimated from the held-out particles; it does not
            count the errors of the steps in time, and is often far above the KL.
    """

    times: Tensor
    particles: Tensor
    log_density: Tensor
    scores: Tensor
    learned: tuple[LearnedScore, ...]
    held_out: int
    kl_bound: Tensor

    @property
    def mean(self) -> Tensor:
        """(K, d)."""
        return self.particles.mean(1)

    @property
    def covariance(self) -> Tensor:
        """(K, d, d)."""
        gaps = self.particles - self.mean[:, None]
        return gaps.mT @ gaps / (gaps.shape[1] - 1)

    @property
    def entropy(self) -> Tensor:
        """(K,), nats."""
        return -self.log_density.mean(1)

    def kl(self, law: Law, index: int = -1) -> tuple[float, float]:
        """KL(particles' law || `law`) at the time of that index, from the held-out particles; its standard error."""
        x = self.particles[index, -self.held_out :]
        ratio = self.log_density[index, -self.held_out :] - log_density(law, x, "the law").detach()
        return float(ratio.mean()), float(ratio.std() / len(ratio) ** 0.5)


@dataclass(frozen=True)
class ParticleSolver:
    """Heun's steps (order 2) of particles and of what they carry; the score is learned anew at each stage.

    Args:
        equation: its functions must be torch operations, with second derivatives in x.
        hidden: widths of the network's one or two hidden layers.
        first: trains the network at the first time; on `device`, whatever it says itself.
        following: trains it on at each predicted place; None sets its last weights only, in closed form.
        memory: share of what the network misses of its targets that these keep after a step, from 0 to 1.
        draws: of the start law, from which the network learns at the first time, besides the particles.
        held_out: share of the particles that the network never sees.
        exact_below: up to this dimension the divergence of the drift is exact, above it Hutchinson's estimate with
            `probes` random signs a step; that of the score is exact always.
        device: "auto", "cpu" or "cuda".
        seed: of the network and its training.
    """

    equation: FokkerPlanck
    hidden: Sequence[int] = (64, 128)
    first: Trainer = field(
        default_factory=lambda: Trainer(steps=2000, batch_size=512, learning_rate=3e-3, ema_decay=0.99)
    )
    following: Trainer | None = None
    memory: float = 0.8
    draws: int = 20_000
    held_out: float = 0.2
    exact_below: int = 128
    probes: int = 8
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self):
        checked(self.equation)
        widths = self.hidden if isinstance(self.hidden, Sequence) else ()
        if not (1 <= len(widths) <= 2 and all(isinstance(width, int) and width > 0 for width in widths)):
            raise UserError(f"hidden is {self.hidden!r}, expected the widths of one or two layers")
        if not (isinstance(self.held_out, int | float) and 0 < self.held_out < 1):
            raise UserError(f"held_out is {self.held_out!r}, expected a share between 0 and 1")
        if not (isinstance(self.memory, int | float) and 0 <= self.memory <= 1):
            raise UserError(f"memory is {self.memory!r}, expected a share from 0 to 1")
        for name in ("probes", "draws", "exact_below"):
            value, least = getattr(self, name), int(name != "exact_below")
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}, expected a whole number, {least} or more")
        if not isinstance(self.first, Trainer) or not isinstance(self.following, Trainer | None):
            raise UserError(
                f"first is {self.first!r} and following is {self.following!r}, expected a Trainer each, or no following"
            )

    def solve(
        self,
        start: Law,
        times: Sequence[float] | Tensor,
        number: int = 4000,
        steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> ParticleSolution:
        """The law at the rising `times`, from `start` at the first of them.

        Args:
            start: its log_prob must be differentiable at its draws.
            number: of particles.
            steps: between each two times.
            generator: of the particles' first places, and of the probes.

        Raises:
            UserError: the times do not rise, there are too few particles, or some leave for infinity.

        Warns:
            RuntimeWarning: the steps are too long, or the learned score does not fit the particles.
        """
        times = rising(times)
        if not isinstance(steps, int) or not isinstance(number, int) or steps < 1 or number < 1:
            raise UserError(f"solve has number={number} and steps={steps}, expected whole numbers of at least 1")
        device = devices.pick(self.device)
        state = _beginning(start, number, times[0], device, generator)
        shown, dim = round((1 - self.held_out) * number), state.x.shape[1]
        seeded = torch.Generator().manual_seed(derive_seed(self.seed, "network"))
        network = Correction(dim, self.hidden, seeded).to(device)
        if shown < 2 * (least := network.last.in_features + 1) or shown == number:
            raise UserError(
                f"there are {shown} particles to learn from and {number - shown} held out, expected at least "
                f"{2 * least} (twice the weights of an output) and 1; take more particles, or a smaller hidden"
            )
        many = _beginning(start, max(self.draws, shown), times[0], device, generator)
        score = self._learn(many, times[0], network, self.first, len(many.x))
        del many
        records, bound, coarse, astray = [(state, score, 0.0)], 0.0, 0.0, 0.0
        far = FAR * (1 + float(state.x.abs().max()))
        missed = self._missed(state, score, times[0], shown)
        for begin, end in itertools.pairwise(times):
            h = (end - begin) / steps
            for n in range(steps):
                t = begin + n * h
                probes = self._probes(state.x, generator)
                now = self._rates(state, score, t, probes)
                ahead = state.moved(h, now)
                check_places(ahead.x, ahead.log_density, ahead.target, t + h, h, n, far)
                near = score.whitened(state.x[:shown])
                score = self._learn(ahead, t + h, score.correction, self.following, shown, near)
                then = self._rates(ahead, score, t + h, probes)
                coarse += step_error(now.log_density, then.log_density, h)
                before, state = state.x, state.moved(h, now, then)
                astray += place_error(now.x, then.x, h, before, state.x)
                check_places(state.x, state.log_density, state.target, t + h, h, n, far)
                score = self._learn(state, t + h, score.correction, None, shown, near)
                state = state._replace(target=score(state.x).lerp(state.target, self.memory * (1 - score.own_share)))
                missed_before, missed = missed, self._missed(state, score, t + h, shown)
                bound += h / 2 * (missed_before + missed)
            records.append((state, score, bound))
            warn_of_steps(coarse, astray, end, steps, dim)
            warn_of_score(state.x[shown:], score, end)
        states, scores, bounds = zip(*records, strict=True)
        x, log_density, own, _ = (torch.stack(values) for values in zip(*states, strict=True))
        times, bounds = (torch.tensor(values, dtype=torch.float64) for values in (times, bounds))
        bounds = bounds.nan_to_num(torch.inf, torch.inf)
        return ParticleSolution(times, x, log_density, own, scores, number - shown, bounds)

    def _learn(
        self,
        state: State,
        t: float,
        network: Correction,
        trainer: Trainer | None,
        shown: int,
        near: Tensor | None = None,
    ) -> LearnedScore:
        trainer = trainer and replace(trainer, device=self.device)
        return learn(state.x[:shown], state.target[:shown], t, network, trainer, near)

    def _missed(self, state: State, score: LearnedScore, t: float, shown: int) -> float:
        """The rate of the bound: 1/8 E|grad log p - s|_a^2 over the held-out particles."""
        x, gap = state.x[shown:], state.score[shown:] - score(state.x[shown:])
        return float((gap * act(self.equation.covariance(x, t), gap)).sum(1).mean()) / 8

    def _probes(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if x.shape[1] <= self.exact_below:
            return None
        coins = torch.randint(0, 2, (self.probes, *x.shape), generator=generator, dtype=x.dtype)
        return (2 * coins - 1).to(x.device)

    def _rates(self, state: State, score: LearnedScore, t: float, probes: Tensor | None) -> State:
        parts = []
        for rows in torch.arange(len(state.x), device=state.x.device).split(CHUNK):
            some = None if probes is None else probes[:, rows]
            parts.append(self._rates_of(State(*(value[rows] for value in state)), score, t, some))
        return State(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _rates_of(self, state: State, score: LearnedScore, t: float, probes: Tensor | None) -> State:
        equation, none = self.equation, torch.zeros_like(state.x)
        x = state.x.detach().requires_grad_()
        with torch.enable_grad():
            equation.check_differentiable(x, t, drift=True)
            turning = equation.covariance_divergence(x, t)
            constant = not bool(turning.any())  # a does not depend on x
            still = equation.drift if constant else lambda x, t: equation.velocity(x, t, none)
            divergence = _divergence(lambda x: still(x, t), x, probes)
            s, trace = score.traced(x, equation.covariance(x, t))
            divergence = divergence - 0.5 * (trace + (0 if constant else (turning * s).sum(1)))
            velocity = equation.velocity(x, t, s)
            slopes = [
                torch.autograd.grad((divergence + (velocity * carried).sum(1)).sum(), x, retain_graph=True)[0]
                for carried in (state.score, state.target)
            ]
        return State(velocity.detach(), -divergence.detach(), -slopes[0], -slopes[1])


def _beginning(start: Law, number: int, t: float, device: torch.device, generator: torch.Generator | None) -> State:
    """Draws of the start law with its log density and score there."""
    parts = []
    for first in range(0, number, CHUNK):
        try:
            x = start.sample(min(CHUNK, number - first), generator).to(device, torch.float64).requires_grad_()
        except (AttributeError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"draws from the start, {type(start).__name__}, fail: {reason}") from error
        with torch.enable_grad():
            logs = log_density(start, x)
            if not logs.requires_grad:
                raise UserError("the start law's log_prob has no derivative in x; expected torch operations on x")
            (score,) = torch.autograd.grad(logs.sum(), x)
        parts.append(State(x.detach(), logs.detach(), score, score))
    state = State(*(torch.cat(values) for values in zip(*parts, strict=True)))
    check_places(state.x, state.log_density, state.target, t, 0.0)
    return state


def _divergence(function, x: Tensor, probes: Tensor | None) -> Tensor:
    """That of function: (B, d) -> (B, d) at `x` (B, d), (B,): exact, or the mean over `probes` (K, B, d)."""
    total = torch.zeros_like(x[:, 0])
    directions = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None] if probes is None else probes
    for direction in directions:
        _, slope = torch.func.jvp(function, (x,), (direction.expand_as(x),))
        total = total + (slope * direction).sum(1)
    return total if probes is None else total / len(probes)
