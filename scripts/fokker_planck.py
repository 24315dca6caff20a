"""Solve a Fokker-Planck equation: python scripts/fokker_planck.py problem=double_well solver=galerkin"""

import json

import torch
from cli import build, command, expect, run_folder, write_config
from omegaconf import DictConfig

from diffusion import UserError, devices
from diffusion.fokker_planck.pictures import save_animation, save_picture
from diffusion.fokker_planck.problems import Problem


@command("fokker_planck")
def main(config: DictConfig) -> None:
    expect(config, frames=int, animation=bool, seed=int)
    kinds = {"tolerance": float, "order": int | None, "symmetrised": bool, "number": int, "steps": int, "options": dict}
    expect(config.solver, **{name: kind for name, kind in kinds.items() if name in config.solver})
    config.device = str(devices.pick(config.device))
    if config.frames < 2:
        raise UserError(f"frames is {config.frames}, expected at least 2, the first and the last time")
    problem = build(config.problem)
    if not isinstance(problem, Problem):
        raise UserError(f"problem is {type(problem).__name__}, expected a diffusion.fokker_planck.problems.Problem")
    times = torch.linspace(0, problem.horizon, config.frames, dtype=torch.float64).tolist()
    run = build(config.solver)(problem, times)
    print(run.table())
    folder = run_folder()
    write_config(config, folder)
    figures = folder / "figures.json"
    figures.write_text(json.dumps(run.to_dict(), indent=2) + "\n")
    picture = save_picture(run, folder / "density.png")
    animation = save_animation(run, folder / "density.gif") if config.animation else "none"
    print(f"figures: {figures}; picture: {picture}; animation: {animation}")


if __name__ == "__main__":
    main()
