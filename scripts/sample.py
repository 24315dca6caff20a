"""Sample from a checkpoint: python scripts/sample.py checkpoint=outputs/.../checkpoints/last num_samples=64"""

import math

from cli import command, expect, load, run_folder
from omegaconf import DictConfig

from diffusion.plotting import save_samples
from diffusion.samplers import Counted, generate


@command("sample")
def main(config: DictConfig) -> None:
    expect(config, seed=int, num_samples=int, batch_size=int, compile=bool, label=int)
    generator, sampler = load(config)
    number, counted = config.num_samples, Counted(generator)
    label = generator.labels(config.label, number)
    size = (number, *generator.shape)
    samples = generate(counted, size, sampler, config.seed, label, config.batch_size, progress=True)
    evaluations = counted.evaluations / math.ceil(number / config.batch_size)
    picture = save_samples(samples, run_folder())
    print(f"{number} samples, {evaluations:g} evaluations each: {picture} and {picture.with_suffix('.npz')}")


if __name__ == "__main__":
    main()
