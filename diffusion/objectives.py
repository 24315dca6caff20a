"""Objectives: what a network is regressed on. objective(network, batch) -> loss of shape (B, ...), not reduced."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion.errors import UserError
from diffusion.fields import EmpiricalField
from diffusion.generator import Generator

SCORE_WEIGHT = 0.1


class Batch(NamedTuple):
    """What an objective gets at each step."""

    x: Tensor  # (B, *shape) data
    label: Tensor | None  # (B,) classes
    generator: torch.Generator  # the randomness of this step


class Objective(Protocol):
    def __call__(self, network: nn.Module, batch: Batch) -> Tensor: ...


class NoiseLevels:
    """A law of training times: log(noise / signal) normal with the given mean and std, cut off at t_min and T.

    noise / signal is sigma_t / (alpha_t std) with std that of the data, so one law serves all fields: in VE and
    PFGM++ it is EDM's log-normal law of sigma (Karras et al. 2022, sec. 5), which has mean -0.5 in this unit; in flow
    matching it is the logit-normal law of t (Esser et al. 2024). The times of a batch are stratified, one in each of
    B equal shares of the law, which leaves each of them with that law and lowers the variance of the loss.

    Args:
        times: (N,) rising from t_min to T, close together.
        levels: (N,) log(noise / signal) at these times, rising.
        mean, std: of log(noise / signal).
        even_share: share of the times drawn evenly from `times` instead.
    """

    def __init__(self, times: Tensor, levels: Tensor, mean: float = -0.5, std: float = 1.2, even_share: float = 0.0):
        if not std > 0:
            raise UserError(f"noise levels have std={std}, expected a positive number")
        self.mean, self.std = mean, std
        self.times = times
        normal = torch.special.ndtr((levels - mean) / std)
        if not normal[-1] - normal[0] > 1e-9:
            ends = f"{float(levels[0]):.3g} to {float(levels[-1]):.3g}"
            raise UserError(f"noise levels have mean={mean} and std={std}, but log(noise / signal) goes from {ends}")
        normal = (normal - normal[0]) / (normal[-1] - normal[0])
        self.shares = normal.lerp(torch.linspace(0, 1, len(times), dtype=torch.float64), even_share)

    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """(number,) times, float64, in random order of size, on the device of `generator`."""
        device = generator.device
        options = {"generator": generator, "device": device, "dtype": torch.float32}
        places = torch.randperm(number, generator=generator, device=device)
        u = ((places + torch.rand(number, **options)) / number).double()
        shares, times = self.shares.to(device), self.times.to(device)
        right = torch.searchsorted(shares, u).clamp(1, len(shares) - 1)
        weight = ((u - shares[right - 1]) / (shares[right] - shares[right - 1])).clamp(0, 1)
        return times[right - 1].lerp(times[right], weight)


class Matching(ABC):
    """What the regressions on a field share: times, noise, hidden labels, and the unit of the loss.

    For affine fields the target is x0, for others the velocity; the unit is the preconditioner's `out`, so that the
    network's raw output is regressed on a target of unit variance: EDM's loss, for every field. The unit depends on
    (x, t) alone.

    Args:
        generator: to be trained, calibrated to its data.
        mean, std: law of the training times, see NoiseLevels.
        label_dropout: probability that a class is hidden from a conditional network, for classifier-free guidance.
        score_weight: of the loss of the score, in its own unit, where the network has a second output for it.
    """

    def __init__(
        self,
        generator: Generator,
        mean: float = -0.5,
        std: float = 1.2,
        label_dropout: float = 0.1,
        score_weight: float = SCORE_WEIGHT,
    ):
        if not 0 <= label_dropout <= 1:
            raise UserError(f"label_dropout is {label_dropout}, expected a probability")
        if not 0 <= score_weight < math.inf:
            raise UserError(f"score_weight is {score_weight}, expected a number of 0 or more")
        self.score_weight = score_weight
        self.field, self.num_classes, self.label_dropout = generator.field, generator.num_classes, label_dropout
        times, wrap = generator.field.clock(4096), generator.precondition
        self.times = NoiseLevels(times, wrap.log_noise_to_signal(times), mean, std, wrap.even_share)

    @abstractmethod
    def moved(self, batch: Batch) -> int:
        """How many points of the batch, from the first on, are moved and shown to the network."""

    @abstractmethod
    def target(self, x: Tensor, t: Tensor, label: Tensor | None, batch: Batch) -> Tensor:
        """What the network is regressed on at `x` (n, *shape), which came from the first points of the batch."""

    @abstractmethod
    def score(self, x: Tensor, t: Tensor, label: Tensor | None, batch: Batch) -> Tensor:
        """What its second output is regressed on, where it has one."""

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """Squared error (n, *shape), with that of the score added."""
        number = self.moved(batch)
        x0 = batch.x[:number]
        t = self.times.draw(number, batch.generator).to(x0)
        x = self.field.sample(x0, t, batch.generator)
        label = self._hide(batch, number)
        prediction = network(x, t, label)
        loss = ((prediction.target - self.target(x, t, label, batch)) / prediction.error).square()
        if prediction.score is None or self.score_weight == 0:
            return loss
        error = (prediction.score - self.score(x, t, label, batch)) / prediction.score_error
        return loss + self.score_weight * error.square()

    def _hide(self, batch: Batch, number: int) -> Tensor | None:
        if not self.num_classes:
            return None
        chance = torch.rand(number, generator=batch.generator, device=batch.generator.device)
        return batch.label[:number].where(chance.to(batch.x.device) >= self.label_dropout, self.num_classes)


class FieldMatching(Matching):
    """Regression of a generator on its field's target, one data point for each place: see Matching."""

    def moved(self, batch):
        return len(batch.x)

    def target(self, x, t, label, batch):
        return self.field.target(x, t, batch.x)

    def score(self, x, t, label, batch):
        return self.field.score(x, t, batch.x)


