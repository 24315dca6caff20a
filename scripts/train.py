"""Train a generator: python scripts/train.py experiment=digits_gravity [option=value ...]"""

import contextlib
import functools
import json
import math
import os
from pathlib import Path

import torch
from cli import build, command, draw, expect, launch, refuse_choices, run_folder, write_config
from omegaconf import DictConfig, OmegaConf

from diffusion import Generator, UserError, checkpoints, devices
from diffusion.data import Splits
from diffusion.fields import Field, validate
from diffusion.generator import learns_score
from diffusion.gradient_flow.chase import Chase
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.logging import RunLog
from diffusion.metrics import Features, InceptionFeatures, default_features, evaluate
from diffusion.plotting import save_picture, save_samples
from diffusion.randomness import derive_seed
from diffusion.samplers import Sampler

CALIBRATION_EXAMPLES, CALIBRATION_NUMBERS = 10_000, 10**8
LEAST_EVALUATED = 20
VALIDATED = 256
GRID_SAMPLES = 64


@command("train")
def main(config: DictConfig) -> None:
    expect(config, seed=int, num_samples=int, batch_size=int, conditional=bool, inception=bool)
    expect(config, validate=bool)
    expect(config.trainer, devices=int)
    folder = run_folder()
    resume = _checkpoint_to_resume(config.resume, folder, config.trainer.steps)
    processes = config.trainer.devices
    trainer = build({key: value for key, value in config.trainer.items() if key != "devices"})
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        if devices.pick(config.device).type == "cuda" and processes > torch.cuda.device_count():
            raise UserError(f"trainer.devices is {processes}, but this machine has {torch.cuda.device_count()} GPUs")
        launch(processes, [f"hydra.run.dir={folder}", f"resume={resume or 'null'}"])
    is_main = os.environ.get("RANK", "0") == "0"

    splits = build(config.data)
    _fill_in(config, splits)
    make = build(config.objective)
    if isinstance(make, functools.partial) and make.func is Chase:
        generator, sampler = _one_step(config, splits), None
    else:
        generator, sampler = _of_field(config, splits, resume, check=config.validate and is_main and not resume)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(config.seed))
    most = max(2, min(CALIBRATION_EXAMPLES, CALIBRATION_NUMBERS // math.prod(generator.shape)))
    generator.calibrate(splits.train.take(order[:most]).x)
    objective = make(generator)
    features = _features(config, splits) if is_main and config.num_samples else None
    plain = OmegaConf.to_container(config, resolve=True)

    def samples(model: Generator | OneStepGenerator, number: int, progress: bool = False) -> torch.Tensor:
        label = torch.arange(number) % config.num_classes if config.num_classes else None
        return draw(model, sampler, number, config.seed, label, config.batch_size, progress)[0]

    samples(generator.eval(), 1)  # a sampler that does not suit the field says so now
    generator.train()

    def draw_grid(step: int, model: Generator | OneStepGenerator) -> None:
        run.image(step, save_picture(samples(model, GRID_SAMPLES), folder / f"samples_{step:07d}.png"))

    def train(log=lambda step, metrics: None, callbacks=()) -> Generator | OneStepGenerator:
        place, about = folder / "checkpoints", {"data": plain["data"]}
        return trainer.fit(generator, objective, splits.train, place, splits.test, resume, about, log, callbacks)

    if not is_main:
        train()
        return
    write_config(config, folder)
    step = checkpoints.read_step(resume) if resume else 0
    with contextlib.closing(RunLog(folder, plain, step, plain["logger"] or None)) as run:
        print(f"{f'continuing {resume}' if resume else 'training'} in {folder}", flush=True)
        average = train(run.metrics, [draw_grid])
        if sampler is None:
            print(_descent(folder, objective))
        if config.num_samples:
            x = samples(average, config.num_samples, progress=True)
            save_samples(x, folder)
        if features:
            evaluation = evaluate(x.to(average.device), splits, features, config.seed)
            run.evaluation(evaluation.to_dict())
            print(evaluation.table())
            if sampler is None:
                print(evaluation.copies())
    print(f"run: {folder}")


def _refuse_wrong(field: Field, splits: Splits) -> None:
    """Check the field, with few draws, before anything is trained on it."""
    print("checking the field (validate=false skips this)", flush=True)
    some = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:VALIDATED]
    report = validate(field, splits.train.take(some).x, effort=0.02)
    if not report.passed:
        checks = "; ".join(
            f"{check.name}: {check.figure:.3g} {check.unit}, expected at most {check.tolerance:.3g}"
            if check.unit
            else f"{check.name}: {check.note}"
            for check in report.checks
            if check.passed is False
        )
        raise UserError(f"the field is wrong: {checks}. See scripts/validate.py; validate=false trains all the same")


def _of_field(config: DictConfig, splits: Splits, resume: Path | None, check: bool) -> tuple[Generator, Sampler]:
    """A generator that learns the option `field`, after a check of that, and the sampler that draws from it."""
    field = build(config.field)
    if check:
        _refuse_wrong(field, splits)
    config.heads = _heads(field, splits, resume)
    torch.manual_seed(derive_seed(config.seed, "network"))
    return Generator(field, build(config.model), splits.train.shape), build(config.sampler)


def _one_step(config: DictConfig, splits: Splits) -> OneStepGenerator:
    """A one-step generator; it has neither field nor sampler, and the configuration says so."""
    refuse_choices("a one-step generator", "field", "sampler", "heads")
    config.field, config.sampler, config.heads = None, None, 1
    torch.manual_seed(derive_seed(config.seed, "network"))
    return OneStepGenerator(build(config.model), splits.train.shape)


def _descent(folder: Path, objective: Chase) -> str:
    """How far the functional, or what else the loss is, has fallen, in training and on held-out data."""
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    falls = []
    for name, title in (("loss", "training"), ("test_loss", "held out")):
        if found := [(row[name], row["step"]) for row in rows if name in row]:
            (start, first), (end, last), (least, lowest) = found[0], found[-1], min(found)
            falls.append(
                f"{title} {start:.4g} at step {first}, {end:.4g} at step {last}, least {least:.4g} at {lowest}"
            )
    return f"the {'functional' if objective.log_value else 'mean square of the step'}: {'; '.join(falls)}"


def _heads(field: Field, splits: Splits, resume: Path | None) -> int:
    """Outputs of the network: two where a score can be learned, if the run to go on with has them too."""
    about = checkpoints.read_description(resume).get("model") if resume else None
    network = about.get("network") if isinstance(about, dict) else None
    if isinstance(network, dict) and network.get("heads", 1) == 1:
        return 1
    return 2 if learns_score(field, splits.train.shape) else 1


def _features(config: DictConfig, splits: Splits) -> Features | None:
    """The feature space of the final evaluation, before anything is trained; None, and a line, where there is none."""
    if config.num_samples < LEAST_EVALUATED:
        raise UserError(f"num_samples is {config.num_samples}, expected 0 or at least {LEAST_EVALUATED}")
    try:
        return InceptionFeatures() if config.inception else default_features(splits)
    except UserError as error:
        if config.inception:
            raise
        print(f"no final evaluation: {error}", flush=True)
        return None


def _checkpoint_to_resume(wanted: str | None, folder: Path, steps: int) -> Path | None:
    """`resume`, with "auto" resolved: this run's last checkpoint, or that of the newest run beside it if unfinished."""
    if wanted != "auto":
        return wanted and Path(wanted)
    for place in (folder, *sorted(folder.parent.iterdir(), reverse=True)):
        last = place / "checkpoints" / "last"
        if checkpoints.exists(last):
            if place == folder or checkpoints.read_step(last) < steps:
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
