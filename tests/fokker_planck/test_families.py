"""Test functions: derivatives against autograd, orthogonality, and how they adapt."""

import math

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from diffusion.errors import UserError
from diffusion.fokker_planck import test_functions as families


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def points(dim, number=40, seed=1):
    return torch.randn(number, dim, generator=randomness(seed), dtype=torch.float64) * (1 + torch.arange(dim)) + 0.7


FAMILIES = {
    "bumps": lambda x: families.GaussianBumps.adapted(x, 7, randomness()),
    "fourier": lambda x: families.RandomFourier.adapted(x, 7, randomness()),
    "periodic": lambda x: families.RandomFourier.periodic([(-1.0, 2.0)] * x.shape[1], 2),
    "hermite": lambda x: families.HermitePolynomials.adapted(x, 4),
    "together": lambda x: families.Together(
        families.HermitePolynomials.adapted(x, 2), families.GaussianBumps.adapted(x, 3, randomness())
    ),
}


def matrix(kind, dim, number=40):
    if kind == "one":
        a = torch.rand(number, generator=randomness(3), dtype=torch.float64)
        return a, a[:, None, None] * torch.eye(dim)
    if kind == "diagonal":
        a = torch.rand(number, dim, generator=randomness(3), dtype=torch.float64)
        return a, torch.diag_embed(a)
    a = torch.randn(number, dim, dim, generator=randomness(3), dtype=torch.float64)
    return a, a


@pytest.mark.parametrize("kind", ["one", "diagonal", "full"])
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_term_is_that_of_autograd(family, dim, kind):
    x = points(dim)
    phi = FAMILIES[family](x)
    v, (a, full) = torch.randn(x.shape, generator=randomness(2), dtype=torch.float64), matrix(kind, dim)

    def one(row):
        return phi.value(row[None])[0]

    grad = torch.func.vmap(torch.func.jacrev(one))(x)
    hess = torch.func.vmap(torch.func.hessian(one))(x)
    slope, curvature = (grad * v[:, None]).sum(2), torch.einsum("nij,nkij->nk", full, hess) / 2
    assert phi.value(x).shape == (40, phi.number)
    assert float((phi.slope(x, v) - slope).abs().max()) < 1e-10 * float(slope.abs().max())
    assert float((phi.curvature(x, a) - curvature).abs().max()) < 1e-10 * float(curvature.abs().max())
    assert torch.allclose(phi.rate(x, v, a), slope + curvature, rtol=1e-10, atol=1e-10)


def test_the_values_are_those_of_the_formulas():
    x = points(2)
    bumps, fourier = FAMILIES["bumps"](x), FAMILIES["fourier"](x)
    y = (x - x.mean(0)) / x.std(0)
    gaps = y[:, None] - bumps.centres
    assert torch.allclose(bumps.value(x), (-gaps.square().sum(2) / (2 * bumps.width**2)).exp(), atol=1e-14)
    assert torch.allclose(fourier.value(x), (y @ fourier.wave.T + fourier.phase).cos(), atol=1e-14)


def test_hermite_polynomials_are_all_of_their_degree_and_orthonormal():
    nodes, weights = (torch.from_numpy(v) for v in hermegauss(12))
    grid = torch.cartesian_prod(nodes, nodes, nodes)
    weight = torch.cartesian_prod(weights, weights, weights).prod(1) / math.tau**1.5
    phi = families.HermitePolynomials(torch.zeros(3).double(), torch.ones(3).double(), 4)
    value = phi.value(grid)
    assert phi.number == math.comb(3 + 4, 4) - 1
    assert float((weight @ value).abs().max()) < 1e-12
    assert torch.allclose(value.T @ (weight[:, None] * value), torch.eye(phi.number).double(), atol=1e-11)


