"""One-step generators: units, draws, classes, checkpoints, training."""

import math

import torch
from cases import draws
from torch import nn

from diffusion import Generator, checkpoints
from diffusion.data import TensorData
from diffusion.fields import linear, variance_exploding
from diffusion.gradient_flow.chase import Chase
from diffusion.gradient_flow.functionals.energy import EnergyDistance
from diffusion.gradient_flow.one_step import OneStepGenerator
from diffusion.networks import MLP
from diffusion.trainer import Trainer


def mlp(shape=(2,), num_classes=0, width=32):
    torch.manual_seed(0)
    made = OneStepGenerator(MLP(shape, width, 1, num_classes), shape)
    with torch.no_grad():
        made.network.last.weight.normal_(0, 0.1)
    return made.eval()


class Still(nn.Module):
    """G(z) = (1 + scale) z with scale = 0."""

    num_classes = 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, z, noise, label=None):
        return (1 + self.scale) * z


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


def test_a_network_of_two_heads_is_refused(user_error):
    generator = OneStepGenerator(MLP((1, 2, 2), 8, 1, heads=2), (1, 2, 2))
    with user_error("output has shape (3, 2, 2, 2), expected (3, 1, 2, 2)"):
        generator.sample(3)


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
    OneStepGenerator(Still(), (3,)).save(tmp_path / "own")
    with user_error("could not store its network", "OneStepGenerator.load(..., network=...)"):
        OneStepGenerator.load(tmp_path / "own")
    assert isinstance(OneStepGenerator.load(tmp_path / "own", network=Still()).network, Still)
    for folder, kind in (("one", OneStepGenerator), ("field", Generator)):
        assert type(checkpoints.restore(tmp_path / folder, (Generator, OneStepGenerator))) is kind


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
