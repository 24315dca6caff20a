"""Stein variational gradient descent against closed forms."""

import math

import pytest
import torch
from cases import draws
from scipy.integrate import solve_ivp

from diffusion.gradient_flow.flows.stein import SteinFlow, direction, median_rule
from diffusion.gradient_flow.functionals import base as module
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.kernels import Function, Gaussian, InverseMultiquadric
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential

PRECISION = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
CENTRE = torch.tensor([0.5, -1.0], dtype=torch.float64)
LINEAR = Function(lambda x, y: x @ y.T + 1)
KERNELS = [Gaussian(0.8), InverseMultiquadric(1.3), LINEAR]
with_kernels = pytest.mark.parametrize("kernel", KERNELS, ids=["gaussian", "multiquadric", "linear"])


def energy(x):
    return 0.5 * ((x - CENTRE) @ PRECISION * (x - CENTRE)).sum(1)


GAUSSIAN = KL(lambda x: -energy(x))


def kernel_value(kernel, x, y):
    squares = (x - y).square().sum()
    if kernel is LINEAR:
        return x @ y + 1
    scaled = squares / kernel.bandwidth**2
    return (-scaled / 2).exp() if isinstance(kernel, Gaussian) else (1 + scaled) ** -0.5


@with_kernels
def test_the_direction_is_its_definition(kernel):
    """(1/N) sum_j k(x_i, x_j) b_j + tau grad_j k(x_i, x_j), the gradient by autograd."""
    x, tau = draws(6, 2, 0), 0.7
    expected = torch.zeros_like(x)
    for i in range(6):
        for j in range(6):
            y = x[j].clone().requires_grad_()
            k = kernel_value(kernel, x[i], y)
            expected[i] += (-k * (PRECISION @ (x[j] - CENTRE)) + tau * torch.autograd.grad(k, y)[0]).detach() / 6
    phi = direction(tau * Entropy() + Potential(energy), x, kernel)
    torch.testing.assert_close(phi, expected, rtol=1e-12, atol=1e-12)
    assert not phi.requires_grad


def test_a_kernel_that_is_a_function_is_derived_in_y():
    x, y = draws(4, 2, 0), draws(5, 2, 1)
    cubic = Function(lambda x, y: (1 + x @ y.T) ** 3)
    expected = 3 * (1 + x @ y.T).square().sum(1, keepdim=True) * x
    torch.testing.assert_close(cubic.slopes_there(x, y), expected, rtol=1e-12, atol=1e-12)
    gaussian = Gaussian(0.8)
    torch.testing.assert_close(Function(gaussian.matrix).slopes_there(x, y), gaussian.slopes_there(x, y))


@with_kernels
def test_without_an_entropy_it_is_the_smoothed_velocity(kernel):
    x = draws(6, 2, 0)
    velocity = Potential(energy).velocity(x)
    gram = torch.stack([torch.stack([kernel_value(kernel, a, b) for b in x]) for a in x])
    torch.testing.assert_close(direction(Potential(energy), x, kernel), gram @ velocity / 6, rtol=1e-12, atol=1e-12)


@with_kernels
def test_it_vanishes_at_exact_draws_as_they_become_many(kernel):
    """Stein's identity: the mean square falls as 1/N, and does not for draws of another law."""
    root = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    sizes = {}
    for number in (100, 1600):
        exact = [CENTRE + draws(number, 2, seed) @ root.T for seed in range(4)]
        sizes[number] = sum(float(direction(GAUSSIAN, x, kernel).square().mean()) for x in exact)
        wrong = sum(float(direction(GAUSSIAN, 1.5 * x, kernel).square().mean()) for x in exact)
    assert sizes[1600] < sizes[100] / 16 * 3
    assert wrong > 10 * sizes[1600]


def rates(m, s):
    """Of mean and covariance under the linear kernel: phi(x) = A x + c."""
    a = torch.eye(2, dtype=torch.float64) - PRECISION @ (s + torch.outer(m - CENTRE, m))
    c = -PRECISION @ (m - CENTRE)
    return a @ m + c, a @ s + s @ a.T


