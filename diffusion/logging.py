"""Where a run's numbers and pictures go: always to its folder, and to wandb where wanted."""

import json
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from diffusion.errors import UserError


class RunLog:
    """Writes metrics.jsonl, a record a line, and evaluation.json; sends the same to wandb.

    Args:
        folder: of the run.
        config: the resolved configuration.
        step: at which the run begins; lines of metrics.jsonl after it, from a run that was cut off, are dropped because
            they will be written again.
        wandb_options: keyword arguments of wandb.init, or None for no wandb. It runs online where an API key is set
            (or as WANDB_MODE says), otherwise offline; `wandb sync` uploads an offline run.

    Raises:
        UserError: wandb cannot start.
    """

    def __init__(self, folder: Path, config: Mapping, step: int = 0, wandb_options: Mapping[str, Any] | None = None):
        self.folder, path = folder, folder / "metrics.jsonl"
        if path.exists():
            rows = [row for row in path.read_text().splitlines() if _step_of(row) <= step]
            path.write_text("".join(f"{row}\n" for row in rows))
        self.path = path
        self.run = None if wandb_options is None else _start_wandb(folder, config, wandb_options)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after step `step`."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.run:
            self.run.log(dict(values), step=step)

    def image(self, step: int, path: Path) -> None:
        """A picture that was written to `path` at step `step`."""
        if self.run:
            self.run.log({"samples": wandb.Image(str(path))}, step=step)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """The final evaluation, nested dictionaries of numbers."""
        (self.folder / "evaluation.json").write_text(json.dumps(values, indent=2) + "\n")
        if self.run:
            self.run.summary.update({"evaluation": dict(values)})

    def close(self) -> None:
        if self.run:
            self.run.finish()


def _step_of(row: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut short."""
    try:
        return json.loads(row)["step"]
    except json.JSONDecodeError:
        return float("inf")


def _start_wandb(folder: Path, config: Mapping, options: Mapping[str, Any]):
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    try:
        return wandb.init(
            **options, config=dict(config), dir=str(folder), mode=mode, settings=wandb.Settings(silent=True)
        )
    except (wandb.errors.Error, TypeError) as error:
        raise UserError(f"wandb could not start ({error}); set WANDB_MODE=offline or logger=none") from error


def _has_key() -> bool:
    """Whether a wandb API key is set in the environment or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
