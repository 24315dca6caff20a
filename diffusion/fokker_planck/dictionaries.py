"""Dictionaries for the inverse problem: terms of a drift f, and of a rate of covariance a = g g^T."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError


@dataclass(frozen=True)
class Term:
    """One function of a dictionary, with the name under which it is reported.

    Args:
        function: (x (B, d), t) -> (B, d) for a drift; (B,), (B, d) or (B, d, d) for a covariance.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


def named(terms, kind: str) -> list[Term]:
    """Terms as they are, and other functions as terms called kind[0], kind[1], ..."""
    if not isinstance(terms, Sequence) or not all(map(callable, terms)):
        raise UserError(f"the {kind} is {terms!r}, expected a list of functions of (x, t)")
    return [term if isinstance(term, Term) else Term(f"{kind}[{i}]", term) for i, term in enumerate(terms)]


def _monomials(dim: int, degree: int) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """All products of up to `degree` coordinates, and their names: x1^2 x2."""
    found = []
    for total in range(degree + 1):
        for chosen in itertools.combinations_with_replacement(range(dim), total):
            powers = Counter(chosen)
            parts = [f"x{i + 1}" + (f"^{n}" if n > 1 else "") for i, n in powers.items()]

            def value(x: Tensor, powers=powers) -> Tensor:
                product = torch.ones_like(x[:, 0])
                for i, n in powers.items():
                    product = product * x[:, i] ** n
                return product

            found.append((" ".join(parts) or "1", value))
    return found


def polynomial_drift(dim: int, degree: int) -> list[Term]:
    """Every monomial up to a total degree, in each component."""

    def term(name: str, value, i: int) -> Term:
        unit = torch.zeros(dim)
        unit[i] = 1
        return Term(f"f{i + 1}: {name}", lambda x, t: value(x)[:, None] * unit.to(x))

    return [term(name, value, i) for i in range(dim) for name, value in _monomials(dim, degree)]


def isotropic_covariance(dim: int, degree: int = 0) -> list[Term]:
    """Every monomial up to a total degree, times the unit matrix."""
    return [Term(f"a: {name}", lambda x, t, value=value: value(x)) for name, value in _monomials(dim, degree)]


def full_covariance(dim: int, degree: int = 0) -> list[Term]:
    """Every monomial up to a total degree, in each element of a symmetric matrix."""

    def term(name: str, value, i: int, j: int) -> Term:
        unit = torch.zeros(dim, dim)
        unit[i, j] = unit[j, i] = 1
        return Term(f"a{i + 1}{j + 1}: {name}", lambda x, t: value(x)[:, None, None] * unit.to(x))

    pairs = itertools.combinations_with_replacement(range(dim), 2)
    return [term(name, value, i, j) for i, j in pairs for name, value in _monomials(dim, degree)]
