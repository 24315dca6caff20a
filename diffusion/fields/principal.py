"""The Gaussian of the data's principal components: a prior that already has their mean and their main variations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields.laws import Law
from diffusion.specs import recorded


@recorded
class PrincipalGaussian(Law):
    """z ~ N(mean, C) with C = sum_k variance_k u_k u_k^T + remainder (I - sum_k u_k u_k^T), u_k orthonormal.

    Probabilistic principal component analysis (Tipping & Bishop 1999, J. R. Stat. Soc. B 61, 611): `fit` gives the
    maximum-likelihood C of this form. Arguments are numbers in lists or tensors; lists are stored in a checkpoint.

    Args:
        mean: (d,).
        components: (K, d), the directions u_k.
        variances: (K,), along them.
        remainder: the variance in every other direction.

    Raises:
        UserError: the shapes do not match, the directions are not orthonormal, or a variance is not positive.
    """

    def __init__(
        self,
        mean: Sequence[float] | Tensor,
        components: Sequence[Sequence[float]] | Tensor,
        variances: Sequence[float] | Tensor,
        remainder: float,
    ):
        mean, components, variances = (
            torch.as_tensor(value, dtype=torch.float64) for value in (mean, components, variances)
        )
        components = components if components.numel() else components.new_empty(0, *mean.shape)
        shapes = tuple(mean.shape), tuple(components.shape), tuple(variances.shape)
        if mean.dim() != 1 or shapes[1] != (len(variances), len(mean)) or variances.dim() != 1:
            raise UserError(f"mean, components and variances have shapes {shapes}, expected (d,), (K, d) and (K,)")
        gram = components @ components.T
        if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-6):
            raise UserError("components are not orthonormal, expected unit vectors at right angles to each other")
        if not (remainder > 0 and bool((variances > 0).all())):
            raise UserError(f"variances go down to {min([remainder, *variances.tolist()])}, expected positive numbers")
        self.dim = len(mean)
        self.mean, self.components, self.variances, self.remainder = mean, components, variances, float(remainder)
        self.std = math.sqrt((float(variances.sum()) + (self.dim - len(variances)) * remainder) / self.dim)

    @classmethod
    def fit(cls, data: Tensor, components: int) -> "PrincipalGaussian":
        """The law of most likelihood for `data` (N, *shape) with this number of components.

        Raises:
            UserError: the data do not vary in more directions than there are components.
        """
        x = data.detach().double().flatten(1).cpu()
        dim = x.shape[1]
        if not 0 <= components < min(len(x), dim):
            raise UserError(
                f"components is {components}, expected less than the {dim} coordinates and the {len(x)} data points"
            )
        mean = x.mean(0)
        _, singular, directions = torch.linalg.svd(x - mean, full_matrices=False)
        variances = singular.square() / len(x)
        remainder = float(variances[components:].sum()) / (dim - components)
        if not remainder > 1e-12 * float(variances[0]):
            raise UserError(f"the data do not vary beyond {components} components; give a smaller number")
        return cls(mean.tolist(), directions[:components].tolist(), variances[:components].tolist(), remainder)

    def draw(self, size, generator=None, dtype=None, device=None):
        self._check(size)
        device = generator.device if device is None and generator is not None else device
        eps = torch.randn(size, generator=generator, dtype=dtype, device=device).flatten(1)
        z = self.mean.to(eps) + self._scale(eps, self.variances.sqrt(), math.sqrt(self.remainder))
        return z.view(tuple(size))

    def log_prob(self, z):
        self._check(z.shape)
        gap = z.flatten(1)
        gap = gap - self.mean.to(gap)
        white = self._scale(gap, self.variances.rsqrt(), 1 / math.sqrt(self.remainder))
        log_det = float(self.variances.log().sum()) + (self.dim - len(self.variances)) * math.log(self.remainder)
        return -0.5 * (white.square().sum(1) + log_det + self.dim * math.log(2 * math.pi))

    def _scale(self, x: Tensor, along: Tensor, elsewhere: float) -> Tensor:
        """`x` (B, d) stretched by `along` (K,) in the principal directions and by `elsewhere` in all others."""
        u = self.components.to(x)
        return elsewhere * x + (x @ u.T * (along.to(x) - elsewhere)) @ u
