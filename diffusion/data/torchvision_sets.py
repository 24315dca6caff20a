"""MNIST, FashionMNIST and CIFAR10, read by torchvision and kept in memory."""

from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional

from diffusion.data.base import Splits, TensorData, check_at_least, one_line
from diffusion.errors import UserError

_MNIST_FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
_CIFAR10_FILES = "data_batch_1 to data_batch_5, test_batch, batches.meta"

# torchvision's class, the name used here, the folder below the path, the files in it
_SETS = {
    "MNIST": (datasets.MNIST, "mnist", "MNIST/raw", _MNIST_FILES),
    "FashionMNIST": (datasets.FashionMNIST, "fashion_mnist", "FashionMNIST/raw", _MNIST_FILES),
    "CIFAR10": (datasets.CIFAR10, "cifar10", "cifar-10-batches-py", _CIFAR10_FILES),
}

# what torchvision raises for a download that fails (OSError, RuntimeError, HTTPException) and for a file that is not
# what it should be (the others; AssertionError from its idx reader)
_FAILURES = (OSError, RuntimeError, HTTPException, ValueError, TypeError, KeyError, EOFError, AssertionError)


def torchvision_set(name: str, path: str | Path = "data", download: bool = True, size: int | None = None) -> Splits:
    """One of torchvision's labelled image sets, with its own training and test part, 10 classes.

    Args:
        name: "MNIST" or "FashionMNIST", (1, 28, 28), or "CIFAR10", (3, 32, 32).
        path: folder that holds torchvision's folder of that set.
        download: fetch what is missing.
        size: resize to (size, size), bilinear with antialiasing; None keeps the original size.

    Raises:
        UserError: an unknown name, a size below 1, files that are missing or damaged and cannot be downloaded.
    """
    if name not in _SETS:
        raise UserError(f"image set {name!r} is unknown, expected one of {', '.join(_SETS)}: change name")
    if size is not None:
        check_at_least("size", size, 1)
    source, short_name, folder, files = _SETS[name]
    root = Path(path).expanduser().absolute()
    try:
        parts = [source(root, train=train, download=download) for train in (True, False)]
    except _FAILURES as error:
        raise UserError(
            f"{name} cannot be read from {root / folder} ({one_line(error)}): "
            f"expected {files}; put whole files there, or remove them and download where the network is reachable"
        ) from error
    train, test = (
        TensorData(_resized(_channels_first(torch.as_tensor(part.data)), size), torch.as_tensor(part.targets), 10)
        for part in parts
    )
    return Splits(train, test, short_name)


def _channels_first(images: Tensor) -> Tensor:
    """(N, H, W) or (N, H, W, 3) as (N, C, H, W)."""
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None:
        return images
    return torch.cat([functional.resize(some, [size, size], antialias=True) for some in images.split(1024)])
