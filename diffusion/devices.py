"""Which device to run on."""

import torch

from diffusion.errors import UserError


def pick(name: str = "auto") -> torch.device:
    """The device called `name`: "cpu", "cuda", "mps", or "auto" for the first of CUDA, MPS and CPU that is there.

    Raises:
        UserError: there is no such device on this machine.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    kind, _, index = str(name).partition(":")
    if not present.get(kind, False) or not (index.isdigit() or name == kind):
        there = ", ".join(kind for kind, there in present.items() if there)
        raise UserError(f"device is {name!r}, expected auto or one that this machine has: {there}")
    return torch.device(name)
