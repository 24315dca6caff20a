"""What samplers that work on the arc share: its scale, and the grid that suits it."""

import functools
import math
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField, Field, StudentT
from diffusion.samplers.arc import Arc, data_std, noise_scales
from diffusion.samplers.base import Model, PlannedSampler
from diffusion.samplers.grids import BandGrid, Grid

SCALE = 0.5  # of the arc, in units of the std of the data; this and FINEST by measurement on mixtures and digits
FINEST = 0.22  # size of the finest structure of the data, in units of their std
HEAVY = 3.0  # degrees of freedom below which the tails of Student-t noise are heavy
MEASURED, FAR = 16, 5.0  # samples whose std is compared to the one that steps were made for; ratio that warns
LOOKS, BENT = 32, 0.01  # lines of a field that are looked at, at as many times; relative turn that counts as a bend


def compare(x_0: Tensor, std: float, stacklevel: int) -> None:
    """Warn where samples (B, *shape) are of another scale than the one that steps were made for."""
    found = float((x_0 - x_0.mean(0)).square().mean().sqrt())
    if len(x_0) >= MEASURED and not std / FAR < found < FAR * std:
        warnings.warn(
            f"the samples have a std of {found:.3g} and the steps were made for {std:.3g}, so that they may be "
            "inaccurate; give the sampler std=..., or the model data_std",
            stacklevel=stacklevel + 1,
        )


class Lines(NamedTuple):
    """How far the lines of one data point are from x0 + t z: root mean square coordinates, medians over draws."""

    noise: float  # of z, at the horizon
    bent: float  # of t z, at the last time at which they bend; 0 where they nowhere do


class _Same:
    """A field, equal to itself alone: fields of one's own need not be hashable."""

    def __init__(self, field: Field):
        self.field = field

    def __hash__(self):
        return id(self.field)

    def __eq__(self, other):
        return self.field is other.field


def lines(field: Field, shape: tuple[int, ...]) -> Lines:
    """Of a field whose time runs over decades, for data of a `shape`."""
    return _lines(_Same(field), tuple(shape))


@functools.lru_cache(maxsize=16)
def _lines(same: _Same, shape: tuple[int, ...]) -> Lines:
    field = same.field
    t = field.clock(LOOKS)[:, None].expand(-1, LOOKS).flatten()
    x0 = torch.zeros(len(t), *shape, dtype=torch.float64)
    x = field.sample(x0, t, torch.Generator().manual_seed(0))
    turn = t[:, None] * field.velocity(x, t, x0).flatten(1) - x.flatten(1)
    size, turn = (value.square().mean(1).sqrt().view(LOOKS, LOOKS) for value in (x.flatten(1), turn))
    sizes, turns = size.nanmedian(1).values, (turn / size).nanmedian(1).values
    return Lines(sizes[-1].item() / field.horizon, sizes.where(turns > BENT, 0).max().item())


@dataclass(frozen=True)
class OnArc(PlannedSampler):
    """Samplers of the ODE in the variables of diffusion.samplers.arc.

    Fields that are not affine and whose time runs over decades do not say what their noise is, so it is seen from
    draws of their lines. With r its median root mean square coordinate, that of a sample is R^2 = (r^2 + |z|^2 / d) / 2
    with z = x_T / T, as if it were Student-t noise with D = d.

    Args:
        grid: rule that lays times. None is a BandGrid from 0.22 std to sqrt(d) std, for data of d coordinates: from
            their finest structure to the distances between them, or to where the lines of one data point bend, if that
            is farther; the low end times d^(-1/4) for heavy-tailed noise. A BandGrid is laid for each sample's own
            noise, where samples differ in it.
        std: standard deviation per coordinate of the data. None asks the model, and is 0.8 where it does not know.
    """

    grid: Grid | None = field(default=None, kw_only=True)
    std: float | None = field(default=None, kw_only=True)

    def __post_init__(self):
        if self.std is not None and not 0 < self.std < math.inf:
            raise UserError(f"sampler has std={self.std}, expected a positive number, or null")
        if self.grid is not None and not isinstance(self.grid, Grid):
            raise UserError(f"sampler has grid={self.grid!r}, expected a grid, such as BandGrid, or null")

    def __call__(self, model, x_T, generator=None, **conditions):
        x_0 = super().__call__(model, x_T, generator, **conditions)
        compare(x_0, self.data_std(model), stacklevel=2)
        return x_0

    def data_std(self, model: Model) -> float:
        return self.std or data_std(model)

    def arc(self, model: Model, x: Tensor) -> Arc:
        """For states `x` at the horizon."""
        return Arc(model.field, SCALE * self.data_std(model), self.noise(model, x))

    def noise(self, model: Model, x: Tensor) -> Tensor:
        """R (rows, 1) float64 on the CPU, for states `x` at the horizon."""
        if not _unknown(model.field):
            return noise_scales(model.field, x)
        squared = (x.flatten(1).cpu().double() / model.field.horizon).square().mean(1, keepdim=True)
        return ((lines(model.field, x.shape[1:]).noise ** 2 + squared) / 2).sqrt()

    def default_grid(self, model: Model, x: Tensor) -> BandGrid:
        std, dim = self.data_std(model), x[0].numel()
        bent = lines(model.field, x.shape[1:]).bent if _unknown(model.field) else 0.0
        return BandGrid(FINEST * std * hidden(model.field, dim), max(dim**0.5 * std, bent))

    def times(self, model: Model, x: Tensor, points: int) -> Tensor:
        """(rows, points) falling from T to t_min, for states `x` at the horizon."""
        grid = self.grid or self.default_grid(model, x)
        if isinstance(grid, BandGrid):
            return grid.rows(model.field, points, self.noise(model, x))
        return grid(model.field, points)[None]


def heavy(field: Field) -> bool:
    """Whether the noise of a field is Student-t noise of heavy tails, as that of gravity."""
    return isinstance(field, AffineField) and isinstance(field.base, StudentT) and field.base.dof < HEAVY


def hidden(field: Field, dim: int) -> float:
    """How much less than the finest structure the noise may be at which lines still bend.

    The radius of x tells the scale R of heavy-tailed noise, unless the noise changes it by less than data differ in
    their radii: |x0|^2 varies by a share that falls as d^(-1/2), which is the power of noise of std d^(-1/4). So
    samples are told from each other below that.
    """
    return dim**-0.25 if heavy(field) else 1.0


def _unknown(field: Field) -> bool:
    """Whether lines are to be looked at."""
    return field.rho > 1 and not isinstance(field, AffineField)
