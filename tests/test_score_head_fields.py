"""The score beside the velocity for any field: its unit at all times, what is learned, and where there is none."""

import math

import pytest
import torch
from own_fields import Logistic, Sheared, cosine_laplace, half_uniform, narrowing, quadratic_logistic
from problems import FIELDS, coupled, swirling

from diffusion import Generator, checkpoints
from diffusion.conditional_score import flaw, information
from diffusion.data import toy
from diffusion.errors import UserError
from diffusion.fields import (
    AffineField,
    EmpiricalField,
    Field,
    RadialField,
    curved,
    gravity,
    laplace,
    pfgmpp,
    radial_exponential,
    radial_gravity,
    radial_stretched,
    radial_tanh,
    straight,
    uniform,
)
from diffusion.generator import learns_score
from diffusion.networks import MLP
from diffusion.objectives import FieldMatching, StableField
from diffusion.preconditioning import MeasuredPreconditioner, Preconditioner
from diffusion.samplers import Stochastic
from diffusion.trainer import Trainer

FEW = 48  # nodes of the tables of a field that is not affine

LEARNED = {
    "gravity_1": lambda: (gravity(1), 1),
    "gravity_2": lambda: (gravity(2), 2),
    "gravity_64": lambda: (gravity(64), 64),
    "pfgmpp_2": lambda: (pfgmpp(2, 128.0), 2),
    "pfgmpp_64": lambda: (pfgmpp(64, 128.0), 64),
    "half_a_degree": lambda: (pfgmpp(3, 0.5), 3),
    "laplace": lambda: (cosine_laplace(), 2),
    "laplace_64": lambda: (cosine_laplace(), 64),
    "logistic": lambda: (quadratic_logistic(), 3),
    "radial_text": lambda: (RadialField("1 - exp(-(r/t)^2 / 2)", 2, 80.0), 2),
    "radial_gravity_2": lambda: (radial_gravity(2), 2),
    "radial_gravity_16": lambda: (radial_gravity(16), 16),
    "radial_gravity_64": lambda: (radial_gravity(64), 64),
    "narrowing": lambda: (narrowing(), 3),
    "curved": lambda: (curved(laplace()), 2),
    "coupled": lambda: (coupled(), 2),
    "swirling": lambda: (swirling(), 2),
    "own": lambda: (Sheared(0.3), 4),
}
NONE = {
    "jumps_of_the_base": (half_uniform, 2, "Product", "Stein"),
    "jumps_of_the_prior": (lambda: straight(uniform()), 2, "TrajectoryField", "Stein"),
    "pole": (lambda: radial_tanh(2), 2, "RadialField", "no variance"),
    "pole_of_an_exponential": (lambda: radial_exponential(3), 3, "RadialField", "no variance"),
    "pole_at_first": (lambda: radial_stretched(64), 64, "RadialField", "no variance"),
}


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


def two_modes(number, dim, seed=0):
    """Data that are not Gaussian, not centred, and correlated."""
    x0 = 0.2 + 0.7 * torch.randn(number, dim, generator=randomness(seed), dtype=torch.float64)
    x0[::2] -= 1.0
    return x0


def preconditioner(field, dim):
    wrap = Preconditioner if isinstance(field, AffineField) else MeasuredPreconditioner
    precondition = wrap(field, (dim,), score=True)
    precondition.calibrate(two_modes(4000, dim))
    return precondition


def between_the_nodes(field, points):
    first, second = field.clock(FEW)[:2].tolist()
    return [first, *(first + share * (second - first) for share in (0.2, 0.5)), *field.clock(points)[1:].tolist()]


def two_headed(field, dim):
    torch.manual_seed(0)
    generator = Generator(field, MLP((dim,), 16, 1, heads=2), (dim,))
    torch.nn.init.normal_(generator.network.last.weight)
    return generator.calibrate(two_modes(200, dim)).eval()


@pytest.mark.parametrize("name", LEARNED)
def test_target_of_the_score_has_unit_variance_at_all_times(name):
    """On draws that calibration has not seen, of data that are not Gaussian."""
    field, dim = LEARNED[name]()
    precondition, draws = preconditioner(field, dim), randomness(3)
    x0 = two_modes(2000, dim, seed=1)
    for t in between_the_nodes(field, 7):
        x = field.sample(x0, t, draws)
        c, s = precondition.with_score(x, t)
        left = (s.unit * field.score(x, t, x0) - s.offset - s.skip * c.y) / s.out
        if s.out.median() < 1e-5:  # x tells the score, up to the rounding of the tables
            assert float(left.square().mean()) < 10, t
            continue
        assert 0.6 < float(left.square().mean()) < 1.4, t
        assert abs(float(left.mean())) < 0.4, t


