"""Scores learned from particles, against those of known laws, and the equations that they come from."""

import math

import pytest
import torch
from cases import draws

from diffusion.gradient_flow.flows.wasserstein import WassersteinFlow
from diffusion.gradient_flow.functionals import base as module
from diffusion.gradient_flow.functionals.entropy import Entropy
from diffusion.gradient_flow.functionals.kl import KL
from diffusion.gradient_flow.scores.base import GaussianScore
from diffusion.gradient_flow.scores.blob import Blob
from diffusion.gradient_flow.scores.kernel_family import Frame, Kernels
from diffusion.gradient_flow.scores.network_score import FIRST, Denoising, NetworkScore
from diffusion.gradient_flow.scores.stein_score import Choice, SteinScore
from diffusion.objectives import Batch
from diffusion.trainer import Trainer


class Normal:
    """A Gaussian with correlated coordinates."""

    def __init__(self, dim):
        self.root = torch.eye(dim, dtype=torch.float64) + 0.4 * draws(dim, dim, 11)

    def draw(self, number, seed):
        return draws(number, len(self.root), seed) @ self.root.T - 1

    def score(self, x):
        return -torch.cholesky_solve((x + 1).T, torch.linalg.cholesky(self.root @ self.root.T)).T


class Modes:
    """Eight Gaussians on a ring."""

    def __init__(self, dim):
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        self.means = torch.zeros(8, dim, dtype=torch.float64)
        self.means[:, 0], self.means[:, 1] = 3 * angle.cos(), 3 * angle.sin()

    def draw(self, number, seed):
        which = torch.randint(8, (number,), generator=torch.Generator().manual_seed(seed))
        return self.means[which] + 0.35 * draws(number, self.means.shape[1], seed + 1)

    def log_prob(self, x):
        return (-(x[:, None] - self.means).square().sum(2) / (2 * 0.35**2)).logsumexp(1)

    def score(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(x).sum(), x)[0]


OPTIONS = {"learning_rate": 3e-3, "warmup": 10, "ema_decay": 0.9, "checkpoint_every": 10, "test_examples": 2000}
SHORT = Trainer(steps=150, batch_size=256, device="cpu", **OPTIONS)

SMALL = NetworkScore(trainer=SHORT, width=32, depth=1)
LAWS = {"normal": Normal, "modes": Modes}


def error(estimator, law, number, seed=0):
    """Root mean square error of the score over its root mean square."""
    x = law.draw(number, seed)
    exact = law.score(x)
    found = estimator.fitted(x, torch.Generator().manual_seed(5)).score(x)
    return float((found - exact).norm() / exact.norm())


# name, estimator, law, dim -> the largest errors of 200 and 1600 particles
ERRORS = [
    ("gaussian", GaussianScore(), "normal", 2, 0.18, 0.06),
    ("gaussian", GaussianScore(), "normal", 5, 0.22, 0.09),
    ("blob", Blob(), "normal", 2, 0.42, 0.30),
    ("blob", Blob(), "normal", 5, 0.78, 0.62),
    ("blob", Blob(0.25), "modes", 2, 0.60, 0.30),
    ("stein", SteinScore(), "normal", 2, 0.18, 0.06),
    ("stein", SteinScore(), "normal", 5, 0.22, 0.09),
    ("stein", SteinScore(), "modes", 2, 0.55, 0.35),
    ("stein", SteinScore(), "modes", 5, 0.58, 0.42),
    ("network", SMALL, "normal", 2, 0.30, 0.15),
    ("network", SMALL, "modes", 5, 1.15, 0.55),
]


@pytest.mark.parametrize(
    "estimator, law, dim, few, many",
    [case[1:] for case in ERRORS],
    ids=[f"{name}-{law}-{dim}" for name, _, law, dim, _, _ in ERRORS],
)
def test_the_error_of_the_score_falls_with_the_number_of_particles(estimator, law, dim, few, many):
    law = LAWS[law](dim)
    errors = [error(estimator, law, number) for number in (200, 1600)]
    assert errors[0] < few and errors[1] < many and errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize(
    ("name", "dim", "blob", "stein"),
    [("normal", 2, 0.3, 0.06), ("normal", 5, 0.7, 0.14), ("normal", 10, 1.0, 0.22), ("modes", 2, 0.8, 0.46)],
)
def test_the_blob_is_for_few_dimensions_and_one_mode(name, dim, blob, stein):
    """Errors of 400 particles, by the rule, as its docstring has them."""
    law = LAWS[name](dim)
    assert error(Blob(), law, 400) == pytest.approx(blob, abs=0.05)
    assert error(SteinScore(), law, 400) < 1.2 * stein


def sums_of_kernels(dim, round):
    x = Normal(dim).draw(60, 3)
    frame = Frame.of(x)
    return x, frame, Kernels.of(frame, x[:7] + 0.1, round, 0.7)


