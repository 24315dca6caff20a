"""The two kinds of data set, the record that they hand out, and what every loader needs.

Images are kept as uint8 (N, C, H, W) and leave as float32 in [-1, 1]: x = value / 127.5 - 1. Points are kept as float32
(N, *shape) and leave as they are. Labels are int64 in 0 .. num_classes - 1; num_classes is 0 where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from diffusion.errors import UserError


class Examples(NamedTuple):
    """A batch: x is (B, *shape) float32, images in [-1, 1]; label is (B,) int64, or None where there are no labels."""

    x: Tensor
    label: Tensor | None


class TensorData:
    """A data set in memory, on any device.

    Args:
        values: uint8 images (N, C, H, W), or finite float32 points (N, *shape).
        labels: (N,) int64 in 0 .. num_classes - 1 on the same device, or None.
        num_classes: number of classes; 0 if and only if labels is None.

    Raises:
        UserError: values or labels of another type or shape, a value that is not finite, a label out of range.
    """

    def __init__(self, values: Tensor, labels: Tensor | None = None, num_classes: int = 0):
        self.is_image = values.dtype == torch.uint8
        if values.ndim != 4 if self.is_image else values.dtype != torch.float32 or values.ndim < 2:
            raise UserError(
                f"values are {values.dtype} of shape {tuple(values.shape)}, expected uint8 images (N, C, H, W) or "
                "float32 points (N, ...): convert or reshape them"
            )
        if 0 in values.shape:
            raise UserError(f"values have shape {tuple(values.shape)}, expected at least one example: check the source")
        if not self.is_image and not (finite := values.flatten(1).isfinite().all(1)).all():
            row = (~finite).nonzero()[0].item()
            raise UserError(f"row {row} of the points is {values[row].tolist()}, expected finite numbers: repair it")
        _check_labels(labels, len(values), num_classes)
        self.values, self.labels, self.num_classes = values, labels, num_classes
        self.shape: tuple[int, ...] = tuple(values.shape[1:])

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> TensorData:
        """The same data on `device`."""
        moved = copy(self)
        moved.values = self.values.to(device)
        moved.labels = None if self.labels is None else self.labels.to(device)
        return moved

    def take(self, index: Tensor) -> Examples:
        """The examples at `index` ((B,) int64, any device), converted on the device that the values live on."""
        index = index.to(self.values.device)
        return Examples(_to_float(self.values[index]), None if self.labels is None else self.labels[index])

    def batches(self, order: Iterable[Tensor]) -> Iterator[Examples]:
        """One batch for each index tensor of `order`, in that order."""
        for index in order:
            yield self.take(index)


class StreamedData:
    """Images on disk, too many for memory: read like `TensorData`, decoded by worker processes.

    Args:
        dataset: map-style; item i is (uint8 image (C, H, W), label as int). All images have one shape.
        num_classes: number of classes; 0: the data has no labels, whatever the items say.
        workers: processes that decode, one torch thread each; 0 decodes in this process. With workers, `order` is read
            ahead of the batches by up to 2 * workers index tensors.
        device: where examples go; bytes travel (from pinned memory to CUDA), floats are made there.

    Raises:
        UserError: an empty data set, items that are not uint8 images, a negative number of workers; when read, what the
            data set raises for an item.
    """

    is_image = True

    def __init__(self, dataset: Dataset, num_classes: int = 0, workers: int = 4, device: torch.device | str = "cpu"):
        check_at_least("workers", workers, 0)
        if len(dataset) == 0:
            raise UserError("the data set has no images, expected at least one: check the source")
        image, _ = dataset[0]
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise UserError(f"item 0 is {image.dtype} of shape {tuple(image.shape)}, expected a uint8 image (C, H, W)")
        self.dataset, self.num_classes, self.workers, self.device = dataset, num_classes, workers, torch.device(device)
        self.shape: tuple[int, ...] = tuple(image.shape)

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device | str) -> StreamedData:
        """The same data, its examples sent to `device`."""
        moved = copy(self)
        moved.device = torch.device(device)
        return moved

    def take(self, index: Tensor) -> Examples:
        """The examples at `index` ((B,) int64, any device), decoded in this process."""
        return self._send(*default_collate([self.dataset[i] for i in index.tolist()]))

    def batches(self, order: Iterable[Tensor]) -> Iterator[Examples]:
        """One batch for each index tensor of `order`, in that order."""
        for images, labels in self._decoded(order):
            yield self._send(images, labels)

    def in_memory(self) -> TensorData:
        """Everything, decoded once by the workers, as `TensorData` on the same device."""
        images = torch.empty(len(self), *self.shape, dtype=torch.uint8)
        labels = torch.empty(len(self), dtype=torch.int64)
        order = torch.arange(len(self)).split(64)
        for index, (some_images, some_labels) in zip(order, self._decoded(order), strict=True):
            images[index], labels[index] = some_images, some_labels
        return TensorData(images, labels if self.num_classes else None, self.num_classes).to(self.device)

    def _decoded(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (B, C, H, W) and labels (B,) for each index tensor of `order`, in host memory."""
        loader = DataLoader(
            _Guarded(self.dataset),
            batch_sampler=(index.tolist() for index in order),
            collate_fn=_collate,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one the loader draws from the global generator
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _send(self, images: Tensor, labels: Tensor) -> Examples:
        label = labels.to(self.device, non_blocking=True) if self.num_classes else None
        return Examples(_to_float(images.to(self.device, non_blocking=True)), label)


class Splits(NamedTuple):
    """A data set as it is used: `train` to learn from, `test` to judge by, `name` for the records."""

    train: TensorData | StreamedData
    test: TensorData | StreamedData
    name: str


def to_uint8(x: Tensor) -> Tensor:
    """Images (..., C, H, W), float in [-1, 1], as uint8: rounded to the nearest value, clamped outside [-1, 1].

    The exact inverse of the conversion in `TensorData.take`.

    Raises:
        UserError: x holds NaN, which no grey value stands for.
    """
    if (missing := x.isnan().sum().item()) > 0:
        raise UserError(f"{missing} of {x.numel()} pixel values are NaN, expected numbers: find out what produced them")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def fixed_split(count: int) -> tuple[Tensor, Tensor]:
    """Indices of a 90 % training and a 10 % test part of `count` examples: drawn once with seed 0, each part sorted.

    Raises:
        UserError: fewer than two examples.
    """
    if count < 2:
        raise UserError(f"{count} example found, expected at least 2 (one to train on, one to test on): add some")
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    held_out = max(1, round(count / 10))
    return shuffled[held_out:].sort().values, shuffled[:held_out].sort().values


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise a `UserError` that names the option unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}, expected a whole number of at least {least}: change {name}")


def one_line(error: BaseException) -> str:
    """What a library said, on one line and not longer than 300 characters, to be quoted in a `UserError`."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


class _Guarded(Dataset):
    """`dataset` with every `UserError` as an item: raised in a worker, its line would arrive inside a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _collate(items: list[tuple[Tensor, int] | UserError]) -> list[Tensor] | UserError:
    """Images (B, C, H, W) and labels (B,), or the first error among the items."""
    return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


def _to_float(values: Tensor) -> Tensor:
    return values.float().div_(127.5).sub_(1) if values.dtype == torch.uint8 else values


def _check_labels(labels: Tensor | None, count: int, num_classes: int) -> None:
    if labels is None:
        if num_classes != 0:
            raise UserError(f"num_classes is {num_classes} without labels, expected 0: give labels, or leave it out")
        return
    check_at_least("num_classes", num_classes, 1)
    if labels.dtype != torch.int64 or labels.shape != (count,):
        raise UserError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, expected int64 of shape ({count},): "
            "give one per example"
        )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UserError(f"label {wrong} is out of range, expected 0 to {num_classes - 1}: correct it or num_classes")
