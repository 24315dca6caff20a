"""The objective of one-step generators: gradients against autograd, features, classes, second samples."""

import functools

import pytest
import torch
from cases import draws
from torch import nn

from diffusion import Generator
from diffusion.fields import linear
from diffusion.gradient_flow.chase import Chase
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.drifting import Drifting, gaussian
from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.kernels import Gaussian
from diffusion.gradient_flow.functionals.mmd import MMD
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.functionals.sinkhorn import SinkhornDivergence
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.networks import MLP
from diffusion.objectives import Batch

B = 20


class Linear(nn.Module):
    """z A + c_label, float64, in place of a network."""

    def __init__(self, dim=3, num_classes=0):
        super().__init__()
        self.num_classes = num_classes
        self.A = nn.Parameter(0.3 * draws(dim, dim, 5))
        self.c = nn.Parameter(draws(num_classes + 1, dim, 6))

    def forward(self, z, noise, label=None):
        assert noise.shape == (len(z), 2) and not noise.any()
        return z @ self.A + (self.c[label] if label is not None else self.c[-1])


def generator_of(num_classes=0, dim=3):
    made = OneStepGenerator(Linear(dim, num_classes), (dim,)).double()
    made.centre.copy_(draws(1, dim, 7)[0])
    made.std.fill_(1.7)
    return made


def batch_of(label=None, number=B, dim=3, seed=0):
    return Batch(draws(number, dim, 0), label, torch.Generator().manual_seed(seed))


class Seen:
    """A functional of the data that remembers these, and the particles that it was fitted to."""

    def __init__(self, build):
        self.build, self.data, self.particles = build, [], []

    def __call__(self, data):
        self.data.append(data)
        return Spy(self.build(data), self)


class Spy(Functional):
    def __init__(self, inner, seen):
        self.inner, self.seen = inner, seen

    def relative(self):
        return Spy(self.inner.relative(), self.seen)

    def fitted(self, particles, generator=None):
        self.seen.particles.append(particles)
        return Spy(self.inner.fitted(particles, generator), self.seen)

    def value(self, particles):
        return self.inner.value(particles)

    def velocity(self, particles):
        return self.inner.velocity(particles)

    def first_variation(self, particles):
        return self.inner.first_variation(particles)


FUNCTIONALS = {
    "energy": lambda data: EnergyDistance(data, directions=16),
    "mmd": lambda data: MMD(Gaussian(1.0), data),
    "sinkhorn": lambda data: SinkhornDivergence(data, 2.0, tolerance=1e-12),
}


def curved(x):
    """(N, 3) to features (N, 2, 2)."""
    return torch.stack([x[:, 0] ** 2, x[:, 1].sin(), x.prod(1), x.sum(1)], 1).view(-1, 2, 2)


@pytest.mark.parametrize("name", FUNCTIONALS)
@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
@pytest.mark.parametrize("features", [None, curved], ids=["pixels", "features"])
def test_the_gradient_is_that_of_the_functional_through_the_generator(name, debias, features):
    """The mean square over N particles and k coordinates has 2 step / k times the gradient of F."""
    generator, seen, number = generator_of(), Seen(FUNCTIONALS[name]), 13
    objective = Chase(generator, seen, particles=number, step=0.7, features=features, debias=debias)
    loss = objective(generator, batch_of())
    found = torch.autograd.grad(loss.mean(), list(generator.parameters()))
    phi = features or (lambda x: x)
    torch.testing.assert_close(seen.data[0], phi(batch_of().x))
    x = phi(generator(draws_of(0, number)))
    torch.testing.assert_close(seen.particles[0], x.detach())
    fitted = [FUNCTIONALS[name](data).fitted(x.detach(), randomness_after(number, debias)) for data in seen.data]
    value = fitted[0].value(x) - (fitted[1].value(x) if debias else 0)
    assert len(seen.data) == 1 + debias
    if debias:  # a second sample of G, as large as the batch, in the features too
        torch.testing.assert_close(seen.data[1], phi(generator(second_draws(number))).detach())
    expected = torch.autograd.grad(value, list(generator.parameters()))
    k = x[0].numel()
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, 2 * 0.7 / k * true, rtol=1e-6, atol=1e-12)
    assert loss.shape == x.shape and loss.mean().item() == pytest.approx(value.item())


def draws_of(seed, number, dim=3):
    """The noise of the particles of a step."""
    return torch.randn((number, dim), generator=torch.Generator().manual_seed(seed)).double()


def second_draws(number, dim=3):
    """The noise of the second sample."""
    return torch.randn((B, dim), generator=randomness_after(number, debias=False)).double()


def randomness_after(number, debias, dim=3):
    randomness = torch.Generator().manual_seed(0)
    torch.randn((number, dim), generator=randomness)
    if debias:
        torch.randn((B, dim), generator=randomness)
    return randomness


def test_without_its_value_the_loss_is_the_square_of_the_step_and_the_gradient_the_same():
    generator = generator_of()
    gradients = []
    for log_value in (True, False):
        objective = Chase(generator, FUNCTIONALS["mmd"], step=0.7, log_value=log_value, debias=False)
        loss = objective(generator, batch_of()).mean()
        gradients.append(torch.autograd.grad(loss, generator.network.A)[0])
    torch.testing.assert_close(*gradients)
    x = generator(draws_of(0, B)).detach()
    velocity = MMD(Gaussian(1.0), batch_of().x).velocity(x)
    assert loss.item() == pytest.approx(0.49 * float(velocity.square().mean()))


