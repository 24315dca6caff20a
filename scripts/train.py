"""Train a generator: python scripts/train.py experiment=digits_gravity [option=value ...]"""

import math
import os
from pathlib import Path

import torch
from cli import build, command, launch, run_folder, write_config
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion import Generator, UserError, checkpoints, specs
from diffusion.data import Splits
from diffusion.logging import RunLog
from diffusion.metrics import InceptionFeatures, default_features, evaluate
from diffusion.plotting import save_picture, save_samples
from diffusion.randomness import derive_seed

CALIBRATION_EXAMPLES = 10_000
GRID_SAMPLES = 64


@command("train")
def main(config: DictConfig) -> None:
    folder = run_folder()
    resume = _checkpoint_to_resume(config.resume, folder, config.trainer.steps)
    with open_dict(config):
        devices = config.trainer.pop("devices")
    if devices > 1 and "WORLD_SIZE" not in os.environ:
        launch(devices, [f"hydra.run.dir={folder}", f"resume={resume or 'null'}"])
    is_main = os.environ.get("RANK", "0") == "0"

    splits = build(config.data)
    _fill_in(config, splits)
    torch.manual_seed(derive_seed(config.seed, "network"))
    generator = Generator(build(config.field), build(config.model), splits.train.shape)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(config.seed))
    generator.calibrate(splits.train.take(order[:CALIBRATION_EXAMPLES]).x)
    objective, sampler, trainer = build(config.objective)(generator), build(config.sampler), build(config.trainer)

    def samples(model: Generator, number: int, progress: bool = False) -> torch.Tensor:
        label = torch.arange(number) % config.num_classes if config.num_classes else None
        return model.sample(number, sampler, config.seed, label, config.batch_size, progress)

    def draw_grid(step: int, model: Generator) -> None:
        run.image(step, save_picture(samples(model, GRID_SAMPLES), folder / f"samples_{step:07d}.png"))

    plain = OmegaConf.to_container(config, resolve=True)
    if is_main:
        write_config(config, folder)
        run = RunLog(
            folder, plain, checkpoints.read_description(resume)["step"] if resume else 0, plain["logger"] or None
        )
        print(f"{'continuing ' + str(resume) if resume else 'training'} in {folder}", flush=True)
    average = trainer.fit(
        generator,
        objective,
        splits.train,
        folder / "checkpoints",
        splits.test,
        resume,
        {"model": specs.describe(generator), "data": plain["data"]},
        run.metrics if is_main else None,
        [draw_grid] if is_main else [],
    )
    if not is_main:
        return
    if config.num_samples:
        x = samples(average, config.num_samples, progress=True)
        save_samples(x, folder)
        features = InceptionFeatures() if config.inception else default_features(splits)
        evaluation = evaluate(x, splits, features, config.seed)
        run.evaluation(evaluation.to_dict())
        print(evaluation.table())
    run.close()
    print(f"run: {folder}")


def _checkpoint_to_resume(wanted: str | None, folder: Path, steps: int) -> Path | None:
    """`resume`, with "auto" resolved: this run's last checkpoint, or that of the newest run beside it if unfinished."""
    if wanted != "auto":
        return wanted and Path(wanted)
    for place in (folder, *sorted(folder.parent.iterdir(), reverse=True)):
        last = place / "checkpoints" / "last"
        if checkpoints.exists(last):
            if place == folder or checkpoints.read_description(last).get("step", steps) < steps:
                return last
            break
    print("resume=auto: no unfinished run here, starting afresh", flush=True)
    return None


def _fill_in(config: DictConfig, splits: Splits) -> None:
    """The facts of the data that other groups of the configuration refer to."""
    config.shape, config.dim = list(splits.train.shape), math.prod(splits.train.shape)
    if config.conditional and not splits.train.num_classes:
        raise UserError(f"conditional is true but the data set {splits.name} has no labels; use conditional=false")
    config.num_classes = splits.train.num_classes if config.conditional else 0


if __name__ == "__main__":
    main()
