"""Estimates of E log q: values against closed forms, scores against the entropy's own."""

import math

import pytest
import torch
from cases import draws

from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals import base as module
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.interaction import Interaction
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.gradient_flow.scores.blob import Blob, silverman


def test_the_blob_of_two_particles_is_known():
    """At distance 2 r: log of (1 + e) / 2 times the kernel's height, e = exp(-2 r^2 / h^2)."""
    r, h = 0.7, 0.9
    x = torch.tensor([[r, 0.0, 1.0], [-r, 0.0, 1.0]], dtype=torch.float64)
    e = math.exp(-2 * r**2 / h**2)
    expected = math.log((1 + e) / 2) - 1.5 * math.log(math.tau * h**2)
    entropy = Entropy(Blob(bandwidth=h))
    assert float(entropy.value(x)) == pytest.approx(expected, rel=1e-13)
    force = 2 * e / (1 + e) * 2 * r / h**2
    assert entropy.velocity(x).flatten().tolist() == pytest.approx([force, 0, 0, -force, 0, 0])


@pytest.mark.parametrize("dim", [1, 3])
def test_the_blob_is_the_entropy_after_the_blur(dim):
    """Of normal particles: the mean of the log-density of N(0, 1 + h^2)."""
    x, h = draws(3000, dim, 0), 0.4
    expected = -0.5 * dim * (math.log(math.tau * (1 + h**2)) + 1 / (1 + h**2))
    assert float(Entropy(Blob(bandwidth=h)).value(x)) == pytest.approx(expected, abs=0.03 * dim)


@pytest.mark.parametrize("estimator", [Blob(), Blob(0.4), GaussianScore()], ids=["rule", "fixed", "gaussian"])
def test_the_mean_of_the_log_density_is_the_value(estimator):
    x = draws(50, 3, 0)
    assert float(estimator.log_density(x).mean()) == pytest.approx(float(estimator.value(x)), rel=1e-12)


def test_silverman_chooses_and_holds():
    """In one dimension (4 / 3)^(1/5) s N^(-1/5) = 1.06 s N^(-1/5) (Silverman 1986, eq. 3.28)."""
    x = 3 * draws(200, 1, 0)
    rule = (4 / 3) ** 0.2 * float(x.std(correction=0)) * 200**-0.2
    assert silverman(x) == pytest.approx(rule, rel=1e-12)
    fitted = Entropy().fitted(x)
    assert fitted.estimator.held == pytest.approx(rule, rel=1e-12)
    torch.testing.assert_close(fitted.value(2 * x), Entropy(Blob(rule)).value(2 * x))
    torch.testing.assert_close(Entropy().value(2 * x), Entropy(Blob(2 * rule)).value(2 * x))
    assert fitted.fitted(2 * x).estimator.held == pytest.approx(2 * rule, rel=1e-12)
    assert Entropy(Blob(0.3)).fitted(x) == Entropy(Blob(0.3))


def test_far_particles_do_not_underflow():
    x = torch.tensor([[0.0, 0.0], [1e3, 0.0], [1e3, 0.1]], dtype=torch.float64)
    estimator = Blob(bandwidth=0.1)
    alone = math.log(1 / 3) - math.log(math.tau * 0.01)
    assert float(estimator.log_density(x)[0]) == pytest.approx(alone + 1 - 1, rel=1e-9)
    assert estimator.score(x)[0].abs().max() == 0
    assert estimator.score(x).isfinite().all() and estimator.value(x).isfinite()


