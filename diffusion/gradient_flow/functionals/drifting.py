"""The drifting field of one-step generators: attraction to the data minus repulsion among the particles."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional, check_data, chunks, with_data


def laplace(distance: Tensor, tau: float) -> Tensor:
    """log k = -|x - y| / tau, the kernel of Deng et al. 2026."""
    return -distance / tau


def gaussian(distance: Tensor, tau: float) -> Tensor:
    """log k = -|x - y|^2 / (2 tau^2)."""
    return -distance.square() / (2 * tau**2)


@dataclass(frozen=True)
class Drifting(Functional):
    """The velocity of drifting models (Deng et al. 2026, arXiv 2602.04770, eqs. 8 to 11): there is no functional to it.

    With weights a(x, y) on data and b(x, x') on particles, made of the kernel k,

        V(x) = sum_yx' a(x, y) b(x, x') (y - x')        summed over data y and particles x'.

    Where each set of weights sums to 1 over its own points, V is the mean shift towards the data minus that towards the
    particles; with the Gaussian kernel it is tau^2 grad log(p_tau / q_tau), for the kernel estimates p_tau of the
    density of the data and q_tau of that of the particles. The paper's weights sum to 1 over data and particles
    together, which slows particles that have one kind of neighbour only, and are geometric means with weights
    normalised over the particles x that they act on, which lets no point act on everything.

    In expectation V is 0 where the laws agree, whatever the kernel and the weights.

    Args:
        data: (M, *shape).
        taus: widths of the kernel, in units of the data's distances; the fields of all are summed.
        kernel: (distances, tau) -> log k.
        together: weights sum to 1 over data and particles together, False: over each.
        columns: weights are normalised over the particles that they act on as well.
        unit: the field of each tau is scaled to a mean square of 1 per coordinate, so that all have a say.
        own: a particle counts among those that repel it. Then particles that are the data rest; without it, as in the
            paper's algorithm 2, they do not, but narrow kernels repel.

    Raises:
        UserError: no such data, or taus are not positive numbers.
    """

    data: Tensor
    taus: tuple[float, ...] = (0.5, 1.0, 2.0)
    kernel: Callable[[Tensor, float], Tensor] = laplace
    together: bool = True
    columns: bool = True
    unit: bool = True
    own: bool = True

    def __post_init__(self):
        check_data(self.data)
        if not self.taus or not all(0 < tau < float("inf") for tau in self.taus):
            raise UserError(f"taus is {list(self.taus)}, expected one or more positive numbers")

    def value(self, particles):
        """Raises UserError: the field is the gradient of nothing."""
        raise UserError(
            "the drifting field has no value: it is the gradient of no functional; judge its particles by another one, "
            "such as EnergyDistance"
        )

    def first_variation(self, particles):
        """As `value`."""
        return self.value(particles)

    @torch.no_grad()
    def velocity(self, particles):
        x, y = with_data(particles, self.data)
        if not self.own and len(x) < 2:
            raise UserError("there is one particle, expected two or more with own=False: nothing would repel it")
        total = torch.zeros_like(x)
        for tau in self.taus:
            field = self._field(x, y, tau)
            scale = field.square().mean().sqrt() if self.unit else field.new_tensor(1.0)
            total += field / scale.clamp_min(torch.finfo(field.dtype).tiny)
        return total.to(particles.dtype).view_as(particles)

    def _field(self, x: Tensor, y: Tensor, tau: float) -> Tensor:
        columns = self._columns(x, y, tau) if self.columns else None
        parts = []
        for rows in chunks(len(x), len(y) + len(x)):
            log_k = self._log_kernel(x, y, tau, rows)
            groups = [log_k] if self.together else log_k.split([len(y), len(x)], 1)
            log_a = torch.cat([group.log_softmax(1) for group in groups], 1)
            if columns is not None:
                log_a = (log_a + log_k - columns) / 2
            a, b = log_a.exp().split([len(y), len(x)], 1)
            parts.append(b.sum(1, keepdim=True) * (a @ y) - a.sum(1, keepdim=True) * (b @ x))
        return torch.cat(parts)

    def _columns(self, x: Tensor, y: Tensor, tau: float) -> Tensor:
        """log of the sum of the kernel over the particles, (M + N,)."""
        total = x.new_full((len(y) + len(x),), -torch.inf)
        for rows in chunks(len(x), len(total)):
            total = torch.logaddexp(total, self._log_kernel(x, y, tau, rows).logsumexp(0))
        return total

    def _log_kernel(self, x: Tensor, y: Tensor, tau: float, rows: slice) -> Tensor:
        """(n, M + N): of the particles `rows` with data and particles."""
        # The product form of cdist loses all digits of short distances.
        options = {"compute_mode": "donot_use_mm_for_euclid_dist"}
        near = torch.cat([torch.cdist(x[rows], points, **options) for points in (y, x)], 1)
        log_k = self.kernel(near, tau)
        if not self.own:
            index = torch.arange(len(x), device=x.device)[rows]
            log_k[torch.arange(len(index)), len(y) + index] = -torch.inf
        return log_k
