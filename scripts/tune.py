"""Tune the sampler to a checkpoint: python scripts/tune.py checkpoint=outputs/.../checkpoints/last nfe=8"""

import contextlib
import os

import torch
from cli import command, expect, run_folder
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from diffusion import Generator, UserError, devices
from diffusion.samplers import store_tuned, tune
from diffusion.samplers.base import state_dtype


@command("tune")
def main(config: DictConfig) -> None:
    expect(config, nfe=int, trajectories=int | None, rounds=int, seed=int, denoise=bool)
    generator = Generator.load(config.checkpoint, devices.pick(config.device), config.trust)
    if not os.access(config.checkpoint, os.W_OK):
        raise UserError(f"checkpoint {config.checkpoint} cannot be written to, and what is found is kept there")

    def draw(number: int, randomness: torch.Generator) -> tuple[Tensor, dict]:
        x_T = generator.field.sample_prior((number, *generator.shape), randomness, dtype=torch.float64)
        x_T = x_T.to(generator.device, state_dtype(generator.device))
        if not generator.num_classes:
            return x_T, {}
        label = torch.linspace(0, generator.num_classes, number + 1)[:-1].long()  # even shares of the classes
        return x_T, {"label": label.to(generator.device)}

    with tqdm(unit=" solutions", desc="exact solutions", leave=False) as bar:

        def show(done: int, total: int, error: float) -> None:
            bar.total = total
            bar.set_description("tuning", refresh=False)
            bar.set_postfix(error=f"{error:.2e}", refresh=False)
            bar.update(done - bar.n)

        chosen = config.nfe, config.trajectories, config.rounds, config.seed, config.denoise
        found = tune(generator, draw, *chosen, progress=show)
    path = store_tuned(config.checkpoint, found)
    with contextlib.suppress(OSError):
        run_folder().rmdir()  # all that is left is in the checkpoint
    if found.error == found.default_error:
        print(f"nothing better was found than the default, sampler=multistep sampler.steps={config.nfe}")
    print(f"{config.nfe} evaluations: median error on fresh draws {found.error:.3g}, untuned {found.default_error:.3g}")
    print(f"{path}; use it with sampler=tuned sampler.nfe={config.nfe}")


if __name__ == "__main__":
    main()
