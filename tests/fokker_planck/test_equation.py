"""The equation: conventions of its functions, closed forms, messages, and the probability flow against densities."""

import math

import numpy as np
import pytest
import torch

from diffusion.errors import UserError
from diffusion.fokker_planck import FokkerPlanck, problems
from diffusion.fokker_planck.equation import act

DOUBLE = torch.float64


@pytest.fixture
def points():
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def root(x):
    """A full matrix g(x) (B, 3, 3)."""
    g = 0.2 * x[:, :, None] * x[:, None].sin()
    return g + torch.eye(3, dtype=x.dtype) * (1 + x[:, :1, None] ** 2)


def test_act(points):
    matrix = root(points)
    assert torch.equal(act(points[:, 0], points), points[:, :1] * points)
    assert torch.equal(act(points, points), points**2)
    assert torch.allclose(act(matrix, points), torch.einsum("bij,bj->bi", matrix, points), rtol=1e-14)


@pytest.mark.parametrize("number", [1, 3, 7])
@pytest.mark.parametrize(
    ("drift", "diffusion"),
    [
        (lambda x, t: -t[:, None] * x, lambda x, t: t),
        (lambda x, t: -t * x, lambda x, t: t),
        (lambda x, t: -t * x, lambda x, t: t.expand(len(x))),
        (lambda x, t: -t[:, None] * x, lambda x, t: t[:, None].expand_as(x)),
    ],
    ids=["times", "number", "mixed", "columns"],
)
def test_time_as_a_number_or_for_each_point(points, number, drift, diffusion):
    """Also where the number of points is the dimension, so that shapes alone would not tell."""
    equation, x = FokkerPlanck(drift, diffusion), points[:number]
    assert torch.equal(equation.drift(x, 0.5), -0.5 * x)
    g = equation.diffusion(x, torch.tensor(0.5))
    assert g.shape in ((number,), (number, 3))
    assert bool((g == 0.5).all())


@pytest.mark.parametrize("t", [2, np.float32(2), np.array(2.0), np.array([2.0]), torch.tensor([2])], ids=repr)
def test_times_of_every_kind(points, t):
    for drift in (lambda x, t: -t * x, lambda x, t: -t[:, None] * x):
        assert torch.equal(FokkerPlanck(drift, 1.0).drift(points, t), -2 * points)


def test_constant_diffusion(points):
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: 2.0)
    assert torch.equal(equation.covariance(points, 0.0), torch.full((7,), 4.0, dtype=DOUBLE))
    assert torch.equal(equation.covariance_divergence(points, 0.0), torch.zeros_like(points))


def test_covariance(points):
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: root(x))
    g = root(points)
    assert torch.allclose(equation.covariance(points, 0.0), torch.einsum("bik,bjk->bij", g, g), rtol=1e-13)


def product_root(x):
    """g = u 1^T / sqrt(3) with u = (x_1, x_2, 0), so that a = u u^T."""
    return (x * torch.tensor([1.0, 1.0, 0.0]).to(x))[:, :, None].expand(-1, 3, 3) / math.sqrt(3)


CLOSED = {
    "isotropic": (
        lambda x, t: x[:, 0] * x[:, 1],
        lambda x: 2 * (x[:, 0] * x[:, 1])[:, None] * x[:, [1, 0, 2]] * torch.tensor([1.0, 1.0, 0.0]).to(x),
    ),
    "diagonal": (lambda x, t: x.sin(), lambda x: (2 * x).sin()),
    "diagonal_of_others": (lambda x, t: x.roll(1, 1), torch.zeros_like),
    "matrix": (lambda x, t: product_root(x), lambda x: 3 * x * torch.tensor([1.0, 1.0, 0.0]).to(x)),
}


@pytest.mark.parametrize("form", CLOSED)
def test_covariance_divergence_in_closed_form(points, form):
    """(div a)_i = sum_j d_j a_ij."""
    diffusion, wanted = CLOSED[form]
    equation = FokkerPlanck(lambda x, t: -x, diffusion)
    assert torch.allclose(equation.covariance_divergence(points, 0.0), wanted(points), atol=1e-13)


def test_covariance_divergence_by_autograd(points):
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: root(x))
    for x, got in zip(points, equation.covariance_divergence(points, 0.0), strict=True):
        slope = torch.autograd.functional.jacobian(lambda x: (root(x[None]) @ root(x[None]).mT)[0], x)  # d_k a_ij
        assert torch.allclose(got, torch.einsum("ijj->i", slope), rtol=1e-12)


def test_velocity(points):
    equation = FokkerPlanck(lambda x, t: -x, lambda x, t: root(x))
    score = points.cos()
    a, turning = equation.covariance(points, 0.0), equation.covariance_divergence(points, 0.0)
    wanted = -points - turning / 2 - torch.einsum("bij,bj->bi", a, score) / 2
    assert torch.allclose(equation.velocity(points, 0.0, score), wanted, rtol=1e-13)


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "matrix"])
def test_from_covariance(points, form):
    a = {"isotropic": points[:, 0] ** 2, "diagonal": points**2, "matrix": root(points) @ root(points).mT}[form]
    equation = FokkerPlanck.from_covariance(lambda x, t: -x, lambda x, t: _like(a, x))
    assert torch.allclose(equation.covariance(points, 0.0), a, rtol=1e-12, atol=1e-12)


