"""How a network is wrapped, so that its input and its target have unit variance, whatever the base law."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.fields import AffineField
from diffusion.fields.base import expand_time


class Coefficients(NamedTuple):
    """How the network F is wrapped: denoised = centre + skip y + out F(scale y, noise), with y = x - alpha centre."""

    y: Tensor  # (B, *shape)
    scale: Tensor  # (B, 1, ...)
    skip: Tensor  # (B, 1, ...)
    out: Tensor  # (B, 1, ...)
    noise: Tensor  # (B, 2)


class Preconditioner(nn.Module):
    """EDM's argument (Karras et al. 2022, arXiv 2206.00364, app. B.6), carried over to every base law.

    Let the data have mean `centre` and variance std^2 per coordinate, and let y = x - alpha centre. With noise of a
    known scale s in x, the variance of y is m = alpha^2 std^2 + s^2, and

        scale^2 = 1 / m              gives the network an input of unit variance,
        skip    = alpha std^2 / m    is the best linear estimate of x0 - centre from y, and
        out^2   = std^2 s^2 / m      is the mean square error of that estimate.

    The network's target, (x0 - centre - skip y) / out, then has unit variance, and a loss in units of `out` weighs
    every noise level alike. For a Gaussian base s = sigma_t, and this is EDM. For a heavy-tailed base s = sigma_t R,
    with R drawn anew for each point (Law.scales), and x tells of R by its power P = |y|^2 / d. The posterior of R given
    P weighs the known-scale answers:

        scale^2 = E[1/m | P],    skip = E[alpha std^2 / m | P],    out^2 = E[std^2 s^2 / m | P] + Var[skip | P] P.

    The likelihood of P given R is a Gamma law of mean m; its variance is that of d independent coordinates for the
    noise and, for the data, the one measured: images differ in power more than d independent coordinates would. Its
    shape is limited to 32, a spread of 9 % in the noise level: little is lost, and it is smooth on the nodes.

    All coefficients are functions of (x, t) alone, so the loss is still least where the network's estimate is E[x0|x].
    The network is told the posterior mean of log s and log sigma_t, as log(noise / signal) / 4, limited softly to 1000
    and 1/1000, so that sigma_T / alpha_T = infinity and the far tails give finite, nearly constant inputs.

    Args:
        field: an affine field.
        shape: of one data point.
    """

    LIMIT, MOST_CERTAIN = 1e-3, 32.0

    def __init__(self, field: AffineField, shape: Sequence[int]):
        super().__init__()
        self.field = field
        scales = field.base.scales
        # Squares of larger scales would leave the range of single precision.
        self.register_buffer("scales", scales.value.clamp_max(1e15).float(), persistent=False)
        self.register_buffer("log_weight", scales.log_weight.float(), persistent=False)
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("std", torch.tensor(1.0))
        self.register_buffer("power_shape", torch.tensor(0.5 * self.centre.numel()))

    def calibrate(self, x0: Tensor) -> None:
        """Take centre, std and the Gamma shape of the power of the data from a sample (N, *shape), N > 1.

        Raises:
            UserError: the data do not vary.
        """
        x0 = x0.double()
        centre = x0.mean(0)
        power = (x0 - centre).square().flatten(1).mean(1)
        if len(x0) < 2 or not power.mean() > 0:
            raise UserError(f"the {len(x0)} data points do not vary, expected at least two that differ")
        self.centre.copy_(centre)
        self.std.copy_(power.mean().sqrt())
        self.power_shape.copy_((power.mean().square() / power.var()).clamp_max(1e6))

    def forward(self, x: Tensor, t: Tensor | float) -> Coefficients:
        field, one, dim = self.field, [1] * (x.dim() - 1), x[0].numel()
        t = expand_time(t, x).expand(len(x), *one)
        alpha, sigma, std = (value.to(x.dtype).reshape(-1, 1) for value in (field.alpha(t), field.sigma(t), self.std))
        y = x - alpha.view(-1, *one) * self.centre.to(x.dtype)
        power = y.square().flatten(1).mean(1, keepdim=True)

        # (B, K): a column for each scale that the noise may have.
        signal, noise = (alpha * std).square(), (sigma * self.scales.to(x.dtype)).square()
        m = signal + noise
        share = signal / m
        variance = share.square() / self.power_shape.to(x.dtype) + 2 * (1 - share.square()) / dim  # of P, over m^2
        shape = (1 / variance).clamp_max(self.MOST_CERTAIN)
        log_ratio = power.clamp_min(torch.finfo(x.dtype).tiny).log() - m.log()
        log_likelihood = shape * (shape.log() + log_ratio - log_ratio.exp()) - torch.lgamma(shape)
        posterior = (self.log_weight.to(x.dtype) + log_likelihood).softmax(1)

        def mean(values: Tensor) -> Tensor:
            return (posterior * values).sum(1, keepdim=True)

        skips = alpha * std.square() / m
        skip = mean(skips)
        out = (mean(std.square() * noise / m) + mean((skips - skip).square()) * power).sqrt()
        level = (mean(noise.log()) / 2).exp()
        features = torch.cat([self._feature(level, alpha * std), self._feature(sigma, alpha * std)], dim=1)
        return Coefficients(y, *(value.view(-1, *one) for value in (mean(1 / m).sqrt(), skip, out)), features)

    def _feature(self, noise: Tensor, signal: Tensor) -> Tensor:
        low = self.LIMIT**2
        ratio = (noise.square() + low * signal.square()) / (signal.square() + low * noise.square())
        return ratio.log() / 8
