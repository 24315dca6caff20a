"""How a network is wrapped, so that its input and its target have unit variance, whatever the field."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.coefficients import Coefficients, ScoreCoefficients, feature
from diffusion.conditional_score import information
from diffusion.errors import UserError
from diffusion.fields import AffineField, StudentT
from diffusion.fields.base import expand_time
from diffusion.measured import MeasuredPreconditioner

__all__ = ["Coefficients", "MeasuredPreconditioner", "Preconditioner", "ScoreCoefficients"]


class _Posterior(NamedTuple):
    """What a point's power tells of the scale of its noise, a column for each."""

    weight: Tensor  # (B, K)
    power: Tensor  # (B, 1)
    sigma: Tensor  # (B, 1)
    m: Tensor  # (B, K)
    share: Tensor  # (B, K): of the signal in m

    def mean(self, values: Tensor) -> Tensor:
        """(B, 1) of values (B, K)."""
        return (self.weight * values).sum(1, keepdim=True)


class Preconditioner(nn.Module):
    """For affine fields, whose target is x0: EDM's argument, carried over to every base law.

    The argument is that of Karras et al. 2022 (arXiv 2206.00364, app. B.6).
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

    A score is treated alike, for sigma_t score. With noise of known scale its best linear estimate is -sigma_t y / m
    (Stein's identity makes its covariance with y -sigma_t), and what is left of it has the variance J - sigma_t^2 / m,
    with J = c / R^2 the base law's Fisher information per coordinate. J is measured on draws, and c is J times the
    square of the scale, the factor that it has over a Gaussian: 2 for Laplace noise. So

        skip = -sigma_t E[1/m | P],    out^2 = E[c / R^2 - sigma_t^2 / m | P] + Var[skip | P] P.

    For Student-t noise R is not what a linear estimate misses: given x0 the score is -w z / sigma_t with
    w = (D + d) / (D + |z|^2). With a = s^2 / m, z has the mean a y / sigma_t and per coordinate the variance
    R^2 (1 - a), so that |z|^2 / d is about a^2 P / sigma_t^2 + R^2 (1 - a). With w and u = |z|^2 / (D + |z|^2) there

        out^2 = E[(a w / sigma_t + skip)^2 P + w^2 R^2 (1 - a) (1 - 4 a u (1 - u) / d) | P],

    where the last factor is the mean square of the derivative of w z by z, over w^2, where noise prevails.

    All coefficients are functions of (x, t) alone, so the loss is still least where the network's estimate is E[x0|x].
    The network is told the posterior mean of log s and log sigma_t, as log(noise / signal) / 4, limited softly to 1000
    and 1/1000, so that sigma_T / alpha_T = infinity and the far tails give finite, nearly constant inputs.

    Args:
        field: an affine field.
        shape: of one data point.
        score: whether the coefficients of a score are asked for.
    """

    MOST_CERTAIN = 32.0
    even_share = 0.0  # of the training times is even in the clock

    def __init__(self, field: AffineField, shape: Sequence[int], score: bool = False):
        super().__init__()
        self.field = field
        scales = field.base.scales
        # Squares of larger scales would leave the range of single precision.
        self.register_buffer("scales", scales.value.clamp_max(1e15).float(), persistent=False)
        self.register_buffer("log_weight", scales.log_weight.float(), persistent=False)
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("std", torch.tensor(1.0))
        self.register_buffer("power_shape", torch.tensor(0.5 * self.centre.numel()))
        if score:
            # Of the base law; 0 in checkpoints from before it was known, whose scores have the unit of Gaussian noise.
            self.register_buffer("information", torch.tensor(information(field.base, shape)))

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
        return self._coefficients(x, t)[0]

    def with_score(self, x: Tensor, t: Tensor | float) -> tuple[Coefficients, ScoreCoefficients]:
        """The coefficients of both outputs."""
        c, posterior = self._coefficients(x, t)
        return c, self._of_score(c.y, posterior)

    def _coefficients(self, x: Tensor, t: Tensor | float) -> tuple[Coefficients, "_Posterior"]:
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
        posterior = _Posterior((self.log_weight.to(x.dtype) + log_likelihood).softmax(1), power, sigma, m, share)

        mean = posterior.mean
        skips = alpha * std.square() / m
        skip = mean(skips)
        out = (mean(std.square() * noise / m) + mean((skips - skip).square()) * power).sqrt()
        level = (mean(noise.log()) / 2).exp()
        features = torch.cat([feature(level, alpha * std), feature(sigma, alpha * std)], dim=1)
        offset = self.centre.to(x.dtype).expand_as(y)
        scale, skip, out = (value.view(-1, *one) for value in (mean(1 / m).sqrt(), skip, out))
        return Coefficients(offset, y, scale, skip, out, features), posterior

    def _of_score(self, y: Tensor, posterior: "_Posterior") -> ScoreCoefficients:
        _, power, sigma, m, share = posterior
        mean, dim, base = posterior.mean, y[0].numel(), self.field.base
        squared, known = self.scales.to(y.dtype).square(), self.information.to(y.dtype)
        pulls = sigma / m
        pull = mean(pulls)
        scatter = mean((pulls - pull).square()) * power
        out = mean(share / squared) + scatter
        if isinstance(base, StudentT):
            a = squared * sigma * pulls
            length = dim * (a.square() * (power / sigma.square()) + squared * share)
            u = length / (base.dof + length)
            w = (base.dof + dim) / (base.dof + length)
            stretch = 1 - 4 * a * u * (1 - u) / dim
            whole = mean((a * w / sigma - pull).square() * power + w.square() * squared * share * stretch)
            out = whole.where(known > 0, out)
        else:
            gaussian = (self.log_weight.softmax(0).to(y.dtype) / squared).sum()
            out = out + ((known / gaussian).clamp_min(1) - 1) * mean(1 / squared.expand_as(m))
        out = out.clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        unit, skip, out = (value.view(-1, *[1] * (y.dim() - 1)) for value in (sigma, -pull, out))
        return ScoreCoefficients(unit, torch.zeros_like(out), skip, out)

    def log_noise_to_signal(self, t: Tensor) -> Tensor:
        """log of sigma_t / (alpha_t std), in the shape of `t`, float64; infinite where alpha is 0."""
        return self.field.log_noise_to_signal(t) - self.std.double().cpu().log()