@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
def test_unit_of_laplace_noise_is_its_closed_form(t):
    """J = 2 / variance: what the best linear estimate leaves of sigma score is J - sigma^2 / (alpha^2 std^2 + s^2)."""
    precondition = preconditioner(cosine_laplace(), 4)
    precondition.std.fill_(0.5)
    s = precondition.with_score(torch.randn(5, 4, generator=randomness(), dtype=torch.float64), t)[1]
    alpha, sigma = math.cos(0.5 * math.pi * t), math.sin(0.5 * math.pi * t)
    m = 0.25 * alpha**2 + 2 * sigma**2
    torch.testing.assert_close(s.skip.flatten(), torch.full((5,), -sigma / m).double())
    torch.testing.assert_close(
        s.out.flatten(), torch.full((5,), math.sqrt(1 - sigma**2 / m)).double(), rtol=1e-5, atol=0
    )


def test_information_is_that_of_the_closed_forms():
    assert information(laplace(), (3,)) == pytest.approx(2)
    assert information(Logistic(), (3,)) == pytest.approx(1 / 3, rel=0.01)
    base = gravity(5).base
    z = base.draw((20_000, 5), randomness(1), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(base.log_prob(z).sum(), z)
    assert information(base, (5,)) == pytest.approx(float(score.square().mean()), rel=0.03)


class TestWhatIsLearned:
    @pytest.mark.parametrize("name", ["laplace_64", "radial_gravity_64", "own"])
    def test_a_score_is_learned_where_there_is_a_smooth_density(self, name):
        field, dim = LEARNED[name]()
        assert flaw(field, (dim,)) is None

    @pytest.mark.parametrize("name", NONE)
    def test_where_none_can_be_regressed_on_it_is_refused(self, name, user_error):
        build, dim, law, why = NONE[name]
        assert not learns_score(build(), (dim,))
        with user_error("heads=2, expected 1", law, why):
            two_headed(build(), dim)

    @pytest.mark.parametrize("case", FIELDS, ids=[case.name for case in FIELDS])
    def test_the_verdict_on_every_field_is_what_is_known_of_it(self, case):
        gaussian = case.name.startswith(("variance_", "linear"))
        expected = not (case.has_jumps or case.has_pole or gaussian)
        assert learns_score(case.build(), (case.dim,)) == expected

    def test_a_field_without_a_density_is_refused_and_trains_without_a_score(self, user_error):
        class Silent(Sheared):
            log_prob = Field.log_prob

        field = Silent(0.3)
        assert not learns_score(field, (4,))
        with user_error("heads=2, expected 1", "Silent has no density"):
            two_headed(field, 4)
        assert Generator(field, MLP((4,), 16, 1), (4,)).heads == 1

    def test_a_density_that_fails_says_how(self, user_error):
        class Wrong(Sheared):
            def log_prob(self, x, t, x0):
                raise KeyError("width")

        class Unready(Sheared):
            def sample(self, x0, t, generator=None):
                raise NotImplementedError

        assert flaw(Unready(0.3), (4,)) == "its score fails, NotImplementedError"
        with user_error("heads=2, expected 1", "KeyError", "width"):
            two_headed(Wrong(0.3), 4)

    def test_loading_asks_for_no_verdict(self, monkeypatch, tmp_path):
        """It takes seconds, and a trained network is past it."""
        field = LEARNED["laplace"]()[0]
        two_headed(field, 2).save(tmp_path / "last")
        monkeypatch.setattr("diffusion.generator.flaw", lambda field, shape: "it is late")
        assert Generator.load(tmp_path / "last", field=field).heads == 2
        with pytest.raises(UserError, match="it is late"):
            two_headed(field, 2)

    @pytest.mark.parametrize("name", ["laplace", "curved"])
    def test_without_an_output_for_it_the_remedy_is_one(self, name, user_error):
        field, dim = LEARNED[name]()
        with user_error("expected Gaussian", "heads=2"):
            Generator(field, MLP((dim,), 16, 1), (dim,)).score(torch.zeros(1, dim), 0.5)


@pytest.mark.parametrize("name", ["laplace", "radial_gravity_16", "swirling", "own"])
class TestHeads:
    def test_a_perfect_network_gives_score_and_velocity(self, name):
        field, dim = LEARNED[name]()
        generator = two_headed(field, dim)
        x0, t = two_modes(6, dim, seed=2), field.clock(6)
        x = field.sample(x0, t, randomness(4))
        exact = EmpiricalField(field, two_modes(50, dim))
        target, score = exact.target(x, t), exact.score(x, t)
        c, s = generator.precondition.with_score(x, t)
        unit = s.unit.view(-1, *[1] * (x.dim() - 1))
        answer = torch.cat(
            [(target - c.offset - c.skip * c.y) / c.out, (unit * score - s.offset - s.skip * c.y) / s.out], 1
        )
        generator.network.forward = lambda *inputs: answer
        torch.testing.assert_close(generator.score(x, t), score, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(generator.velocity(x, t), exact.velocity(x, t), rtol=1e-7, atol=1e-7)
        assert generator(x, t).score_error.shape == (6, 1)

    def test_velocities_are_those_of_one_head(self, name):
        field, dim = LEARNED[name]()
        generator = two_headed(field, dim)
        x, t = torch.randn(5, dim, generator=randomness(5)), float(field.clock(5)[2])
        one = Generator(field, MLP((dim,), 16, 1), (dim,)).calibrate(two_modes(200, dim))
        for a, b in zip(generator.precondition(x, t), one.precondition(x, t), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extremes_give_finite_scores(self, name, dtype):
        field, dim = LEARNED[name]()
        generator = two_headed(field, dim)
        x = torch.ones(5, dim, dtype=dtype) * torch.tensor([0, 1e-6, 1, 1e6, 1e9], dtype=dtype)[:, None]
        for t in (field.t_min, field.horizon):
            prediction = generator(x, t)
            assert prediction.score.isfinite().all() and (prediction.score_error > 0).all()
            assert prediction.score.dtype == dtype

    def test_stochastic_samplers_and_checkpoints_have_it(self, name, tmp_path):
        field, dim = LEARNED[name]()
        generator = two_headed(field, dim)
        generator.save(tmp_path / "last")
        loaded = Generator.load(tmp_path / "last", field=field)
        x = torch.randn(5, dim, generator=randomness(3))
        t = float(field.clock(5)[2])
        assert loaded.score(x, t).equal(generator.score(x, t))
        found = [model.sample(3, Stochastic(5), seed=1) for model in (loaded, generator)]
        assert found[0].equal(found[1]) and found[0].isfinite().all()


def test_checkpoints_without_a_score_are_those_of_before(tmp_path):
    """Fields that had no score then: nothing new is stored for one output, so that theirs still load."""
    for field in (cosine_laplace(), curved(laplace())):
        generator = Generator(field, MLP((2,), 16, 1), (2,))
        generator.save(tmp_path / "last")
        names = checkpoints.read_tensors(tmp_path / "last", "model")
        assert not [name for name in names if "score" in name or "information" in name]


@pytest.mark.parametrize(
    ("name", "objective"), [("laplace", FieldMatching), ("laplace", StableField), ("radial_gravity_2", FieldMatching)]
)
def test_training_reaches_the_exact_score(name, objective, tmp_path):
    """In its unit, what the trained score misses is in the median a third of what the best linear estimate does."""
    data, field = toy("8gaussians").train, LEARNED[name]()[0]
    points = data.values[:1500].double()
    torch.manual_seed(0)
    generator = Generator(field, MLP((2,), width=64, depth=2, heads=2), (2,)).calibrate(data.values)
    options = {"device": "cpu", "checkpoint_every": 500, "log_every": 500}
    trainer = Trainer(steps=200, batch_size=256, learning_rate=5e-3, warmup=20, ema_decay=0.98, **options)
    goal = objective(generator, **({"share": 0.5} if objective is StableField else {}), score_weight=1.0)
    fresh = errors_of_the_score(generator.eval(), points, goal)
    trained = trainer.fit(generator, goal, data, tmp_path)
    after = errors_of_the_score(trained, points, goal)
    assert after.median() < 0.35 * fresh.median()
    assert after.mean() < 0.5 * fresh.mean()


@torch.no_grad()
def errors_of_the_score(generator, points, objective):
    draws, field = randomness(7), generator.field
    x0 = points[torch.randint(len(points), (500,), generator=draws)]
    t = objective.times.draw(500, draws).clamp_min(0.1)
    x = field.sample(x0, t, draws)
    prediction = generator(x, t)
    exact = EmpiricalField(field, points).score(x, t)
    return ((prediction.score - exact) / prediction.score_error).square().mean(1)
