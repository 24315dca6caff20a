"""KL divergence from densities, scores and models at a time."""

import math

import pytest
import torch
from cases import draws
from torch import nn

from diffusion import Generator
from diffusion.fields import EmpiricalField, gravity, linear, variance_exploding
from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.targets import ScorePotential
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.gradient_flow.scores.blob import Blob
from diffusion.networks import MLP


def gaussian(dim):
    root = torch.eye(dim, dtype=torch.float64) + 0.3 * draws(dim, dim, 7)
    return torch.distributions.MultivariateNormal(draws(1, dim, 8)[0], root @ root.T)


@pytest.mark.parametrize("dim", [2, 5])
def test_between_gaussians_it_is_the_closed_form(dim):
    target, x = gaussian(dim), 1.0 + draws(60, dim, 0) @ draws(dim, dim, 1)
    mean, covariance = x.mean(0), torch.cov(x.T, correction=0)
    law = torch.distributions.MultivariateNormal(mean, covariance)
    kl = KL(target.log_prob, Entropy(GaussianScore()))
    assert float(kl.value(x)) == pytest.approx(float(torch.distributions.kl_divergence(law, target)), rel=1e-11)
    pull = torch.linalg.solve(target.covariance_matrix, (x - target.mean).T).T
    push = torch.linalg.solve(covariance, (x - mean).T).T
    torch.testing.assert_close(kl.velocity(x), push - pull, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(kl.first_variation(x), law.log_prob(x) - target.log_prob(x))


def test_the_flow_between_gaussians_comes_to_rest_at_the_target():
    target, x = gaussian(2), 2.0 + draws(30, 2, 0)
    kl = KL(target.log_prob, Entropy(GaussianScore()))
    end = WassersteinFlow(kl, control=None).run(x, steps=400, step_size=0.1)
    torch.testing.assert_close(end.mean(0), target.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cov(end.T, correction=0), target.covariance_matrix, rtol=1e-6, atol=1e-6)
    assert float(kl.value(end)) == pytest.approx(0, abs=1e-9)


def test_a_density_and_its_score_are_told_apart_by_their_shape():
    x = draws(20, 2, 0)
    density = KL(lambda x: -x.square().sum(1) / 2, Entropy(Blob(0.5)))
    score = KL(lambda x: -x, Entropy(Blob(0.5)))
    torch.testing.assert_close(score.velocity(x), density.velocity(x))
    kinds = [type(kl.fitted(x).terms()[1].functional) for kl in (density, score)]
    assert kinds == [Potential, ScorePotential]
    one = x[:1].expand(3, 2)  # as many particles as coordinates, and more
    for particles in (x[:2], x[:1], one):
        assert KL(lambda x: -x).terms()[1].functional.velocity(particles).equal(-particles)


def test_a_target_is_asked_once_what_it_is():
    calls = []

    def target(x):
        calls.append(len(x))
        return -x.square().sum(1)

    x = draws(9, 2, 0)
    moments = list(WassersteinFlow(KL(target), control=None).moments(x, 3, 0.01))
    assert calls == [1, 9, 9, 9]
    assert [type(term.functional) for term in moments[-1].functional.terms()] == [Entropy, Potential]


def test_terms_are_the_entropy_and_the_potential():
    x, kl = draws(20, 2, 0), KL(lambda x: -x.square().sum(1) / 2)
    (one, entropy), (other, potential) = kl.terms()
    assert (one, other) == (1.0, 1.0) and entropy is kl.entropy
    torch.testing.assert_close(entropy.velocity(x) + potential.velocity(x), kl.velocity(x))
    torch.testing.assert_close(entropy.value(x) + potential.value(x), kl.value(x))
    assert [term.weight for term in (0.5 * kl).terms()] == [0.5, 0.5]
    held = kl.fitted(x).fitted(2 * x).terms()[0].functional.estimator.held
    assert held == pytest.approx(2 * kl.fitted(x).terms()[0].functional.estimator.held)


def test_an_energy_may_stand_for_the_target():
    x, energy = draws(20, 2, 0), Potential(lambda x: x.square().sum(1))
    torch.testing.assert_close(KL(energy).value(x), KL(lambda x: -x.square().sum(1)).value(x))


@pytest.mark.parametrize("field", [variance_exploding(), linear(), gravity(2)], ids=["gaussian", "linear", "gravity"])
def test_the_law_of_a_data_set_at_a_time_is_a_target(field):
    model, t = EmpiricalField(field, draws(30, 2, 0)), 0.4
    x = draws(20, 2, 1)
    kl, plain = KL(model, time=t), KL(lambda x: model.log_prob(x, t))
    torch.testing.assert_close(kl.velocity(x), plain.velocity(x), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(kl.value(x), plain.value(x))
    torch.testing.assert_close(kl.first_variation(x), plain.first_variation(x))
    assert kl.velocity(x.float()).dtype == torch.float32


class Denoised(nn.Module):
    """Network of a generator that knows the law N(0, s^2): it says nothing, where the preconditioning knows all."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, noise, label=None):
        return self.weight * x


def test_a_generator_at_a_time_is_a_target():
    """With an output of 0 its law is that of normal data, N(0, s^2 + t^2): the score is linear, the density known."""
    data = draws(4000, 2, 0)
    data = (data - data.mean(0)) / data.std(0, correction=0)
    generator, t = Generator(variance_exploding(), Denoised(), (2,)).calibrate(data), 0.8
    x = draws(20, 2, 1)
    kl, variance = KL(generator, time=t), float(generator.data_std) ** 2 + t**2
    potential = kl.terms()[1].functional
    torch.testing.assert_close(potential.velocity(x), -x / variance, rtol=1e-4, atol=1e-4)
    assert not potential.velocity(x).requires_grad
    exact = x.square().sum(1) / (2 * variance) + math.log(math.tau * variance)
    torch.testing.assert_close(potential.first_variation(x), exact, rtol=1e-3, atol=1e-3)


def test_a_generator_whose_noise_has_no_score_says_so(user_error):
    generator = Generator(gravity(2), MLP((2,), width=8, depth=1), (2,)).calibrate(draws(50, 2, 0).float())
    with user_error("expected Gaussian"):
        KL(generator, time=0.5).velocity(draws(4, 2, 0).float())


def test_what_is_known_by_its_score_has_no_value(user_error):
    x, kl = draws(10, 2, 0), KL(lambda x: -x)
    for ask in (kl.value, kl.first_variation, kl.fitted(x).value):
        with user_error("known by its score alone", "log-density"):
            ask(x)


@pytest.mark.parametrize("time", [None, 0.0, 1e-3, 80.1, math.nan, "1"])
def test_times_at_which_a_model_is_not_defined_are_refused(time, user_error):
    with user_error(f"time is {time}", "t_min=0.002 to 80"):
        KL(EmpiricalField(variance_exploding(), draws(5, 2, 0)), time=time)


@pytest.mark.parametrize("time", [0.002, 80.0])
def test_the_ends_of_time_are_a_models_too(time):
    KL(EmpiricalField(variance_exploding(), draws(5, 2, 0)), time=time)


def test_targets_that_are_none_are_refused(user_error):
    x = draws(4, 2, 0)
    with user_error("the target is a int", "expected a log-density or a score"):
        KL(3)
    with user_error("time is 1.0", "has no times"):
        KL(lambda x: -x, time=1.0)
    with user_error("entropy is", "expected an Entropy"):
        KL(lambda x: -x, Blob())
    with user_error("of shape (1, 1)", "expected (1,), a log-density, or (1, 2), a score"):
        KL(lambda x: x[:, :1]).velocity(x)
    with user_error("a log-density or a score", "ScorePotential(score)"):
        KL(lambda x: -x).velocity(x[:, :1])
    assert KL(ScorePotential(lambda x: -x)).terms()[1].functional.velocity(x[:, :1]).equal(-x[:, :1])
    with user_error("is float", "expected (1,)"):
        KL(lambda x: 1.0).velocity(x)
    with user_error("score has shape (1, 2), expected (4, 2)"):
        KL(lambda x: x[:1]).velocity(x)
    with user_error("log-density has shape (), expected (4,)"):
        ScorePotential(lambda x: x, lambda x: x.sum()).value(x)
