"""Selling's decomposition: a positive matrix as a sum of rho e e^T, with whole-number vectors e and rho >= 0.

It turns diffusion in any direction into jumps between points of a grid (Selling 1874; Fehrenbach & Mirebeau 2014,
arXiv 1301.3925). In 2 dimensions there are 3 vectors, in 3 there are 6; rho is a continuous function of the matrix.
"""

import itertools

import torch
from torch import Tensor

MOST_FLIPS = 10_000


def selling(matrices: Tensor) -> dict[tuple[int, ...], Tensor]:
    """rho (N,) for each vector e that occurs, for positive definite `matrices` (N, d, d) with d = 2 or 3.

    Of e and -e, that whose first non-zero number is positive stands for both.
    """
    number, dim = matrices.shape[:2]
    eye = torch.eye(dim, dtype=matrices.dtype, device=matrices.device)
    base = torch.cat([eye, -eye.sum(0, keepdim=True)]).repeat(number, 1, 1)
    pairs = list(itertools.combinations(range(dim + 1), 2))
    for _ in range(MOST_FLIPS):
        gram = base @ matrices @ base.mT
        products = torch.stack([gram[:, i, j] for i, j in pairs], 1)
        scale = gram.diagonal(dim1=1, dim2=2).amax(1)
        worst, which = products.max(1)
        flip = worst > 1e-14 * scale
        if not bool(flip.any()):
            break
        for number_of_pair, (i, j) in enumerate(pairs):
            here = flip & (which == number_of_pair)
            others = [k for k in range(dim + 1) if k not in (i, j)]
            u, v = base[here, i], base[here, j]
            flipped = base[here].clone()
            flipped[:, i] = -u
            flipped[:, j] = v
            if dim == 2:
                flipped[:, others[0]] = u - v
            else:
                for k in others:
                    flipped[:, k] = flipped[:, k] + u
            base[here] = flipped
    weights: dict[tuple[int, ...], Tensor] = {}
    for number_of_pair, (i, j) in enumerate(pairs):
        others = [k for k in range(dim + 1) if k not in (i, j)]
        vectors = _across(base, others)
        rho = (-products[:, number_of_pair]).clamp_min(0)
        for vector in vectors.unique(dim=0):
            e = tuple(int(v) for v in vector.tolist())
            part = torch.where((vectors == vector).all(1), rho, 0.0)
            if bool((part > 0).any()):
                weights[e] = weights[e] + part if e in weights else part
    return weights


def _across(base: Tensor, others: list[int]) -> Tensor:
    """The whole-number vectors (N, d) at right angles to the others of the superbase, with their sign fixed."""
    if base.shape[2] == 2:
        u = base[:, others[0]]
        vectors = torch.stack([-u[:, 1], u[:, 0]], 1)
    else:
        vectors = torch.linalg.cross(base[:, others[0]], base[:, others[1]])
    vectors = vectors.round()
    first = vectors.gather(1, (vectors != 0).int().argmax(1, keepdim=True))
    return vectors * first.sign()
