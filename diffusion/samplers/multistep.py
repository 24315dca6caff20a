"""Linear multistep methods on the arc: one evaluation a step, whatever the order."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField, Gaussian, StudentT
from diffusion.fields.base import Field
from diffusion.samplers.arc import Arc, Places, coefficients, column, data_mean, slope
from diffusion.samplers.base import Model, Velocity, whole
from diffusion.samplers.on_arc import FINEST, SCALE, OnArc, heavy, hidden

GAUSS, TINY = 12, 1e-300  # nodes of the rule for weights; sine at an angle that is 0 in float64
LOW = 12  # evaluations up to which the order is 2
HIDING, WIDE = 50.0, 4.0  # noise of the prior, in std and in sqrt(d) std of the data, that leaves their mean to be seen
SMOOTH, KINKED = (0.0, 0.0, 0.0, 1.0), (0.25, 0.25, 0.85, 1.0)  # offsets of the sine for 1 to 4 slopes, by measurement


def integral_weights(nodes: Tensor, start: Tensor, stop: Tensor, offset: float) -> Tensor:
    """w (rows, k) with sum_j w_j f(node_j) = integral of f from start to stop, for f = (sin + offset) polynomial.

    Args:
        nodes: (rows, k), angles from 0 to pi / 2; the polynomials have a degree below k.
        start, stop: (rows, 1), angles too.
    """

    def factor(angle: Tensor) -> Tensor:
        return angle.sin() + offset

    width, powers = stop - start, torch.arange(nodes.shape[1], dtype=torch.float64)
    places, shares = (torch.from_numpy(values) for values in leggauss(GAUSS))
    places, shares = (places + 1) / 2, shares / 2
    moments = (factor(start + width * places) * shares) @ places[:, None] ** powers
    system = ((nodes - start) / width)[:, None] ** powers[:, None]
    return width * torch.linalg.solve(system, moments[:, :, None])[:, :, 0] / factor(nodes).clamp_min(TINY)


Factors = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


class Moves(NamedTuple):
    """The plan: where to evaluate, and the moves between."""

    times: Tensor  # (rows, places)
    at: Places  # (rows, places)
    known: Tensor  # (n, B, *shape) slopes at the first n places, which are not evaluated; n is 0 or 1
    weights: list[tuple[Tensor, Tensor]]  # of the slopes, see Multistep._weights
    scale: Tensor  # () of the arc
    continued: Tensor  # (rows, 1) whether the last step leads to t = 0; otherwise it is the field's estimate


@dataclass(frozen=True)
class Multistep(OnArc):
    """Adams' methods for the slope on the arc (see diffusion.samplers.arc): `steps` evaluations in all.

    The slopes of the last `order` evaluations, divided by the sine of the angle, are extended as a polynomial in the
    angle, which is integrated with the sine exactly. With Gaussian noise that quotient is -m / c, where m would be the
    centre of the data near x if these were Gaussian with the arc's scale c: such data are solved exactly, wherever
    their centre is, in any number of steps up to order 3. So these are exponential integrators for x, as DEIS (Zhang &
    Chen 2023, arXiv 2204.13902) and DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) are, of m instead of the noise or
    the denoised. Where the slope is not known to vanish with the angle (heavy-tailed noise, fields and laws of one's
    own), the sine gets an offset. So it does at order 4, for every field: steps are so short then that the slope is
    smooth by itself, also that of data without a density, which does not vanish.

    With the corrector each step is made again once the slope at its end is known, without another evaluation, and the
    order is one higher (UniPC, Zhao et al. 2023, arXiv 2302.04867). Weights are computed from the places on the arc, so
    any grid will do. The last step leads to t = 0, where the arc is regular. Only where the noise of a sample hides the
    data at t_min still (heavy tails) is it the field's estimate from an evaluation at t_min.

    Where x at the horizon shows hardly more than noise, and the model of an affine field has a `data_mean`, no
    evaluation is spent there: the velocity is that of data at their mean. E[x0|x] differs from that by a share
    alpha std / sigma of the std, along every axis (Wang & Vastola 2024, arXiv 2412.09726, follow a Gaussian's velocity
    for longer). So few evaluations are one more; many would see the difference.

    The first steps know fewer slopes. Where there are many steps, or no corrector, their states are made again from the
    horizon on with all slopes known so far, so that they do not limit the order.

    Args:
        steps: evaluations. The grid has one time more, or two with `from_mean`; the last, t_min, is not evaluated.
        order: 1 to 4, slopes that a step is extended from. None is 2 up to 12 steps, 3 up to 24, 4 beyond.
        corrector: make each step again.
        denoise: end with the field's estimate from an evaluation at t_min, for every sample. Right where the data have
            no density (there the last step is wrong by about 1 % of their std), and for images of few grey levels;
            where they have one, steps are better spent earlier.
        factors: on the weights of the slopes, for each step in the move up to its place and in that to the next, as
            many as there are weights (see `shapes`); diffusion.samplers.tune finds them. None is 1 everywhere.
        from_mean: take the velocity at the horizon from the model's data_mean. None is true up to 12 steps, where no
            order, grid or factors are given, the field is affine, the model has a data_mean, and the noise there is
            above 50 std and 4 sqrt(d) std.
    """

    steps: int = 10
    order: int | None = None
    corrector: bool = True
    denoise: bool = False
    factors: Factors | None = None
    from_mean: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        whole(self.steps, "steps", 1)
        if not isinstance(self.corrector, bool) or not isinstance(self.denoise, bool):
            raise UserError(
                f"sampler has corrector={self.corrector!r} and denoise={self.denoise!r}, expected true or false"
            )
        if not isinstance(self.from_mean, bool | None):
            raise UserError(f"sampler has from_mean={self.from_mean!r}, expected true, false or null")
        if self.order is not None:
            whole(self.order, "order", 1)
        if self.order not in (None, 1, 2, 3, 4):
            raise UserError(f"sampler has order={self.order}, expected 1, 2, 3 or 4, or null")
        if self.factors is not None:
            try:
                shapes = [tuple(map(len, pair)) for pair in self.factors]
            except TypeError:
                shapes = None
            if shapes != self.shapes() or not all(
                isinstance(f, int | float) for pair in self.factors for w in pair for f in w
            ):
                raise UserError(
                    f"sampler has factors that do not fit, expected as many as it has weights: {self.shapes()}"
                )

    def plan(self, model: Model, x: Tensor) -> Moves:
        arc = self.arc(model, x)
        mean = self._mean(model, x)
        places = self.steps + (mean is not None)
        times = self._evaluations(arc, self.times(model, x, places + 1))
        at, scale = arc.at(times), torch.as_tensor(arc.scale, dtype=torch.float64)
        weights = [
            (again.to(x), onward.to(x))
            for again, onward in self._scaled(self._weights(at.angle, self._offset(model.field, x[0].numel())))
        ]
        continued = (times[:, -1:] > arc.field.t_min).to(x.device)
        times, at, known = times.to(x), at.to(x), x.new_empty(0, *x.shape)
        if mean is not None:

            def velocity(x: Tensor, t: Tensor) -> Tensor:
                return model.field.velocity(x, t.expand(len(x)), mean.to(x).expand_as(x))

            known = slope(velocity, x, times, at, 0)[None]
        return Moves(times, at, known, weights, scale.to(x), continued)

    @property
    def places(self) -> int:
        """Places on the arc with a slope of their own: the evaluations, and the horizon where `from_mean` is true."""
        return self.steps + bool(self.from_mean)

    def starts_from_mean(self, model: Model, x: Tensor) -> bool:
        """Whether the slope at the horizon is known without an evaluation, for states `x` there."""
        return self._mean(model, x) is not None

    def _mean(self, model: Model, x: Tensor) -> Tensor | None:
        """Mean of the data (*shape), where it is to be used.

        Raises:
            UserError: it is to be used, and is not known or not of the shape of a point.
        """
        mean, affine = data_mean(model), isinstance(model.field, AffineField)
        if self.from_mean is None:
            if mean is None or not affine or self.steps > LOW or not (self.order is self.grid is self.factors is None):
                return None
            alpha, sigma = (c.item() for c in coefficients(model.field, torch.tensor([model.field.horizon])))
            if sigma < alpha * self.data_std(model) * max(HIDING, WIDE * x[0].numel() ** 0.5):
                return None
        elif not self.from_mean:
            return None
        if mean is None or not affine:
            missing = "a model with data_mean; give it one" if affine else "an affine field; take false"
            raise UserError(f"sampler has from_mean=True, expected {missing}, or tune for this model if it was tuned")
        if not isinstance(mean, Tensor) or mean.shape != x.shape[1:]:
            found = f"shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else f"type {type(mean).__name__}"
            expected = f"a tensor of the shape of a point, {tuple(x.shape[1:])}"
            raise UserError(f"data_mean of the model has {found}, expected {expected}, or None")
        return mean

    def shapes(self) -> list[tuple[int, int]]:
        """How many weights each step has, in the move up to its place, which may not be made again, and to the next."""
        angles = torch.linspace(1.5, 0.1, self.places, dtype=torch.float64)[None]
        return [(again.shape[1], onward.shape[1]) for again, onward in self._weights(angles, 1.0)]

    def _evaluations(self, arc: Arc, grid: Tensor) -> Tensor:
        """The places, (rows, places): all times but the last of a grid (rows, places + 1) from T to t_min.

        Samples whose noise still hides the data at t_min are evaluated there, and a little earlier everywhere else.
        """
        times, last = grid[:, :-1], torch.tensor([[arc.field.t_min]], dtype=torch.float64)
        far = (arc.at(last).noise_to_signal > arc.scale * (FINEST / SCALE)) | self.denoise
        number = times.shape[1]
        if number == 1 or not bool(far.any()):
            return times
        places = torch.linspace(0, number, number, dtype=torch.float64)
        before = places.long().clamp_max(number - 1)
        earlier = torch.lerp(grid[:, before].log(), grid[:, before + 1].log(), places - before).exp()
        earlier = torch.cat([grid[:, :1], earlier[:, 1:-1], grid[:, -1:]], 1)  # the ends exactly
        return torch.where(far, earlier, times)

    def follow(self, plan: Moves, velocity: Velocity, x: Tensor, field: Field) -> Tensor:
        at, slopes = plan.at, []
        first = state = corrected = x / column(at.radius, 0, x)
        for n, (again, onward) in enumerate(plan.weights):
            x = state * column(at.radius, n, x)
            here = plan.known[n] if n < len(plan.known) else slope(velocity, x, plan.times, at, n)
            slopes = [*slopes[-4:], here]
            if again.shape[1] > 0:
                state = (first if self._refines(n, len(plan.weights)) else corrected) + _sum(again, slopes)
            corrected = state
            state = corrected + _sum(onward, slopes)
        v = column(at.speed, -1, x) * slopes[-1] + column(at.drift, -1, x) * x
        estimate = field.endpoint(x, plan.times[:, -1].expand(len(x)), v)
        return torch.where(column(plan.continued, 0, x), state * plan.scale, estimate)

    def _scaled(self, weights: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if self.factors is None:
            return weights
        pairs = zip(weights, self.factors, strict=True)
        return [tuple(w * torch.tensor(f, dtype=w.dtype) for w, f in zip(ws, fs, strict=True)) for ws, fs in pairs]

    def _offset(self, field: Field, dim: int) -> float:
        """Of the sine that the slopes are divided by, see `integral_weights`."""
        smooth = isinstance(field, AffineField) and isinstance(field.base, Gaussian | StudentT) and not heavy(field)
        offset = (SMOOTH if smooth else KINKED)[self._slopes() - 1]
        return offset if self._slopes() == 4 else offset * hidden(field, dim) ** 2

    def _slopes(self) -> int:
        """How many a step is extended from."""
        return self.order or (2 if self.steps <= LOW else 3 if self.steps < 25 else 4)

    def _refines(self, n: int, places: int) -> bool:
        """Whether the n-th state is made again from the horizon on."""
        return 1 <= n < self._slopes() and (not self.corrector or places >= 5 * self._slopes())

    def _weights(self, angles: Tensor, offset: float) -> list[tuple[Tensor, Tensor]]:
        """Weights (rows, k) of the last k slopes, for each step: in the move up to its place, and in that to the next.

        The first has k = 0 where that move is not made again.
        """
        ends, places, moves = torch.cat([angles, torch.zeros_like(angles[:, :1])], 1), angles.shape[1], []
        for n in range(places):
            start, oldest = n, n + 1
            if self._refines(n, places):
                start, oldest = 0, 0
            elif self.corrector and n > 0:
                start, oldest = n - 1, max(0, n - self._slopes())
            spans = ((oldest, start, n), (max(0, n + 1 - self._slopes()), n, n + 1))
            moves.append(
                tuple(
                    integral_weights(ends[:, a : n + 1], ends[:, b : b + 1], ends[:, c : c + 1], offset)
                    for a, b, c in spans
                )
            )
        return moves


def _sum(weights: Tensor, slopes: list[Tensor]) -> Tensor:
    """The sum of the last slopes, with weights (rows, k)."""
    k = weights.shape[1]
    return sum(column(weights, j, slopes[0]) * value for j, value in enumerate(slopes[-k:]))
