"""The score beside the velocity, where the law of the noise is not Gaussian: what is learned, stored and refused."""

import math

import pytest
import torch
from problems import mixture
from torch import nn

from diffusion import Generator, checkpoints
from diffusion.data import toy
from diffusion.fields import EmpiricalField, gravity, linear, pfgmpp
from diffusion.generator import learns_score
from diffusion.networks import MLP, UNet
from diffusion.objectives import Batch, FieldMatching, StableField
from diffusion.samplers import Counted, Stochastic, motion
from diffusion.trainer import Trainer

LEARNED = {
    "gravity_2": (lambda: gravity(2), (2,)),
    "gravity_64": (lambda: gravity(64), (1, 8, 8)),
    "pfgmpp_64": (lambda: pfgmpp(64, 128.0), (1, 8, 8)),
    "half_a_degree": (lambda: pfgmpp(3, 0.5), (3,)),
}


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def two_headed(field=None, shape=(2,), width=16, depth=1, num_classes=0):
    torch.manual_seed(0)
    generator = Generator(field or gravity(2), MLP(shape, width, depth, num_classes, heads=2), shape)
    return generator.calibrate(0.7 * torch.randn(50, *shape, generator=randomness(1)) + 0.2)


def awake(generator):
    with torch.no_grad():
        nn.init.normal_(generator.network.last.weight)
    return generator


class TestConditionalScore:
    @pytest.mark.parametrize(("dim", "dof"), [(2, 1.0), (5, 3.5)])
    def test_score_of_student_t_is_its_closed_form(self, dim, dof):
        field = pfgmpp(dim, dof)
        x0 = torch.randn(9, dim, generator=randomness(), dtype=torch.float64)
        t = field.clock(9)
        x = field.sample(x0, t, randomness(1))
        gap = x - x0
        expected = -(dof + dim) * gap / (dof * t[:, None].square() + gap.square().sum(1, keepdim=True))
        torch.testing.assert_close(field.score(x, t, x0), expected, rtol=1e-9, atol=1e-12)

    def test_no_graph_is_left_and_none_is_needed(self):
        x = torch.ones(2, 2, requires_grad=True)
        with torch.no_grad():
            score = gravity(2).score(x, 1.0, torch.zeros(2, 2))
        assert not score.requires_grad and x.grad is None

    def test_its_mean_given_the_place_is_the_marginal_score(self):
        """E[score(x|x0) phi(x)] = E[score(x) phi(x)] for functions phi, over draws of (x0, x)."""
        data = mixture(gravity(2))
        for t in (0.2, 1.0):
            x0 = data.draw(2500, randomness(1))
            x = data.field.sample(x0, t, randomness(2))
            phi = torch.stack([torch.ones(len(x)), (x[:, 0] > 0).double(), 1 / (1 + x.square().sum(1))], 1)
            rest = (data.field.score(x, t, x0) - data.score(x, t))[:, :, None] * phi[:, None]
            assert (rest.mean(0) / (rest.std(0) / len(x) ** 0.5)).abs().max() < 4


class TestWhatIsLearned:
    @pytest.mark.parametrize("name", LEARNED)
    def test_a_score_is_learned_where_none_follows(self, name):
        field, shape = LEARNED[name]
        assert learns_score(field(), shape)

    def test_where_it_follows_none_is_learned(self, user_error):
        assert not learns_score(linear(2), (2,))
        with user_error("heads=2, expected 1", "Gaussian", "follows from the velocity"):
            two_headed(linear(2))

    def test_a_network_of_ones_own_has_one_output(self):
        network = nn.Linear(2, 2)
        network.num_classes = 0
        assert Generator(gravity(2), network, (2,)).heads == 1


@pytest.mark.parametrize("name", LEARNED)
def test_loss_of_a_fresh_network_is_that_of_two_unit_variances(name):
    """A fresh network's score is the best linear one. What it leaves has unit variance, within 30 %."""
    field, shape = LEARNED[name][0](), LEARNED[name][1]
    generator = two_headed(field, shape)
    x0 = 0.5 * torch.randn(4000, *shape, generator=randomness(2))
    generator.calibrate(x0)
    objective = FieldMatching(generator)
    with torch.no_grad():
        generator.network.last.bias.zero_()
        t = objective.times.draw(4000, randomness(3)).float()
        x = field.sample(x0, t, randomness(4))
        prediction = generator(x, t)
        errors = (prediction.score - field.score(x, t, x0)) / prediction.score_error
    assert errors.isfinite().all()
    assert 0.7 < float(errors.square().mean()) < 1.3


