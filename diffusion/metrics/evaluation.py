"""How good a set of generated samples is, next to the two figures that give it a scale.

The floor is what real samples score that were held out; no honest generator does better. The Gaussian, with the mean
and the full covariance of the training set, is the least that a generator should beat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.data import Splits, StreamedData, TensorData, to_uint8
from diffusion.errors import UserError
from diffusion.metrics.distances import (
    BLOCK_ROWS,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    precision_recall,
    sliced_wasserstein,
)
from diffusion.metrics.features import Features

SUBSETS = 10
REFERENCE_EXAMPLES = 50_000
"""Training examples that the Frechet distance and the search for copies run against, at most."""
PAIRWISE_EXAMPLES = 5_000
"""Training examples for kernel distance, precision, recall and sliced W2, and held-out examples, at most."""
READ_EXAMPLES = 256
NEIGHBOURS = 3
SMALLEST_RATIO_BASE = 1e-12


class Figures(NamedTuple):
    """One column: each figure is a mean over disjoint subsets of Evaluation.subset_size samples.

    Attributes:
        frechet: Frechet distance in features, squared units.
        kernel: squared maximum mean discrepancy in features; unbiased, so it may be negative.
        precision: share of samples inside the real manifold.
        recall: share of training examples inside the samples' manifold; grows with the size of the subset.
        sliced_w2: sliced Wasserstein-2 distance in data space, data units.
        nearest_train: median distance to the nearest training example, data units per root of the dimension.
        memorised: share of samples that lie no farther from a training example than the nearest 1 % of held-out ones.
    """

    frechet: float
    kernel: float
    precision: float
    recall: float
    sliced_w2: float
    nearest_train: float
    memorised: float


@dataclass(frozen=True)
class Evaluation:
    """What evaluate found. `generated`, `real` (the floor) and `gaussian` may be compared: their biases are alike.

    Attributes:
        frechet_all: Frechet distance of all generated samples at once, against frechet_reference training examples.
            With 50,000 of each and Inception features this is the FID of the literature; with fewer it is larger.
        samples: generated samples given.
        subset_size: samples in each subset that the columns average over.
        reference: training examples compared with.
    """

    generated: Figures
    real: Figures
    gaussian: Figures
    frechet_all: float
    samples: int
    subset_size: int
    reference: int
    features: str
    data: str
    seed: int

    @property
    def frechet_over_floor(self) -> float:
        """Frechet distance as a multiple of held-out real data's (a base below 1e-12 counts as 1e-12)."""
        return self.generated.frechet / max(self.real.frechet, SMALLEST_RATIO_BASE)

    @property
    def frechet_over_gaussian(self) -> float:
        """Frechet distance as a multiple of the fitted Gaussian's (a base below 1e-12 counts as 1e-12).

        Says little for points in their own coordinates: a Gaussian's distance there is 0 but for its finite sample.
        """
        return self.generated.frechet / max(self.gaussian.frechet, SMALLEST_RATIO_BASE)

    def to_dict(self) -> dict:
        """Everything as plain numbers, strings and dicts, for JSON."""
        return {
            "data": self.data,
            "features": self.features,
            "seed": self.seed,
            "samples": self.samples,
            "subset_size": self.subset_size,
            "reference": self.reference,
            "generated": self.generated._asdict(),
            "real": self.real._asdict(),
            "gaussian": self.gaussian._asdict(),
            "frechet_all": self.frechet_all,
            "frechet_over_floor": self.frechet_over_floor,
            "frechet_over_gaussian": self.frechet_over_gaussian,
        }

    def table(self) -> str:
        """The figures in aligned columns, and three lines that say how they were made."""
        titles = {
            "frechet": ("Frechet distance", "low"),
            "kernel": ("kernel distance", "low"),
            "precision": ("precision", "high"),
            "recall": ("recall", "high"),
            "sliced_w2": ("sliced W2", "low"),
            "nearest_train": ("nearest training example", "as real"),
            "memorised": ("memorised", "as real"),
        }
        rows = [["", "generated", "real", "gaussian", "aim"]]
        for name, (title, aim) in titles.items():
            values = [f"{getattr(column, name):.4g}" for column in (self.generated, self.real, self.gaussian)]
            rows.append([title, *values, aim])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += [
            f"Frechet distance: {self.frechet_over_floor:.3g} times real data's, {self.frechet_over_gaussian:.3g} "
            f"times the Gaussian's, {self.frechet_all:.4g} for all {self.samples:,} samples at once",
            f"means over subsets of {self.subset_size:,} samples, against {self.reference:,} training examples",
            f"data: {self.data}; features: {self.features}; seed: {self.seed}",
        ]
        return "\n".join(lines)

    def copies(self) -> str:
        """One line on memorisation: how near samples come to training examples, beside held-out data."""
        mine, real = self.generated, self.real
        return (
            "a flow to a finite data set can memorise it: samples lie "
            f"{mine.nearest_train / max(real.nearest_train, SMALLEST_RATIO_BASE):.2f} times as far from the nearest "
            f"training example as held-out data do; {mine.memorised:.1%} of them, and {real.memorised:.1%} of those, "
            "lie as near as the nearest 1 % of those"
        )


