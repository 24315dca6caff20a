"""Maximum mean discrepancies and kernels against sums written out."""

import math

import pytest
import torch
from cases import draws

from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.kernels import Gaussian, InverseMultiquadric, Riesz, kernel_of, median_distance
from diffusion.gradient_flow.functionals.mmd import MMD

KERNELS = {
    "gaussian": (Gaussian(0.7), lambda r: math.exp(-(r**2) / (2 * 0.49))),
    "multiquadric": (InverseMultiquadric(0.7), lambda r: 1 / math.sqrt(1 + r**2 / 0.49)),
    "riesz": (Riesz(0.5), lambda r: -math.sqrt(r)),
    "several": (Gaussian(2.0, (0.5, 1.0)), lambda r: math.exp(-(r**2) / 2) + math.exp(-(r**2) / 8)),
}
every = pytest.mark.parametrize("name", KERNELS)


@every
def test_kernels_are_their_formulas(name):
    kernel, formula = KERNELS[name]
    x, y = draws(4, 3, 0), draws(5, 3, 1)
    expected = torch.tensor([[formula(math.dist(a, b)) for b in y.tolist()] for a in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(kernel.matrix(x, y), expected, rtol=1e-12, atol=0)


@every
def test_slopes_are_those_of_autograd(name):
    kernel, x, y = KERNELS[name][0], draws(4, 3, 0).requires_grad_(), draws(5, 3, 1)
    (expected,) = torch.autograd.grad(kernel.matrix(x, y).sum(), x)
    torch.testing.assert_close(kernel.slopes(x.detach(), y), expected)
    own = kernel_of(lambda x, y: kernel.matrix(x, y)).slopes(x.detach(), y)
    torch.testing.assert_close(own, expected)


@every
def test_the_value_is_the_sum_over_all_pairs(name):
    kernel, formula = KERNELS[name]
    x, y = draws(4, 3, 0), draws(5, 3, 1)

    def mean(a, b):
        return sum(formula(math.dist(p, q)) for p in a.tolist() for q in b.tolist()) / (len(a) * len(b))

    expected = mean(x, x) - 2 * mean(x, y) + mean(y, y)
    assert float(MMD(kernel, y).value(x)) == pytest.approx(expected, rel=1e-10)


def test_riesz_of_power_one_is_the_energy_distance():
    x, y = draws(30, 1, 0) + 0.5, draws(20, 1, 1)
    riesz, energy = MMD(Riesz(1.0), y), EnergyDistance(y)
    assert float(riesz.value(x)) == pytest.approx(float(energy.value(x)), rel=1e-10)
    torch.testing.assert_close(riesz.velocity(x), energy.velocity(x))


@pytest.mark.parametrize("power", [0.4, 1.0, 1.9])
def test_riesz_points_in_one_place_do_not_push(power):
    data = draws(30, 3, 0).repeat(2, 1).float()
    velocity = MMD(Riesz(power), data).velocity(data)
    assert bool(velocity.isfinite().all()) and float(velocity.abs().max()) < 1e-6
    x = data.double().requires_grad_()
    (gradient,) = torch.autograd.grad(MMD(Riesz(power), draws(5, 3, 1)).value(x), x)
    assert bool(gradient.isfinite().all())


def test_the_default_is_a_gaussian_as_wide_as_the_median_of_the_data():
    x, y = draws(30, 3, 0) + 0.5, draws(21, 3, 1)
    median = float(torch.nn.functional.pdist(y).median())
    assert median_distance(y) == pytest.approx(median)
    torch.testing.assert_close(MMD(data=y).velocity(x), MMD(Gaussian(median), y).velocity(x))


def test_bad_values_are_refused(user_error):
    data = draws(5, 2, 0)
    with user_error("bandwidth is 0", "positive"):
        Gaussian(0)
    with user_error("scales are ()", "one a kernel"):
        Gaussian(1.0, ())
    with user_error("power is 2", "between 0 and 2"):
        Riesz(2)
    with user_error("the kernel is str", "a Kernel or a function"):
        MMD("gaussian", data)
    with user_error("data is NoneType"):
        MMD(Gaussian(1.0))
    with user_error("median distance of 5 data points is 0.0", "bandwidth"):
        MMD(data=torch.zeros(5, 2))
    with user_error("the kernel returned (5,)", "(5, 5)"):
        MMD(lambda x, y: x.sum(1), data).velocity(data)
    with user_error("no bandwidth"):
        Gaussian().matrix(data, data)
    with user_error("no derivative in x"):
        MMD(lambda x, y: (x @ y.T).detach(), data).velocity(data)
