"""Conditions of some of the points."""

from typing import Any

from torch import Tensor


def is_of_points(value: Any, number: int) -> bool:
    """Whether a condition has an entry for each of `number` points."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == number


def of_points(conditions: dict[str, Any], index: Tensor, number: int) -> dict[str, Any]:
    """Of the points `index` (b,) of `number`: tensors (number, ...) go with their points, the rest is for all."""
    return {
        name: value[index.to(value.device)] if is_of_points(value, number) else value
        for name, value in conditions.items()
    }
