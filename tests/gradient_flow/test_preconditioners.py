"""Preconditioned Langevin dynamics: the covariance of the particles, and what is refused."""

import pytest
import torch
from cases import draws
from torch import Tensor

from diffusion.gradient_flow.flows.base import Moment
from diffusion.gradient_flow.flows.langevin import Langevin
from diffusion.gradient_flow.flows.metropolis import Metropolis
from diffusion.gradient_flow.flows.overdamped import EulerMaruyama, LeimkuhlerMatthews, StochasticHeun, ThirdOrder
from diffusion.gradient_flow.flows.preconditioners import EnsembleCovariance, Matrix
from diffusion.gradient_flow.flows.underdamped import Underdamped
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential


def name(value) -> str:
    return type(value).__name__


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logistic(x: Tensor) -> Tensor:
    return -(x + 2 * torch.nn.functional.softplus(-x)).sum(1)


def test_the_covariance_of_the_particles_makes_steps_affine_invariant():
    """x -> A x of start and target takes the run with it; A is lower triangular, so that the roots go with it too."""
    a = torch.tensor([[3.0, 0.0], [-1.0, 0.01]], dtype=torch.float64)
    inverse, shift, x = torch.linalg.inv(a), torch.tensor([5.0, -2.0], dtype=torch.float64), draws(30, 2, 11)
    before = Langevin(KL(logistic), EulerMaruyama(), EnsembleCovariance())
    after = Langevin(KL(lambda y: logistic((y - shift) @ inverse.T)), EulerMaruyama(), EnsembleCovariance())
    expected = before.run(x, 30, 0.05, seeded(12)) @ a.T + shift
    torch.testing.assert_close(after.run(x @ a.T + shift, 30, 0.05, seeded(12)), expected, rtol=1e-8, atol=1e-8)


def test_few_particles_with_their_own_covariance_have_the_right_law():
    """8 in 2 dimensions, over a long time: without div P they come out a third too narrow."""
    flow = Langevin(KL(torch.neg), EulerMaruyama(), EnsembleCovariance())
    generator, squares = seeded(13), []
    for moment in flow.moments(draws(8, 2, 14), 5000, 0.03, generator):
        if moment.step > 500:
            squares.append(float(moment.particles.square().mean()))
    assert sum(squares) / len(squares) == pytest.approx(1, abs=0.12)


def test_a_step_with_the_particles_covariance_has_its_divergence():
    """Against the derivative of the covariance of 6 particles in the coordinates of each; without noise."""

    def covariance(x):
        return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)

    x, h, temperature = draws(6, 3, 15), 0.1, 0.7
    jacobian = torch.autograd.functional.jacobian(covariance, x)
    expected = x + h * (-x @ covariance(x) + temperature * torch.einsum("abib->ia", jacobian))
    functional = temperature * Entropy() + Potential(lambda x: x.square().sum(1) / 2)
    flow = Langevin(functional, EulerMaruyama(), EnsembleCovariance())
    torch.testing.assert_close(flow.stepped(Moment(x, functional), h, torch.zeros_like, None).particles, expected)


def test_too_few_particles_for_their_covariance_are_refused(user_error):
    with user_error("3 particles in 2 coordinates", "more than 3"):
        Langevin(KL(logistic), EulerMaruyama(), EnsembleCovariance()).run(draws(3, 2, 0), 1, 0.1)


@pytest.mark.parametrize(
    "integrator", [LeimkuhlerMatthews(), StochasticHeun(), ThirdOrder(), Metropolis(), Underdamped()], ids=name
)
def test_a_moving_preconditioner_is_for_the_plain_scheme(integrator, user_error):
    with user_error(name(integrator), "EnsembleCovariance", "take EulerMaruyama"):
        Langevin(KL(logistic), integrator, EnsembleCovariance())


@pytest.mark.parametrize(
    "matrix, text",
    [
        (torch.tensor([1.0, -1.0]), "lowest eigenvalue -1"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric positive"),
        (torch.ones(2, 3), "shape (2, 3)"),
        (torch.ones(2, dtype=torch.int64), "torch.int64"),
    ],
    ids=["negative", "skewed", "oblong", "integers"],
)
def test_bad_preconditioners_are_refused(matrix, text, user_error):
    with user_error(text):
        Matrix(matrix)


def test_a_preconditioner_of_another_dimension_is_refused(user_error):
    with user_error("d=2", "expected 3"):
        Langevin(KL(logistic), preconditioner=Matrix(torch.ones(2))).run(draws(4, 3, 0), 1, 0.1)
