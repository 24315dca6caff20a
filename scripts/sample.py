"""Sample from a checkpoint: python scripts/sample.py checkpoint=outputs/.../checkpoints/last num_samples=64"""

from cli import command, draw, expect, load, run_folder
from omegaconf import DictConfig

from diffusion.plotting import save_samples


@command("sample")
def main(config: DictConfig) -> None:
    expect(config, seed=int, num_samples=int, batch_size=int, compile=bool, label=int | None)
    generator, sampler = load(config)
    samples, evaluations = draw(generator, sampler, config.num_samples, config.seed, config.label, config.batch_size)
    picture = save_samples(samples, run_folder())
    each = f"{evaluations:.4g} evaluation{'s' * (evaluations != 1)} each"
    print(f"{config.num_samples} samples, {each}: {picture} and {picture.with_suffix('.npz')}")


if __name__ == "__main__":
    main()
