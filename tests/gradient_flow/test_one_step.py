"""One-step generators and their objective: gradients against autograd, classes, draws, checkpoints, training."""

import functools
import math

import pytest
import torch
from cases import draws
from torch import nn

from diffusion import Generator, checkpoints
from diffusion.data import TensorData
from diffusion.fields import linear, variance_exploding
from diffusion.gradient_flow.chase import Chase
from diffusion.gradient_flow.functionals.base import Functional
from diffusion.gradient_flow.functionals.drifting import Drifting, gaussian
from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.functionals.kernels import Gaussian
from diffusion.gradient_flow.functionals.mmd import MMD
from diffusion.gradient_flow.functionals.potential import Potential
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.networks import MLP
from diffusion.objectives import Batch
from diffusion.trainer import Trainer

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


def mlp(shape=(2,), num_classes=0, width=32):
    torch.manual_seed(0)
    made = OneStepGenerator(MLP(shape, width, 1, num_classes), shape)
    with torch.no_grad():
        made.network.last.weight.normal_(0, 0.1)
    return made.eval()


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
    expected = torch.autograd.grad(value, list(generator.parameters()))
    k = x[0].numel()
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, 2 * 0.7 / k * true, rtol=1e-6, atol=1e-12)
    assert loss.shape == x.shape and loss.mean().item() == pytest.approx(value.item())


def draws_of(seed, number, dim=3):
    """The noise of the particles of a step."""
    return torch.randn((number, dim), generator=torch.Generator().manual_seed(seed)).double()


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
    assert float(loss.mean()) == pytest.approx(0.75 * values[0] + 0.25 * values[1])


def test_second_samples_are_of_the_classes_of_the_batch():
    generator, label = generator_of(num_classes=2), torch.tensor([0] * 12 + [1] * 8)
    with torch.no_grad():
        generator.network.A.zero_()
        generator.network.c.copy_(torch.tensor([[0.0] * 3, [100.0] * 3, [-100.0] * 3]))
    seen = Seen(FUNCTIONALS["mmd"])
    Chase(generator, seen, label_dropout=0.0)(generator, batch_of(label))
    assert [len(data) for data in seen.data] == [12, 12, 8, 8]
    assert float(seen.data[1].abs().max()) < 30 and float(seen.data[3].min()) > 100


@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
def test_debiased_a_generator_of_the_data_s_law_stays(debias):
    """Few data, a narrow kernel: without a second sample particles are drawn together."""
    generator = OneStepGenerator(Still(), (2,)).double()
    objective = Chase(generator, functools.partial(Drifting, taus=(0.5,), kernel=gaussian), debias=debias, step=0.5,
                      log_value=False)  # fmt: skip
    slopes = []
    for seed in range(200):
        randomness = torch.Generator().manual_seed(seed)
        loss = objective(generator, Batch(draws(8, 2, 1000 + seed), None, randomness)).mean()
        slopes.append(float(torch.autograd.grad(loss, generator.network.scale)[0]))
    slopes = torch.tensor(slopes)
    z = float(slopes.mean() / slopes.std() * len(slopes) ** 0.5)
    assert abs(z) < 3 if debias else z > 6


class Still(nn.Module):
    """G(z) = (1 + scale) z with scale = 0."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, z, noise, label=None):
        return (1 + self.scale) * z


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"particles": 0}, "particles is 0"),
        ({"particles": 2.5}, "particles is 2.5"),
        ({"step": 0.0}, "step is 0.0"),
        ({"label_dropout": 1.5}, "label_dropout is 1.5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, words, user_error):
    with user_error(words, "expected"):
        Chase(generator_of(), FUNCTIONALS["mmd"], **options)


def test_a_generator_of_a_field_is_no_one_step_generator(user_error):
    with user_error("the generator is a Generator, expected a OneStepGenerator"):
        Chase(Generator(linear(2), MLP((2,), 8, 1), (2,)), FUNCTIONALS["mmd"])


def test_a_field_without_value_says_so(user_error):
    with user_error("has no value"):
        Chase(generator_of(), Drifting)(generator_of(), batch_of())


def identity():
    """G(z) = centre + std z."""
    return OneStepGenerator(Still(), (2,))


def test_outputs_of_the_network_are_in_units_of_the_data():
    data = 3 + 2 * draws(5000, 2, 0)
    x = identity().calibrate(data).sample(5000)
    torch.testing.assert_close(x.mean(0).double(), data.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(x.std(0), torch.full((2,), 2.0), rtol=0.05, atol=0)


def test_sample_i_depends_on_the_seed_and_i_alone():
    generator = mlp()
    whole = generator.sample(11, seed=3)
    assert whole.dtype == torch.float32 and whole.shape == (11, 2)
    torch.testing.assert_close(generator.sample(11, seed=3, batch_size=4), whole)
    torch.testing.assert_close(generator.sample(5, seed=3), whole[:5])
    assert not torch.equal(generator.sample(11, seed=4), whole)


def test_noise_is_that_of_a_generator_of_a_field():
    """The same seed starts both at the same place, up to the prior's scale."""
    field, randomness = variance_exploding(2), torch.Generator().manual_seed(5)
    prior = torch.cat([field.sample_prior((1, 2), randomness, dtype=torch.float64) for _ in range(4)])
    torch.testing.assert_close(identity().sample(4, seed=5), (prior / field.horizon).float())


