"""A small network whose divergence, and whose derivatives' traces, are closed formulas in any dimension."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.errors import UserError

RIDGE = 1e-3  # relative to the mean squares of the features
ROUNDING = 1e-13


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
    def solve_last(self, y: Tensor, target: Tensor) -> None:
        """Set the last weights to those of least squares, n(y) closest to `target` (B, d).

        The change of U is held back by RIDGE: in directions that the points do not tell, U stays what it was.
        """
        features = nn.functional.pad(self.features(y), (0, 1), value=1.0)
        gram, free = features.T @ features / len(y), y.shape[1] + 1
        scale = gram.diagonal().clone()
        scale[:-free] *= RIDGE
        scale[-free:] *= ROUNDING
        change = torch.linalg.solve(gram + scale.diag(), features.T @ (target - self(y)) / len(y)).T
        self.last.weight += change[:, :-1]
        self.last.bias += change[:, -1]

    def _hidden(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h (B, H), and the slope of the activation z sigmoid(z) in each layer."""
        slopes = []
        for layer in self.layers:
            z = layer(y)
            gate = z.sigmoid()
            slopes.append(gate * (1 + z * (1 - gate)))
            y = z * gate
        return y, slopes