def test_from_singular_covariance(points):
    """Positive semi-definite is enough, and rounding below 0 is no error."""
    u = points[:, :, None]
    equation = FokkerPlanck.from_covariance(lambda x, t: -x, lambda x, t: _like(u @ u.mT, x))
    assert torch.allclose(equation.covariance(points, 0.0), u @ u.mT, atol=1e-7)


def _like(values, x):
    """Values for the points themselves, and the first of them for the points of a probe."""
    return values if len(x) == len(values) else values[:1].expand(len(x), *values.shape[1:])


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (lambda x, t: torch.full_like(x[:, 0], -0.5), "-0.5"),
        (lambda x, t: torch.full_like(x, -0.25), "-0.25"),
        (lambda x, t: torch.tensor([1.0, 2.0, -0.125]).diag().expand(len(x), 3, 3), "eigenvalue -0.125 at x="),
        (lambda x, t: torch.ones(3, 3).triu().expand(len(x), 3, 3), "not symmetric: it differs by 1"),
    ],
    ids=["isotropic", "diagonal", "matrix", "unsymmetric"],
)
def test_covariances_that_are_none(points, covariance, words):
    equation = FokkerPlanck.from_covariance(lambda x, t: -x, covariance)
    with pytest.raises(UserError, match=words):
        equation.covariance(points, 0.0)


@pytest.mark.parametrize(
    ("drift", "diffusion", "words"),
    [
        (lambda x, t: x[:, 0], lambda x, t: 1.0, r"drift\(x, t\) gives shape \(5,\) for x \(5, 3\), expected \(5, 3\)"),
        (lambda x, t: -x.T, lambda x, t: 1.0, r"drift\(x, t\) gives shape \(3, 5\)"),
        (lambda x, t: 3.0, lambda x, t: 1.0, r"drift\(x, t\) gives float 3.0"),
        (lambda x, t: x @ torch.ones(2, 2).to(x), lambda x, t: 1.0, r"drift\(x, t\) fails for x \(5, 3\)"),
        (lambda x, t: -x, lambda x, t: x[:, :2], r"diffusion\(x, t\) gives shape \(5, 2\)"),
        (lambda x, t: -x, lambda x, t: torch.eye(3), r"\(5,\) or \(5, 3\) or \(5, 3, 3\)"),
        (lambda x, t: -x, lambda x, t: None, r"diffusion\(x, t\) gives NoneType None"),
        (lambda x, t: x / 0, lambda x, t: 1.0, r"drift\(x, t\) is not finite at x="),
        (lambda x, t: 1j * x, lambda x, t: 1.0, r"drift\(x, t\) gives torch.complex\d+, expected real numbers"),
        (lambda x, t: -x, lambda x, t: math.nan, r"diffusion\(x, t\) is not finite at x="),
    ],
    ids=["flat", "turned", "number", "fails", "narrow", "one_matrix", "none", "infinite", "complex", "nan"],
)
def test_functions_of_the_wrong_kind(points, drift, diffusion, words):
    equation = FokkerPlanck(drift, diffusion)
    with pytest.raises(UserError, match=words):
        equation.velocity(points, 0.0, points)


def test_points_of_the_wrong_shape():
    with pytest.raises(UserError, match=r"points have shape \(4,\) .* expected \(B, d\)"):
        FokkerPlanck(lambda x, t: -x, lambda x, t: 1.0).drift(torch.zeros(4), 0.0)


def test_not_finite_names_the_point(points):
    equation = FokkerPlanck(lambda x, t: torch.where(x[:, :1] == points[4, 0], math.inf, -x), lambda x, t: 1.0)
    with pytest.raises(UserError, match=f"x=.{float(points[4, 0])}"):
        equation.drift(points, 0.0)


FLOWS = {
    "ornstein_uhlenbeck": lambda: problems.ornstein_uhlenbeck(2, turn=1.5),
    "variance_preserving": lambda: problems.variance_preserving(dim=2, high=4.0),
    "variance_exploding": lambda: problems.variance_exploding(),
    "geometric_brownian": problems.geometric_brownian,
}


@pytest.mark.parametrize("name", FLOWS)
def test_probability_flow_carries_the_densities(name):
    """From 0.2 to 0.4 of the horizon by Runge and Kutta: log p_t along paths changes by the integral of -div v."""
    problem = FLOWS[name]()
    start, h = 0.2 * problem.horizon, 0.2 * problem.horizon / 40

    def rates(x, t):
        x = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(problem.law_at(t).log_prob(x).sum(), x, create_graph=True)
        v = problem.equation.velocity(x, t, score)
        slopes = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(problem.dim)]
        return torch.cat([v, -sum(slopes)[:, None]], 1).detach()

    x = problem.law_at(start).sample(50, torch.Generator().manual_seed(0))
    state = torch.cat([x, problem.law_at(start).log_prob(x)[:, None]], 1)
    for n in range(40):
        t = start + n * h
        one = rates(state[:, :-1], t)
        two = rates((state + h / 2 * one)[:, :-1], t + h / 2)
        three = rates((state + h / 2 * two)[:, :-1], t + h / 2)
        four = rates((state + h * three)[:, :-1], t + h)
        state = state + h / 6 * (one + 2 * two + 2 * three + four)
    wanted = problem.law_at(start + 40 * h).log_prob(state[:, :-1])
    assert torch.allclose(state[:, -1], wanted, atol=1e-5)


