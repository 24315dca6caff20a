"""Functionals of a data set, and flows on them, as conf/flow names them: data -> functional, functional -> flow."""

from collections.abc import Callable

from torch import Tensor

from diffusion.fields import EmpiricalField, variance_exploding
from diffusion.generator import Generator
from diffusion.gradient_flow.flows.annealed import AnnealedLangevin
from diffusion.gradient_flow.flows.base import Alternating
from diffusion.gradient_flow.flows.fisher_rao import FisherRaoFlow
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.fdivergence import FDivergence
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.ratios import ClassifierRatio
from diffusion.gradient_flow.scores.base import ScoreEstimator
from diffusion.gradient_flow.scores.blob import Blob
from diffusion.samplers import LogSNRGrid


def density(
    data: Tensor,
    log_prob: Callable[[Tensor], Tensor] | None = None,
    std: float = 0.1,
    estimator: ScoreEstimator | None = None,
) -> KL:
    """KL from a log-density of one's own; without one, from the data with Gaussian noise of `std` on each coordinate.

    Args:
        log_prob: up to a constant, (N, *shape) -> (N,).
        estimator: of the particles' own density; None: Blob(std).
    """
    entropy = Entropy(Blob(std) if estimator is None else estimator)
    if log_prob is not None:
        return KL(log_prob, entropy)
    return KL(EmpiricalField(variance_exploding(), data), entropy, std)


def classified(data: Tensor, kind: str = "jensen_shannon") -> FDivergence:
    """An f-divergence whose density ratio a classifier of data and particles learns along the flow."""
    return FDivergence(kind, ClassifierRatio(data))


def langevin_birth_death(functional: KL) -> Alternating:
    """Langevin's dynamics and birth-death in turn: particles need not cross barriers to have the right weights."""
    return Langevin(functional, EulerMaruyama()) + FisherRaoFlow(functional)


def model(data: Tensor, checkpoint: str | None = None) -> Generator | EmpiricalField:
    """The trained generator of a checkpoint; without one, the exact field of the data under Gaussian noise."""
    if checkpoint is None:
        return EmpiricalField(variance_exploding(), data)
    return Generator.load(checkpoint, data.device)


def annealed(model: Generator | EmpiricalField, levels: int = 20, repeats: int = 10) -> AnnealedLangevin:
    """Annealing over noise levels of `model` that fall by one factor, from its prior to its data."""
    times = LogSNRGrid()(model.field, levels)[:levels]
    return AnnealedLangevin(model, tuple(times.tolist()), repeats)
