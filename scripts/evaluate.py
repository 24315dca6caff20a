"""Evaluate a checkpoint: python scripts/evaluate.py checkpoint=outputs/.../checkpoints/last num_samples=2000"""

import json

import torch
from cli import build, checkpoint_data, command, expect, run_folder
from omegaconf import DictConfig

from diffusion import Generator, devices
from diffusion.metrics import InceptionFeatures, default_features, evaluate


@command("evaluate")
def main(config: DictConfig) -> None:
    expect(config, seed=int, num_samples=int, batch_size=int, inception=bool)
    generator = Generator.load(config.checkpoint, devices.pick(config.device), config.trust)
    splits = checkpoint_data(config, generator)
    features = InceptionFeatures() if config.inception else default_features(splits)
    label = torch.arange(config.num_samples) % generator.num_classes if generator.num_classes else None
    sampler = build(config.sampler)
    samples = generator.sample(config.num_samples, sampler, config.seed, label, config.batch_size, progress=True)
    evaluation = evaluate(samples.to(generator.device), splits, features, config.seed)
    path = run_folder() / "evaluation.json"
    settings = {"checkpoint": str(config.checkpoint), "num_samples": config.num_samples, "sampler": str(sampler)}
    path.write_text(json.dumps({**settings, **evaluation.to_dict()}, indent=2) + "\n")
    print(evaluation.table())
    print(f"figures: {path}")


if __name__ == "__main__":
    main()
