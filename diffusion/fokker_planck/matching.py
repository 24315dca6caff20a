"""The weak form as an objective of the shared trainer: a drift, or a drift and a diffusion, from samples at some times.

For every test function phi and every polynomial psi of time the right equation has

    [psi E phi](T) - [psi E phi](0) - int (psi' E phi + psi E[f . grad phi + 1/2 tr(g g^T Hess phi)]) dt = 0.

What does not depend on the network is averaged once over all samples, with its covariance S; a batch averages the rest.
The residuals rho of all these equations are weighed by (S + u^2 G)^-1. G is the Gram matrix of psi grad phi under the
samples, so rho^T G^-1 rho is the mean square error of the drift as far as the functions see it: to descend on it is as
well conditioned as a regression on the drift itself. S takes the place of G where chance is more than the error u.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusion.data.base import TensorData
from diffusion.errors import UserError
from diffusion.fokker_planck.equation import FokkerPlanck, Function
from diffusion.fokker_planck.moment_equations import CHANCE, Rates, equations, time_weights
from diffusion.fokker_planck.scaled_functions import Samples, TestFunctions, frame
from diffusion.fokker_planck.snapshots import ELEMENTS, Snapshots, quadrature
from diffusion.fokker_planck.weak import COARSE, exceeded, quadratic_form, whitening
from diffusion.objectives import Batch

ACCURACY = 0.1  # u: an error of the drift, in standard deviations of the samples over all the time
REMEMBERED = 100  # batches, whose mean rates tell whether the times resolve them


def paired(samples: Samples) -> TensorData:
    """Data for the trainer: K snapshots (K, N, d) as N examples (K, d), one point of each time, float32."""
    if not isinstance(samples, Tensor):
        number = min(map(len, samples))
        samples = torch.stack([part[:number] for part in samples])
    return TensorData(samples.transpose(0, 1).float().contiguous())


class WeakMatching:
    """Squared weak residuals of a network, estimated without bias from examples (K, d).

    The network is (x, t) -> f, or, where `diffusion` is not given, (x, t) -> (f, g), such as `DriftNetwork` and
    `ProcessNetwork`. With r_i the residuals of one example, the mean of r_i r_j over pairs of different examples is the
    square of the mean of r, in which the variance of r has no part; single losses, and their mean near the end, may be
    negative.

    The weak form determines f p_t up to fields without divergence. Drift and noise together are determined by how the
    law changes: samples of a stationary law do not tell the scale of time, and a noise that may be any function of x is
    told from the drift by little.

    Args:
        samples, times, paths, degree: as in `weak_residual`.
        test_functions: fixed, so more of them, times `time_moments`, than the unknowns of the drift: 32 to 64 waves on
            a line, 128 in 3 dimensions. The shortest should vary over the lengths over which the drift does.
        diffusion: g, as in `FokkerPlanck`; None where the network learns it.
        time_moments: number of polynomials psi; 2 or K - 1, unless given.

    Raises:
        UserError: bad samples, as in `weak_residual`; the diffusion is to be learned from samples whose law does not
            change in time beyond chance.

    Warns:
        while it is trained: the times do not resolve the rates of the network, by more than COARSE standard errors.
    """

    def __init__(
        self,
        samples: Samples,
        times: Sequence[float] | Tensor,
        test_functions: TestFunctions,
        diffusion: Function | float | None = None,
        time_moments: int | None = None,
        paths: bool = False,
        degree: int | None = None,
    ):
        snapshots = Snapshots(samples, times, paths)
        most, span = len(snapshots.times) - 1, snapshots.times[-1] - snapshots.times[0]
        moments = min(2, most) if time_moments is None else time_moments
        if not isinstance(moments, int) or not 1 <= moments <= most:
            raise UserError(f"WeakMatching has time_moments={moments}, expected 1 to {most}, the times - 1")
        self.test_functions, self.learned = test_functions, diffusion is None
        self.times = torch.tensor(snapshots.times, dtype=torch.float64)
        _, _, scale = frame(samples)
        unit = scale / span**0.5
        noise = (lambda x, t: unit.to(x).expand_as(x)) if diffusion is None else diffusion
        rates = Rates([], [], FokkerPlanck(lambda x, t: torch.zeros_like(x), noise), test_functions)
        weights, doubt = snapshots.integral(degree)
        factors = time_weights(snapshots.times, weights, moments, rates.columns)
        doubtful = time_weights(snapshots.times, weights + doubt, moments, rates.columns) - factors
        mean, covariance = equations(snapshots, rates, factors)
        if self.learned:
            still = exceeded(*quadratic_form(mean[:, 0], covariance[:, 0, :, 0]), snapshots.points)
            if still > CHANCE:
                raise UserError(
                    f"the law of the samples does not change in time beyond chance (p = {still:.2g}), so that they do "
                    "not tell the scale of time: give the diffusion, or samples on the way to the stationary law"
                )
        chance = covariance.sum((1, 3))
        self.white = whitening(chance + ACCURACY**2 / span * gram(snapshots, test_functions, scale, moments))
        known = slice(0, 1) if self.learned else slice(None)
        self.fixed = self.white @ mean[:, known].sum(1)
        self.factors = factors[:, :, 1]
        off = equations(snapshots, rates, doubtful)[0][:, known].sum(1)
        self.time_rule = _TimeRule(doubtful[:, :, 1], off, chance.diagonal(), snapshots.points)

    def residuals(self, network: nn.Module, x: Tensor) -> Tensor:
        """Weighed residuals r (B, R) of examples (B, K, d)."""
        return self._weighed(self._rates(network, x))

    def _weighed(self, rates: Tensor) -> Tensor:
        rate = torch.einsum("km,bkf->bmf", self.factors.to(rates), rates)
        return self.fixed.to(rates) + rate.flatten(1) @ self.white.T.to(rates)

    def _rates(self, network: nn.Module, x: Tensor) -> Tensor:
        """What the network gives of the test functions' rates at each time, (B, K, F)."""
        points, t = x.flatten(0, 1), self.times.to(x).repeat(len(x))
        out = network(points, t)
        if self.learned == isinstance(out, Tensor):
            raise UserError(
                "the network returns f alone and no diffusion is given, or both f and g where one is: expected "
                "WeakMatching to be given g, or a network that returns (f, g)"
            )
        if self.learned:
            f, g = out
            rate = self.test_functions.rate(points, f, g @ g.mT if g.dim() == 3 else g.square())
        else:
            rate = self.test_functions.slope(points, out)
        return rate.view(*x.shape[:2], -1)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """r_i times the mean of the other r_j, (B, R)."""
        x = batch.x
        if x.dim() != 3 or x.shape[1] != len(self.times) or len(x) < 2:
            expected = f"two or more of ({len(self.times)}, d)"
            raise UserError(f"examples have shape {tuple(x.shape)}, expected {expected}: one point of each time")
        rates = self._rates(network, x)
        self.time_rule.look_at(rates.detach())
        r = self._weighed(rates)
        return r * (r.sum(0) - r) / (len(r) - 1)


