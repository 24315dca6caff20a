"""Real and toy data, as training and evaluation see it: float32 examples, images in [-1, 1], labels where known.

A loader (`digits`, `toy`, `cities`, `torchvision_set`, `image_folder`, `array`) returns `Splits`: a fixed training set
and a fixed test set, each a `TensorData` (in memory, on any device) or a `StreamedData` (decoded from disk by worker
processes). Both are read by index only, so that whoever trains decides the order:

    train, test, name = digits()
    for x, label in train.to(device).batches(order):    # order: any iterable of index tensors
        ...

Nothing here draws from torch's or numpy's global random state.
"""

from diffusion.data.arrays import array
from diffusion.data.base import Examples, Splits, StreamedData, TensorData, to_uint8
from diffusion.data.folder import image_folder
from diffusion.data.geonames import cities
from diffusion.data.principal import principal_gaussian
from diffusion.data.sklearn_digits import digits
from diffusion.data.torchvision_sets import torchvision_set
from diffusion.data.toy_laws import LAWS, ToyLaw, toy, toy_law

__all__ = [
    "LAWS",
    "Examples",
    "Splits",
    "StreamedData",
    "TensorData",
    "ToyLaw",
    "array",
    "cities",
    "digits",
    "image_folder",
    "principal_gaussian",
    "to_uint8",
    "torchvision_set",
    "toy",
    "toy_law",
]
