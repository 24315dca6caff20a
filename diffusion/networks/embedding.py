"""How a network is told the noise level and the class."""

import torch
from torch import Tensor, nn

from diffusion.errors import UserError


class Embedding(nn.Module):
    """(B, 2) noise features and (B,) labels to (B, width).

    The two features are the log noise level that x reveals and the one that t alone gives, over 4
    (diffusion.preconditioning), so each is of order 1.

    Args:
        width: of the output.
        num_classes: 0 for no classes. With classes, the label ``num_classes`` stands for "unknown", which is also what
            ``label=None`` means: one network is conditional and unconditional at once.
    """

    def __init__(self, width: int, num_classes: int = 0):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-2, 4, 16), persistent=False)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.mix = nn.Sequential(nn.Linear(2 + 4 * 16, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, noise: Tensor, label: Tensor | None) -> Tensor:
        angles = (noise[:, :, None] * self.frequencies).flatten(1)
        out = self.mix(torch.cat([noise, angles.cos(), angles.sin()], dim=1))
        if self.label is None:
            if label is not None:
                raise UserError("labels were given to a network without classes; train with conditional=true")
            return out
        if label is None:
            label = torch.full(noise.shape[:1], self.num_classes, device=noise.device)
        return out + self.label(label)