class _TimeRule:
    """Whether the times resolve the rates of the network as it is, see `Snapshots.integral`.

    Args:
        factors: of the rates at each time, in the estimate of the error (K, M).
        off: what is known of that error (R,).
        chance: variances of the residuals (R,).
        points: samples at a time.
    """

    def __init__(self, factors: Tensor, off: Tensor, chance: Tensor, points: int):
        self.factors, self.off, self.chance, self.points = factors, off, chance, points
        self.mean = self.variance = torch.zeros_like(off)
        self.seen, self.doubted, self.said = 0, False, False

    def look_at(self, rates: Tensor) -> None:
        """Those of a batch (B, K, F); warns once, if they are too coarse for REMEMBERED batches and the next, too."""
        if self.said:
            return
        rows = torch.einsum("km,bkf->bmf", self.factors.to(rates), rates).flatten(1)
        self.seen += 1
        self.mean = torch.lerp(self.mean.to(rows), rows.mean(0), 1 / self.seen)
        self.variance = torch.lerp(self.variance.to(rows), rows.var(0), 1 / self.seen)
        if self.seen < REMEMBERED:
            return
        doubt = 4 * self.variance.to(self.off) * (1 / self.points + 1 / (self.seen * len(rates)))
        self.seen = 0
        kept = self.chance > 1e-12 * self.chance.max()
        excess = (((self.mean.to(self.off) + self.off).square() - doubt) / self.chance)[kept].mean()
        off = float(excess.clamp_min(0).sqrt())
        before, self.doubted = self.doubted, off > COARSE
        if before and self.doubted:
            self.said = True
            warnings.warn(
                f"the integrals over {len(self.factors)} times may be off by {off:.2g} standard errors for the network "
                "as it is, judged by leaving out every second time: what it learns may be wrong by as much, take more "
                "times",
                stacklevel=3,
            )


def gram(snapshots: Snapshots, phi: TestFunctions, scale: Tensor, moments: int) -> Tensor:
    """int psi psi' E[grad phi . grad phi'] dt (M F, M F), for x in units of `scale` (d,)."""
    weights = quadrature(snapshots.times, 1)  # all positive
    factors = time_weights(snapshots.times, weights, moments, 2)[:, :, 1]
    total = 0
    for part, weight, factor in zip(snapshots.parts, weights, factors, strict=True):
        products = 0
        for x in part.double().split(max(1, ELEMENTS // phi.number)):
            for direction in torch.diag(scale).to(x):
                slope = phi.slope(x, direction.expand_as(x))
                products = products + slope.T @ slope / len(part)
        total = total + torch.kron(torch.outer(factor, factor) / weight, products.cpu())
    return total
