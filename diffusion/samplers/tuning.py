"""Samplers tuned to a model: how a given number of evaluations brings samples closest to the exact ODE's."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from diffusion.errors import UserError
from diffusion.samplers.arc import data_std
from diffusion.samplers.base import Model, state_dtype
from diffusion.samplers.grids import BandGrid
from diffusion.samplers.multistep import Multistep

FILE = "tuned.yaml"
ENTRY = {"sampler", "error", "default_error", "rule"}
RULE = 2  # of the weights of Multistep, which factors are relative to
REFERENCE = Multistep(steps=128)
FEW = 10  # evaluations up to which the weights too are tuned: what that costs grows with the square of the evaluations
RESIDUALS = 1024  # coordinates of all trajectories together, at least
CHANGE = 0.01  # of an unknown, for its derivative
DAMPING = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of a round; the best is taken
WANDER = math.log(3)  # of the scale's logarithm; leaves 5 / 3 of the ratio that a sampler warns of, on_arc.FAR
GAIN = 0.03  # share of the error that a round must take away to be followed by another
FAILURES = (UserError, OverflowError, torch.linalg.LinAlgError)  # of steps too long for the model, or for numbers


@dataclass(frozen=True)
class Tuned:
    """A sampler and what it is worth: median over fresh draws of the distance from the exact ODE, per coordinate.

    Infinite where the sampler fails.
    """

    sampler: Multistep
    error: float
    default_error: float  # of Multistep(steps=nfe)


def tune(
    model: Model,
    draw: Callable[[int, torch.Generator], tuple[Tensor, dict]],
    nfe: int,
    trajectories: int | None = None,
    rounds: int = 8,
    seed: int = 0,
    denoise: bool = False,
    progress: Callable[[int, int, float], None] = lambda done, total, error: None,
) -> Tuned:
    """The Multistep that makes the least error in `nfe` evaluations: its times, its scale and, up to 10, its weights.

    The mean logarithm of the error, over trajectories whose ends are known from a fine solution, falls by the damped
    Gauss-Newton method (Levenberg 1944), from even gaps on. The residuals of each sample are divided by its error (or
    a quarter of the median, if that is more), so that the gradient of their squares is that of the logarithms.
    Derivatives are differences: a round costs about half a solution for each unknown, which leaves alone what comes
    before it. The order is the better of 2 and 3 up to 10 evaluations, of 2 and 4 beyond.

    Args:
        model: has `velocity` and `field`.
        draw: draw(number, generator) -> prior draws (number, *shape) and the conditions that go with them.
        nfe: evaluations, 2 or more.
        trajectories: number to tune on; four times as many fresh ones are drawn to report on. None is 64, or as many as
            have 1024 coordinates together.
        rounds: at most; they end where one gains less than 3 %.
        denoise: tune a sampler that ends with the field's estimate at t_min (see Multistep).
        progress: called after each solution with how many there have been, how many there may be, and the error.

    Returns:
        The better on the fresh draws of what was found and of the default.

    Raises:
        UserError: every one of them fails, as where the velocity is not finite.
    """
    if nfe < 2 or (trajectories is not None and trajectories < 2) or rounds < 1:
        raise UserError(
            f"tuning has nfe={nfe}, trajectories={trajectories}, rounds={rounds}, expected at least 2, 2, 1"
        )
    generator = torch.Generator().manual_seed(seed)
    if trajectories is None:
        trajectories = max(64, math.ceil(RESIDUALS / draw(1, torch.Generator())[0].numel()))
    fine = replace(REFERENCE, denoise=denoise)
    problem = _Problem(model, fine, *draw(trajectories, generator))
    default = Multistep(nfe, denoise=denoise)
    even = tuple(torch.linspace(0, 1, nfe + 1, dtype=torch.float64).tolist())
    grid = replace(default.default_grid(model, problem.x_T), shares=even)
    orders = sorted({min(order, nfe - 1) for order in ((2, 3) if nfe <= FEW else (2, 4))})
    starts = [replace(default, order=order, grid=grid, std=default.data_std(model)) for order in orders]
    total, done = rounds * sum(_unknowns(start) + len(DAMPING) for start in starts), itertools.count(1)
    found = [_fitted(start, problem, rounds, lambda error: progress(next(done), total, error)) for start in starts]
    fresh = _Problem(model, fine, *draw(4 * trajectories, generator))
    errors = [fresh.attempt(sampler).norm(dim=1).median().item() for sampler in (default, *found)]
    if min(errors) == math.inf:
        fresh.errors(default)  # says what is wrong
    best = errors.index(min(errors))
    return Tuned((default, *found)[best], errors[best], errors[0])


class _Kept:
    """A model that does not evaluate again what a first solution did, for others that start alike."""

    def __init__(self, model: Model):
        self.model, self.field, self.data_std = model, model.field, data_std(model)
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
    """Prior draws and where the ODE leads from them, by a fine solution."""

    def __init__(self, model: Model, fine: Multistep, x_T: Tensor, conditions: dict):
        self.model, self.x_T, self.conditions = _Kept(model), x_T.to(state_dtype(x_T.device)), conditions
        self.x_0 = fine(model, self.x_T, **conditions)

    def residuals(self, sampler: Multistep, first: bool = True) -> Tensor:
        """(B, d), in units that make a row's norm its root mean square.

        Args:
            first: false where an earlier one, of the same number of evaluations, may share its start.
        """
        self.model.begin(first)
        away = (self.x_0 - sampler(self.model, self.x_T, **self.conditions)).flatten(1)
        return away / away.shape[1] ** 0.5

    def attempt(self, start: Multistep, unknowns: Tensor | None = None, first: bool = True) -> Tensor:
        """`residuals` with the unknowns changed; infinite where there is no such sampler or it fails."""
        try:
            return self.residuals(start if unknowns is None else _changed(start, unknowns), first)
        except FAILURES:
            return torch.full_like(self.x_0.flatten(1), math.inf)

    def errors(self, sampler: Multistep) -> Tensor:
        """(B,) root mean square over coordinates."""
        return self.residuals(sampler).norm(dim=1)


def _unknowns(start: Multistep) -> int:
    """Times, the scale and, where there are few evaluations, factors on the weights."""
    return start.steps + (sum(map(sum, start.shapes())) if start.steps <= FEW else 0)


def _fitted(start: Multistep, problem: _Problem, rounds: int, progress: Callable[[float], None]) -> Multistep:
    """What the damped Gauss-Newton method finds from `start`."""
    unknowns = torch.zeros(_unknowns(start), dtype=torch.float64)
    identity = torch.eye(len(unknowns), dtype=torch.float64)

    def solved(changes: Iterable[Tensor]) -> Iterator[Tensor]:
        for change in changes:
            yield problem.attempt(start, unknowns + change, first=False)
            progress(least)

    for _ in range(rounds):
        residuals = problem.attempt(start, unknowns)
        errors = residuals.norm(dim=1)
        least = _mean(errors)
        if least == math.inf:
            break
        trust = errors.clamp_min(errors.median() / 4 + 1e-12).reciprocal()[:, None]
        slopes = torch.stack([(trust * (residuals - r) / CHANGE).flatten() for r in solved(CHANGE * identity)])
        curvature, downhill = slopes @ slopes.T, slopes @ (trust * residuals).flatten()
        curvature, downhill = curvature.cpu().double(), downhill.cpu().double()
        if not bool(curvature.isfinite().all()):
            break
        unit = curvature.diagonal().mean().clamp_min(1e-30) * identity
        changes = [torch.linalg.solve(curvature + damping * unit, downhill) for damping in DAMPING]
        means = [_mean(trial.norm(dim=1)) for trial in solved(changes)]
        best = means.index(min(means))
        if not means[best] < (1 - GAIN) * least:
            break
        unknowns = unknowns + changes[best]
    return _changed(start, unknowns)


def _mean(errors: Tensor) -> float:
    """Geometric; infinite where one is not a number."""
    return (errors + 1e-12).log().mean().exp().nan_to_num(math.inf, posinf=math.inf).item()


def _changed(start: Multistep, unknowns: Tensor) -> Multistep:
    """With other times (steps - 1,), another scale (1,) and other factors (all or none).

    Times change by the logarithm of each gap of the grid over the rest of the way, so that those before stay; the scale
    by its logarithm, up to a factor of 3; factors by themselves.
    """
    left = 1 - torch.tensor(start.grid.shares, dtype=torch.float64)
    ratios = (left[:-2] / left[1:-1] - 1) * unknowns[: start.steps - 1].exp()
    shares = (0.0, *(1 - (1 / (1 + ratios)).cumprod(0)).tolist(), 1.0)
    values, factors = iter((1 + unknowns[start.steps :]).tolist()), None
    if len(unknowns) > start.steps:
        factors = tuple(tuple(tuple(next(values) for _ in range(k)) for k in pair) for pair in start.shapes())
    std = start.std * math.exp(min(max(unknowns[start.steps - 1].item(), -WANDER), WANDER))
    return replace(start, grid=replace(start.grid, shares=shares), std=std, factors=factors)


def store_tuned(folder: str | Path, tuned: Tuned) -> Path:
    """Write what was found beside a checkpoint, where `tuned_sampler` finds it; grids for other budgets stay."""
    path = Path(folder) / FILE
    entries = _read(path) if path.exists() else {}
    sampler, errors = asdict(tuned.sampler), {"error": tuned.error, "default_error": tuned.default_error, "rule": RULE}
    if sampler["grid"] is not None:
        sampler["grid"]["shares"] = list(sampler["grid"]["shares"])
    entries[tuned.sampler.steps] = {"sampler": sampler, **errors}
    fresh = path.with_name(f".{FILE}.new")
    fresh.write_text(yaml.safe_dump(dict(sorted(entries.items())), sort_keys=False))
    fresh.replace(path)
    return path


def tuned_sampler(checkpoint: str | Path, nfe: int) -> Multistep:
    """The sampler that was tuned to a checkpoint for `nfe` evaluations.

    Raises:
        UserError: none was, or the file that says so is damaged.
    """
    path = Path(checkpoint) / FILE
    entries = _read(path) if path.exists() else {}
    if nfe not in entries:
        known = f"only for {', '.join(map(str, entries))}" if entries else "for no number of them"
        raise UserError(
            f"checkpoint {checkpoint} is not tuned for nfe={nfe} evaluations, {known}; run python scripts/tune.py "
            f"checkpoint={checkpoint} nfe={nfe}"
        )
    try:
        found = entries[nfe]
        if not set(found) >= ENTRY:
            raise ValueError("it is not complete")
        if found["rule"] != RULE:
            raise ValueError("its factors are for other weights than those of now")
        options = dict(found["sampler"])
        grid = options.pop("grid")
        if grid is not None:
            grid = BandGrid(grid["low"], grid["high"], tuple(grid["shares"]))
        if options.get("factors") is not None:
            options["factors"] = tuple(tuple(map(tuple, pair)) for pair in options["factors"])
        sampler = Multistep(**options, grid=grid)
        if sampler.steps != nfe or (grid is not None and len(grid.shares) != nfe + 1):
            raise ValueError(f"it has {sampler.steps} steps for {nfe} evaluations")
        return sampler
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and run scripts/tune.py again") from error


def _read(path: Path) -> dict:
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); delete it and tune again") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} is damaged, it holds no table; delete it and tune again")
    return entries
