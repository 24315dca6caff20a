"""Networks: (x, noise features, label) to an output like x, or to `heads` of them stacked along the first axis of x.

All that they share is that call."""

from diffusion.networks.mlp import MLP
from diffusion.networks.unet import UNet

__all__ = ["MLP", "UNet"]
