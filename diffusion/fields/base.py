"""The one abstraction: a field is a bundle of lines along which data points travel.

Conventions, everywhere in this package:

- time t runs from 0 (data) to the horizon T (the prior); a generator integrates from T down to ``t_min``;
- x0 is a data point, z the label of a field line, x_t = transport(x0, z, t) the place reached at time t;
- shapes: points are (B, *shape), times are numbers or (B,), densities are (B,), in nats;
- u = (p_t, p_t f_t) is free of divergence in (t, x): the continuity equation, d_t p + div(p f) = 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.errors import UserError


class Unavailable(UserError):
    """A field was asked for something that it does not define, such as the density of one known by its samples."""


def expand_time(t: Tensor | float, x: Tensor) -> Tensor:
    """`t`, a number or (B,), shaped to broadcast against `x` (B, *shape), in the dtype and on the device of `x`.

    Raises:
        UserError: `t` is neither a number nor one time for each row of `x`.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.numel() != 1 and t.shape != x.shape[:1]:
        raise UserError(f"time has shape {tuple(t.shape)}, expected a number or ({x.shape[0]},), one for each point")
    return t.reshape(-1, *[1] * (x.dim() - 1))


class Isotropic(NamedTuple):
    """p_t(x|x0) and f_t(x|x0) of a field in which x0 enters through the gap g = x - alpha x0 and its length alone:

        log p_t(x|x0) = log_prob(|g|^2),    f_t(x|x0) = rate(|g|^2) g + alpha_dot x0.

    `log_prob` and `rate` map squared lengths (B, N), a row for each time, to (B, N).
    """

    alpha: Tensor  # (B, 1)
    alpha_dot: Tensor  # (B, 1)
    log_prob: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]


class Field(ABC):
    """What moves the data: conditional laws p_t(x|x0) and the velocity f_t(x|x0) that carries them.

    A field of one's own needs `horizon`, `velocity`, and a way to draw x_t: either `sample`, or `draw` and `transport`
    where its lines have labels. With `log_prob` as well it has exact fields of data sets and can be fully validated.
    The prior is the law of x_T from a data point at the origin, unless `sample_prior` and `prior_log_prob` say
    otherwise.

    Attributes:
        horizon: T, the time at which the marginal is taken to be the prior.
        t_min: where integration ends; below it a data point is not told from its blurred image. 1e-3 of the horizon.
        rho: the field's clock. t^(1/rho) is a time in which field lines bend evenly, so that grids are laid and
            adaptive steps are controlled in it: 1 where t is such a time, 7 where t runs over decades
            (Karras et al. 2022, eq. 5).
    """

    horizon: float
    rho: float = 1.0

    @cached_property
    def t_min(self) -> float:
        return 1e-3 * self.horizon

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """f_t(x|x0) (B, *shape): the time derivative of the line from `x0` through `x`."""

    def sample(self, x0: Tensor, t: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
        """A draw of x_t (B, *shape) for each x0, in the dtype and on the device of `x0`."""
        z = self.draw(x0.shape, generator, dtype=x0.dtype, device=None if generator is not None else x0.device)
        return self.transport(x0, z.to(x0.device), t)

    def log_prob(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """log p_t(x|x0) (B,), in nats; -inf where there is no mass."""
        raise Unavailable(f"{type(self).__name__} has no density; define log_prob(x, t, x0)")

    def score(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """grad_x log p_t(x|x0) (B, *shape), by autograd. Its mean given x is the marginal score grad log p_t(x).

        That is so where the density is continuous: a jump of it has a part in the marginal score, and none here.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            total = self.log_prob(x, t, x0).sum()
            if not total.requires_grad:  # a piecewise constant density
                return torch.zeros_like(x)
            return torch.autograd.grad(total, x, materialize_grads=True)[0]

    def draw(
        self,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Labels of field lines, of shape `size` = (B, *shape)."""
        raise Unavailable(f"{type(self).__name__} has no labels; define draw(size, ...) and transport(x0, z, t)")

    def transport(self, x0: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """x_t (B, *shape): where the line labelled `z` from `x0` is at time `t`."""
        raise Unavailable(f"{type(self).__name__} has no labels; define draw(size, ...) and transport(x0, z, t)")

    def sample_prior(
        self,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws of the prior, of shape `size` = (B, *shape)."""
        device = generator.device if device is None and generator is not None else device
        return self.sample(torch.zeros(size, dtype=dtype, device=device), self.horizon, generator)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior (B,), in nats."""
        return self.log_prob(x, self.horizon, torch.zeros_like(x))

    def target(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """What a network regresses on: a quantity (B, *shape) whose mean given (x, t) fixes the marginal velocity."""
        return self.velocity(x, t, x0)

    def velocity_from_target(self, x: Tensor, t: Tensor | float, target: Tensor) -> Tensor:
        """The marginal velocity f_t(x) that follows from the conditional mean of the target."""
        return target

    def endpoint(self, x: Tensor, t: Tensor | float, velocity: Tensor) -> Tensor:
        """Estimate of x0 from the marginal velocity at `x`: the last step of a sampler, from `t_min` to the data."""
        return x - expand_time(t, x) * velocity

    def isotropic(self, x: Tensor, t: Tensor | float) -> Isotropic:
        """The field as a function of distances, at points like `x` (B, *shape) and times `t`."""
        raise Unavailable(f"{type(self).__name__} is not a function of the distance from x0")

    def clock(self, points: int) -> Tensor:
        """`points` times from t_min to the horizon, even in t^(1/rho), (points,) float64."""
        ends = torch.tensor([self.t_min, self.horizon], dtype=torch.float64) ** (1 / self.rho)
        times = torch.linspace(*ends.tolist(), points, dtype=torch.float64) ** self.rho
        times[0], times[-1] = self.t_min, self.horizon
        return times
