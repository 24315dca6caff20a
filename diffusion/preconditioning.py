"""How a network is wrapped, so that its input and its target have unit variance, whatever the field."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.fields import AffineField, Field
from diffusion.fields.base import expand_time


class Coefficients(NamedTuple):
    """How the network F is wrapped: target = offset + skip y + out F(scale y, noise), with y the centred x."""

    offset: Tensor  # (B, *shape)
    y: Tensor  # (B, *shape)
    scale: Tensor  # (B, 1, ...)
    skip: Tensor  # (B, 1, ...)
    out: Tensor  # (B, 1, ...)
    noise: Tensor  # (B, 2)


class ScoreCoefficients(NamedTuple):
    """How its second output is: sigma_t score = skip y + out F'."""

    skip: Tensor  # (B, 1, ...)
    out: Tensor  # (B, 1, ...)


LIMIT = 1e-3  # of noise / signal, and of its inverse, in what the network is told


def _feature(noise: Tensor, signal: Tensor) -> Tensor:
    """log(noise / signal) / 4, limited softly so that infinite ratios give finite, nearly constant inputs."""
    low = LIMIT**2
    return ((noise.square() + low * signal.square()) / (signal.square() + low * noise.square())).log() / 8


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

    A score is treated alike. With noise of known scale its best linear estimate is -y / m, and what is left of
    -(x - alpha x0) / s^2 has the variance alpha^2 std^2 / (s^2 m), so that, in units of 1 / sigma_t,

        skip = -sigma_t E[1/m | P],    out^2 = sigma_t^2 (E[alpha^2 std^2 / (s^2 m) | P] + Var[1/m | P] P).

    All coefficients are functions of (x, t) alone, so the loss is still least where the network's estimate is E[x0|x].
    The network is told the posterior mean of log s and log sigma_t, as log(noise / signal) / 4, limited softly to 1000
    and 1/1000, so that sigma_T / alpha_T = infinity and the far tails give finite, nearly constant inputs.

    Args:
        field: an affine field.
        shape: of one data point.
    """

    MOST_CERTAIN = 32.0
    even_share = 0.0  # of the training times is even in the clock

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
        return self.with_score(x, t)[0]

    def with_score(self, x: Tensor, t: Tensor | float) -> tuple[Coefficients, ScoreCoefficients]:
        """The coefficients of both outputs."""
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
        pulls = sigma / m
        pull = mean(pulls)
        score_out = mean(share / self.scales.to(x.dtype).square()) + mean((pulls - pull).square()) * power
        score_out = score_out.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        level = (mean(noise.log()) / 2).exp()
        features = torch.cat([_feature(level, alpha * std), _feature(sigma, alpha * std)], dim=1)
        offset = self.centre.to(x.dtype).expand_as(y)
        shaped = (value.view(-1, *one) for value in (mean(1 / m).sqrt(), skip, out, -pull, score_out))
        scale, skip, out, score_skip, score_out = shaped
        return Coefficients(offset, y, scale, skip, out, features), ScoreCoefficients(score_skip, score_out)

    def log_noise_to_signal(self, t: Tensor) -> Tensor:
        """log of sigma_t / (alpha_t std), in the shape of `t`, float64; infinite where alpha is 0."""
        return self.field.log_noise_to_signal(t) - self.std.double().cpu().log()


def _interpolate(at: Tensor, places: Tensor, *tables: Tensor) -> list[Tensor]:
    """Values (B,) of each of `tables` (B, K), known at rising `places` (B, K), at (B,); constant beyond the ends."""
    right = torch.searchsorted(places.contiguous(), at[:, None]).clamp(1, places.shape[1] - 1)
    low, high = places.gather(1, right - 1), places.gather(1, right)
    share = ((at[:, None] - low) / (high - low).clamp_min(torch.finfo(at.dtype).tiny)).clamp(0, 1)
    return [torch.lerp(table.gather(1, right - 1), table.gather(1, right), share)[:, 0] for table in tables]


class MeasuredPreconditioner(nn.Module):
    """For every other field, whose target is the velocity: the same coefficients, measured on draws of the field.

    At NODES times, even in the field's clock, x_t and the velocity v are drawn. With y = x - E[x_t] and P = |y|^2 / d,
    and with means over the draws whose P is near the one at hand,

        scale^2 = 1 / E[P | P],    skip = E[v . y | P] / E[|y|^2 | P],    out^2 = E[|v - E[v] - skip y|^2 / d | P],

    and between the times and the values of P they are interpolated, for t v in place of v: where the noise is large
    v = (x - x0) / t for many fields, and what is to be learned is a small difference from that. "Near" is a Gaussian
    weight in log P as wide as log P scatters at a known noise level, sqrt(2 / d); so in many dimensions, and for heavy
    tails, P tells of the noise level that each point really has, and in few dimensions the time alone does. Means over
    all draws of a time weigh each by 1 / (1 + P / median P), a function of x_t alone that tames heavy tails.

    The network is told the noise level that P reveals, the noise being what is left of y after regression on x0, and
    the place of the time on the clock, from -1 to 1.

    Args:
        field: any field with `sample` and `velocity`.
        shape: of one data point.
    """

    NODES, LEVELS, DRAWS, MOST_NUMBERS = 48, 24, 2048, 4_000_000
    even_share = 0.25  # of the training times; noise / signal does not tell where the velocity is hard to learn

    def __init__(self, field: Field, shape: Sequence[int]):
        super().__init__()
        self.field = field
        self.register_buffer("centre", torch.zeros(self.NODES, *shape))
        self.register_buffer("mean_shift", torch.zeros(self.NODES, *shape))
        self.register_buffer("std", torch.tensor(1.0))
        for name in ("log_power", "log_scale", "skip", "log_out", "log_noise"):
            table = torch.linspace(-1, 1, self.LEVELS).repeat(self.NODES, 1)
            self.register_buffer(name, table if name == "log_power" else torch.zeros(self.NODES, self.LEVELS))
        self.register_buffer("signal", torch.ones(self.NODES))
        self.register_buffer("noise", torch.linspace(-2, 2, self.NODES).exp())

    def calibrate(self, x0: Tensor) -> None:
        """Measure the field on lines from a sample (N, *shape) of the data, N > 1.

        Raises:
            UserError: the data do not vary.
        """
        shape, x0 = x0.shape[1:], x0.double().cpu().flatten(1)
        dim = x0.shape[1]
        variance = (x0 - x0.mean(0)).square().mean()
        if len(x0) < 2 or not variance > 0:
            raise UserError(f"the {len(x0)} data points do not vary, expected at least two that differ")
        self.std.copy_(variance.sqrt())
        number = max(128, min(self.DRAWS, self.MOST_NUMBERS // dim))
        for node, t in enumerate(self.field.clock(self.NODES).tolist()):
            generator = torch.Generator().manual_seed(0)  # the same lines at all times, so that the tables are smooth
            start = x0[torch.randint(len(x0), (number,), generator=generator)].view(-1, *shape)
            x = self.field.sample(start, t, generator)
            v = t * self.field.velocity(x, t, start)
            self._measure(node, *(value.flatten(1) for value in (start, x, v)))

    def _measure(self, node: int, x0: Tensor, x: Tensor, v: Tensor) -> None:
        weight = torch.ones(len(x), 1, dtype=x.dtype)
        for _ in range(3):
            total = weight.sum()
            centre, mean_shift = (weight * x).sum(0) / total, (weight * v).sum(0) / total
            y = x - centre
            power = y.square().mean(1, keepdim=True)
            weight = 1 / (1 + power / power.median())
        gap = x0 - x0.mean(0)
        alpha = ((weight * y * gap).sum() / (weight * gap.square()).sum()).clamp_min(0)
        noise = (y - alpha * gap).square().mean(1, keepdim=True).clamp_min(1e-300)
        log_power = power.log()
        half = torch.linspace(0, 1, self.LEVELS // 2, dtype=x.dtype)
        even = log_power.min() + (half + 0.5 * half[1]) * (log_power.max() - log_power.min())
        levels = torch.cat([log_power[:, 0].quantile(half), even]).sort().values  # in the bulk, and in the tails
        width = math.sqrt(2 / min(x.shape[1], 64))
        near = (-0.5 * ((log_power - levels) / width).square()).softmax(0).T  # (LEVELS, N), rows sum to 1
        mean_power, v = near @ power, v - mean_shift
        skip = near @ (v * y).mean(1, keepdim=True) / mean_power
        # Of the estimate as it will be made, with skip interpolated between the levels.
        (own_skip,) = _interpolate(log_power[:, 0], *(row.expand(len(x), -1) for row in (levels, skip.T)))
        left = near @ (v - own_skip[:, None] * y).square().mean(1, keepdim=True)
        # Rounding decides where the velocity is a multiple of y.
        log_out = left.clamp_min(1e-12 * float(v.square().mean(1).median())).log() / 2
        self.centre[node], self.mean_shift[node] = (m.view_as(self.centre[0]) for m in (centre, mean_shift))
        self.signal[node], self.noise[node] = alpha * self.std, noise.median().sqrt()
        tables = {"log_power": levels, "log_scale": -mean_power.log() / 2, "skip": skip, "log_out": log_out}
        for name, column in {**tables, "log_noise": near @ noise.log() / 2}.items():
            getattr(self, name)[node] = column.flatten()

    def forward(self, x: Tensor, t: Tensor | float) -> Coefficients:
        one = [1] * (x.dim() - 1)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)).clamp_min(self.field.t_min)
        before, share = self._place(t)

        def between(table: Tensor) -> Tensor:
            table = table.to(x.dtype)
            return torch.lerp(table[before], table[before + 1], share.view(-1, *[1] * (table.dim() - 1)))

        y = x - between(self.centre)
        log_power = y.square().flatten(1).mean(1).clamp_min(torch.finfo(x.dtype).tiny).log()
        sides = [self._look_up(log_power, node) for node in (before, before + 1)]
        log_scale, skip, out, noise = torch.lerp(*sides, share).unsqueeze(2)
        place = (before + share) * (2 / (self.NODES - 1)) - 1
        features = torch.cat([_feature(noise, between(self.signal)[:, None]), place[:, None]], 1)
        t = t.view(-1, *one)
        scale, skip, out = (value.view(-1, *one) for value in (log_scale.exp(), skip, out))
        return Coefficients(between(self.mean_shift) / t, y, scale, skip / t, out / t, features)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The node before each time, and the share of the way to the next."""
        first, last = (end ** (1 / self.field.rho) for end in (self.field.t_min, self.field.horizon))
        place = (t.clamp_min(0) ** (1 / self.field.rho) - first) / (last - first) * (self.NODES - 1)
        before = place.floor().clamp(0, self.NODES - 2)
        return before.long(), (place - before).clamp(0, 1)

    def _look_up(self, log_power: Tensor, node: Tensor) -> Tensor:
        """log scale, skip, out and noise (4, B) at a time node for each point.

        Beyond the levels they are constant, but for the scale, which goes on as P^(-1/2).
        """
        levels, *tables = (
            table.to(log_power.dtype)[node]
            for table in (self.log_power, self.log_scale, self.skip, self.log_out, self.log_noise)
        )
        log_scale, skip, log_out, log_noise = _interpolate(log_power, levels, *tables)
        excess = (log_power - levels[:, -1]).clamp_min(0)
        # Near the data out and noise grow like t: between the times they, and not their logarithms, are linear.
        return torch.stack([log_scale - excess / 2, skip, log_out.exp(), log_noise.exp()])

    def log_noise_to_signal(self, t: Tensor) -> Tensor:
        """log of noise / signal of the time, in the shape of `t` (N,), float64; rising."""
        before, share = self._place(t)
        signal = self.signal.double().cpu().clamp_min(1e-30)
        noise = signal * (self.noise.double().cpu() / signal).cummax(0).values
        noise, signal = (torch.lerp(table[before], table[before + 1], share) for table in (noise, signal))
        return (noise / signal).log() + 1e-6 * (before + share)
