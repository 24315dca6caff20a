"""Randomness as a function of seeds: nothing to store, so nothing to lose when a run is resumed."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) from several numbers or names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def example_order(number: int, batch_size: int, seed: int, first_step: int, steps: int) -> Iterator[Tensor]:
    """Indices (batch_size,) of the examples of each step from `first_step` on: epochs, each shuffled anew."""
    epoch, shuffled = -1, torch.empty(0)
    for step in range(first_step, steps):
        places = torch.arange(step * batch_size, (step + 1) * batch_size)
        parts = []
        for wanted in (places // number).unique().tolist():
            if wanted != epoch:
                epoch = wanted
                generator = torch.Generator().manual_seed(derive_seed(seed, "epoch", epoch))
                shuffled = torch.randperm(number, generator=generator)
            parts.append(shuffled[places[places // number == wanted] % number])
        yield torch.cat(parts)
