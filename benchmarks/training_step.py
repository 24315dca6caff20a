"""The cost of the whole training step beside a bare loop: python benchmarks/training_step.py

The bare loop draws a batch at random, runs the network, takes the mean square of its output, goes backward and takes a
step of fused Adam; same network, same batch size. The whole step adds what a training run needs: noise levels,
preconditioning, clipping, the schedule, the average of the weights, order and seeds, metrics. Both run on one thread,
in turns, in one process; what is compared is CPU time, as the median over turns of the ratio within a turn.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffusion import Generator
from diffusion.data import digits
from diffusion.fields import gravity
from diffusion.networks import MLP, UNet
from diffusion.objectives import FieldMatching
from diffusion.trainer import Trainer

BATCH_SIZE, WARM_UP = 128, 10


def bare_loop(network: torch.nn.Module, images: torch.Tensor, steps: int) -> float:
    """CPU seconds a step."""
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)
    noise = torch.zeros(BATCH_SIZE, 2)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            started = time.process_time()
        x = images[torch.randint(len(images), (BATCH_SIZE,))]
        loss = network(x, noise).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return (time.process_time() - started) / steps


def whole_step(network: torch.nn.Module, data, steps: int) -> float:
    """CPU seconds a step, with metrics logged every 10 steps, of which the first 10 steps are left out."""
    generator = Generator(gravity(64), network, data.shape).calibrate(data.take(torch.arange(len(data))).x)
    marks = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(WARM_UP + steps, BATCH_SIZE, device="cpu", log_every=10, checkpoint_every=10**9)
        trainer.fit(
            generator,
            FieldMatching(generator),
            data,
            folder,
            log=lambda step, metrics: marks.setdefault(step, time.process_time()),
        )
    return (marks[WARM_UP + steps] - marks[WARM_UP]) / steps


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=7)
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    data = digits().train
    images = data.take(torch.arange(len(data))).x
    results = {"torch": torch.__version__, "batch_size": BATCH_SIZE, "turns": chosen.turns}
    for name, build, steps in [
        ("UNet of the default experiment", lambda: UNet(data.shape, 32, (1, 2), 1), 30),
        ("MLP (pure overhead)", lambda: MLP(data.shape, 32, 1), 300),
    ]:
        pairs = [(bare_loop(build(), images, steps), whole_step(build(), data, steps)) for _ in range(chosen.turns)]
        bare, whole = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        results[name] = {"bare_cpu_ms": 1e3 * bare, "whole_cpu_ms": 1e3 * whole, "ratio": ratio}
        print(f"{name}: bare {1e3 * bare:.2f} ms, whole {1e3 * whole:.2f} ms of CPU a step, ratio {ratio:.3f}")
    chosen.json.write_text(json.dumps(results, indent=2) + "\n")
    print(chosen.json)


if __name__ == "__main__":
    main()
