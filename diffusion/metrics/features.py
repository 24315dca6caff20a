"""Feature spaces: maps from data (N, *shape) to vectors (N, k) in which distances mean something.

Images arrive as floats in [-1, 1]. Features run where their argument lives and return float64 there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion.data import Splits, StreamedData, TensorData, to_uint8
from diffusion.data.base import one_line
from diffusion.errors import UserError

CHUNK_IMAGES = 256
TRAINING_IMAGES = 20_000
"""Images that a classifier is trained on at most, over all sets."""
TRAINING_STEPS = 200
BATCH_IMAGES = 256
CLASSIFIER_FEATURES = 64


class Features(Protocol):
    """A named map (N, *shape) -> (N, k) float64. Figures are comparable only within one feature space."""

    @property
    def name(self) -> str: ...

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PointFeatures:
    """The coordinates themselves, k = number of values a sample: for points in few dimensions, or raw pixels."""

    name: str = field(default="coordinates", init=False)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1).double()


@dataclass(frozen=True)
class ClassifierFeatures:
    """Penultimate activations of a small convolutional classifier, k = 64; see train_classifier_features.

    Attributes:
        body: (N, C, H, W) -> (N, 64).
        head: the linear layer that made class scores of the features in training; its accuracy on images that were not
            trained on tells how far the features can be trusted.
        seed: initialised and shuffled the training.
    """

    body: nn.Module
    head: nn.Linear
    seed: int

    @property
    def name(self) -> str:
        return f"classifier trained on the real set (seed {self.seed})"

    def __call__(self, x: Tensor) -> Tensor:
        return _in_chunks(self.body.to(x.device), x)


def train_classifier_features(datasets: Sequence[TensorData | StreamedData], seed: int = 0) -> ClassifierFeatures:
    """Trains a small classifier on the spot and returns its penultimate activations as a feature space.

    Pass the training and the test split together: a network knows its own training images better than others, and the
    real-against-real floor is honest only where both real sets were treated alike. Three convolutions, the first with a
    stride that brings any image to about 14 to 28 pixels a side, then the global average. 200 steps of Adam on batches
    of 256, from at most 20,000 images: seconds for 8 x 8, under two minutes for 32 x 32, on two cores. On a CPU the
    result is a function of the data and the seed; the global random state is left alone.

    Args:
        datasets: labelled image sets of one shape and one set of classes.
        seed: for the initial weights, the choice of images and the batches.

    Raises:
        UserError: a set has no labels (num_classes below 2), is not of images, or differs from the first in shape or
            number of classes.
    """
    first = datasets[0]
    for data in datasets:
        if not data.is_image or data.num_classes < 2:
            raise UserError(
                f"classifier features need labelled images, found shape {tuple(data.shape)} with {data.num_classes} "
                f"classes; pass InceptionFeatures() for unlabelled images, PointFeatures() for points"
            )
        if (data.shape, data.num_classes) != (first.shape, first.num_classes):
            raise UserError(
                f"data sets differ: shape {tuple(data.shape)} with {data.num_classes} classes, expected "
                f"{tuple(first.shape)} with {first.num_classes}; train on splits of one data set"
            )
    generator = torch.Generator().manual_seed(seed)
    share = TRAINING_IMAGES / max(TRAINING_IMAGES, sum(map(len, datasets)))
    batches = []
    for data in datasets:
        index = torch.randperm(len(data), generator=generator)[: round(share * len(data))]
        batches += data.batches(index.split(CHUNK_IMAGES))
    images, labels = torch.cat([batch.x for batch in batches]), torch.cat([batch.label for batch in batches])

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        body = _convolutional_body(channels=first.shape[0], side=min(first.shape[1:]))
        head = nn.Linear(CLASSIFIER_FEATURES, first.num_classes)
    network = nn.Sequential(body, head).to(images.device)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=TRAINING_STEPS)
    for _ in range(TRAINING_STEPS):
        batch = torch.randint(len(images), (BATCH_IMAGES,), generator=generator)
        loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)
    return ClassifierFeatures(body, head, seed)


class InceptionFeatures:
    """Pool features of the Inception network of the FID, k = 2048: Heusel et al. 2017 (arXiv:1706.08500).

    The weights of the original TensorFlow graph and its own bilinear resize (no antialiasing), as published figures
    use them; fetched once by torchmetrics and torch-fidelity (about 95 MB). Images are rounded to uint8 first; grey
    ones are repeated over the three channels, as is customary.

    Raises:
        UserError: on construction, where the optional packages are missing or the weights cannot be had; on a call,
            where the images have other than 1 or 3 channels.
    """

    name = "Inception-v3 pool (2048)"

    def __init__(self) -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"], antialias=False)
        except ImportError as error:
            raise UserError(
                f"Inception features need torchmetrics and torch-fidelity, found {one_line(error)!r}; "
                f"run pip install 'diffusion[fid]', or pass other features"
            ) from error
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the Inception weights could not be loaded ({one_line(error)}), expected them from the network or in "
                f"{torch.hub.get_dir()}/checkpoints; connect once or copy the file there, or pass other features"
            ) from error

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UserError(
                f"Inception features were given shape {tuple(x.shape)}, expected images (N, 1 or 3, H, W); "
                f"pass PointFeatures() for other data"
            )
        network = self.network.to(x.device)
        return _in_chunks(lambda images: network(to_uint8(images).expand(-1, 3, -1, -1)), x)


def default_features(splits: Splits, seed: int = 0) -> Features:
    """The feature space for a data set: its own coordinates, a classifier of its labels, or Inception.

    Points are their own features. Labelled images get a classifier trained on both splits with the seed. Unlabelled
    images, colour or grey, get Inception.

    Raises:
        UserError: Inception is called for and not installed, or its weights cannot be had.
    """
    if not splits.train.is_image:
        return PointFeatures()
    if splits.train.num_classes > 1:
        return train_classifier_features([splits.train, splits.test], seed)
    return InceptionFeatures()


def _convolutional_body(channels: int, side: int) -> nn.Sequential:
    """(N, channels, H, W) -> (N, 64): a strided stem, two stages at half the side each, the global average."""

    def stage(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    stride = max(1, side // 14)
    return nn.Sequential(
        *stage(channels, 32, stride + 2, stride),
        *stage(32, 64, 3, 2),
        *stage(64, CLASSIFIER_FEATURES, 3, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@torch.no_grad()
def _in_chunks(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([network(chunk).double() for chunk in x.split(CHUNK_IMAGES)])
