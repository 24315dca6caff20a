"""Move noise to data by a gradient flow: python scripts/flow.py flow=sinkhorn data=digits"""

import contextlib
import json

import torch
from cli import build, command, expect, run_folder, write_config
from omegaconf import DictConfig, OmegaConf

from diffusion import UserError, devices
from diffusion.data import StreamedData, TensorData
from diffusion.gradient_flow.pictures import save_animation, save_curve
from diffusion.gradient_flow.runs import follow
from diffusion.logging import RunLog
from diffusion.plotting import save_picture, save_samples

HELD_OUT = 2000  # points, at most, beside which memorisation is measured


@command("flow")
def main(config: DictConfig) -> None:
    expect(config, seed=int, num_particles=int, num_data=int | None, frames=int, animation=bool)
    for name in ("num_particles", "num_data"):
        if config[name] is not None and config[name] < 1:
            raise UserError(f"{name} is {config[name]}, expected 1 or more")
    splits, device = build(config.data), devices.pick(config.device)
    data = _points(splits.train, config.num_data).to(device)
    held_out = _points(splits.test, HELD_OUT).to(device)
    functional = build(config.flow.functional)(data=data)
    flow = build(config.flow.geometry)(functional)
    randomness = torch.Generator(device).manual_seed(config.seed)
    noise = torch.randn(config.num_particles, *data.shape[1:], generator=randomness, device=device)
    folder = run_folder()
    write_config(config, folder)
    plain = OmegaConf.to_container(config, resolve=True)
    with contextlib.closing(RunLog(folder, plain, 0, plain["logger"] or None)) as log:
        run = follow(
            flow,
            config.start_std * noise,
            config.flow.steps,
            config.flow.step_size,
            data,
            held_out,
            randomness,
            config.frames,
            log.metrics,
        )
        picture = save_samples(run.frames[-1].float(), folder)
        curve = save_curve(run, folder / "functional.png")
        log.image(config.flow.steps, picture)
    save_picture(run.frames[0].float(), folder / "start.png")
    (folder / "figures.json").write_text(json.dumps(run.to_dict(), indent=2) + "\n")
    animation = save_animation(run, data.cpu(), folder / "flow.gif") if config.animation else "none"
    print(run.table())
    print(f"particles: {picture}; functional: {curve}; animation: {animation}")


def _points(data: TensorData | StreamedData, number: int | None) -> torch.Tensor:
    """`number` examples, or all, in an order that is random and always the same."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.take(order[:number]).x


if __name__ == "__main__":
    main()
