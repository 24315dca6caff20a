"""A small network whose divergence, and whose derivatives' traces, are closed formulas in any dimension."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.errors import UserError

RIDGE = 1e-3  # relative to the mean squares of the features
ROUNDING = 1e-13
SAMPLED = 500  # points that tell the noise
WIDE = 1.0


class Correction(nn.Module):
    """n(y) = U h(y) + A y + c, (B, d) -> (B, d), with one or two hidden layers h and the weights (U, A), c last.

    With D_1, D_2 the slopes of the activation in the layers W_1, W_2, the Jacobian is U D_2 W_2 D_1 W_1 + A, and the
    trace of M times it is sum_jk D_2,j (W_2 o (W_1 M U)^T)_jk D_1,k + tr(M A): as cheap as the network itself.

    Args:
        dim: d.
        hidden: widths of the one or two hidden layers.
        generator: of the first weights; the last ones start at 0.

    Raises:
        UserError: another number of layers.
    """

    def __init__(self, dim: int, hidden: Sequence[int], generator: torch.Generator | None = None):
        super().__init__()
        if len(hidden) not in (1, 2) or min(hidden) < 1:
            raise UserError(f"hidden is {tuple(hidden)}, expected the widths of one or two layers")
        widths = [dim, *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, dtype=torch.float64) for before, after in zip(widths, hidden, strict=False)
        )
        self.last = nn.Linear(hidden[-1] + dim, dim, dtype=torch.float64)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
                layer.bias.normal_(0, 1, generator=generator)
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self, y: Tensor) -> Tensor:
        return self.last(self.features(y))

    def features(self, y: Tensor) -> Tensor:
        """What the last weights act on: (B, H + d)."""
        return torch.cat([self._hidden(y)[0], y], 1)

    def traced(self, y: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """n (B, d), and tr(matrix dn/dy) (B,), for a `matrix` (d, d), or one for each point (B, d, d)."""
        h, slopes = self._hidden(y)
        value = self.last(torch.cat([h, y], 1))
        outer, direct = self.last.weight.split([h.shape[1], y.shape[1]], 1)
        if matrix.dim() == 3:
            chain = outer
            for layer, slope in zip(reversed(self.layers), reversed(slopes), strict=True):
                chain = (chain * slope[:, None]) @ layer.weight
            return value, (matrix.mT * (chain + direct)).sum((1, 2))
        turned = self.layers[0].weight @ matrix @ outer  # (H_1, H of the last hidden layer)
        if len(slopes) == 1:
            trace = slopes[0] @ turned.diagonal()
        else:
            trace = ((slopes[1] @ (self.layers[1].weight * turned.T)) * slopes[0]).sum(1)
        return value, trace + (matrix.T * direct).sum()

    @torch.no_grad()
    def solve_last(self, y: Tensor, target: Tensor) -> float:
        """Set the last weights to those of least squares, n(y) closest to the score at `y` (B, d) plus y.

        The products of the score s with the features phi are known twice: from `target` (B, d), exact where that is,
        and by E phi s = -E grad phi from where the points are (Hyvaerinen 2005), unbiased but with noise. The latter
        count only by as much as they differ by more than their noise and WIDE of its deviations (James & Stein 1961):
        little where `target` is right, wholly where it is far off.

        The change of U is held back by RIDGE: in directions that the points do not tell, U stays what it was.

        Returns:
            the share of the latter, from 0 to 1; 1 where `target` is not finite.
        """
        features = nn.functional.pad(self.features(y), (0, 1), value=1.0)
        number, free = len(y), y.shape[1] + 1
        gram = features.T @ features / number
        scale = gram.diagonal().clone()
        scale[:-free] *= RIDGE
        scale[-free:] *= ROUNDING
        root = torch.linalg.cholesky(gram + scale.diag())
        now = features.T @ self(y) / number
        told = features.T @ target / number - now
        seen = features.T @ y / number - self._mean_slopes(y) - now
        some = torch.arange(0, number, -(-number // SAMPLED), device=y.device)
        score = self(y[some]) + features[some] @ torch.cholesky_solve(seen, root) - y[some]
        terms = features[some, :, None] * score[:, None] + self._slopes(y[some])
        terms = torch.linalg.solve_triangular(root, terms, upper=False).flatten(1)
        alike = terms @ terms.T / number
        squares = alike.square()
        noise = alike.diagonal().mean() + WIDE * (2 * (squares.mean() - squares.diagonal().mean() / len(some))).sqrt()
        fitted = torch.cholesky_solve(gram, root).trace() / number
        noise = noise / (1 - fitted).clamp_min(0.1) ** 2  # the score is fitted to the same points
        apart = torch.linalg.solve_triangular(root, seen - told, upper=False).square().sum()
        share = float((1 - noise / apart).clamp(0, 1).nan_to_num(1.0))
        gap = seen if share == 1 else torch.lerp(told, seen, share)
        change = torch.cholesky_solve(gap, root).T
        self.last.weight += change[:, :-1]
        self.last.bias += change[:, -1]
        return share

    def _mean_slopes(self, y: Tensor) -> Tensor:
        """The mean of `_slopes`, without these."""
        _, slopes = self._hidden(y)
        if len(slopes) == 1:
            chain = slopes[0].mean(0)[:, None] * self.layers[0].weight
        else:
            chain = (slopes[1].T @ slopes[0] / len(y) * self.layers[1].weight) @ self.layers[0].weight
        return torch.cat([chain, *self._straight(y)])

    def _slopes(self, y: Tensor) -> Tensor:
        """Derivatives (B, H + d + 1, d) of the features and of the constant."""
        _, slopes = self._hidden(y)
        chain = slopes[0][:, :, None] * self.layers[0].weight
        for layer, slope in zip(self.layers[1:], slopes[1:], strict=True):
            chain = slope[:, :, None] * (layer.weight @ chain)
        return torch.cat([chain, *(part.expand(len(y), -1, -1) for part in self._straight(y))], 1)

    @staticmethod
    def _straight(y: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of y and of the constant."""
        eye = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        return eye, torch.zeros_like(eye[:1])

    def _hidden(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h (B, H), and the slope of the activation z sigmoid(z) in each layer."""
        slopes = []
        for layer in self.layers:
            z = layer(y)
            gate = z.sigmoid()
            slopes.append(gate * (1 + z * (1 - gate)))
            y = z * gate
        return y, slopes
