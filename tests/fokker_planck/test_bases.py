"""Bases of test functions: orthonormal, with an exact quadrature and exact derivatives."""

import math

import numpy as np
import pytest
import torch
from scipy.special import eval_hermitenorm, eval_legendre, factorial

from diffusion.errors import UserError
from diffusion.fokker_planck.bases import Fourier, Hermite, Legendre
from diffusion.fokker_planck.laws import gaussian
from diffusion.fokker_planck.products import Product, along, hyperbolic_cross, total_degree

BASES = {
    "hermite": lambda n: Hermite(n, 0.4, 0.7),
    "legendre": lambda n: Legendre(n, -1.0, 3.0),
    "fourier": lambda n: Fourier(n, -1.0, 3.0),
}


@pytest.fixture(params=sorted(BASES))
def make(request):
    return BASES[request.param]


def closed_form(basis, x: np.ndarray, k: int) -> np.ndarray:
    if isinstance(basis, Hermite):
        z = (x - 0.4) / 0.7
        weight = np.exp(-z * z / 4) / math.sqrt(math.sqrt(math.tau) * 0.7)
        return weight * eval_hermitenorm(k, z) / math.sqrt(factorial(k))
    if isinstance(basis, Legendre):
        return eval_legendre(k, (x - 1) / 2) * math.sqrt((2 * k + 1) / 4)
    angle = (k + 1) // 2 * math.tau * (x - 1) / 4
    return 0.5 * np.ones_like(x) if k == 0 else (np.cos(angle) if k % 2 else np.sin(angle)) / math.sqrt(2)


@pytest.mark.parametrize("order", [1, 2, 9, 129])
def test_modes_are_orthogonal(make, order):
    basis = make(order + (1 - order % 2) * isinstance(make(1), Fourier))
    rule = basis.rule()
    eye = torch.eye(basis.order, dtype=torch.float64)
    torch.testing.assert_close(rule.modes.mT @ rule.modes, eye, rtol=0, atol=1e-13)
    values = basis.functions(rule.nodes) * rule.roots[:, None]
    torch.testing.assert_close(values, rule.modes, rtol=0, atol=1e-12)
    assert (rule.nodes.diff() > 0).all()
    assert len(basis.degrees) == basis.order


def test_functions_are_those_of_the_books(make):
    basis, x = make(15), torch.linspace(-0.9, 2.8, 41, dtype=torch.float64)
    expected = np.stack([closed_form(basis, x.numpy(), k) for k in range(15)], 1)
    np.testing.assert_allclose(basis.functions(x).numpy(), expected, rtol=0, atol=1e-12)


def test_derivatives_are_exact(make):
    basis = make(33)
    rule, x = basis.rule(), basis.rule().nodes.clone().requires_grad_()
    for k in (0, 7, 20, 31):
        values = basis.functions(x)[:, k]
        slope = torch.autograd.grad(values.sum(), x)[0]
        found = rule.derivative @ (values.detach() * rule.roots) / rule.roots
        torch.testing.assert_close(found, slope, rtol=0, atol=1e-11 * float(slope.abs().max() + 1))


def test_tilt_slopes_are_gradients_and_one_is_in_the_span(make):
    basis = make(9)
    x = basis.rule().nodes.clone().requires_grad_()
    slope = torch.autograd.grad((basis.log_tilt(x) + 0 * x).sum(), x)[0]
    torch.testing.assert_close(basis.tilt_slope(x.detach()), slope)
    ratio = basis.functions(x.detach())[:, 0] / basis.log_tilt(x.detach()).exp()
    torch.testing.assert_close(ratio, ratio[:1].expand(9), rtol=1e-13, atol=0)