def test_a_given_covariance_is_kept_and_has_a_divergence_where_its_roots_have_none():
    """Equal eigenvalues have no derivative of their vectors, and the root of x^2 none at 0."""
    x = torch.tensor([[0.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
    matrix = FokkerPlanck.from_covariance(
        lambda x, t: -x, lambda x, t: (1 + x[:, 0].square())[:, None, None] * torch.eye(2, dtype=x.dtype)
    )
    square = FokkerPlanck.from_covariance(lambda x, t: -x, lambda x, t: x.square())
    along_first = torch.stack([2 * x[:, 0], torch.zeros(2)], 1)
    assert torch.allclose(matrix.covariance_divergence(x, 0.0), along_first, atol=1e-12)
    assert torch.allclose(square.covariance_divergence(x, 0.0), 2 * x, atol=1e-12)
    g = matrix.diffusion(x, 0.0)
    assert torch.allclose(g @ g.mT, matrix.covariance(x, 0.0), atol=1e-12)


@torch.no_grad()
def _silent_drift(x, t):
    return -x


@pytest.mark.parametrize(
    "equation",
    [
        FokkerPlanck(_silent_drift, 1.0),
        FokkerPlanck(lambda x, t: -x.detach(), 1.0),
        FokkerPlanck(lambda x, t: -x, lambda x, t: 1 + 0.5 * x[:, 0].detach().sin()),
        FokkerPlanck(lambda x, t: torch.from_numpy(-x.detach().numpy()), 1.0),
    ],
    ids=["no_grad", "drift detached", "diffusion detached", "numpy"],
)
def test_functions_that_torch_cannot_differentiate_are_refused(points, equation, user_error):
    with user_error("torch"):
        equation.check_differentiable(points, 0.0)
        equation.check_differentiable(points, 0.0, drift=True)


def test_functions_in_single_precision_are_differentiated(points):
    matrix = torch.tensor([[-1.0, 0.5, 0.0], [-0.3, -0.7, 0.2], [0.0, 0.0, -1.0]])

    def wide(x, t):
        return (1 + 0.1 * x.float().square().sum(1)).sqrt()

    equation = FokkerPlanck(lambda x, t: x.float() @ matrix, wide)
    equation.check_differentiable(points, 0.0, drift=True)
    torch.testing.assert_close(equation.covariance_divergence(points, 0.0), 0.2 * points, rtol=1e-5, atol=1e-6)


def test_a_drift_that_is_not_differentiated_need_not_be_seen(points):
    equation = FokkerPlanck(_silent_drift, 1.0)
    assert equation.velocity(points, 0.0, 0 * points).equal(equation.drift(points, 0.0))


def test_kinks_are_no_reason_to_refuse(points):
    FokkerPlanck(lambda x, t: -x.sign() - x.relu(), lambda x, t: 1 + x[:, 0].abs()).check_differentiable(points, 0.0)
    FokkerPlanck(lambda x, t: -x.sign() - x.relu(), 1.0).check_differentiable(points, 0.0, drift=True)
    FokkerPlanck(lambda x, t: torch.ones_like(x), 1.0).check_differentiable(points, 0.0)


def test_numbers_and_whole_numbers(points, user_error):
    assert torch.equal(FokkerPlanck(lambda x, t: -x, 2).diffusion(points, 0.0), torch.full_like(points[:, 0], 2))
    with user_error("expected functions of (x, t)"):
        FokkerPlanck(1.0, 1.0)
    with user_error("torch.int64", "floating-point"):
        FokkerPlanck(lambda x, t: -x, 1.0).drift(torch.ones(3, 2, dtype=torch.int64), 0.0)


@pytest.mark.parametrize("times", [[0.0, 1.0, 0.5], [0.0, 0.0]])
def test_the_flow_goes_one_way(times, points, user_error):
    equation = FokkerPlanck(lambda x, t: -x, 1.0)
    with user_error("times", "rising or falling"):
        equation.follow(points, times, lambda x, t: -x)


@pytest.mark.parametrize("hidden", [lambda u: u.detach(), lambda u: torch.tensor(u.tolist(), dtype=u.dtype)])
def test_noise_of_a_difference_that_torch_does_not_see_is_named(hidden):
    def diffusion(x, t):
        q = 1 + 0.4 * torch.tanh(hidden(x[:, 0] - x[:, 1]))
        return torch.stack([q, 0.3 * q + 0.2], 1)

    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"torch does not see how g g.T changes with x"):
        FokkerPlanck(lambda x, t: -x, diffusion).covariance_divergence(x, 0.0)
