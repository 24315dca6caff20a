"""Samplers tuned to a model: how a given number of evaluations brings samples closest to the exact ODE's."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.conditions import of_points
from diffusion.errors import UserError
from diffusion.samplers.arc import data_mean, data_std
from diffusion.samplers.base import Model, state_dtype
from diffusion.samplers.multistep import Multistep
from diffusion.samplers.tuned import Tuned

REFERENCE, FINER = Multistep(steps=128), 3  # steps as many times those that are tuned, at least
FEW = 10  # evaluations up to which the weights too are tuned: what that costs grows with the square of the evaluations
TRAJECTORIES, RESIDUALS = 128, 1024  # at least; coordinates of all of them together, at least
TAIL = 4.0  # median errors; larger errors count less and less: near a border between modes a sample may end in either
BIAS, AXES = 100.0, 8  # weight of a bias in units of the data's std; main axes of the data along which it is looked at
CHANGE = 0.01  # of an unknown, for its derivative
DAMPING = tuple(10.0**power for power in range(-5, 3))  # of a first round, later those next to the last; best is taken
RACE, PART, LEAST = 3, 4, 32  # rounds of each order, on every fourth trajectory, or more than that: on so many
WANDER = math.log(3)  # of the scale's logarithm; leaves 5 / 3 of the ratio that a sampler warns of, on_arc.FAR
GAIN = 0.02  # share of all errors that a round must take away to be followed by another, or as much of the loss
FAILURES = (UserError, OverflowError, torch.linalg.LinAlgError)  # of steps too long for the model, or for numbers


def tune(
    model: Model,
    draw: Callable[[int, torch.Generator], tuple[Tensor, dict]],
    nfe: int,
    trajectories: int | None = None,
    rounds: int = 4,
    seed: int = 0,
    denoise: bool = False,
    progress: Callable[[int, int, float], None] = lambda done, total, error: None,
) -> Tuned:
    """The Multistep that makes the least error in `nfe` evaluations: its times, its scale and, up to 10, its weights.

    What falls, over trajectories whose ends are known from a fine solution, is the mean of log(1 + (error / c)^2) with
    c four times the median error, and the square of a bias. The first (Cauchy's loss) lets large errors weigh more than
    small ones, but not those of samples that end in another mode. The bias is what the residuals of the others have in
    common, and what distances between laws, such as Frechet's, see first: the shift of their mean, and how much their
    extent along each of the main axes of the data is missed. It is measured in standard deviations of the data and
    counts 100 times; below 5 evaluations it is most of the sum.

    That is done by the damped Gauss-Newton method (Levenberg 1944), from even gaps on. Derivatives are differences: a
    round costs about half a solution for each unknown, which leaves alone what comes before it. So most of the way is
    gone on a quarter of the trajectories, on no fewer than 32. There two orders race, 2 and 3 up to 10 evaluations, 2
    and 4 beyond: the one whose loss over all trajectories is smaller after 3 rounds goes on with all of them.

    Args:
        model: has `velocity` and `field`.
        draw: draw(number, generator) -> prior draws (number, *shape) and conditions: tensors with an entry for each of
            them go with them, the rest is for all.
        nfe: evaluations, 2 or more.
        trajectories: number to tune on; twice as many fresh ones are drawn to report on. None is 128, or as many as
            have 1024 coordinates together.
        rounds: on all trajectories, at most, after the race; they end where one gains no more than errors that all fall
            by 2 %.
        denoise: tune a sampler that ends with the field's estimate at t_min (see Multistep).
        progress: called after each solution with how many there have been, how many there may be, and the median error.

    Returns:
        What was found or the default, by their median errors on the fresh draws.

    Raises:
        UserError: every one of them fails, as where the velocity is not finite.
    """
    if nfe < 2 or (trajectories is not None and trajectories < 2) or rounds < 1:
        raise UserError(
            f"tuning has nfe={nfe}, trajectories={trajectories}, rounds={rounds}, expected at least 2, 2, 1"
        )
    generator = torch.Generator().manual_seed(seed)
    if trajectories is None:
        trajectories = max(TRAJECTORIES, math.ceil(RESIDUALS / draw(1, torch.Generator())[0].numel()))
    fine = replace(REFERENCE, steps=max(REFERENCE.steps, FINER * nfe), denoise=denoise)
    problem = _Problem.solved(model, fine, *draw(trajectories, generator))
    default = Multistep(nfe, denoise=denoise)
    plain = replace(default, from_mean=default.starts_from_mean(model, problem.x_T), std=default.data_std(model))
    even = tuple(torch.linspace(0, 1, plain.places + 1, dtype=torch.float64).tolist())
    grid = replace(default.default_grid(model, problem.x_T), shares=even)
    orders = sorted({min(order, plain.places - 1) for order in ((2, 3) if nfe <= FEW else (2, 4))})
    starts = [replace(plain, order=order, grid=grid) for order in orders]
    total = sum(_solutions(start, RACE) for start in starts) + max(_solutions(start, rounds) for start in starts)
    done = itertools.count(1)
    fits = [_Fit(start, lambda error: progress(next(done), total, error)) for start in starts]
    part = problem.part(max(1, min(PART, trajectories // LEAST)))
    first = [problem.attempt(fit.advance(part, RACE)) for fit in fits]
    usual = TAIL * min(residuals.norm(dim=1).median() for residuals in first) + 1e-12
    losses = [problem.loss(residuals, usual) for residuals in first]
    found = fits[losses.index(min(losses))].advance(problem, rounds)
    fresh = _Problem.solved(model, fine, *draw(2 * trajectories, generator))
    errors = [fresh.attempt(sampler).norm(dim=1).median().item() for sampler in (default, found)]
    if min(errors) == math.inf:
        fresh.errors(default)  # says what is wrong
    best = errors.index(min(errors))
    return Tuned((default, found)[best], errors[best], errors[0])


class _Kept:
    """A model that does not evaluate again what a first solution did, for others that start alike."""

    def __init__(self, model: Model):
        self.model, self.field = model, model.field
        self.data_std, self.data_mean = data_std(model), data_mean(model)
        self.evaluations, self.number, self.first = [], 0, True

    def begin(self, first: bool) -> None:
        self.evaluations, self.number, self.first = [] if first else self.evaluations, 0, first

    def velocity(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        self.number += 1
        if not self.first:
            at, then, velocity = self.evaluations[self.number - 1]
            if x.equal(at) and t.equal(then):
                return velocity
        velocity = self.model.velocity(x, t, **conditions)
        if self.first:
            self.evaluations.append((x, t, velocity))
        return velocity


class _Problem:
    """Prior draws and where the ODE leads from them."""

    def __init__(self, model: Model, x_T: Tensor, conditions: dict, x_0: Tensor):
        self.model, self.x_T, self.conditions, self.x_0 = _Kept(model), x_T, conditions, x_0
        ends = self.x_0.flatten(1) / self.x_0[0].numel() ** 0.5
        gaps = ends - ends.mean(0)
        squares, parts = torch.linalg.eigh((gaps @ gaps.T).cpu().double())
        main = [-i for i in range(1, 1 + min(AXES, len(gaps))) if squares[-i] > 1e-10 * squares[-1]]
        self.parts = parts[:, main].to(gaps)
        self.axes = gaps.T @ self.parts / squares[main].sqrt().to(gaps)
        self.std = gaps.square().sum(1).mean().sqrt().clamp_min(1e-12)

    @classmethod
    def solved(cls, model: Model, fine: Multistep, x_T: Tensor, conditions: dict) -> "_Problem":
        """By a fine solution."""
        x_T = x_T.to(state_dtype(x_T.device))
        return cls(model, x_T, conditions, fine(model, x_T, **conditions))

    def part(self, every: int) -> "_Problem":
        """That of the first of so many draws each time."""
        index = torch.arange(0, len(self.x_T), every, device=self.x_T.device)
        conditions = of_points(self.conditions, index, len(self.x_T))
        return _Problem(self.model.model, self.x_T[index], conditions, self.x_0[index])

    def residuals(self, sampler: Multistep, first: bool = True) -> Tensor:
        """(B, d), in units that make a row's norm its root mean square.

        Args:
            first: false where an earlier one, of the same number of evaluations, may share its start.
        """
        self.model.begin(first)
        away = (self.x_0 - sampler(self.model, self.x_T, **self.conditions)).flatten(1)
        return away / away.shape[1] ** 0.5

    def attempt(self, start: Multistep, unknowns: Tensor | None = None, first: bool = True) -> Tensor:
        """`residuals` with the unknowns changed; infinite where there is no such sampler or it fails.

        That a trial is inaccurate is no news, so that its warnings are not shown.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.residuals(start if unknowns is None else _changed(start, unknowns), first)
        except FAILURES:
            return torch.full_like(self.x_0.flatten(1), math.inf)

    def bias(self, residuals: Tensor) -> Tensor:
        """What residuals (..., B, d) have in common, (..., k + d), in standard deviations of the ends.

        Parts (B, k) of unit length along the main axes of the ends, a_i = sum_k size_k part_ik axis_k: were the extent
        along axis k wrong by a share s, residuals would be s size_k part_ik axis_k.
        """
        extent = ((residuals @ self.axes) * self.parts).sum(-2) / len(self.parts) ** 0.5
        return torch.cat([extent, residuals.mean(-2)], -1) / self.std

    def loss(self, residuals: Tensor, usual: Tensor) -> float:
        """Cauchy's, of errors in units of `usual`, and the bias; infinite where a residual is not a number."""
        bias = self.bias(near(residuals, usual) * residuals)
        loss = (residuals.norm(dim=1) / usual).square().log1p().mean() + (BIAS * bias).square().sum()
        return loss.nan_to_num(math.inf, posinf=math.inf).item()

    def errors(self, sampler: Multistep) -> Tensor:
        """(B,) root mean square over coordinates."""
        return self.residuals(sampler).norm(dim=1)


def near(residuals: Tensor, usual: Tensor) -> Tensor:
    """Weights (B, 1) in Cauchy's loss: 1 for residuals (B, d) far below `usual`, 1/2 there, 0 far above."""
    return 1 / (1 + (residuals.norm(dim=1, keepdim=True) / usual).square())


def _unknowns(start: Multistep) -> int:
    """Times, the scale and, where there are few evaluations, factors on the weights."""
    return start.places + (sum(map(sum, start.shapes())) if start.steps <= FEW else 0)


def _solutions(start: Multistep, rounds: int) -> int:
    """How many `rounds` need at most."""
    return rounds * (_unknowns(start) + 3) + len(DAMPING) - 3


class _Fit:
    """What the damped Gauss-Newton method finds from `start`, a few rounds at a time.

    Args:
        progress: called after each solution with the median error that the round began with.
    """

    def __init__(self, start: Multistep, progress: Callable[[float], None]):
        self.start, self.progress = start, progress
        self.unknowns = torch.zeros(_unknowns(start), dtype=torch.float64)

    def advance(self, problem: _Problem, rounds: int) -> Multistep:
        """What is found after so many rounds more, or before, where one gains too little."""
        self.dampings = DAMPING
        for _ in range(rounds):
            if not self._round(problem):
                break
        return _changed(self.start, self.unknowns)

    def _round(self, problem: _Problem) -> bool:
        """Whether another is worth while."""
        start, unknowns = self.start, self.unknowns
        residuals = problem.attempt(start, unknowns)
        middle = residuals.norm(dim=1).median()
        usual = TAIL * middle + 1e-12
        loss = problem.loss(residuals, usual)
        if loss == math.inf:
            return False

        def solved(changes: Iterable[Tensor]) -> Iterator[Tensor]:
            for change in changes:
                yield problem.attempt(start, unknowns + change, first=False)
                self.progress(middle.item())

        trust = near(residuals, usual)
        unit = trust.sqrt() / (len(residuals) ** 0.5 * usual)

        def weighted(residuals: Tensor) -> Tensor:
            return torch.cat([(unit * residuals).flatten(-2), BIAS * problem.bias(trust * residuals)], -1)

        identity = torch.eye(len(unknowns), dtype=torch.float64)
        slopes = torch.stack([weighted((residuals - changed) / CHANGE) for changed in solved(CHANGE * identity)])
        curvature, downhill = slopes @ slopes.T, slopes @ weighted(residuals)
        curvature, downhill = curvature.cpu().double(), downhill.cpu().double()
        if not bool(curvature.isfinite().all()):
            return False
        size = curvature.diagonal().mean().clamp_min(1e-30) * identity
        changes = [torch.linalg.solve(curvature + damping * size, downhill) for damping in self.dampings]
        losses = [problem.loss(trial, usual) for trial in solved(changes)]
        gain = loss - min(losses)
        if not gain > 0:
            return False
        best = losses.index(min(losses))
        self.unknowns, place = unknowns + changes[best], DAMPING.index(self.dampings[best])
        self.dampings = DAMPING[max(0, place - 1) : place + 2]
        return gain > 2 * GAIN * (unit * residuals).square().sum().item()


def _changed(start: Multistep, unknowns: Tensor) -> Multistep:
    """With other times (steps - 1,), another scale (1,) and other factors (all or none).

    Times change by the logarithm of each gap of the grid over the rest of the way, so that those before stay; the scale
    by its logarithm, up to a factor of 3; factors by themselves.
    """
    left = 1 - torch.tensor(start.grid.shares, dtype=torch.float64)
    ratios = (left[:-2] / left[1:-1] - 1) * unknowns[: start.places - 1].exp()
    shares = (0.0, *(1 - (1 / (1 + ratios)).cumprod(0)).tolist(), 1.0)
    values, factors = iter((1 + unknowns[start.places :]).tolist()), None
    if len(unknowns) > start.places:
        factors = tuple(tuple(tuple(next(values) for _ in range(k)) for k in pair) for pair in start.shapes())
    std = start.std * math.exp(min(max(unknowns[start.places - 1].item(), -WANDER), WANDER))
    return replace(start, grid=replace(start.grid, shares=shares), std=std, factors=factors)