@pytest.mark.parametrize("degree", [0, 6, 17])
def test_quadrature_of_polynomials(degree):
    legendre = Legendre(9, -1.0, 3.0).rule()
    exact = (3.0 ** (degree + 1) - (-1.0) ** (degree + 1)) / (degree + 1)
    assert float(legendre.roots.square() @ legendre.nodes**degree) == pytest.approx(exact, rel=1e-13)
    basis = Hermite(9, 0.0, 1.0)
    rule = basis.rule()
    moment = float((rule.roots * basis.log_tilt(rule.nodes).exp()).square() @ rule.nodes**degree)
    expected = 0.0 if degree % 2 else float(np.prod(np.arange(degree - 1, 0, -2.0)))
    assert moment == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_domains():
    points = torch.tensor([-9.0, 0.0, 3.5])
    assert Legendre(5, -1.0, 3.0).holds(points).tolist() == [False, True, False]
    assert Hermite(5).holds(points).all()
    assert Fourier(5, -1.0, 3.0).holds(points).all()
    wrapped = Fourier(5, -1.0, 3.0).functions(torch.tensor([0.3, 4.3], dtype=torch.float64))
    torch.testing.assert_close(wrapped[0], wrapped[1])


def test_hermite_adapts_to_samples_and_laws():
    samples = torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    first, second = Hermite.adapted(7, samples)
    assert (first.order, first.middle, second.middle) == (7, 1.0, 3.0)
    assert second.scale == pytest.approx(8**0.5)
    (basis,) = Hermite.adapted(7, gaussian(2.0, 0.3))
    assert (basis.middle, basis.scale) == (2.0, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("build", "figure"),
    [
        (lambda: Hermite(0), "0"),
        (lambda: Hermite(700), "700"),
        (lambda: Hermite(8, 0.0, -1.0), "-1.0"),
        (lambda: Legendre(8, 1.0, 1.0), "1.0"),
        (lambda: Fourier(8, 0.0, 1.0), "9"),
        (lambda: Fourier(9, 0.0, math.inf), "inf"),
        (lambda: Hermite.adapted(8, torch.zeros(3)), r"\(3,\)"),
        (lambda: Product([]), "bases"),
        (lambda: Product([Hermite(4)], torch.ones(3, dtype=torch.bool)), r"\(3,\)"),
        (lambda: Product([Hermite(4)], torch.zeros(4, dtype=torch.bool)), "first mode"),
    ],
    ids=["none", "many", "scale", "interval", "even", "infinite", "samples", "no-bases", "mask", "mask-mass"],
)
def test_bad_bases_are_refused(build, figure):
    with pytest.raises(UserError, match=figure):
        build()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_products_along_an_axis(axis):
    values = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(6, 3 + axis, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.tensordot(values, matrix, ([axis + 1], [1])).movedim(-1, axis + 1)
    torch.testing.assert_close(along(matrix, values, axis), expected)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_product_evaluates_what_its_nodes_hold(dim):
    bases = [Hermite(4, 0.1, 0.8), Legendre(5, -1.0, 2.0), Fourier(3, -1.0, 1.0)][:dim]
    product = Product(bases)
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(product.shape, dtype=torch.float64, generator=generator)
    at_nodes = product.from_modes(coefficients[None]).reshape(-1) / product.roots
    torch.testing.assert_close(product.evaluate(coefficients, product.points), at_nodes)
    back = product.coefficients(product.state(product.from_modes(coefficients[None])))
    torch.testing.assert_close(back[0], coefficients)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_moments_are_means_and_standard_errors(dim):
    bases = [Hermite(4, 0.1, 0.8), Legendre(5, -1.0, 2.0), Fourier(3, -1.0, 1.0)][:dim]
    product = Product(bases)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, dim, dtype=torch.float64, generator=generator)
    weights = torch.rand(50, dtype=torch.float64, generator=generator)
    means, errors = product.moments(x, weights)
    index = tuple(size - 1 for size in product.shape)
    unit = torch.zeros(product.shape, dtype=torch.float64)
    unit[index] = 1
    terms = weights * product.evaluate(unit, x)
    assert float(means[index]) == pytest.approx(float(terms.mean()))
    assert float(errors[index]) == pytest.approx(float(terms.std()) / 50**0.5)


def test_sparse_products_count_their_modes():
    bases = [Hermite(9), Legendre(9, 0.0, 1.0)]
    assert int(total_degree(bases).sum()) == 45  # 9 * 10 / 2
    cross = hyperbolic_cross(bases)
    assert int(cross.sum()) == sum(9 // k for k in range(1, 10))
    assert cross[0].all() and cross[:, 0].all() and not cross[4, 4]
    waves = total_degree([Fourier(9, 0.0, 1.0)] * 2)
    assert waves[8, 0] and waves[3, 4] and not waves[8, 1]
