"""What tuning has found, and the file beside a checkpoint that keeps it."""

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from diffusion.errors import UserError
from diffusion.samplers.grids import BandGrid
from diffusion.samplers.multistep import Multistep

FILE = "tuned.yaml"
ENTRY = {"sampler", "error", "default_error", "rule"}
RULE = 2  # of the weights of Multistep, which factors are relative to


@dataclass(frozen=True)
class Tuned:
    """A sampler and what it is worth: median over fresh draws of the distance from the exact ODE, per coordinate.

    Infinite where the sampler fails.
    """

    sampler: Multistep
    error: float
    default_error: float  # of Multistep(steps=nfe)


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
        if sampler.steps != nfe or (grid is not None and len(grid.shares) != sampler.places + 1):
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
