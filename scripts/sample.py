"""Sample from a checkpoint: python scripts/sample.py checkpoint=outputs/.../checkpoints/last num_samples=64"""

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
    picture = save_samples(samples, run_folder())
    each = f"{counted.points / number:.4g} evaluations each"
    print(f"{number} samples, {each}: {picture} and {picture.with_suffix('.npz')}")


if __name__ == "__main__":
    main()
