"""Whether grad_x log p_t(x|x0) can be regressed on, found on draws of the field; and how large it is."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.fields import AffineField, Field, Gaussian, Law, StudentT
from diffusion.fields.base import Unavailable
from diffusion.fields.bumps import Bumps

TIMES = 5
FEWEST, MOST, NUMBERS, CHUNK = 512, 4096, 2**17, 256  # of draws at a time t, numbers in them, draws in memory
TAIL = 0.05  # share of the draws that shows how often large scores occur
STANDARD_ERRORS = 8.0
INFORMATION_NUMBERS = 200_000


def flaw(field: Field, shape: Sequence[int]) -> str | None:
    """Why no score can be learned beside the velocity, in points of this shape; None where one can.

    The marginal score is the mean of the conditional one, grad_x log p_t(x|x0), if that obeys Stein's identity
    E[score . u + div u] = 0 for bounded u; where the density jumps it does not. And a regression needs its variance:
    at a pole r^-k of the density, where the law of r has no zero at 0, there is none. The exponent of the tail of
    |score|, by Hill's estimator (Hill 1975, Ann. Stat. 3, 1163), must be above 2.

    Both are asked of the base law of an affine field, and of 5 times of any other, on fixed draws.
    """
    if isinstance(field, AffineField) and isinstance(field.base, Gaussian):
        return "its score follows from the velocity"
    if isinstance(field, AffineField) and isinstance(field.base, StudentT):
        return None
    try:
        if isinstance(field, AffineField):
            return _flaw(*_base(field.base, shape, _number(shape)))
        return next(filter(None, (_flaw(*_field(field, shape, t)) for t in field.clock(TIMES).tolist())), None)
    except Unavailable as error:
        return str(error)
    except UserError:
        raise
    except Exception as error:  # of the user's own code
        reason = str(error).partition("\n")[0]
        return f"its score fails, {type(error).__name__}: {reason}".removesuffix(": ")


def information(law: Law, shape: Sequence[int]) -> float:
    """E|grad log p|^2 / d, the Fisher information per coordinate of a law, on fixed draws."""
    if isinstance(law, StudentT):
        return (law.dof + law.dim) / (law.dof + law.dim + 2)
    _, score = _base(law, shape, max(FEWEST, INFORMATION_NUMBERS // math.prod(shape)))
    return float(score.square().mean())


def _number(shape: Sequence[int]) -> int:
    return min(MOST, max(FEWEST, NUMBERS // math.prod(shape)))


def _randomness() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _base(law: Law, shape: Sequence[int], number: int) -> tuple[Tensor, Tensor]:
    """Draws of a law and their scores, (number, d) each."""
    z = law.draw((number, *shape), _randomness(), dtype=torch.float64)
    return z.flatten(1), torch.cat([gradient(law.log_prob, part) for part in z.split(CHUNK)]).flatten(1)


def _field(field: Field, shape: Sequence[int], t: float) -> tuple[Tensor, Tensor]:
    """Draws of x_t from one data point, about their middle, and their scores, (number, d) each."""
    randomness, number = _randomness(), _number(shape)
    x0 = torch.randn(1, *shape, generator=randomness, dtype=torch.float64).expand(number, *shape)
    middle = field.sample(x0, t, randomness).median(0).values  # of other draws, on which the identity does not depend
    x = field.sample(x0, t, randomness)
    scores = [field.score(part, t, x0[: len(part)]) for part in x.split(CHUNK)]
    return (x - middle).flatten(1), torch.cat(scores).flatten(1)


def gradient(log_prob: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient (B, *shape) of log-densities (B,) of `z`; 0 where they do not depend on it."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        total = log_prob(z).sum()
        if not total.requires_grad:
            return torch.zeros_like(z)
        return torch.autograd.grad(total, z, materialize_grads=True)[0]


def _flaw(gap: Tensor, score: Tensor) -> str | None:
    if not bool(score.isfinite().all()):
        return "its score is not finite at every draw"
    unit = gap.square().mean(1).median().sqrt()
    gap, score = gap / unit, score * unit
    size = score.norm(dim=1).sort().values[-int(TAIL * len(score)) :].log()
    exponent = float(1 / (size - size[0])[1:].mean())
    if exponent < 2:
        return f"its score has no variance, P(|score| > u) falls like u^-{exponent:.2g}"
    dim = gap.shape[1]
    length = torch.tensor([0.3, 1.0, 3.0, 1.0, 1.0, 1.0], dtype=gap.dtype)
    wave = torch.randn(len(length), dim, generator=_randomness(), dtype=gap.dtype) / math.sqrt(dim)
    wave[:3] = 0
    bumps = Bumps(length, wave, torch.arange(len(length), dtype=gap.dtype))

    def identity(gap: Tensor, score: Tensor) -> Tensor:
        u, divergence = bumps.fields(gap)
        return torch.einsum("nkd,nd->nk", u, score) + divergence

    rest = torch.cat([identity(*part) for part in zip(gap.split(CHUNK), score.split(CHUNK), strict=True)])
    errors = float((rest.mean(0) / (rest.std(0) / math.sqrt(len(rest))).clamp_min(1e-30)).abs().max())
    if errors > STANDARD_ERRORS:
        return f"its log_prob breaks Stein's identity by {errors:.0f} standard errors, as where a density jumps"
    return None
