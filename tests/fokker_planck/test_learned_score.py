"""Scores learned from particles: traces in closed form against automatic differentiation, and what is learned."""

import math

import pytest
import torch

from diffusion.fokker_planck import problems
from diffusion.fokker_planck.correction import Correction
from diffusion.fokker_planck.laws import GaussianMixture
from diffusion.fokker_planck.learned_score import LearnedScore, learn
from diffusion.trainer import Trainer

DOUBLE = torch.float64
QUICK = Trainer(steps=300, batch_size=256, learning_rate=3e-3, warmup=20, ema_decay=0.9, device="cpu")


def random_network(dim, hidden):
    generator = torch.Generator().manual_seed(0)
    network = Correction(dim, hidden, generator).requires_grad_(False)
    network.last.weight.normal_(generator=generator)
    network.last.bias.normal_(generator=generator)
    return network


def jacobians(function, x):
    """(B, d, d) of a function of points (B, d), one point at a time."""
    return torch.stack([torch.autograd.functional.jacobian(lambda x: function(x[None])[0], row) for row in x])


@pytest.mark.parametrize("hidden", [(7,), (7, 6)], ids=["one", "two"])
@pytest.mark.parametrize("each", [False, True], ids=["one_matrix", "matrix_for_each"])
def test_trace_of_the_network(hidden, each):
    network, generator = random_network(4, hidden), torch.Generator().manual_seed(1)
    y = torch.randn(5, 4, generator=generator, dtype=DOUBLE)
    matrix = torch.randn(5, 4, 4, generator=generator, dtype=DOUBLE)
    matrix = matrix if each else matrix[0]
    value, trace = network.traced(y, matrix)
    assert torch.equal(value, network(y))
    assert torch.allclose(trace, torch.einsum("...ij,...ji->...", matrix, jacobians(network, y)), rtol=1e-12)


@pytest.mark.parametrize("hidden", [(7,), (7, 6)], ids=["one", "two"])
def test_slopes_of_the_features(hidden):
    network, generator = random_network(4, hidden), torch.Generator().manual_seed(1)
    y = torch.randn(5, 4, generator=generator, dtype=DOUBLE)
    wanted = torch.nn.functional.pad(jacobians(network.features, y), (0, 0, 0, 1))
    assert torch.allclose(network._slopes(y), wanted, rtol=1e-12)
    assert torch.allclose(network._mean_slopes(y), wanted.mean(0), rtol=1e-12)


def scored(number=4000):
    """Draws of two Gaussians, whitened, and the scores there."""
    law, generator = problems.two_gaussians(2), torch.Generator().manual_seed(0)
    x = law.sample(number, generator).requires_grad_()
    (scores,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    return x.detach(), scores


SPOILS = {
    "outlier": lambda s: s.index_fill(0, torch.tensor([0]), 1e6),
    "scaled": lambda s: 1.5 * s,
    "absent": lambda s: 0 * s,
    "infinite": lambda s: s.index_fill(0, torch.tensor([0]), torch.inf),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_wrong_targets_are_contradicted_by_the_places(spoil):
    x, scores = scored()
    network = learn(x, scores, 0.0, Correction(2, (16,), torch.Generator().manual_seed(0)), QUICK).correction
    right, wrong = (learn(x, s, 0.0, network, None) for s in (scores, SPOILS[spoil](scores)))
    best, found = (float((score(x) - scores).norm() / scores.norm()) for score in (right, wrong))
    assert right.own_share < 0.2
    assert wrong.own_share > 0.9
    assert found < best + 0.1


def test_places_do_not_spoil_right_targets():
    """In 20 dimensions with 200 points, where the places tell little."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator, dtype=DOUBLE)
    score = learn(x, -x, 0.0, Correction(20, (8,), generator), None)
    assert score.own_share < 0.1
    assert float((score(x) + x).norm() / x.norm()) < 0.05


COVARIANCES = {
    "isotropic": lambda x: 1 + x[:, 0] ** 2,
    "constant_isotropic": lambda x: torch.full_like(x[:, 0], 2.5),
    "diagonal": lambda x: 1 + x**2,
    "constant_diagonal": lambda x: torch.arange(1.0, 4.0).to(x).expand_as(x),
    "matrix": lambda x: x[:, :, None] * x[:, None],
    "constant_matrix": lambda x: (torch.ones(3, 3) + torch.eye(3)).to(x).expand(len(x), 3, 3),
}


@pytest.mark.parametrize("form", COVARIANCES)
def test_trace_of_the_learned_score(form):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=generator, dtype=DOUBLE)
    whitening = torch.randn(3, 3, generator=generator, dtype=DOUBLE) + 2 * torch.eye(3)
    score = LearnedScore(0.0, x[0], whitening, random_network(3, (5, 6)))
    a = COVARIANCES[form](x)
    full = a if a.dim() == 3 else (a[:, None].expand_as(x) if a.dim() == 1 else a).diag_embed()
    value, trace = score.traced(x, a)
    assert torch.allclose(value, score(x), rtol=1e-12)
    assert torch.allclose(trace, torch.einsum("bij,bji->b", full, jacobians(score, x)), rtol=1e-11)


def test_score_of_a_gaussian_is_learned_exactly():
    """From any number of points, and though their own mean and covariance are others."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]], dtype=DOUBLE)
    law = GaussianMixture(torch.ones(1, dtype=DOUBLE), torch.ones(1, 3, dtype=DOUBLE), matrix[None])
    x = law.sample(30, generator)
    exact = -(x - 1) @ matrix.inverse()
    score = learn(x, exact, 0.0, Correction(3, (4,), generator), None)
    far = 3 * torch.randn(10, 3, generator=generator, dtype=DOUBLE)
    assert torch.allclose(score(far), -(far - 1) @ matrix.inverse(), atol=1e-4)


def test_coordinates_turn_with_the_particles():
    """A turn by a right angle, in small steps: in its coordinates the network sees what it sees of points at rest."""
    law, generator = problems.two_gaussians(2), torch.Generator().manual_seed(0)
    x = law.sample(300, generator).requires_grad_()
    (scores,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    x = x.detach()
    first = learn(x, scores, 0.0, Correction(2, (8, 16), generator), None)
    resting = moving = first
    for n in range(1, 10):
        angle = torch.tensor(n * math.pi / 18, dtype=DOUBLE)
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
        near = first.whitened(x)  # where they were a step ago: coordinates do not change from step to step
        resting = learn(x, scores, 0.0, resting.correction, None, near)
        moving = learn(x @ turn.T, scores @ turn.T, 0.0, moving.correction, None, near)
        assert torch.allclose(moving.whitened(x @ turn.T), near, atol=1e-10)
    assert torch.allclose(moving(x @ turn.T), resting(x) @ turn.T, atol=1e-6)


def test_training_fits_better():
    law, generator = problems.two_gaussians(2), torch.Generator().manual_seed(0)
    x = law.sample(500, generator).requires_grad_()
    (scores,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    x, network = x.detach(), Correction(2, (12,), generator)
    plain, trained = (learn(x, scores, 0.0, network, trainer) for trainer in (None, QUICK))
    assert float((trained(x) - scores).norm() / (plain(x) - scores).norm()) < 0.9
    assert not bool(network.last.weight.any())  # what was given is left alone