def test_the_unit_follows_the_noise_that_a_point_has():
    """At one time of gravity, what a linear estimate leaves has unit variance at points near and far."""
    generator = two_headed(gravity(64), (64,))
    x0 = 0.5 * torch.randn(8000, 64, generator=randomness(2), dtype=torch.float64)
    generator.calibrate(x0)
    x = generator.field.sample(x0, 0.05, randomness(4))
    _, s = generator.precondition.with_score(x, 0.05)
    left = ((0.05 * generator.field.score(x, 0.05, x0) - s.skip * x) / s.out).square().mean(1)
    order = x.norm(dim=1).argsort()
    for part in order.split(1000):
        assert 0.5 < float(left[part].mean()) < 2


def test_the_linear_score_of_nearly_gaussian_noise_is_that_of_gaussian_data():
    generator = two_headed(pfgmpp(64, 1e6), (64,))
    generator.precondition.std.fill_(0.5)
    _, s = generator.precondition.with_score(torch.ones(3, 64, dtype=torch.float64), 0.7)
    m = 0.25 + 0.49
    torch.testing.assert_close(s.skip.flatten(), torch.full((3,), -0.7 / m).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(s.out.flatten(), torch.full((3,), 0.5 / m**0.5).double(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_give_finite_scores(dtype):
    for build, shape in LEARNED.values():
        generator = awake(two_headed(build(), shape))
        x = torch.ones(5, *shape, dtype=dtype) * torch.tensor([0, 1e-6, 1, 1e6, 1e9]).to(dtype).view(
            -1, *[1] * len(shape)
        )
        for t in (generator.field.t_min, generator.field.horizon):
            prediction = generator(x, t)
            assert prediction.score.dtype == dtype
            assert prediction.score.isfinite().all() and (prediction.score_error > 0).all()


class Told(nn.Module):
    """A network that gives the answers that it was told."""

    num_classes, heads = 0, 2

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, noise, label=None):
        return self.answer


def test_a_perfect_network_gives_the_exact_velocity_and_score():
    data = mixture(gravity(2))
    t = data.field.clock(12)
    x = data.field.sample(data.draw(12, randomness(1)), t, randomness(2))
    generator = Generator(data.field, Told(), (2,)).calibrate(data.draw(2000, randomness()))
    c, s = generator.precondition.with_score(x, t)
    target = (data.denoised(x, t) - c.offset - c.skip * c.y) / c.out
    score = (t[:, None] * data.score(x, t) - s.skip * c.y) / s.out
    generator.network.answer = torch.cat([target, score], 1)
    model = Counted(generator)
    found = motion(model, x, t)
    assert model.evaluations == 1
    torch.testing.assert_close(found.score, data.score(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.velocity, data.velocity(x, t), rtol=1e-7, atol=1e-7)
    assert generator.score(x, t).equal(found.score) and generator.velocity(x, t).equal(found.velocity)


class TestObjectives:
    def batch(self, field, label=None):
        x = torch.randn(64, 2, generator=randomness(5))
        return Batch(x, label, randomness(6))

    def test_loss_of_the_score_is_added_with_its_weight(self):
        generator = awake(two_headed())
        losses = [FieldMatching(generator, score_weight=w)(generator, self.batch(gravity(2))) for w in (0.0, 1.0, 2.5)]
        assert (losses[1] - losses[0]).min() >= 0 and (losses[1] - losses[0]).mean() > 0.1
        torch.testing.assert_close(losses[2] - losses[0], 2.5 * (losses[1] - losses[0]), rtol=1e-3, atol=1e-3)

    def test_the_velocity_is_trained_as_without(self):
        """With weight 0 the loss is that of a network with one output, number for number."""
        two, one = awake(two_headed()), awake(two_headed())
        one.network.last.weight.data = one.network.last.weight[:2].clone()
        one.network.last.bias.data = one.network.last.bias[:2].clone()
        one.heads = 1
        losses = [FieldMatching(g, score_weight=0.0)(g, self.batch(gravity(2))) for g in (two, one)]
        torch.testing.assert_close(losses[0], losses[1])

    def test_stable_targets_are_means_over_the_batch(self):
        generator = two_headed(num_classes=2)
        label = torch.arange(64) % 2
        batch, objective = self.batch(gravity(2), label), StableField(generator, share=0.25)
        x, t = torch.randn(16, 2, generator=randomness(7)), torch.full((16,), 0.8)
        told = label[:16].where(torch.arange(16) % 3 > 0, 2)
        scores = objective.score(x, t, told, batch)
        for kind, reference in ((0, batch.x[label == 0]), (1, batch.x[label == 1]), (2, batch.x)):
            exact = EmpiricalField(gravity(2), reference).score(x, t)
            torch.testing.assert_close(scores[told == kind], exact[told == kind])

    @pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
    def test_weights_are_checked(self, weight, user_error):
        with user_error(f"score_weight is {weight}"):
            FieldMatching(two_headed(), score_weight=weight)


def test_training_reaches_the_exact_score(tmp_path):
    """Its squared error is in the median a fifth, and in the mean a third, of that of the best linear estimate."""
    data = toy("8gaussians").train
    points = data.values[:2000].double()
    torch.manual_seed(0)
    generator = Generator(gravity(2), MLP((2,), width=64, depth=2, heads=2), (2,)).calibrate(data.values)
    options = {"device": "cpu", "checkpoint_every": 500, "log_every": 500}
    trainer = Trainer(steps=350, batch_size=256, learning_rate=5e-3, warmup=20, ema_decay=0.98, **options)
    objective = FieldMatching(generator)
    fresh = errors_of_the_score(generator.eval(), points, objective)
    trained = trainer.fit(generator, objective, data, tmp_path)
    after = errors_of_the_score(trained, points, objective)
    assert after.median() < 0.25 * fresh.median()
    assert after.mean() < 0.4 * fresh.mean()
    x = trained.sample(400, Stochastic(30), seed=1)
    assert float(torch.cdist(x.double(), points).amin(1).quantile(0.9)) < 0.25


@torch.no_grad()
def errors_of_the_score(generator, points, objective):
    draws = randomness(7)
    x0 = points[torch.randint(len(points), (800,), generator=draws)]
    t = objective.times.draw(800, draws).clamp_min(0.1)
    x = generator.field.sample(x0, t, draws)
    prediction = generator(x, t)
    exact = EmpiricalField(generator.field, points).score(x, t)
    return ((prediction.score - exact) / prediction.score_error).square().mean(1)


class TestCheckpoints:
    def test_a_loaded_score_is_the_same_to_the_last_bit(self, tmp_path):
        generator = awake(two_headed()).eval()
        generator.save(tmp_path / "last")
        loaded = Generator.load(tmp_path / "last")
        x = torch.randn(5, 2, generator=randomness(3))
        assert loaded.score(x, 0.7).equal(generator.score(x, 0.7))
        assert loaded.sample(3, Stochastic(5), seed=1).equal(generator.sample(3, Stochastic(5), seed=1))

    def test_checkpoints_from_before_there_were_heads_load_and_have_no_score(self, tmp_path, user_error):
        generator = Generator(gravity(2), MLP((2,), 16, 1), (2,))
        generator.save(tmp_path / "last")
        description = checkpoints.read_description(tmp_path / "last")
        del description["model"]["network"]["heads"]
        checkpoints.write(
            tmp_path / "old", description, {"model": checkpoints.read_tensors(tmp_path / "last", "model")}
        )
        old = Generator.load(tmp_path / "old")
        x = torch.ones(3, 2)
        assert old.velocity(x, 1.0).equal(generator.velocity(x, 1.0))
        for ask in (lambda: old.score(x, 1.0), lambda: Stochastic(4)(old, x)):
            with user_error("StudentT", "heads=2", "no output for it"):
                ask()
        assert Stochastic(4, noise=0.0)(old, x).isfinite().all()

    def test_scores_learned_before_the_law_was_told_keep_their_unit(self, tmp_path):
        """That of noise of known scale, E[alpha^2 std^2 / (R^2 m) | P] + Var[1/m | P] P."""
        generator = awake(two_headed()).eval()
        generator.save(tmp_path / "last")
        tensors = checkpoints.read_tensors(tmp_path / "last", "model")
        assert tensors.pop("precondition.information").item() == pytest.approx(3 / 5)
        checkpoints.write(tmp_path / "old", checkpoints.read_description(tmp_path / "last"), {"model": tensors})
        old, x = Generator.load(tmp_path / "old"), torch.randn(5, 2, generator=randomness(3))
        assert old.velocity(x, 0.7).equal(generator.velocity(x, 0.7))
        (_, s), (_, now) = (model.precondition.with_score(x, 0.7) for model in (old, generator))
        assert s.skip.equal(now.skip) and (s.out > 1.02 * now.out).all()
        known = pfgmpp(2, 1e6)  # of one scale, so that the unit is in closed form
        one = two_headed(known).precondition
        one.std.fill_(0.5)
        one.information.fill_(0.0)
        out = one.with_score(x, 0.7)[1].out.flatten()
        torch.testing.assert_close(out, torch.full((5,), 0.5 / (0.25 + 0.49) ** 0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "network",
    [lambda heads: MLP((2, 3, 4), 16, 1, heads=heads), lambda heads: UNet((2, 3, 4), 8, heads=heads)],
    ids=["mlp", "unet"],
)
def test_outputs_are_stacked_along_the_first_axis(network):
    x, noise = torch.ones(5, 2, 3, 4), torch.zeros(5, 2)
    assert network(1)(x, noise).shape == x.shape
    assert network(2)(x, noise).shape == (5, 4, 3, 4)