def test_a_polynomial_of_one_coordinate_needs_no_other_order():
    phi = families.HermitePolynomials(torch.zeros(1).double(), torch.ones(1).double(), 3)
    x = points(1)
    he = torch.cat([x, (x**2 - 1) / math.sqrt(2), (x**3 - 3 * x) / math.sqrt(6)], 1)
    assert torch.allclose(phi.value(x), he)


def test_periodic_waves_are_distinct_and_repeat_with_the_box():
    phi, x = families.RandomFourier.periodic([(0.0, math.tau), (-1.0, 1.0)], 2), points(2)
    assert phi.number == 2 * 6
    assert torch.allclose(phi.value(x + torch.tensor([math.tau, -2.0], dtype=torch.float64)), phi.value(x))
    even = torch.cartesian_prod(torch.arange(16).double() * math.tau / 16, torch.arange(16).double() / 8 - 1)
    value = phi.value(even)
    assert torch.allclose(value.T @ value / len(even), torch.eye(12).double() / 2, atol=1e-12)


@pytest.mark.parametrize("family", ["bumps", "fourier", "hermite"])
def test_adapted_families_move_and_stretch_with_the_samples(family):
    x = points(3)
    there = x * torch.tensor([10.0, 0.1, 3.0]) + torch.tensor([5.0, -1.0, 100.0])
    assert torch.allclose(FAMILIES[family](there).value(there), FAMILIES[family](x).value(x), atol=1e-9)
    parts = FAMILIES[family]([x[:10], x[10:]])
    assert torch.equal(parts.value(x), FAMILIES[family](x).value(x))


@pytest.mark.parametrize("family", ["bumps", "fourier"])
def test_functions_vary_in_many_dimensions(family):
    x = points(50, 2000)
    value = FAMILIES[family](x).value(x)
    assert float(value.std(0).min()) > 0.01
    assert float(value.abs().mean()) > 0.05


def test_draws_come_from_the_generator_alone():
    x = points(2)
    first, second = (families.RandomFourier.adapted(x, 5, randomness(4)) for _ in range(2))
    assert torch.equal(first.wave, second.wave) and torch.equal(first.phase, second.phase)
    assert not torch.equal(first.wave, families.RandomFourier.adapted(x, 5, randomness(5)).wave)


def test_waves_have_the_lengths_that_were_asked_for():
    length = families.RandomFourier.adapted(points(3), 500, randomness(), 0.5, 4.0).wave.norm(dim=1)
    assert 0.5 <= float(length.min()) < 0.6 and 3.6 < float(length.max()) <= 4.0


def test_a_coordinate_that_never_changes_is_no_obstacle():
    x = points(2)
    x[:, 1] = 3.0
    assert bool(FAMILIES["fourier"](x).value(x).isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: families.HermitePolynomials.adapted(points(2), 0), "degree is 0"),
        (lambda: families.RandomFourier.adapted(points(2), 0, randomness()), "number=0"),
        (lambda: families.RandomFourier.adapted(points(2), 3, randomness(), 2.0, 1.0), "longest=1.0"),
        (lambda: families.GaussianBumps.adapted(points(2), 0, randomness()), "is 0"),
        (lambda: families.HermitePolynomials.adapted(torch.tensor([1.0, 2.0]), 2), r"\(2,\)"),
        (lambda: families.HermitePolynomials.adapted(points(2) * math.nan, 2), "finite"),
        (lambda: FAMILIES["fourier"](points(2)).value(points(3)), r"\(40, 3\), expected \(N, 2\)"),
        (
            lambda: families.RandomFourier(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.ones(1, 2), torch.ones(1)),
            "le",
        ),
        (lambda: families.GaussianBumps(torch.zeros(2), torch.ones(2), torch.ones(3, 1), torch.ones(3)), r"\(K, 2\)"),
        (lambda: families.RandomFourier(torch.zeros(2), torch.ones(2), torch.ones(3, 2), torch.ones(2)), r"\(K, 2\)"),
    ],
    ids=["degree", "number", "lengths", "bumps", "shape", "finite", "dimension", "scale", "centres", "waves"],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
