"""Conditions of some of the points."""

from typing import Any

import torch
from torch import Tensor

from diffusion.errors import UserError


def is_of_points(value: Any, number: int) -> bool:
    """Whether a condition has an entry for each of `number` points."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == number


def of_points(conditions: dict[str, Any], index: Tensor, number: int) -> dict[str, Any]:
    """Of the points `index` (b,) of `number`: tensors (number, ...) go with their points, the rest is for all."""
    return {
        name: value[index.to(value.device)] if is_of_points(value, number) else value
        for name, value in conditions.items()
    }


def class_labels(label: Tensor | int | None, number: int, num_classes: int) -> Tensor | None:
    """`label` for each of `number` samples, (number,); None stays None.

    Raises:
        UserError: a label is not one of the classes, or their number is wrong.
    """
    if label is None:
        return None
    label = torch.as_tensor(label)
    if not num_classes or label.min() < 0 or label.max() >= num_classes:
        classes = f"a class from 0 to {num_classes - 1}" if num_classes else "null: it has no classes"
        raise UserError(f"label is {label.unique().tolist()}, but this generator expects {classes}")
    if label.dim() and len(label) != number:
        raise UserError(f"there are {len(label)} labels, expected one, or one for each of {number} samples")
    return label.expand(number)