def test_classes_reach_the_network(user_error):
    generator = mlp(num_classes=3)
    with torch.no_grad():
        generator.network.embedding.label.weight.normal_(0, 3)
    label = torch.tensor([0, 1, 2, 1, 0])
    mixed = generator.sample(5, label=label, batch_size=2)
    for kind in range(3):
        alone = generator.sample(5, label=kind)
        torch.testing.assert_close(mixed[label == kind], alone[label == kind])
        assert not torch.allclose(mixed[label != kind], alone[label != kind])
    with user_error("label is [3]", "a class from 0 to 2"):
        generator.sample(2, label=3)
    with user_error("there are 2 labels", "each of 3"):
        generator.sample(3, label=torch.tensor([0, 1]))
    with user_error("label is [1]", "it has no classes"):
        mlp().sample(2, label=1)


def test_what_cannot_be_drawn_is_refused(user_error):
    generator = mlp()
    with user_error("cannot draw 0 samples"):
        generator.sample(0)
    with user_error("in batches of 0"):
        generator.sample(2, batch_size=0)
    with torch.no_grad():
        generator.network.last.bias.fill_(math.nan)
    with user_error("sample 0 is not finite"):
        generator.sample(2)
    with user_error("points have shape (4, 3), expected (B, 2)"):
        generator.calibrate(torch.zeros(4, 3))
    with user_error("the 4 data points do not vary"):
        generator.calibrate(torch.ones(4, 2))


def test_checkpoints_say_what_they_hold(tmp_path, user_error):
    generator = mlp((1, 4, 4)).calibrate(torch.rand(9, 1, 4, 4))
    generator.save(tmp_path / "one")
    loaded = OneStepGenerator.load(tmp_path / "one")
    assert torch.equal(loaded.sample(3), generator.sample(3))
    assert not loaded.training and not any(weight.requires_grad for weight in loaded.parameters())
    with user_error("holds a OneStepGenerator, expected a Generator"):
        Generator.load(tmp_path / "one")
    Generator(linear(2), MLP((2,), 8, 1), (2,)).save(tmp_path / "field")
    with user_error("holds a Generator, expected a OneStepGenerator"):
        OneStepGenerator.load(tmp_path / "field")
    OneStepGenerator(Linear(), (3,)).save(tmp_path / "own")
    with user_error("could not store its network", "OneStepGenerator.load(..., network=...)"):
        OneStepGenerator.load(tmp_path / "own")
    assert isinstance(OneStepGenerator.load(tmp_path / "own", network=Linear()).network, Linear)


def test_training_moves_noise_to_the_data_and_resumes_exactly(tmp_path):
    """Four clusters in the plane; the energy distance to held-out data falls to an eighth."""

    def clusters(seed):
        z = draws(600, 2, seed).float()
        return 2 * z.sign() + 0.2 * z

    train, test = TensorData(clusters(0)), TensorData(clusters(1))
    options = Trainer(
        steps=200, batch_size=100, warmup=10, learning_rate=5e-3, ema_decay=0.98, checkpoint_every=100, device="cpu",
        test_examples=600,
    )  # fmt: skip

    def keep(step, model):
        if step == 100:
            checkpoints.copy(tmp_path / "a" / "last", tmp_path / "half")

    def fit(folder, resume=None, callbacks=()):
        torch.manual_seed(0)
        generator = OneStepGenerator(MLP((2,), 48, 2), (2,)).calibrate(train.values)
        objective = Chase(generator, lambda data: EnergyDistance(data, directions=8), particles=150)
        rows = []
        log = lambda step, metrics: rows.append({"step": step, **metrics})  # noqa: E731
        average = options.fit(
            generator, objective, train, folder, test, resume, log=log, callbacks=callbacks, progress=False
        )
        return generator, average, rows

    judge = EnergyDistance(test.values)
    torch.manual_seed(0)
    before = float(judge.value(OneStepGenerator(MLP((2,), 48, 2), (2,)).calibrate(train.values).sample(600)))
    _, average, rows = fit(tmp_path / "a", callbacks=[keep])
    after = float(judge.value(average.sample(600)))
    assert after < before / 8
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] / 8
    stored = OneStepGenerator.load(tmp_path / "a" / "last")
    assert torch.equal(stored.sample(4), average.sample(4))
    _, again, _ = fit(tmp_path / "b", resume=tmp_path / "half")
    assert torch.equal(again.sample(4), average.sample(4))