def evaluate(generated: Tensor, splits: Splits, features: Features, seed: int = 0) -> Evaluation:
    """Measures generated samples against a training set, beside held-out real data and a Gaussian fit.

    Figures of finite sets are biased by their size, so every column is made of subsets of one size, the smaller of the
    number of generated and of held-out samples; where a column has more, the mean over up to 10 of them is taken. The
    reference is the training split in every column: 50,000 examples drawn with the seed at most (5,000 of them for
    kernel distance, precision, recall and sliced W2; of the held-out split 5,000 at most as well). The Gaussian
    contributes one subset. Images are rounded to the 256 levels that real ones have, the Gaussian's too.

    Args:
        generated: (N, *shape) floats in data units, images in [-1, 1]; in any order. Statistics run in float64 on its
            device (on the CPU where that is MPS, which has no float64).
        splits: real data: train is the reference, test the floor.
        features: feature space of Frechet, kernel distance, precision and recall.
        seed: for subsets, projections and the Gaussian; equal seeds give equal figures.

    Raises:
        UserError: generated samples of a wrong shape, dtype or number (below 4), or not finite; splits with fewer than
            4 examples.
    """
    _check_generated(generated, splits)
    for name, split in (("train", splits.train), ("test", splits.test)):
        if len(split) <= NEIGHBOURS:
            raise UserError(
                f"the {name} split of {splits.name} has {len(split)} examples, expected at least {NEIGHBOURS + 1}; "
                f"use a larger data set"
            )
    device = torch.device("cpu") if generated.device.type == "mps" else generated.device
    generator = torch.Generator().manual_seed(seed)

    def draw(data: TensorData | StreamedData, at_most: int) -> Tensor:
        index = torch.randperm(len(data), generator=generator)[:at_most]
        return torch.cat([batch.x.to(device) for batch in data.batches(index.split(READ_EXAMPLES))])

    def like_real(x: Tensor) -> Tensor:
        return TensorData(to_uint8(x)).take(torch.arange(len(x))).x if splits.train.is_image else x.float()

    train = draw(splits.train, REFERENCE_EXAMPLES)
    test = draw(splits.test, PAIRWISE_EXAMPLES)
    shuffled = torch.randperm(len(generated), generator=generator)
    fake = like_real(generated.detach().to(device)[shuffled.to(device)])
    size = min(len(test), len(fake))
    gaussian = like_real(_fitted_gaussian(train, size, generator))

    train_features = features(train)
    few, few_features = train[:PAIRWISE_EXAMPLES].flatten(1), train_features[:PAIRWISE_EXAMPLES]
    test_distance = nearest_distance(test, train)
    close = test_distance.quantile(0.01)

    def figures(x: Tensor, x_features: Tensor, distance: Tensor) -> Figures:
        precision, recall = precision_recall(few_features, x_features, k=NEIGHBOURS)
        return Figures(
            frechet=frechet_distance(x_features, train_features),
            kernel=kernel_distance(x_features, few_features),
            precision=precision,
            recall=recall,
            sliced_w2=sliced_wasserstein(x.flatten(1), few, torch.Generator().manual_seed(seed)),
            nearest_train=distance.median().item() / x[0].numel() ** 0.5,
            memorised=(distance <= close).double().mean().item(),
        )

    def column(x: Tensor, x_features: Tensor, distance: Tensor) -> Figures:
        whole = min(len(x) // size, SUBSETS) * size
        subsets = zip(*(part[:whole].split(size) for part in (x, x_features, distance)), strict=True)
        return _mean([figures(*subset) for subset in subsets])

    fake_features = features(fake)
    return Evaluation(
        generated=column(fake, fake_features, nearest_distance(fake, train)),
        real=column(test, features(test), test_distance),
        gaussian=column(gaussian, features(gaussian), nearest_distance(gaussian, train)),
        frechet_all=frechet_distance(fake_features, train_features),
        samples=len(fake),
        subset_size=size,
        reference=len(train),
        features=features.name,
        data=splits.name,
        seed=seed,
    )


def _check_generated(generated: Tensor, splits: Splits) -> None:
    shape = tuple(splits.train.shape)
    if not generated.is_floating_point():
        raise UserError(
            f"generated samples are {generated.dtype}, expected floats in data units; convert images to [-1, 1]"
        )
    if tuple(generated.shape[1:]) != shape or generated.ndim != len(shape) + 1:
        raise UserError(
            f"generated samples have shape {tuple(generated.shape)}, expected (N, {', '.join(map(str, shape))}) as in "
            f"{splits.name}; evaluate against the data set that the generator was trained on"
        )
    if len(generated) <= NEIGHBOURS:
        raise UserError(
            f"{len(generated)} generated samples, expected at least {NEIGHBOURS + 1}; generate more, 1,000 or so"
        )
    broken = (~generated.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"{len(broken)} of {len(generated)} generated samples hold NaN or infinity (the first is sample "
            f"{broken[0]}), expected finite values; use more sampler steps or an earlier checkpoint"
        )


def _fitted_gaussian(train: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, *shape) float64 draws with the mean and the covariance of train.

    Given the data, mean + sum_i z_i (x_i - mean) / sqrt(n - 1) with independent normal z_i has that law exactly, with
    no factorisation, whatever the rank.
    """
    mean = train.mean(0, dtype=torch.float64)
    draws = mean.flatten().repeat(count, 1)
    for rows in train.split(BLOCK_ROWS):
        weights = torch.randn(count, len(rows), generator=generator, dtype=torch.float64).to(train.device)
        draws.addmm_(weights, (rows - mean).flatten(1), alpha=(len(train) - 1) ** -0.5)
    return draws.unflatten(1, train.shape[1:])


def _mean(columns: Sequence[Figures]) -> Figures:
    return Figures(*(sum(values) / len(values) for values in zip(*columns, strict=True)))
