"""Evaluate a checkpoint: python scripts/evaluate.py checkpoint=outputs/.../checkpoints/last num_samples=2000"""

import json

import torch
from cli import checkpoint_data, command, draw, expect, load, run_folder
from omegaconf import DictConfig

from diffusion import Generator, UserError
from diffusion.data import Splits
from diffusion.likelihood import dequantise, likelihood
from diffusion.metrics import InceptionFeatures, default_features, evaluate

EXACT_DIVERGENCE = 16  # coordinates; a mean over points does not need more, see diffusion.likelihood
TOLERANCE = 1e-3  # nats a step and coordinate


@command("evaluate")
def main(config: DictConfig) -> None:
    expect(config, seed=int, num_samples=int, batch_size=int, compile=bool, inception=bool, likelihood=int)
    generator, sampler = load(config)
    splits = checkpoint_data(config, generator)
    if config.likelihood is None or not 0 <= config.likelihood <= len(splits.test):
        raise UserError(f"likelihood is {config.likelihood}, expected from 0 to {len(splits.test)} test points")
    if config.likelihood and not isinstance(generator, Generator):
        raise UserError(f"likelihood is {config.likelihood}, expected 0: a one-step generator gives samples alone")
    features = InceptionFeatures() if config.inception else default_features(splits)
    label = torch.arange(config.num_samples) % generator.num_classes if generator.num_classes else None
    samples, evaluations = draw(generator, sampler, config.num_samples, config.seed, label, config.batch_size)
    name = str(sampler) if sampler else "one step"
    del sampler  # and the memory of its graph
    evaluation = evaluate(samples.to(generator.device), splits, features, config.seed)
    figures = evaluation.to_dict()
    if config.likelihood:
        figures["likelihood"] = likelihoods(generator, splits, config.likelihood, config.seed, config.batch_size)
    path = run_folder() / "evaluation.json"
    settings = {"checkpoint": str(config.checkpoint), "num_samples": config.num_samples, "sampler": name}
    settings["evaluations"] = evaluations
    path.write_text(json.dumps({**settings, **figures}, indent=2) + "\n")
    print(evaluation.table())
    if not isinstance(generator, Generator):
        print(evaluation.copies())
    for name, value in figures.get("likelihood", {}).items():
        print(f"likelihood, {name.replace('_', ' ')}: {value:.5g}")
    print(f"figures: {path}")


def likelihoods(generator: Generator, splits: Splits, number: int, seed: int, batch_size: int) -> dict[str, float]:
    """Mean log-likelihood of `number` test points, of images with the noise that makes up for their grey levels."""
    randomness = torch.Generator().manual_seed(seed)
    x, label = splits.test.take(torch.randperm(len(splits.test), generator=randomness)[:number])
    x = x.to(generator.device, torch.float64)
    if splits.test.is_image:
        x = dequantise(x, randomness)
    conditions = {"label": label.to(generator.device)} if generator.num_classes else {}
    options = {"tolerance": TOLERANCE * x[0].numel(), "exact_dim": EXACT_DIVERGENCE, "batch_size": batch_size}
    found = likelihood(generator, x, generator=randomness, **options, **conditions)

    def mean(values: torch.Tensor, name: str) -> dict[str, float]:
        error = {f"{name}_standard_error": float(values.std() / number**0.5)} if number > 1 else {}
        return {name: float(values.mean()), **error}

    figures = {"points": number, **mean(found.nats, "nats"), "nats_numerical_error": float(found.error.mean())}
    if splits.test.is_image:
        figures |= mean(found.bits_per_dim(), "bits_per_dim")
    return {**figures, "evaluations": float(found.evaluations.double().mean())}


if __name__ == "__main__":
    main()
