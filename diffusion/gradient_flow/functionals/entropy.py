"""The entropy E log q of a law that is seen through particles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diffusion.errors import UserError
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.scores.base import ScoreEstimator
from diffusion.gradient_flow.scores.blob import Blob


@dataclass(frozen=True)
class Entropy(Functional):
    """F[q] = E log q in nats, the negative of Shannon's differential entropy; its flow is the heat equation.

    Particles have no density: an estimator stands for it. The velocity is minus its score, -grad log q.

    Args:
        estimator: Blob, GaussianScore, SteinScore, NetworkScore, or one's own.

    Raises:
        UserError: the estimator is none; value and first_variation, where it has a score only.
    """

    estimator: ScoreEstimator = field(default_factory=Blob)

    def __post_init__(self):
        if not isinstance(self.estimator, ScoreEstimator):
            raise UserError(f"estimator is {self.estimator!r}, expected a ScoreEstimator such as Blob()")

    def value(self, particles):
        return self.estimator.value(particles)

    def velocity(self, particles):
        return -self.estimator.score(particles)

    def first_variation(self, particles):
        return self.estimator.log_density(particles)

    def fitted(self, particles, generator=None):
        estimator = self.estimator.fitted(particles, generator)
        return self if estimator is self.estimator else replace(self, estimator=estimator)
