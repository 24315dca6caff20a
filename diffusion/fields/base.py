"""The one abstraction: a field is a bundle of lines along which data points travel.

Conventions, everywhere in this package:

- time t runs from 0 (data) to the horizon T (the prior); a generator integrates from T down to ``t_min``;
- x0 is a data point, z the label of a field line, x_t = transport(x0, z, t) the place reached at time t;
- shapes: points are (B, *shape), times are numbers or (B,), densities are (B,), in nats;
- u = (p_t, p_t f_t) is free of divergence in (t, x): the continuity equation, d_t p + div(p f) = 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError


def expand_time(t: Tensor | float, x: Tensor) -> Tensor:
    """`t`, a number or (B,), shaped to broadcast against `x` (B, *shape), in the dtype and on the device of `x`.

    Raises:
        UserError: `t` is neither a number nor one time for each row of `x`.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.numel() != 1 and t.shape != x.shape[:1]:
        raise UserError(f"time has shape {tuple(t.shape)}, expected a number or ({x.shape[0]},), one for each point")
    return t.reshape(-1, *[1] * (x.dim() - 1))


class Field(ABC):
    """What moves the data: conditional laws p_t(x|x0) and the velocity f_t(x|x0) that carries them.

    Attributes:
        horizon: T, the time at which the marginal is taken to be the prior.
        t_min: where integration ends; below it a data point is not told from its blurred image.
        rho: the field's clock. t^(1/rho) is a time in which field lines bend evenly, so that grids are laid and
            adaptive steps are controlled in it: 1 where t is such a time, 7 where t runs over decades
            (Karras et al. 2022, eq. 5).
    """

    horizon: float
    t_min: float
    rho: float

    @abstractmethod
    def draw(
        self,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Labels of field lines, of shape `size` = (B, *shape)."""

    @abstractmethod
    def transport(self, x0: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """x_t (B, *shape): where the line labelled `z` from `x0` is at time `t`."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """f_t(x|x0) (B, *shape): the time derivative of the line from `x0` through `x`."""

    @abstractmethod
    def log_prob(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """log p_t(x|x0) (B,), in nats."""

    @abstractmethod
    def sample_prior(
        self,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws of the prior, of shape `size` = (B, *shape)."""

    @abstractmethod
    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the prior (B,), in nats."""

    @abstractmethod
    def target(self, x: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
        """What a network regresses on: a quantity (B, *shape) whose mean given (x, t) fixes the marginal velocity."""

    @abstractmethod
    def velocity_from_target(self, x: Tensor, t: Tensor | float, target: Tensor) -> Tensor:
        """The marginal velocity f_t(x) that follows from the conditional mean of the target."""

    @abstractmethod
    def endpoint(self, x: Tensor, t: Tensor | float, velocity: Tensor) -> Tensor:
        """Estimate of x0 from the marginal velocity at `x`: the last step of a sampler, from `t_min` to the data."""
