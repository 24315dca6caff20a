"""A residual multilayer perceptron, for points."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from diffusion.networks.embedding import Embedding
from diffusion.specs import recorded


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 2 * width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).chunk(2, dim=1)
        return x + self.body(self.norm(x) * (1 + scale) + shift)


@recorded
class MLP(nn.Module):
    """x (B, *shape), noise features (B, 2) and labels (B,) to an output like x, or to several.

    Args:
        shape: of one data point.
        width: of the hidden layers.
        depth: number of residual blocks.
        num_classes: 0 for no classes.
        heads: number of outputs like x, stacked along the first axis of shape.
    """

    def __init__(self, shape: Sequence[int], width: int = 128, depth: int = 3, num_classes: int = 0, heads: int = 1):
        super().__init__()
        dim = math.prod(shape)
        self.num_classes, self.heads = num_classes, heads
        self.embedding = Embedding(width, num_classes)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Linear(width, heads * dim)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = self.embedding(noise, label)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(nn.functional.silu(h)).view(len(x), -1, *x.shape[2:])
