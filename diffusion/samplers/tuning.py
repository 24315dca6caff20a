"""Grids tuned to a model: where a given number of evaluations brings samples closest to the exact ODE's."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import Tensor

from diffusion.errors import UserError
from diffusion.samplers.arc import Arc
from diffusion.samplers.base import Model, state_dtype
from diffusion.samplers.grids import BandGrid
from diffusion.samplers.multistep import Multistep
from diffusion.samplers.on_arc import SCALE

FILE = "tuned.yaml"
REFERENCE = Multistep(steps=128)


@dataclass(frozen=True)
class Tuned:
    """A sampler and what it is worth: median over fresh draws of the distance from the exact ODE, per coordinate."""

    sampler: Multistep
    error: float
    default_error: float  # of Multistep(steps=nfe)


def tune(
    model: Model,
    draw: Callable[[int, torch.Generator], tuple[Tensor, dict]],
    nfe: int,
    trajectories: int = 64,
    iterations: int = 100,
    seed: int = 0,
    denoise: bool = False,
    progress: Callable[[int, float], None] = lambda iteration, error: None,
) -> Tuned:
    """The times, the order and the arc's scale with which Multistep makes the least error in `nfe` evaluations.

    The mean logarithm of the error, over trajectories whose ends are known from a fine solution, falls along its
    gradient through the solver. Each order has a fifth of the iterations, then the best of them has the others.

    Args:
        model: differentiable in x and t.
        draw: draw(number, generator) -> prior draws (number, *shape) and the conditions that go with them.
        nfe: evaluations, 2 or more.
        trajectories: number to tune on; four times as many fresh ones are drawn to report on.
        iterations: each costs `nfe` evaluations, forward and backward.
        denoise: tune a sampler that ends with the field's estimate at t_min (see Multistep).
        progress: called with the number of iterations done and the error on the trajectories.

    Returns:
        The better on the fresh draws of what was found and of the default.
    """
    if nfe < 2 or trajectories < 2 or iterations < 1:
        raise UserError(
            f"tuning has nfe={nfe}, trajectories={trajectories}, iterations={iterations}, expected at least 2, 2 and 1"
        )
    generator = torch.Generator().manual_seed(seed)
    fine = replace(REFERENCE, denoise=denoise)
    problem = _Problem(model, fine, *draw(trajectories, generator))
    orders = [order for order in (2, 3, 4) if order < nfe] or [1]
    first = max(1, iterations // (2 + len(orders)))
    runs = [_Descent(Multistep(nfe, order, denoise=denoise), problem) for order in orders]
    done = 0
    for run in runs:
        for _ in range(first):
            done += 1
            progress(done, run.step())
    best, begun = min(runs, key=lambda run: run.least), done
    while done < iterations:
        best.slow_down((iterations - done) / (iterations - begun))
        done += 1
        progress(done, best.step())
    fresh = _Problem(model, fine, *draw(4 * trajectories, generator))
    default = Multistep(nfe, denoise=denoise)
    default_error, error = fresh.median_error(default), fresh.median_error(best.best)
    return Tuned(best.best if error < default_error else default, min(error, default_error), default_error)


class _Problem:
    """Prior draws and where the ODE leads from them, by a fine solution."""

    def __init__(self, model: Model, fine: Multistep, x_T: Tensor, conditions: dict):
        self.model, self.x_T, self.conditions = model, x_T.to(state_dtype(x_T.device)), conditions
        self.x_0 = fine(model, self.x_T, **conditions)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.velocity(x, t.expand(len(x)), **self.conditions)

    def errors(self, x: Tensor) -> Tensor:
        """(B,) root mean square over coordinates."""
        return (x - self.x_0).flatten(1).square().mean(1).sqrt()

    def median_error(self, sampler: Multistep) -> float:
        return float(self.errors(sampler(self.model, self.x_T, **self.conditions)).median())


class _Descent:
    """Adam on the gaps between the times, in the clock of the default grid, and on the arc's scale."""

    RATE = 0.05

    def __init__(self, sampler: Multistep, problem: _Problem):
        self.sampler, self.problem, self.least, self.best = sampler, problem, math.inf, sampler
        arc = sampler.arc(problem.model, problem.x_T)
        self.noise = arc.noise
        self.grid = sampler.default_grid(problem.model, problem.x_T)
        self.log_gaps = torch.zeros(sampler.steps, dtype=torch.float64, requires_grad=True)
        self.log_scale = torch.tensor(math.log(arc.scale), dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.log_gaps, self.log_scale], lr=self.RATE)

    @torch.enable_grad()
    def step(self) -> float:
        """One iteration; the geometric mean of the errors before it."""
        shares = torch.cat([torch.zeros(1, dtype=torch.float64), self.log_gaps.softmax(0).cumsum(0)])
        shares = shares / shares[-1].detach()
        arc = Arc(self.problem.model.field, self.log_scale.exp(), self.noise)
        times = self.sampler.evaluations(arc, self._times(shares))
        x = self.sampler.along(arc, times, self.problem.velocity, self.problem.x_T)
        loss = (self.problem.errors(x) + 1e-12).log().mean()
        if loss.item() < self.least:
            self.least = loss.item()
            grid = replace(self.grid, shares=tuple(shares.tolist()))
            self.best = replace(self.sampler, grid=grid, std=arc.scale.item() / SCALE)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return math.exp(loss.item())

    def slow_down(self, share: float) -> None:
        """Make the steps of the descent this share of what they were at first."""
        self.adam.param_groups[0]["lr"] = share * self.RATE

    def _times(self, shares: Tensor) -> Tensor:
        """The grid's times (rows, steps + 1), differentiable in its shares."""
        field = self.problem.model.field
        fixed = replace(self.grid, shares=tuple(shares.tolist())).rows(field, len(shares), self.noise)
        with torch.enable_grad():
            at = fixed.clone().requires_grad_()
            (rate,) = torch.autograd.grad(self.grid.clock(field, at, self.noise).sum(), at)
        ends = self.grid.clock(field, fixed[:, [0, -1]], self.noise)
        return fixed + (ends[:, 1:] - ends[:, :1]) / rate * (shares - shares.detach())


def store_tuned(folder: str | Path, tuned: Tuned) -> Path:
    """Write what was found beside a checkpoint, where `tuned_sampler` finds it; grids for other budgets stay."""
    path = Path(folder) / FILE
    entries = _read(path) if path.exists() else {}
    sampler, errors = asdict(tuned.sampler), {"error": tuned.error, "default_error": tuned.default_error}
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
        options = dict(entries[nfe]["sampler"])
        grid = options.pop("grid")
        if grid is not None:
            grid = BandGrid(grid["low"], grid["high"], tuple(grid["shares"]))
        return Multistep(**options, grid=grid)
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