@pytest.mark.parametrize("round", [False, True], ids=["whitened", "round"])
@pytest.mark.parametrize("dim", [2, 5])
def test_moments_are_those_of_the_kernels_derivatives(dim, round):
    _, frame, kernels = sums_of_kernels(dim, round)
    group = torch.arange(60) % 2
    one, two = kernels.moments(frame.u, group, 2)

    def kernel(u):
        gaps = (u @ kernels.matrix.T - kernels.centres) / kernels.bandwidth
        return (-gaps.square().sum(1) / 2).exp()

    first = torch.func.vmap(torch.func.jacrev(kernel))(frame.u)  # (N, M, d)
    second = torch.func.vmap(torch.func.hessian(kernel))(frame.u).diagonal(dim1=2, dim2=3).sum(2)
    means = second - torch.einsum("nmd,nd->nm", first, frame.u)
    for found, mine in ((one, group == 0), (two, group == 1)):
        torch.testing.assert_close(found.gram, torch.einsum("nmd,nkd->mk", first[mine], first[mine]) / 60)
        torch.testing.assert_close(found.means, means[mine].sum(0) / 60)
    weights = draws(7, 3, 4)
    exact = 0.5 * torch.einsum("nmd,mr->nrd", first, weights).square().sum(2) + means @ weights
    torch.testing.assert_close(kernels.losses(frame.u, weights), exact)


@pytest.mark.parametrize("round", [False, True], ids=["whitened", "round"])
def test_the_weights_have_the_lowest_loss(round):
    """The gradient of loss + ridge / 2 |sum|^2, with the norm of the kernels' space, is 0."""
    _, frame, kernels = sums_of_kernels(3, round)
    (moments,) = kernels.moments(frame.u, torch.zeros(60), 1)
    weights, ridge = kernels.solve(moments, 1e-2), 1e-2
    b = kernels.matrix
    places = kernels.centres @ torch.linalg.inv(b).T
    norm = torch.cat([k for _, k in kernels.at(places)]) * float((b**2).sum()) / 3 / kernels.bandwidth**2
    slope = (moments.gram + ridge * norm) @ weights + moments.means
    assert float(slope.abs().max()) < 1e-7 * float(moments.means.abs().max())
    assert kernels.solve(moments, math.inf).abs().max() == 0


def test_the_score_is_the_gradient_of_the_log_density():
    law = Modes(2)
    x = law.draw(150, 0)
    estimator = SteinScore(50).fitted(x)
    assert estimator.held.ridge < 1
    frame, kernels, weights = estimator._solved(x)
    y = x.clone().requires_grad_()
    u = frame.whitened(y)
    density = kernels.sums(u, weights) - u.square().sum(1) / 2
    torch.testing.assert_close(estimator.log_density(x), density.detach())
    torch.testing.assert_close(estimator.score(x), torch.autograd.grad(density.sum(), y)[0], rtol=1e-8, atol=1e-8)


def test_a_log_density_is_told_up_to_a_constant():
    """To a quarter of what the best Gaussian leaves unexplained."""
    law = Modes(2)
    x = law.draw(1600, 0)
    exact = law.log_prob(x)
    left = [float((e.fitted(x).log_density(x) - exact).var()) for e in (SteinScore(), GaussianScore())]
    assert left[0] < 0.25 * left[1], left


def test_where_no_correction_helps_it_is_the_gaussian():
    x = draws(150, 3, 0)
    estimator = SteinScore(held=Choice(x[:9], round=False, scale=1.0, ridge=math.inf))
    torch.testing.assert_close(estimator.score(x), GaussianScore().score(x))
    found, exact = estimator.log_density(x), GaussianScore().log_density(x)
    torch.testing.assert_close(found - found.mean(), exact - exact.mean())