def moments_of(x):
    return x.mean(0), torch.cov(x.T, correction=0)


def test_with_the_linear_kernel_mean_and_covariance_follow_their_equation():
    x = 1.0 + draws(12, 2, 0)

    def right(t, y):
        y = torch.from_numpy(y)
        return torch.cat([part.flatten() for part in rates(y[:2], y[2:].view(2, 2))]).numpy()

    start = torch.cat([part.flatten() for part in moments_of(x)]).numpy()
    exact = torch.from_numpy(solve_ivp(right, (0, 1), start, rtol=1e-10, atol=1e-12).y[:, -1])
    errors = []
    for steps in (100, 200):
        moved = SteinFlow(GAUSSIAN, LINEAR).run(x, steps, 1 / steps)
        errors.append(float((torch.cat([part.flatten() for part in moments_of(moved)]) - exact).norm()))
    assert errors[1] < 0.02 and errors[0] / errors[1] == pytest.approx(2, abs=0.15)


def test_the_divergence_falls_by_the_squared_stein_discrepancy():
    """Between Gaussians, linear kernel: dKL/dt in closed form, and |phi|^2 = |A|_F^2 + |c|^2 in its space."""
    m, s = moments_of(1.0 + 1.5 * draws(12, 2, 0))
    m, s = m.requires_grad_(), s.requires_grad_()
    gap = m - CENTRE
    divergence = 0.5 * (torch.trace(PRECISION @ s) + gap @ PRECISION @ gap - torch.logdet(s))
    in_m, in_s = torch.autograd.grad(divergence, (m, s))
    x = 1.0 + 1.5 * draws(12, 2, 0)
    basis = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    phi = direction(GAUSSIAN, x, LINEAR, at=basis)
    c, a = phi[0], (phi[1:] - phi[0]).T
    slope = in_m @ (a @ m + c) + (in_s * (a @ s + s @ a.T)).sum()
    assert float(slope.detach()) == pytest.approx(-float(a.square().sum() + c.square().sum()), rel=1e-10)


def test_one_particle_ends_in_the_mode():
    moved = SteinFlow(GAUSSIAN).run(draws(1, 2, 0), 400, 0.2)
    torch.testing.assert_close(moved[0], CENTRE, rtol=0, atol=1e-8)


def test_many_particles_end_with_the_moments_of_the_target():
    x = SteinFlow(GAUSSIAN).run(draws(100, 2, 0), 300, 0.5)
    torch.testing.assert_close(x.mean(0), CENTRE, rtol=0, atol=0.02)
    assert float((torch.cov(x.T) @ PRECISION - torch.eye(2)).abs().max()) < 0.15


def test_particles_in_another_order_and_in_chunks_move_the_same(monkeypatch):
    x = draws(30, 4, 0).view(30, 2, 2)
    functional = KL(lambda x: -(x**4).flatten(1).sum(1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    phi = direction(functional, x, Gaussian(1.0))
    assert phi.shape == x.shape
    torch.testing.assert_close(direction(functional, x[order], Gaussian(1.0)), phi[order], rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(module, "CHUNK", 97)
    torch.testing.assert_close(direction(functional, x, Gaussian(1.0)), phi, rtol=1e-10, atol=1e-12)
    single = direction(functional, x.float(), Gaussian(1.0))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), phi, rtol=1e-3, atol=1e-4)


def test_the_bandwidth_is_that_of_the_median_rule():
    x = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert median_rule(x) == pytest.approx(math.sqrt(4 / math.log(3) / 2))
    assert median_rule(torch.zeros(1, 2)) == 1.0
    x = draws(20, 2, 0)
    expected = x + 0.3 * direction(GAUSSIAN, x, Gaussian(median_rule(x)))
    torch.testing.assert_close(SteinFlow(GAUSSIAN).run(x, 1, 0.3), expected)


def test_what_makes_no_kernel_is_refused(user_error):
    with user_error("kernel is str", "expected a Kernel"):
        SteinFlow(GAUSSIAN, "gaussian")
    with user_error("median distance of 5", "bandwidth"):
        SteinFlow(GAUSSIAN).run(torch.zeros(5, 2), 1, 0.1)
