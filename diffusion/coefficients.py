"""How a network is wrapped: what every preconditioning (diffusion.preconditioning) gives for points and times."""

from typing import NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """How the network F is wrapped: target = offset + skip y + out F(scale y, noise), with y the centred x."""

    offset: Tensor  # (B, *shape)
    y: Tensor  # (B, *shape)
    scale: Tensor  # (B, 1, ...)
    skip: Tensor  # (B, 1, ...)
    out: Tensor  # (B, 1, ...)
    noise: Tensor  # (B, 2)


class ScoreCoefficients(NamedTuple):
    """How its second output is: unit score = offset + skip y + out F'."""

    unit: Tensor  # (B, 1, ...), sigma_t or t
    offset: Tensor  # (B, *shape), or 0 for all
    skip: Tensor  # (B, 1, ...)
    out: Tensor  # (B, 1, ...)


LIMIT = 1e-3  # of noise / signal, and of its inverse, in what the network is told


def feature(noise: Tensor, signal: Tensor) -> Tensor:
    """log(noise / signal) / 4, limited softly so that infinite ratios give finite, nearly constant inputs."""
    low = LIMIT**2
    return ((noise.square() + low * signal.square()) / (signal.square() + low * noise.square())).log() / 8
