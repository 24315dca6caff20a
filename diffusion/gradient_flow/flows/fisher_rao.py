"""The Fisher-Rao flow: mass is born where the first variation is low and dies where it is high; nothing moves."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.weighting import wide
from diffusion.gradient_flow.flows.base import Flow
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.entropy import Entropy


@dataclass(frozen=True)
class FisherRaoFlow(Flow):
    """d_t q = -q (dF/dq - E_q dF/dq), by particles that die and others that double.

    The gradient flow of F in the Fisher-Rao (Hellinger) metric: Lu, Lu and Nolen 2019, arXiv 1905.09863. Of an ordinary
    function of the weights w of given places it is the natural gradient flow (Amari 1998), dw/dt = -G^-1 df/dw with the
    Fisher information G; a step minimises KL(w' || w) / h' + v.w' with v = df/dw.

    A step gives particle i the weight exp(-h' v_i), with v the first variation, and draws as many particles again by
    these weights, so that on average the law is that of the weights. Where F = tau * Entropy + E[U] the equation is
    linear in log q, and h' = (1 - exp(-tau h)) / tau makes a step of any length h exact: q_h ~ q_0 exp(-h' (tau log q_0
    + U)); without an entropy h' = h and q_h ~ q_0 exp(-h U).

    Particles never reach a new place: add a flow that moves them, WassersteinFlow(F) + FisherRaoFlow(F) or
    Langevin(F) + FisherRaoFlow(F), for the Wasserstein-Fisher-Rao flow. A survivor keeps its index, and a copy has
    what another flow remembers of the particle copied, such as its momentum. For KL the entropy must have a first
    variation, as that of Blob has.

    Raises:
        UserError: in a run, the first variation is unknown, or is NaN, or infinite for all particles.
    """

    functional: Functional

    def begin(self, particles):
        return None

    def advance(self, moment, step_size, generator):
        with torch.no_grad():
            variation = moment.functional.first_variation(moment.particles)
        chosen = resampled(-effective(self.functional, step_size) * variation, generator)
        return replace(moment, particles=moment.particles[chosen], time=moment.time + step_size, origin=chosen)


def effective(functional: Functional, step_size: float) -> float:
    """h' of a step h: h, or (1 - exp(-tau h)) / tau with tau the weight of the entropies."""
    temperature = sum(term.weight for term in functional.terms() if isinstance(term.functional, Entropy))
    return -math.expm1(-temperature * step_size) / temperature if temperature else step_size


def resampled(log_weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which particle each index (N,) is a copy of, with each chosen exp(log_weights) N / sum times on average.

    Systematic resampling (Douc, Cappe and Moulines 2005, arXiv cs/0507025): a particle is chosen a number of times that
    is its expectation rounded up or down, from one uniform number. The chosen keep their indices; copies take the
    places of the dead.

    Raises:
        UserError: a weight is NaN, or none is positive and finite.
    """
    log_weights = log_weights.detach().to(wide(log_weights.device))
    largest, number = log_weights.max(), len(log_weights)
    if not bool(largest.isfinite()):  # max of NaN is NaN
        index = int(log_weights.isnan().nonzero()[0]) if bool(largest.isnan()) else int(log_weights.argmax())
        raise UserError(
            f"the weight of particle {index} is exp({float(log_weights[index])}), expected none NaN or infinite, and "
            "some above 0: the functional is not finite there; try other first particles or a smaller step_size"
        )
    cumulative = (log_weights - largest).exp().cumsum(0)
    expected = cumulative * (number / cumulative[-1])
    start = torch.rand((), generator=generator, dtype=log_weights.dtype, device=log_weights.device)
    until = (expected - start).ceil().clamp_(0, number)  # how many of start, start + 1, ... lie below
    until[-1] = number
    counts = until.diff(prepend=until.new_zeros(1)).long()
    chosen = torch.arange(number, device=counts.device)
    chosen[counts == 0] = chosen.repeat_interleave((counts - 1).clamp_min(0))
    return chosen
