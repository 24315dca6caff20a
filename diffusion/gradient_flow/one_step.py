"""One-step generators: a map G from noise to data, trained to chase its own samples as they run downhill."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import checkpoints, specs
from diffusion.conditions import class_labels
from diffusion.errors import UserError


@specs.recorded
class OneStepGenerator(nn.Module):
    """x = G(z, label) = centre + std network(z, label), z ~ N(0, I): data for one evaluation of a network.

    centre (of each coordinate) and std (of all) are the data's. z itself is not added: near data of few dimensions the
    network would have to take most of it off again.

    Args:
        network: network(z, noise, label) -> output like z, with `num_classes` (see diffusion.networks). Its noise
            features (B, 2) are 0.
        shape: of one data point, such as (1, 8, 8).
    """

    def __init__(self, network: nn.Module, shape: Sequence[int]):
        super().__init__()
        self.network, self.shape = network, tuple(shape)
        self.num_classes = network.num_classes
        self.register_buffer("centre", torch.zeros(self.shape))
        self.register_buffer("std", torch.tensor(1.0))

    def calibrate(self, x0: Tensor) -> "OneStepGenerator":
        """Take centre and std from a sample (N, *shape) of the data.

        Raises:
            UserError: the points have another shape, or do not vary.
        """
        if x0.shape[1:] != self.shape:
            raise UserError(f"points have shape {tuple(x0.shape)}, expected (B, {', '.join(map(str, self.shape))})")
        x0 = x0.double()
        variance = (x0 - x0.mean(0)).square().mean()
        if not variance > 0:
            raise UserError(f"the {len(x0)} data points do not vary, expected at least two that differ")
        self.centre.copy_(x0.mean(0))
        self.std.copy_(variance.sqrt())
        return self

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """G(z) (B, *shape), for z (B, *shape) and classes (B,) of a conditional network.

        Raises:
            UserError: the network's output is not like z, for instance because it has two heads.
        """
        z = z.to(next(self.network.parameters()).dtype)
        y = self.network(z, z.new_zeros(len(z), 2), label)
        if y.shape != z.shape:
            raise UserError(f"the network's output has shape {tuple(y.shape)}, expected {tuple(z.shape)}, like z")
        return self.centre + self.std * y.to(self.centre.dtype)

    @torch.no_grad()
    def sample(
        self,
        number: int,
        seed: int = 0,
        label: Tensor | int | None = None,
        batch_size: int = 1024,
        progress: bool = False,
    ) -> Tensor:
        """`number` samples (number, *shape), float32 on the CPU; one evaluation of the network each.

        Args:
            seed: sample i depends on (seed, i) alone, not on `number` or `batch_size`.
            label: one class for all, or (number,).
            batch_size: samples in memory at a time.

        Raises:
            UserError: number or batch_size is not positive, a label is no class, or a sample is not finite.
        """
        if number < 1 or batch_size < 1:
            raise UserError(f"cannot draw {number} samples in batches of {batch_size}; expected positive numbers")
        label, done = class_labels(label, number, self.num_classes), []
        randomness = torch.Generator().manual_seed(seed)
        with tqdm(total=number, unit="samples", disable=not progress, leave=False) as bar:
            for start in range(0, number, batch_size):
                part = range(start, min(start + batch_size, number))
                z = torch.stack([torch.randn(self.shape, generator=randomness, dtype=torch.float64) for _ in part])
                own = None if label is None else label[start : part.stop].to(self.device)
                x = self(z.float().to(self.device), own).to(device="cpu", dtype=torch.float32)
                if not (finite := x.isfinite().flatten(1).all(1)).all():
                    index = start + int((~finite).nonzero()[0])
                    raise UserError(f"sample {index} is not finite; train with a lower trainer.learning_rate")
                done.append(x)
                bar.update(len(x))
        return torch.cat(done)

    @property
    def device(self) -> torch.device:
        return self.centre.device

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint from which `load` rebuilds this generator."""
        checkpoints.write(folder, {"model": specs.describe(self)}, {"model": self.state_dict()})

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        trust: str | Sequence[str] | None = None,
        **parts: nn.Module,
    ) -> "OneStepGenerator":
        """The generator of a checkpoint, in evaluation mode; arguments and errors as of Generator.load."""
        return checkpoints.restore(folder, (cls,), device, trust, parts)
