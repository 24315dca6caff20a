"""A network for the drift of a process."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.networks.mlp import MLP
from diffusion.specs import recorded


@recorded
class DriftNetwork(nn.Module):
    """f(x, t) for points x (B, d), in units in which x and t are of order 1; a drift of `FokkerPlanck` as it is.

    Args:
        centre, scale: of x, d numbers each; what is learned is f / scale.
        horizon: the unit of time; None for a drift that does not depend on t.
        width, depth: of the MLP.
    """

    def __init__(
        self,
        centre: Sequence[float],
        scale: Sequence[float],
        horizon: float | None = None,
        width: int = 64,
        depth: int = 2,
    ):
        super().__init__()
        if len(centre) != len(scale) or not all(s > 0 for s in scale) or (horizon is not None and not horizon > 0):
            got = f"{len(centre)} centres, {len(scale)} scales from {min(scale, default=0)} and horizon={horizon}"
            raise UserError(f"a drift network has {got}; expected as many scales as centres, positive numbers")
        self.horizon = horizon
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32), persistent=False)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.body = MLP((len(centre),), width, depth)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, d) in the dtype of `x`, for t (B,)."""
        t = torch.zeros_like(t) if self.horizon is None else t / self.horizon
        y = (x.to(self.centre) - self.centre) / self.scale
        return (self.body(y, torch.stack([t, t], 1).to(y)) * self.scale).to(x)


@recorded
class ProcessNetwork(nn.Module):
    """f(x, t) and g of a process, a positive number for each coordinate: `FokkerPlanck(it.drift, it.diffusion)`.

    Args:
        drift: f, in whose units of x the noise starts as 1.
    """

    def __init__(self, drift: DriftNetwork):
        super().__init__()
        self.drift = drift
        self.log_noise = nn.Parameter(torch.zeros(len(drift.scale)))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """g (B, d)."""
        return (self.log_noise.exp() * self.drift.scale).to(x).expand_as(x)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """f and g, (B, d) each, in the dtype of `x`, for t (B,)."""
        return self.drift(x, t), self.diffusion(x, t)