def to_the_mean(data):
    """Each particle is drawn to the mean of the data."""
    return Potential(lambda x: (x - data.mean(0)).square().sum(1) / 2)


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_particles_of_a_class_follow_the_data_of_their_class(hidden):
    generator, label = generator_of(num_classes=3), torch.arange(B) % 2
    objective = Chase(generator, to_the_mean, particles=31, log_value=False, debias=False, label_dropout=hidden)
    batch = batch_of(label)
    loss = objective(generator, batch)
    told = torch.full((31,), 3) if hidden else label[torch.arange(31) % B]
    randomness = torch.Generator().manual_seed(0)
    torch.rand(31, generator=randomness)
    x = generator(torch.randn((31, 3), generator=randomness).double(), told)
    mean = batch.x.mean(0) if hidden else torch.stack([batch.x[label == c].mean(0) for c in (0, 1)])[told]
    torch.testing.assert_close(loss, (x - mean).square())


def test_the_value_of_classes_is_their_mean_by_the_number_of_particles():
    generator, label = generator_of(num_classes=2), (torch.arange(B) < 5).long()
    seen = Seen(FUNCTIONALS["mmd"])
    loss = Chase(generator, seen, debias=False, label_dropout=0.0)(generator, batch_of(label))
    assert [len(x) for x in seen.particles] == [15, 5]
    pairs = zip(seen.data, seen.particles, strict=True)
    values = [float(MMD(Gaussian(1.0), data).value(x)) for data, x in pairs]
    assert loss.mean().item() == pytest.approx(0.75 * values[0] + 0.25 * values[1])


def test_second_samples_are_of_the_classes_of_the_batch():
    generator, label = generator_of(num_classes=2), torch.tensor([0] * 12 + [1] * 8)
    with torch.no_grad():
        generator.network.A.zero_()
        generator.network.c.copy_(torch.tensor([[0.0] * 3, [100.0] * 3, [-100.0] * 3]))
    seen = Seen(FUNCTIONALS["mmd"])
    Chase(generator, seen, label_dropout=0.0)(generator, batch_of(label))
    assert [len(data) for data in seen.data] == [12, 12, 8, 8]
    assert float(seen.data[1].abs().max()) < 30 and float(seen.data[3].min()) > 100


@pytest.mark.parametrize("hidden", [0.5, 1.0])
def test_second_samples_for_particles_without_a_class_have_none(hidden):
    """Drawn to samples with classes, they would stay wherever they are once those have the law of the data."""
    generator, label = generator_of(num_classes=2), torch.tensor([0] * 12 + [1] * 8)
    with torch.no_grad():
        generator.network.A.zero_()
        generator.network.c.copy_(torch.tensor([[0.0] * 3, [100.0] * 3, [-100.0] * 3]))
    seen = Seen(FUNCTIONALS["mmd"])
    Chase(generator, seen, label_dropout=hidden)(generator, batch_of(label))
    torch.testing.assert_close(seen.data[-2], batch_of().x)
    assert len(seen.data[-1]) == B and float(seen.data[-1].max()) < -100
    assert [len(data) for data in seen.data[:-2]] == ([12, 12, 8, 8] if hidden < 1 else [])
    if hidden < 1:
        assert float(seen.data[1].abs().max()) < 30 and float(seen.data[3].min()) > 100


@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
def test_debiased_a_generator_of_the_data_s_law_stays(debias):
    """Few data, a narrow kernel: without a second sample particles are drawn together."""
    generator = OneStepGenerator(Linear(2), (2,)).double()
    with torch.no_grad():
        generator.network.A.copy_(torch.eye(2))
        generator.network.c.zero_()
    objective = Chase(generator, functools.partial(Drifting, taus=(0.5,), kernel=gaussian), debias=debias, step=0.5,
                      log_value=False)  # fmt: skip
    slopes = []
    for seed in range(200):
        randomness = torch.Generator().manual_seed(seed)
        loss = objective(generator, Batch(draws(8, 2, 1000 + seed), None, randomness)).mean()
        slopes.append(float(torch.autograd.grad(loss, generator.network.A)[0].trace()))
    slopes = torch.tensor(slopes)
    z = float(slopes.mean() / slopes.std() * len(slopes) ** 0.5)
    assert abs(z) < 3 if debias else z > 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 0}, "particles is 0"),
        ({"particles": 2.5}, "particles is 2.5"),
        ({"step": 0.0}, "step is 0.0"),
        ({"step": "fast"}, "step is 'fast'"),
        ({"features": "halves"}, "features is 'halves'"),
        ({"functional": None}, "functional is None"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words, user_error):
    with user_error(words, "expected"):
        Chase(generator_of(), **{"functional": FUNCTIONALS["mmd"], **options})


def test_a_generator_of_a_field_is_no_one_step_generator(user_error):
    with user_error("the generator is a Generator, expected a OneStepGenerator"):
        Chase(Generator(linear(2), MLP((2,), 8, 1), (2,)), FUNCTIONALS["mmd"])


def test_a_field_without_value_says_so(user_error):
    with user_error("has no value"):
        Chase(generator_of(), Drifting)(generator_of(), batch_of())