class StableField(Matching):
    """Regression on the mean of the field's target over a whole batch, given the place: less noise than one point has.

    A share of the batch is moved; each place's target is its posterior mean over all points of the batch (of the same
    class, where the network is told the class), by EmpiricalField. The mean over a finite reference is biased towards
    the point that the place came from; the bias vanishes as the batch grows (Xu et al. 2023, arXiv 2302.00670).

    Args:
        share: of the batch that is moved; the network sees share * batch_size points a step.
    """

    def __init__(
        self,
        generator: Generator,
        share: float = 0.125,
        mean: float = -0.5,
        std: float = 1.2,
        label_dropout: float = 0.1,
        score_weight: float = SCORE_WEIGHT,
    ):
        super().__init__(generator, mean, std, label_dropout, score_weight)
        if not 0 < share <= 1:
            raise UserError(f"share is {share}, expected a part of the batch, more than 0 and at most 1")
        self.share = share

    def moved(self, batch):
        return math.ceil(self.share * len(batch.x))

    def target(self, x, t, label, batch):
        return self._mean(self.field.target, EmpiricalField.target, x, t, label, batch)

    def score(self, x, t, label, batch):
        return self._mean(self.field.score, EmpiricalField.score, x, t, label, batch)

    @torch.no_grad()
    def _mean(self, own, average, x: Tensor, t: Tensor, label: Tensor | None, batch: Batch) -> Tensor:
        """The mean over the batch, or over those of the class that the network is told.

        A place that rounds out of a bounded support takes what is its `own` point's.
        """
        if label is None:
            return self._mean_over(batch.x, own, average, x, t, batch.x[: len(x)])
        mean = torch.empty_like(x)
        for kind in label.unique():
            rows = label == kind
            reference = batch.x if kind == self.num_classes else batch.x[batch.label == kind]
            mean[rows] = self._mean_over(reference, own, average, x[rows], t[rows], batch.x[: len(x)][rows])
        return mean

    def _mean_over(self, reference: Tensor, own, average, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        exact = EmpiricalField(self.field, reference)
        mean, inside = own(x, t, x0).clone(), exact.log_prob(x, t).isfinite()
        mean[inside] = average(exact, x[inside], t[inside])
        return mean


class DensityRatio:
    """Classification of data, label 1, against other draws, label 0: the network learns log p/q, (B, *shape) -> (B,).

    With M and N examples of each, mixed at random, the log odds that x is of the data are log(M p / (N q)): log(M / N)
    is added to what the network says, not learned by it (Sugiyama, Suzuki and Kanamori 2012, ch. 4).

    Args:
        data: M, draws of p.
        others: N, draws of q.
    """

    def __init__(self, data: int, others: int):
        if min(data, others) < 1:
            raise UserError(f"there are {data} data and {others} other points, expected at least 1 of each")
        self.log_odds = math.log(data / others)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy (B,) in nats."""
        logit = network(batch.x).view(-1) + self.log_odds
        return nn.functional.binary_cross_entropy_with_logits(logit, batch.label.to(logit), reduction="none")
