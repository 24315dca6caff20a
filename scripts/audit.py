"""Ask the continuity equation of a trained network: python scripts/audit.py checkpoint=outputs/.../checkpoints/last"""

import json

import torch
from cli import checkpoint_data, command, expect, run_folder
from omegaconf import DictConfig

from diffusion import Generator, devices
from diffusion.audit import audit
from diffusion.plotting import save_audit


@command("audit")
def main(config: DictConfig) -> None:
    expect(config, times=int, draws=int, functions=int, seed=int, batch_size=int)
    generator = Generator.load(config.checkpoint, devices.pick(config.device), config.trust)
    train = checkpoint_data(config, generator).train
    x0 = train.take(torch.arange(len(train))).x
    found = audit(generator, x0, config.times, config.draws, config.functions, config.seed, config.batch_size)
    path = run_folder() / "audit.json"
    path.write_text(json.dumps({"checkpoint": str(config.checkpoint), **found.to_dict()}, indent=2) + "\n")
    picture = save_audit(found, run_folder() / "audit.png")
    print(found.table())
    print(f"figures: {path}; picture: {picture}")


if __name__ == "__main__":
    main()
