"""Sample from a checkpoint: python scripts/sample.py checkpoint=outputs/.../checkpoints/last num_samples=64"""

import torch
from cli import build, command, run_folder
from omegaconf import DictConfig

from diffusion import Generator, devices
from diffusion.plotting import save_samples


@command("sample")
def main(config: DictConfig) -> None:
    generator = Generator.load(config.checkpoint, devices.pick(config.device))
    label = None if config.label is None else torch.full((config.num_samples,), config.label)
    samples = generator.sample(
        config.num_samples, build(config.sampler), config.seed, label, config.batch_size, progress=True
    )
    picture = save_samples(samples, run_folder())
    print(f"{config.num_samples} samples: {picture} and {picture.with_suffix('.npz')}")


if __name__ == "__main__":
    main()
