"""AdamW, fused where the device has it, with a state that is stored by the names of the parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def create(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for the parameters of `module`, with the decay 0.99 of the second moment that diffusion models favour."""
    parameters = list(module.parameters())
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameters, learning_rate, (0.9, 0.99), weight_decay=weight_decay, fused=fused)


def state_tensors(module: nn.Module, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimiser's state as {"step.NAME", "exp_avg.NAME", "exp_avg_sq.NAME"}."""
    return {
        f"{key}.{name}": value
        for name, parameter in module.named_parameters()
        for key, value in optimiser.state[parameter].items()
    }


def restore(module: nn.Module, optimiser: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Set the state that `state_tensors` gave.

    Fused kernels want the moments in the memory layout of the parameter itself, and the step on its device.
    """
    for name, parameter in module.named_parameters():
        if f"step.{name}" not in tensors:  # it never had a gradient
            continue
        step_device = parameter.device if optimiser.defaults["fused"] else "cpu"
        optimiser.state[parameter] = {
            "step": tensors[f"step.{name}"].to(step_device),
            "exp_avg": torch.empty_like(parameter).copy_(tensors[f"exp_avg.{name}"]),
            "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"exp_avg_sq.{name}"]),
        }
