"""Handwritten digits that come with scikit-learn: real images, no download."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffusion.data.base import Splits, TensorData


def digits() -> Splits:
    """1,797 handwritten digits, (1, 8, 8), 10 classes: 1,347 to train on, 450 to test on, stratified by class.

    The original grey values 0 .. 16 become round(value * 255 / 16).
    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    source = load_digits()
    images = torch.from_numpy(np.rint(source.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(source.target.astype(np.int64))
    rows = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=source.target)
    train, test = (TensorData(images[index], labels[index], num_classes=10) for index in rows)
    return Splits(train, test, "digits")
