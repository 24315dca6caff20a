"""Tune the sampler to a checkpoint: python scripts/tune.py checkpoint=outputs/.../checkpoints/last nfe=8"""

import torch
from cli import command, expect, run_folder
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from diffusion import Generator, devices
from diffusion.samplers import store_tuned, tune


@command("tune")
def main(config: DictConfig) -> None:
    expect(config, nfe=int, trajectories=int, iterations=int, seed=int)
    generator = Generator.load(config.checkpoint, devices.pick(config.device), config.trust)

    def draw(number: int, randomness: torch.Generator) -> tuple[Tensor, dict]:
        x_T = generator.field.sample_prior((number, *generator.shape), randomness, dtype=torch.float64)
        if not generator.num_classes:
            return x_T, {}
        return x_T, {"label": (torch.arange(number) % generator.num_classes).to(generator.device)}

    with tqdm(total=config.iterations, unit="iterations", leave=False) as bar:

        def show(done: int, error: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix(error=f"{error:.2e}")

        found = tune(generator, draw, config.nfe, config.trajectories, config.iterations, config.seed, show)
    run_folder().rmdir()  # all that is left is in the checkpoint
    path = store_tuned(config.checkpoint, found)
    print(
        f"{config.nfe} evaluations, order {found.sampler.order}: median error on fresh draws {found.error:.3g}", end=""
    )
    print(f", {found.default_error:.3g} untuned: {path}; use it with sampler=tuned sampler.nfe={config.nfe}")


if __name__ == "__main__":
    main()
