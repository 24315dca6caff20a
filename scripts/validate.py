"""Check a field: python scripts/validate.py field=gravity data=8gaussians; exit status 1 if a check fails."""

import json
import math
import sys

import torch
from cli import build, command, expect, run_folder
from omegaconf import DictConfig

from diffusion import UserError
from diffusion.fields import validate
from diffusion.plotting import save_report


@command("validate")
def main(config: DictConfig) -> None:
    expect(config, num_points=int, seed=int)
    if config.num_points < 1 or not isinstance(config.effort, int | float) or not config.effort > 0:
        points = f"num_points is {config.num_points} and effort {config.effort!r}"
        raise UserError(f"{points}, expected at least one point and a positive number")
    train = build(config.data).train
    config.shape, config.dim, config.num_classes = list(train.shape), math.prod(train.shape), 0
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
    x0 = train.take(order[: config.num_points]).x
    field = build(config.field)
    report = validate(field, x0, config.seed, config.effort)
    print(report.table())
    path = run_folder() / "report.json"
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    try:
        picture = save_report(report, field, x0[0], run_folder() / "report.png")
    except UserError as error:  # a wrong field may have no lines to draw
        picture = f"none, {error}"
    print(f"figures: {path}; picture: {picture}")
    if not report.passed:
        print(f"the field is wrong: {', '.join(report.failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
