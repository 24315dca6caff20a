"""Which device to run on, and how."""

import torch
from accelerate import Accelerator

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


def accelerator(name: str, precision: str) -> Accelerator:
    """What prepares models for devices, precision ("no" or "bf16") and processes, on the device called `name`.

    Raises:
        UserError: the device cannot do it, or this process has already trained on another or in another precision.
    """
    device = pick(name)
    try:
        made = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    except ValueError as error:
        raise UserError(f"cannot train on {name} with precision={precision}: {' '.join(str(error).split())}") from error
    if made.device.type != device.type or device.index not in (None, made.device.index):
        raise UserError(
            f"device is {name}, but this process trains on {made.device}; start a new process, and choose among "
            "several GPUs with CUDA_VISIBLE_DEVICES"
        )
    return made
