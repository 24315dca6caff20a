"""Preconditioning measured on draws of a field: for every field that is not affine."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.coefficients import Coefficients, ScoreCoefficients, feature
from diffusion.errors import UserError
from diffusion.fields import Field


def _mix(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    """Between `low` and `high`: geometrically where both are negative, as skips of a score are, otherwise linearly."""
    negative = (low < 0) & (high < 0)
    logs = torch.lerp(*(value.where(negative, -1).neg().log() for value in (low, high)), share)
    return (-logs.exp()).where(negative, torch.lerp(low, high, share))


def _interpolate(at: Tensor, places: Tensor, *tables: Tensor, mix=torch.lerp) -> list[Tensor]:
    """Values (B,) of each of `tables` (B, K), known at rising `places` (B, K), at (B,); constant beyond the ends."""
    right = torch.searchsorted(places.contiguous(), at[:, None]).clamp(1, places.shape[1] - 1)
    low, high = places.gather(1, right - 1), places.gather(1, right)
    share = ((at[:, None] - low) / (high - low).clamp_min(torch.finfo(at.dtype).tiny)).clamp(0, 1)
    return [mix(table.gather(1, right - 1), table.gather(1, right), share)[:, 0] for table in tables]


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

    A score is measured alike, for t score in place of t v. Its mean is 0 but for chance, the same that moved E[x_t].

    The network is told the noise level that P reveals, the noise being what is left of y after regression on x0, and
    the place of the time on the clock, from -1 to 1.

    Args:
        field: any field with `sample` and `velocity`.
        shape: of one data point.
        score: whether the coefficients of a score are asked for; the field then has a density.
    """

    NODES, LEVELS, DRAWS, MOST_NUMBERS = 48, 24, 2048, 4_000_000
    even_share = 0.25  # of the training times; noise / signal does not tell where the velocity is hard to learn

    def __init__(self, field: Field, shape: Sequence[int], score: bool = False):
        super().__init__()
        self.field, self.score = field, score
        self.register_buffer("centre", torch.zeros(self.NODES, *shape))
        self.register_buffer("mean_shift", torch.zeros(self.NODES, *shape))
        self.register_buffer("std", torch.tensor(1.0))
        if score:
            self.register_buffer("score_shift", torch.zeros(self.NODES, *shape))
        of_score = ("score_skip", "log_score_out") if score else ()
        for name in ("log_power", "log_scale", "skip", "log_out", "log_noise", *of_score):
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
            score = t * self.field.score(x, t, start) if self.score else None
            self._measure(node, *(value if value is None else value.flatten(1) for value in (start, x, v, score)))

    def _measure(self, node: int, x0: Tensor, x: Tensor, v: Tensor, score: Tensor | None) -> None:
        weight = torch.ones(len(x), 1, dtype=x.dtype)
        for _ in range(3):
            total = weight.sum()
            centre, mean_shift = (weight * x).sum(0) / total, (weight * v).sum(0) / total
            shift = None if score is None else (weight * score).sum(0) / total
            y = x - centre
            power = y.square().mean(1, keepdim=True)
            weight = 1 / (1 + power / power.median())
        gap = x0 - x0.mean(0)
        alpha = ((weight * y * gap).sum() / (weight * gap.square()).sum()).clamp_min(0)
        noise = (y - alpha * gap).square().mean(1, keepdim=True).clamp_min(1e-300)
        log_power = power.log()
        half = torch.linspace(0, 1, self.LEVELS // 2, dtype=x.dtype)
        even = log_power.min() + (half + 0.5 * half[1]) * (log_power.max() - log_power.min())
        even = log_power[(log_power - even).abs().argmin(0), 0]  # where there is something to measure
        levels = torch.cat([log_power[:, 0].quantile(half), even]).sort().values  # in the bulk, and in the tails
        width = math.sqrt(2 / min(x.shape[1], 64))
        near = (-0.5 * ((log_power - levels) / width).square()).softmax(0).T  # (LEVELS, N), rows sum to 1
        mean_power = near @ power

        def regress(value: Tensor, mix=torch.lerp) -> tuple[Tensor, Tensor]:
            skip = near @ (value * y).mean(1, keepdim=True) / mean_power
            # Of the estimate as it will be made, with skip interpolated between the levels.
            (own_skip,) = _interpolate(log_power[:, 0], *(row.expand(len(x), -1) for row in (levels, skip.T)), mix=mix)
            left = near @ (value - own_skip[:, None] * y).square().mean(1, keepdim=True)
            # Rounding decides where the value is a multiple of y.
            return skip, left.clamp_min(1e-12 * float(value.square().mean(1).median())).log() / 2

        skip, log_out = regress(v - mean_shift)
        self.centre[node], self.mean_shift[node] = (m.view_as(self.centre[0]) for m in (centre, mean_shift))
        self.signal[node], self.noise[node] = alpha * self.std, noise.median().sqrt()
        tables = {"log_power": levels, "log_scale": -mean_power.log() / 2, "skip": skip, "log_out": log_out}
        if score is not None:
            self.score_shift[node] = shift.view_as(self.score_shift[0])
            tables["score_skip"], tables["log_score_out"] = regress(score - shift, _mix)
        for name, column in {**tables, "log_noise": near @ noise.log() / 2}.items():
            getattr(self, name)[node] = column.flatten()

    def forward(self, x: Tensor, t: Tensor | float) -> Coefficients:
        return self._coefficients(x, t)[0]

    def with_score(self, x: Tensor, t: Tensor | float) -> tuple[Coefficients, ScoreCoefficients]:
        """The coefficients of both outputs."""
        return self._coefficients(x, t)

    def _coefficients(self, x: Tensor, t: Tensor | float) -> tuple[Coefficients, ScoreCoefficients | None]:
        one = [1] * (x.dim() - 1)
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x)).clamp_min(self.field.t_min)
        before, share = self._place(t)

        def between(table: Tensor) -> Tensor:
            table = table.to(x.dtype)
            return torch.lerp(table[before], table[before + 1], share.view(-1, *[1] * (table.dim() - 1)))

        y = x - between(self.centre)
        log_power = y.square().flatten(1).mean(1).clamp_min(torch.finfo(x.dtype).tiny).log()
        sides = [self._look_up(log_power, node) for node in (before, before + 1)]
        log_scale, skip, out, noise, *of_score = torch.lerp(*sides, share).unsqueeze(2)
        place = (before + share) * (2 / (self.NODES - 1)) - 1
        features = torch.cat([feature(noise, between(self.signal)[:, None]), place[:, None]], 1)
        t = t.view(-1, *one)
        scale, skip, out, *of_score = (v.view(-1, *one) for v in (log_scale.exp(), skip, out, *of_score))
        c = Coefficients(between(self.mean_shift) / t, y, scale, skip / t, out / t, features)
        return c, ScoreCoefficients(t, between(self.score_shift), *of_score) if of_score else None

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The node before each time, and the share of the way to the next."""
        first, last = (end ** (1 / self.field.rho) for end in (self.field.t_min, self.field.horizon))
        place = (t.clamp_min(0) ** (1 / self.field.rho) - first) / (last - first) * (self.NODES - 1)
        before = place.floor().clamp(0, self.NODES - 2)
        return before.long(), (place - before).clamp(0, 1)

    def _look_up(self, log_power: Tensor, node: Tensor) -> Tensor:
        """log scale, skip, out, noise and, where there are, skip and out of the score (4 or 6, B) at a time node.

        Beyond the levels they are constant, but for the scale, which goes on as P^(-1/2), and the skip of the score,
        which goes on as P^-1, as for heavy tails; its difference from a constant, as for a Gaussian, is added to out.
        """
        levels, *tables = (
            table.to(log_power.dtype)[node]
            for table in (self.log_power, self.log_scale, self.skip, self.log_out, self.log_noise)
        )
        log_scale, skip, log_out, log_noise = _interpolate(log_power, levels, *tables)
        excess = (log_power - levels[:, -1]).clamp_min(0)
        # Near the data out and noise grow like t: between the times they, and not their logarithms, are linear.
        rows = [log_scale - excess / 2, skip, log_out.exp(), log_noise.exp()]
        if self.score:
            skips, log_outs = (table.to(log_power.dtype)[node] for table in (self.score_skip, self.log_score_out))
            (score_skip,) = _interpolate(log_power, levels, skips, mix=_mix)
            (log_score_out,) = _interpolate(log_power, levels, log_outs)
            fall = (-excess).exp()
            unknown = score_skip * (1 - fall) * (log_power / 2).exp()
            rows += [score_skip * fall, (log_score_out.exp().square() + unknown.square()).sqrt()]
        return torch.stack(rows)

    def log_noise_to_signal(self, t: Tensor) -> Tensor:
        """log of noise / signal of the time, in the shape of `t` (N,), float64; rising."""
        before, share = self._place(t)
        signal = self.signal.double().cpu().clamp_min(1e-30)
        noise = signal * (self.noise.double().cpu() / signal).cummax(0).values
        noise, signal = (torch.lerp(table[before], table[before + 1], share) for table in (noise, signal))
        return (noise / signal).log() + 1e-6 * (before + share)
