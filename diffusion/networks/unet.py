"""A UNet for images, after Ho et al. 2020 and Dhariwal and Nichol 2021 (scale-shift normalisation)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.errors import UserError
from diffusion.networks.embedding import Embedding
from diffusion.specs import recorded


def _norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels where there are as many."""
    return nn.GroupNorm(max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 4)), channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    return layer


class _Block(nn.Module):
    """Residual block, with self-attention after it where asked for."""

    def __init__(self, inputs: int, outputs: int, width: int, dropout: float, attention: bool):
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * outputs)
        self.norm2, self.conv2 = _norm(outputs), _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attention = _Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.attention(self.skip(x) + self.conv2(self.dropout(h)))


class _Attention(nn.Module):
    def __init__(self, channels: int, head: int = 32):
        super().__init__()
        self.heads = max(n for n in range(1, max(1, channels // head) + 1) if channels % n == 0)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, height, width)
        return x + self.out(h)


@recorded
class UNet(nn.Module):
    """x (B, C, H, W), noise features (B, 2) and labels (B,) to an output like x, or to several.

    Args:
        shape: (C, H, W) of one image; any H and W.
        channels: of the finest level.
        multipliers: channels of each level as a multiple; each further level halves the resolution.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: levels (0 is the finest) that have self-attention.
        dropout: rate inside the residual blocks.
        num_classes: 0 for no classes.
        heads: number of outputs like x, stacked along the channels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention: Sequence[int] = (1,),
        dropout: float = 0.0,
        num_classes: int = 0,
        heads: int = 1,
    ):
        super().__init__()
        if len(shape) != 3:
            raise UserError(
                f"UNet got data of shape {tuple(shape)}, expected images (C, H, W); for points use model=mlp"
            )
        if channels < 1 or not multipliers or not set(attention) <= set(range(len(multipliers))):
            raise UserError(
                f"UNet has channels={channels}, multipliers={list(multipliers)}, attention={list(attention)}; expected "
                "positive channels, and attention at some of the levels that the multipliers make, 0 the finest"
            )
        width = 4 * channels
        self.num_classes, self.heads = num_classes, heads
        self.embedding = Embedding(width, num_classes)
        self.first = nn.Conv2d(shape[0], channels, 3, padding=1)
        levels = [channels * m for m in multipliers]

        def block(inputs: int, outputs: int, level: int) -> _Block:
            return _Block(inputs, outputs, width, dropout, level in attention)

        self.down, self.up, skips, now = nn.ModuleList(), nn.ModuleList(), [channels], channels
        for level, size in enumerate(levels):
            if level:
                skips.append(now)
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(block(now, size, level))
                now = size
                skips.append(now)
            self.down.append(stage)
        self.middle = block(now, now, len(levels) - 1)
        for level, size in reversed(list(enumerate(levels))):
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(block(now + skips.pop(), size, level))
                now = size
            self.up.append(stage)
        self.norm, self.last = _norm(now), _zero(nn.Conv2d(now, heads * shape[0], 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, noise: Tensor, label: Tensor | None = None) -> Tensor:
        embedding = F.silu(self.embedding(noise, label))
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level, stage in enumerate(self.down):
            if level:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
                skips.append(h)
            for block in stage:
                h = block(h, embedding)
                skips.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = F.interpolate(h, size=skips[-1].shape[-2:]) if h.shape[-2:] != skips[-1].shape[-2:] else h
            for block in stage:
                h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.last(F.silu(self.norm(h)))