@pytest.mark.parametrize("chunk", [2**22, 200])
def test_particles_far_apart_are_at_distance_0_of_themselves(chunk, monkeypatch):
    """Where rounding of squares is larger than a bandwidth."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    x, estimator = 1e13 * draws(40, 3, 0).float(), Blob(bandwidth=0.1)
    alone = -math.log(40) - 1.5 * math.log(math.tau * 0.01)
    assert float(estimator.value(x)) == pytest.approx(alone, rel=1e-6)
    torch.testing.assert_close(estimator.log_density(x), torch.full((40,), alone))
    assert not estimator.score(x).any()


def test_places_far_from_the_origin_lose_no_digits():
    x = draws(40, 3, 0)
    for estimator in (Blob(0.5), GaussianScore()):
        torch.testing.assert_close(estimator.score(x + 1e4), estimator.score(x), rtol=1e-7, atol=1e-9)


def test_images_are_points():
    x = draws(30, 6, 0)
    for functional in (
        Entropy(Blob(0.5)),
        Entropy(GaussianScore()),
        Interaction(lambda g: g.square().flatten(2).sum(2)),
    ):
        flat = functional.velocity(x)
        if not isinstance(functional, Interaction):
            torch.testing.assert_close(functional.velocity(x.view(30, 2, 3)).flatten(1), flat)
            torch.testing.assert_close(functional.first_variation(x.view(30, 2, 3)), functional.first_variation(x))
    image = Interaction(lambda gaps: gaps.square().sum((2, 3)))
    torch.testing.assert_close(image.velocity(x.view(30, 2, 3)).flatten(1), -(x - x.mean(0)) * 2)


def test_the_chunks_are_few_rows(monkeypatch):
    """The memory of a pass is CHUNK pairs."""
    monkeypatch.setattr(module, "CHUNK", 300)
    seen = []

    def kernel(gaps):
        seen.append(gaps.numel())
        return gaps.square().sum(-1)

    Interaction(kernel).velocity(draws(30, 2, 0))
    assert max(seen) <= 300 and sum(seen) == 30 * 30 * 2


@pytest.mark.parametrize("dim", [2, 5])
def test_a_gaussians_value_and_score_are_those_of_its_moments(dim):
    x = draws(100, dim, 0) @ draws(dim, dim, 1) + 2
    covariance = torch.cov(x.T, correction=0)
    law = torch.distributions.MultivariateNormal(x.mean(0), covariance)
    entropy = Entropy(GaussianScore())
    assert float(entropy.value(x)) == pytest.approx(-float(law.entropy()), rel=1e-11)
    torch.testing.assert_close(entropy.first_variation(x), law.log_prob(x))
    torch.testing.assert_close(entropy.velocity(x), torch.linalg.solve(covariance, (x - x.mean(0)).T).T)


def test_the_heat_equation_adds_2t_to_the_covariance_of_gaussians():
    """Second order in the step: forward Euler, extrapolated."""
    x = draws(20, 2, 0) @ draws(2, 2, 3)
    ends = [WassersteinFlow(Entropy(GaussianScore()), control=None).run(x, n, 0.4 / n) for n in (100, 200)]
    coarse, fine = (torch.cov(end.T, correction=0) for end in ends)
    expected = torch.cov(x.T, correction=0) + 0.8 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(2 * fine - coarse, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ends[0].mean(0), x.mean(0))


def test_what_is_no_estimator_and_what_spans_no_volume_is_refused(user_error):
    with user_error("estimator is 3", "ScoreEstimator"):
        Entropy(3)
    with user_error("bandwidth is -1", "positive"):
        Blob(-1)
    with user_error("the 3 particles span no volume in their 5 coordinates", "more than 5"):
        Entropy(GaussianScore()).velocity(draws(3, 5, 0))
    flat = draws(30, 3, 0)
    flat[:, 2] = flat[:, 0] + flat[:, 1]
    with user_error("span no volume"):
        GaussianScore().score(flat)
    with user_error("the 4 particles are all in one place"):
        Entropy().velocity(torch.ones(4, 2))


def test_an_interaction_of_squares_is_the_variance():
    """W = |x|^2 is twice the variance; only the even part counts; pairs at distance 0 do not, if W has a pole there."""
    x = draws(40, 3, 0)
    variance = float(x.var(0, correction=0).sum())
    square = Interaction(lambda gaps: gaps.square().sum(-1))
    assert float(square.value(x)) == pytest.approx(variance)
    torch.testing.assert_close(square.velocity(x), -2 * (x - x.mean(0)))
    skew = Interaction(lambda gaps: gaps.square().sum(-1) + 5 * gaps[..., 0])
    torch.testing.assert_close(skew.velocity(x), square.velocity(x))
    torch.testing.assert_close(skew.first_variation(x), square.first_variation(x))


def test_a_singular_interaction_of_three_particles_is_known():
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    repulsion = Interaction(lambda gaps: 1 / gaps.norm(dim=-1), singular=True)
    assert float(repulsion.value(x)) == pytest.approx((1 + 1 / 3 + 1 / 2) / 9)
    assert repulsion.velocity(x).flatten().tolist() == pytest.approx(
        [(-1 - 1 / 9) / 3, (1 - 1 / 4) / 3, (1 / 9 + 1 / 4) / 3]
    )
    twice = torch.cat([x, x])
    torch.testing.assert_close(repulsion.velocity(twice)[:3], repulsion.velocity(x))


def test_kernels_of_a_wrong_shape_or_without_a_derivative_are_refused(user_error):
    with user_error("shape (4, 4, 2), expected (4, 4)"):
        Interaction(lambda gaps: gaps).value(draws(4, 2, 0))
    with user_error("no derivative"):
        Interaction(lambda gaps: gaps.detach().sum(-1)).velocity(draws(4, 2, 0))
