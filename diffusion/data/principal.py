"""A prior made from a data set."""

import torch

from diffusion.data.base import Splits
from diffusion.fields import PrincipalGaussian

EXAMPLES = 10_000


def principal_gaussian(data: Splits, components: int) -> PrincipalGaussian:
    """The Gaussian of the principal components of the training set, from its first 10,000 examples.

    Raises:
        UserError: the data do not vary in more directions than there are components.
    """
    return PrincipalGaussian.fit(data.train.take(torch.arange(min(EXAMPLES, len(data.train)))).x, components)