def test_what_was_chosen_is_held_and_changes_by_steps():
    law = Modes(2)
    x, generator = law.draw(300, 0), torch.Generator().manual_seed(0)
    first = SteinScore().fitted(x, generator)
    second = first.fitted(x, generator)
    assert first.held.scale / second.held.scale in (0.5, 1.0, 2.0)
    assert abs(math.log10(first.held.ridge / second.held.ridge)) < 1.5
    assert not first.held.centres.equal(second.held.centres)
    order = torch.randperm(300, generator=generator)
    torch.testing.assert_close(first.score(x[order]), first.score(x)[order], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(SteinScore().score(x), SteinScore().fitted(x).score(x))


def test_chunks_and_shapes_change_nothing(monkeypatch):
    x = Normal(6).draw(80, 0)
    estimator = SteinScore(40).fitted(x)
    whole = estimator.score(x), estimator.log_density(x)
    monkeypatch.setattr(module, "CHUNK", 97)
    torch.testing.assert_close(estimator.score(x), whole[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(estimator.log_density(x), whole[1], rtol=1e-7, atol=1e-9)
    images = x.view(80, 2, 3)
    torch.testing.assert_close(SteinScore(40).fitted(images).score(images).flatten(1), whole[0])
    single = estimator.score(x.float())
    assert single.dtype == torch.float32 and estimator.log_density(x.float()).dtype == torch.float32
    torch.testing.assert_close(single, whole[0].float(), rtol=1e-3, atol=1e-3)


class Shift(torch.nn.Module):
    """n(v) = a v + b, whose score in a Gaussian of unit covariance is -v, at a = b = 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.0, 0.0))

    def forward(self, v, noise, label=None):
        return self.a * v + self.b


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_denoising_is_unbiased_for_a_gaussian(noise):
    """At the true score the slope of the loss is 0, within its noise; its second derivatives are those of E |s|^2."""
    network = Shift()
    loss = Denoising(noise)(network, Batch(draws(200_000, 2, 0), None, torch.Generator().manual_seed(1))).mean()
    slopes = torch.autograd.grad(loss, [network.a, network.b], create_graph=True)
    assert max(abs(slope.item()) for slope in slopes) < 0.01
    for slope, parameter in zip(slopes, (network.a, network.b), strict=True):
        (curvature,) = torch.autograd.grad(slope, parameter, retain_graph=True)
        assert float(curvature) == pytest.approx(1, abs=0.02)


@pytest.fixture(scope="module")
def learned():
    """A network fitted to particles of the ring, and these."""
    x = Modes(2).draw(600, 0)
    return SMALL.fitted(x, torch.Generator().manual_seed(0)), x


def test_a_network_learns_the_score(learned):
    estimator, x = learned
    exact = Modes(2).score(x)
    gaussian = float((GaussianScore().score(x) - exact).norm() / exact.norm())
    assert float((estimator.score(x) - exact).norm() / exact.norm()) < 0.85 * gaussian


def test_a_network_goes_on_learning_from_where_it_was(learned):
    estimator, x = learned
    exact = Modes(2).score(x)
    before = {name: value.clone() for name, value in estimator.network.state_dict().items()}
    further = estimator.fitted(x, torch.Generator().manual_seed(1))
    errors = [float((e.score(x) - exact).norm() / exact.norm()) for e in (estimator, further)]
    assert errors[1] < errors[0] + 0.05
    change = sum(float((further.network.state_dict()[name] - value).norm()) for name, value in before.items())
    assert 0 < change < 0.5 * sum(float(value.norm()) for value in before.values())
    assert all(estimator.network.state_dict()[name].equal(value) for name, value in before.items())
    again = estimator.fitted(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(again.score(x), further.score(x))


def test_the_gaussian_part_of_a_network_is_that_of_the_particles_asked_for(learned):
    """Affine maps of the particles, up to a rotation of the whitened ones, carry the score with them."""
    estimator, x = learned
    root = torch.tensor([[2.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    moved = x @ root.T + 3
    expected = torch.linalg.solve(root.T, estimator.score(x).T).T
    torch.testing.assert_close(estimator.score(moved), expected, rtol=1e-3, atol=1e-3)
    assert not estimator.score(x).requires_grad and estimator.score(x.float()).dtype == torch.float32


def test_a_flow_with_a_learned_score_comes_near_its_target():
    """KL to N(0, I), from a narrow law: mean and covariance of the particles."""
    x = 2 + 0.5 * draws(200, 2, 0)
    for estimator in (SteinScore(50), NetworkScore(trainer=SHORT, width=16, depth=1, refit_steps=3)):
        flow = WassersteinFlow(KL(lambda x: -x, Entropy(estimator)), control=None)
        end = flow.run(x, 20, 0.25, torch.Generator().manual_seed(0))
        assert float(end.mean(0).norm()) < 0.1
        torch.testing.assert_close(torch.cov(end.T), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.2)


@pytest.mark.parametrize("estimator", [SteinScore(), NetworkScore()], ids=["stein", "network"])
def test_estimators_without_a_density_have_no_value(estimator, user_error):
    with user_error("expected an estimator with a value such as Blob() or GaussianScore()"):
        Entropy(estimator).value(draws(20, 2, 0))


def test_bad_options_are_refused(user_error):
    with user_error("centres is 0"):
        SteinScore(0)
    with user_error("noise is -0.1"):
        NetworkScore(noise=-0.1)
    with user_error("held_out is 1"):
        NetworkScore(held_out=1)
    with user_error("refit_steps is 0"):
        NetworkScore(refit_steps=0)
    with user_error("learned nothing yet", "fitted"):
        NetworkScore().score(draws(5, 2, 0))
    with user_error("knows no density"):
        NetworkScore().log_density(draws(5, 2, 0))
    with user_error("span no volume"):
        SteinScore().score(draws(3, 5, 0))
    assert FIRST.checkpoint_every < FIRST.steps
