"""One file of numpy arrays: images or points, with labels and a split where the file has them."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from diffusion.data.base import Splits, TensorData, fixed_split, one_line
from diffusion.errors import UserError

_KEYS = ("images", "points", "labels", "split")

# what numpy raises for a file that is not a whole .npy or .npz
_DAMAGED = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def array(path: str | Path, num_classes: int | None = None) -> Splits:
    """Images or points of a `.npz` or `.npy` file.

    `.npz` keys (others are passed over):

    - `images`: uint8, (N, H, W) or (N, H, W, C) with 1 or 3 channels; or else
    - `points`: float32 or float64, (N, d);
    - `labels`, optional: whole numbers (N,), from 0;
    - `split`, optional: (N,), 0 or "train" for a row to train on, 1 or "test" for one to test on. Without it a fixed
      90 % of the rows is trained on.

    `.npy`: the images or the points alone. Nothing is unpickled.

    Args:
        path: the file.
        num_classes: number of classes; None: the largest label + 1.

    Raises:
        UserError: a file that is missing or damaged, neither images nor points or both, an array of another type or
            shape, labels that are out of range.
    """
    file = Path(path).expanduser()
    arrays = _read(file)
    try:
        return _splits(arrays, num_classes, file.stem)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, np.ndarray]:
    """The arrays of `file` under the keys that mean something here."""
    if not file.is_file():
        raise UserError(f"{file} is not a file, expected a .npz or .npy file: check data.path")
    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"images" if content.dtype == np.uint8 else "points": content}
        with content:
            arrays = {key: content[key] for key in _KEYS if key in content}
            found = ", ".join(content) or "none"
    except _DAMAGED as error:
        cause = one_line(error).split(". ")[0]  # numpy goes on to advise unsafe loading
        raise UserError(
            f"{file} cannot be read ({cause}), expected a whole .npz or .npy file without Python objects: "
            "write it again with numpy.savez"
        ) from error
    if ("images" in arrays) == ("points" in arrays):
        raise UserError(f"{file} has the keys {found}, expected either images or points: save it under that key")
    return arrays


def _splits(arrays: dict[str, np.ndarray], num_classes: int | None, name: str) -> Splits:
    values = TensorData(_images(arrays["images"]) if "images" in arrays else _points(arrays["points"])).values
    labels = _labels(arrays["labels"], len(values)) if "labels" in arrays else None
    if num_classes is None:
        num_classes = 0 if labels is None else max(int(labels.max()), 0) + 1
    rows = _rows(arrays["split"], len(values)) if "split" in arrays else fixed_split(len(values))
    train, test = (TensorData(values[row], None if labels is None else labels[row], num_classes) for row in rows)
    return Splits(train, test, name)


def _images(images: np.ndarray) -> torch.Tensor:
    """(N, H, W[, C]) as (N, C, H, W)."""
    channels = 1 if images.ndim == 3 else images.shape[-1]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or channels not in (1, 3):
        raise UserError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 (N, H, W), (N, H, W, 1) or "
            "(N, H, W, 3): convert or transpose them"
        )
    return torch.from_numpy(images.reshape(*images.shape[:3], channels).transpose(0, 3, 1, 2).copy())


def _points(points: np.ndarray) -> torch.Tensor:
    if points.dtype not in (np.float32, np.float64) or points.ndim != 2:
        raise UserError(
            f"points are {points.dtype} of shape {points.shape}, expected float32 or float64 (N, d), or uint8 for "
            "images: convert or reshape them"
        )
    return torch.from_numpy(points.astype(np.float32))


def _labels(labels: np.ndarray, count: int) -> torch.Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise UserError(
            f"labels are {labels.dtype} of shape {labels.shape}, expected whole numbers of shape ({count},): "
            "give one per row"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _rows(split: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to train on and rows to test on."""
    names = split.astype(str)
    train, test = np.isin(names, ["0", "False", "train"]), np.isin(names, ["1", "True", "test"])
    if split.shape != (count,) or not (train | test).all() or not train.any() or not test.any():
        found = ", ".join(map(str, np.unique(names)[:5]))
        raise UserError(
            f"split is of shape {split.shape} with the values {found}; expected shape ({count},) with 0 or 'train' and "
            "1 or 'test', both in use: correct it, or leave it out"
        )
    return torch.from_numpy(train.nonzero()[0]), torch.from_numpy(test.nonzero()[0])
