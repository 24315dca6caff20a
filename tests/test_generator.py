"""The generator: preconditioning, exactness given a perfect network, checkpoints."""

import importlib
import math
import sys

import pytest
import torch
import yaml
from problems import AFFINE, CLOSED_FORM, GaussianMixture, cosine_laplace, lines, mixture, names, times
from torch import nn

from diffusion import Generator, checkpoints, specs
from diffusion.expressions import Expression
from diffusion.fields import AffineField, StudentT, gravity, linear, pfgmpp, variance_exploding
from diffusion.networks import MLP
from diffusion.objectives import NoiseLevels
from diffusion.preconditioning import Preconditioner
from diffusion.samplers import Heun

DIM, STD = 64, 0.5
# In 64 dimensions whatever the list's own dimension, since how well a point reveals its noise level depends on it.
HIGH_DIMENSIONAL = {case.name: case.build() for case in AFFINE if case.build().base.dim is None}
HEAVY = {f"D={D}": pfgmpp(DIM, D) for D in (0.5, 1.0, 3.5, 128.0)}


def normal_data(field, t, number=4000):
    """Gaussian data with a known mean and STD in 64 dimensions, its centre and points of its law at time t."""
    randomness = torch.Generator().manual_seed(0)
    centre = torch.randn(DIM, generator=randomness, dtype=torch.float64)
    x0 = centre + STD * torch.randn(number, DIM, generator=randomness, dtype=torch.float64)
    return x0, centre, field.transport(x0, field.draw(x0.shape, randomness, dtype=torch.float64), t)


def preconditioner(field, centre):
    """Of normal data about `centre` with STD in each coordinate."""
    precondition = Preconditioner(field, centre.shape)
    precondition.centre.copy_(centre)
    precondition.std.fill_(STD)
    return precondition


def network_input_and_target(field, t):
    """What the network sees and what it is to answer, for normal data: (number, 64) each."""
    x0, centre, x = normal_data(field, t)
    precondition = preconditioner(field, centre)
    c = precondition(x, t)
    return c.scale * c.y, (x0 - precondition.centre - c.skip * c.y) / c.out


class Ideal(nn.Module):
    """A network that gives the answer that it was told, and remembers the question."""

    num_classes = 0

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x, noise, label=None):
        self.seen = (x, noise, label)
        return self.answer


def ideal_generator(data: GaussianMixture, x, t):
    """A calibrated generator whose network answers as it must at (x, t) for the exact posterior mean of `data`."""
    generator = Generator(data.field, Ideal(), data.means.shape[1:])
    generator.calibrate(data.draw(2000, torch.Generator().manual_seed(0)).float())
    c, centre = generator.precondition(x, t), generator.precondition.centre.double()
    generator.network.answer = (data.denoised(x, t) - centre - c.skip * c.y) / c.out
    return generator, c


def small_generator(field=None, num_classes=3, width=16):
    torch.manual_seed(0)
    generator = Generator(field or gravity(4), MLP((2, 2), width, 1, num_classes), (2, 2))
    with torch.no_grad():
        nn.init.normal_(generator.network.last.weight)
    return generator.calibrate(torch.randn(50, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.7 + 0.2)


class TestPreconditioner:
    @pytest.mark.parametrize("name", HIGH_DIMENSIONAL)
    def test_input_and_target_have_unit_variance_at_every_noise_level(self, name):
        """Within 3 %: the spread of 256,000 numbers that share 4,000 draws of the data."""
        field = HIGH_DIMENSIONAL[name]
        for t in times(field, 7).tolist():
            for values in network_input_and_target(field, t):
                assert float(values.square().mean()) == pytest.approx(1, abs=0.03)

    @pytest.mark.parametrize("name", HEAVY)
    def test_heavy_tails_keep_the_input_and_the_target_at_unit_variance(self, name):
        """Within 3 % for the input and 25 % for the target, of which a few points have much of the variance."""
        field = HEAVY[name]
        for t in times(field, 7).tolist():
            value, target = network_input_and_target(field, t)
            assert float(value.square().mean()) == pytest.approx(1, abs=0.03)
            assert value.square().mean(1).max() < 2
            assert float(target.square().mean()) == pytest.approx(1, abs=0.25)

    @pytest.mark.parametrize("name", HEAVY)
    def test_mean_loss_of_a_fresh_network_is_one_in_training(self, name):
        """Over the law of the training times."""
        field = HEAVY[name]
        times = field.clock(4096)
        levels = field.log_noise_to_signal(times) - math.log(STD)
        t = NoiseLevels(times, levels).draw(4000, torch.Generator().manual_seed(0))
        value, target = network_input_and_target(field, t)
        assert float(value.square().mean()) == pytest.approx(1, abs=0.03)
        assert float(target.square().mean()) == pytest.approx(1, abs=0.05)

    @pytest.mark.parametrize("case", **names(AFFINE))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extremes_give_finite_coefficients(self, case, dtype):
        field = case.build()
        precondition = preconditioner(field, torch.zeros(case.dim))
        x = torch.ones(5, case.dim, dtype=dtype) * torch.tensor([0, 1e-6, 1, 1e6, 1e9], dtype=dtype)[:, None]
        for t in (field.t_min, field.horizon, torch.full((5,), field.horizon, dtype=dtype)):
            c = precondition(x, t)
            for value in c:
                assert value.dtype == dtype
                assert value.isfinite().all()
            assert c.noise.abs().max() < 1.8  # log(1000) / 4
            assert (c.out > 0).all()
            assert (c.out <= STD * (1 + 1e-6)).all()

    def test_features_are_the_log_noise_levels(self):
        """log(noise / (alpha std)) / 4, of what x reveals and of what t says, in the middle of their range."""
        field = gravity(DIM)
        x = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = 40 * x / x.square().mean(1, keepdim=True).sqrt()
        c = preconditioner(field, torch.zeros(DIM))(x, 0.25)
        assert c.noise[:, 0].tolist() == pytest.approx([math.log(40 / STD) / 4] * 3, rel=0.01)
        assert c.noise[:, 1].tolist() == pytest.approx([math.log(0.5) / 4] * 3, rel=1e-5)

    def test_coefficients_of_edm(self):
        """Karras et al. 2022, table 1, for data without a mean."""
        t = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64)
        c = preconditioner(variance_exploding(), torch.zeros(4))(torch.ones(3, 4, dtype=torch.float64), t)
        total = t**2 + STD**2
        torch.testing.assert_close(c.scale[:, 0], total.rsqrt())
        torch.testing.assert_close(c.skip[:, 0], STD**2 / total)
        torch.testing.assert_close(c.out[:, 0], t * STD * total.rsqrt())

    def test_each_point_has_its_own_coefficients(self):
        field = gravity(DIM)
        precondition = preconditioner(field, torch.ones(DIM))
        _, _, x = normal_data(field, 1.0, 6)
        t = times(field, 6)
        together = precondition(x, t)
        for i in range(6):
            for a, b in zip(together, precondition(x[i : i + 1], float(t[i])), strict=True):
                torch.testing.assert_close(a[i : i + 1], b)


@pytest.mark.parametrize("case", **names(CLOSED_FORM))
def test_a_perfect_network_gives_the_exact_denoised_noise_and_velocity(case):
    field, _, z, t, _ = lines(case)
    data = mixture(field, case.dim)
    x = field.transport(data.means[torch.arange(len(t)) % 3], z, t)
    generator, c = ideal_generator(data, x, t)
    sigma = field.sigma(t)[:, None]
    rounding = 1 + x.abs() / sigma
    for name, tolerance in (("denoised", 1 + x.abs()), ("noise", rounding), ("velocity", rounding * (1 + 10 / sigma))):
        error = (getattr(generator, name)(x, t) - getattr(data, name)(x, t)).abs() / tolerance
        assert error.max() < 1e-11, name
    seen = generator.network.seen
    torch.testing.assert_close(seen[0], c.scale * c.y)
    torch.testing.assert_close(seen[1], c.noise)


def test_score_of_a_gaussian_field_is_exact():
    case = next(case for case in CLOSED_FORM if case.name == "linear")
    field, _, z, t, _ = lines(case)
    data = mixture(field, case.dim)
    x = field.transport(data.means[torch.arange(len(t)) % 3], z, t)
    generator, _ = ideal_generator(data, x, t)
    torch.testing.assert_close(generator.score(x, t), data.score(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("field", "law"), [(gravity(4), "StudentT"), (cosine_laplace(), "Product")])
def test_score_of_another_base_law_is_refused(field, law, user_error):
    with user_error(law, "Gaussian"):
        small_generator(field).score(torch.zeros(1, 2, 2), 0.5)


def test_results_have_the_dtype_of_the_points_and_the_network_keeps_its_own():
    generator = small_generator(variance_exploding())
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(3, 2, 2, dtype=dtype)
        for value in generator.estimate(x, 0.5):
            assert value.dtype == dtype
        assert generator.score(x, torch.ones(3, dtype=dtype)).dtype == dtype


def test_labels_reach_the_network():
    generator = small_generator()
    x = torch.ones(3, 2, 2)
    a, b = (generator.denoised(x, 1.0, torch.full((3,), k)) for k in (0, 1))
    assert (a - b).abs().min() > 1e-6
    assert generator.denoised(x, 1.0).equal(generator.denoised(x, 1.0, torch.full((3,), 3)))


class TestCalibrate:
    def test_centre_and_spread_are_those_of_the_data(self):
        x0 = torch.randn(2000, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.3
        x0 += torch.tensor([[1.0, 2.0], [3.0, 1000.0]])
        generator = small_generator().calibrate(x0)
        torch.testing.assert_close(generator.precondition.centre, x0.double().mean(0).float())
        assert float(generator.precondition.std) == pytest.approx(0.3, rel=0.05)  # about the centre of each coordinate

    def test_data_without_variation_is_refused(self, user_error):
        with user_error("do not vary"):
            small_generator().calibrate(torch.ones(5, 2, 2))

    def test_data_of_another_shape_is_refused(self, user_error):
        with user_error("(5, 3)", "(B, 2, 2)"):
            small_generator().calibrate(torch.ones(5, 3))


class TestSample:
    def test_labels_and_seeds(self):
        generator = small_generator()
        first = generator.sample(4, Heun(4), seed=1, label=2)
        assert first.equal(generator.sample(4, Heun(4), seed=1, label=torch.full((4,), 2)))
        fewer = generator.sample(2, Heun(4), seed=1, label=2)
        torch.testing.assert_close(first[:2], fewer, rtol=1e-4, atol=1e-4)  # float32 networks round by batch size
        assert not torch.isclose(first, generator.sample(4, Heun(4), seed=1, label=1)).any()
        assert not torch.isclose(first, generator.sample(4, Heun(4), seed=2, label=2)).any()

    @pytest.mark.parametrize("label", [-1, 3, torch.tensor([0, 1, 3])])
    def test_labels_out_of_range_are_refused(self, label, user_error):
        with user_error("0 to 2"):
            small_generator().sample(3, Heun(3), label=label)

    def test_labels_need_classes(self, user_error):
        with user_error("label is [0]"):
            small_generator(num_classes=0).sample(3, Heun(3), label=0)

    def test_points_of_another_shape_are_refused(self, user_error):
        with user_error("(5, 4)", "(B, 2, 2)"):
            small_generator().velocity(torch.ones(5, 4), 1.0)


def outputs(generator):
    x = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(3))
    label = None if not generator.num_classes else torch.arange(5) % generator.num_classes
    return generator.eval().denoised(x, torch.linspace(0.1, 0.9, 5), label)


class TestCheckpoints:
    @pytest.mark.parametrize("field", [gravity(4), pfgmpp(4, 3.5, horizon=40.0), linear()], ids=["1", "2", "3"])
    def test_a_loaded_generator_is_the_same_to_the_last_bit(self, field, tmp_path):
        generator = small_generator(field)
        generator.save(tmp_path / "last")
        loaded = Generator.load(tmp_path / "last")
        assert not loaded.training
        assert outputs(loaded).equal(outputs(generator))
        assert (loaded.field.horizon, loaded.field.t_min) == (field.horizon, field.t_min)
        samples = [g.sample(3, Heun(4), seed=1, label=1) for g in (generator, loaded)]
        assert samples[0].equal(samples[1])

    def test_parts_that_no_file_can_hold_are_asked_for(self, tmp_path, user_error):
        """A field made of lambdas is passed again when loading."""
        field = AffineField(lambda t: 1 - t, lambda t: 2 * t, StudentT(4.0, 4), 1.0)
        generator = small_generator(field)
        generator.save(tmp_path / "own")
        with user_error("field", "field=..."):
            Generator.load(tmp_path / "own")
        assert outputs(Generator.load(tmp_path / "own", field=field)).equal(outputs(generator))

    def test_defaults_are_written_down(self, tmp_path):
        """So that a checkpoint means the same after a default has changed."""
        small_generator(gravity(4)).save(tmp_path / "last")
        model = checkpoints.read_description(tmp_path / "last")["model"]
        assert model["field"] == {
            "_target_": "diffusion.fields.affine.gravity",
            "dim": 4,
            "horizon": 80,
            "t_min": 0.002,
        }
        assert model["network"]["depth"] == 1
        assert model["shape"] == [2, 2]

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_weights(self, keep, tmp_path, user_error):
        small_generator().save(tmp_path / "last")
        path = tmp_path / "last" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with user_error(path, "damaged"):
            Generator.load(tmp_path / "last")

    @pytest.mark.parametrize("content", [b"model: {_target_: [", b"\xff\xfe\x00\x81", b"", b"- 1\n", b"just words"])
    def test_damaged_description(self, content, tmp_path, user_error):
        small_generator().save(tmp_path / "last")
        path = tmp_path / "last" / "checkpoint.yaml"
        path.write_bytes(content)
        with user_error(path, "damaged"):
            Generator.load(tmp_path / "last")

    def test_weights_of_another_architecture(self, tmp_path, user_error):
        small_generator(width=16).save(tmp_path / "narrow")
        small_generator(width=32).save(tmp_path / "wide")
        weights = (tmp_path / "narrow" / "model.safetensors").read_bytes()
        (tmp_path / "wide" / "model.safetensors").write_bytes(weights)
        with user_error("another architecture", "16", "32"):
            Generator.load(tmp_path / "wide")

    def test_missing_files(self, tmp_path, user_error):
        with user_error("no checkpoint", tmp_path / "nowhere"):
            Generator.load(tmp_path / "nowhere")
        small_generator().save(tmp_path / "last")
        (tmp_path / "last" / "model.safetensors").unlink()
        with user_error("model.safetensors"):
            Generator.load(tmp_path / "last")

    def test_a_run_is_not_a_checkpoint_and_the_message_says_where_it_is(self, tmp_path, user_error):
        small_generator().save(tmp_path / "checkpoints" / "last")
        with user_error(tmp_path / "checkpoints" / "last"):
            Generator.load(tmp_path)

    @pytest.mark.parametrize(
        "model", [None, "diffusion.generator.Generator", {"_target_": "diffusion.networks.MLP", "shape": [2]}]
    )
    def test_a_checkpoint_of_something_else(self, model, tmp_path, user_error):
        small_generator().save(tmp_path / "last")
        path = tmp_path / "last" / "checkpoint.yaml"
        path.write_text(yaml.safe_dump({"model": model, "complete": True}))
        with user_error(tmp_path / "last"):
            Generator.load(tmp_path / "last", field=gravity(4), network=MLP((2, 2))) if model is None else (
                Generator.load(tmp_path / "last")
            )


class TestTrust:
    """A description names what to import and call: only what belongs there may be called."""

    @pytest.mark.parametrize(
        "target",
        ["os.system", "builtins.eval", "diffusionx.run", "subprocess.run", "", None, 3, "torch.load", "diffusion"],
    )
    def test_targets_outside_the_package_are_refused_before_anything_is_called(self, target, tmp_path, user_error):
        marker = tmp_path / "called"
        with user_error(repr(target)):
            specs.build({"_target_": target, "command": f"touch {marker}"})
        assert not marker.exists()

    def test_targets_outside_the_package_are_refused_inside_a_checkpoint(self, tmp_path, user_error):
        small_generator().save(tmp_path / "last")
        path = tmp_path / "last" / "checkpoint.yaml"
        description = checkpoints.read_description(tmp_path / "last")
        description["model"]["field"] = {"_target_": "os.system", "command": "true"}
        path.write_text(yaml.safe_dump({**description, "complete": True}))
        with user_error("'os.system'"):
            Generator.load(tmp_path / "last")

    def test_a_description_cannot_widen_its_own_trust(self, tmp_path):
        """diffusion.specs.build is itself inside the package, and reading a file gives a mapping not yet built."""
        (tmp_path / "evil").mkdir()
        inner = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
        (tmp_path / "evil" / "checkpoint.yaml").write_text(yaml.safe_dump({**inner, "complete": True}))
        read = {"_target_": "diffusion.checkpoints.read_description", "folder": str(tmp_path / "evil")}
        with pytest.raises(ValueError):
            specs.build({"_target_": "diffusion.specs.build", "spec": read, "trust": ["os"]})
        assert not (tmp_path / "made").exists()

    def test_own_modules_are_trusted_by_name(self, tmp_path, monkeypatch, user_error):
        (tmp_path / "own_schedule.py").write_text(
            "def sigma(t):\n    return 2 * t\n\ndef alpha(t):\n    return 1 - t\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        own = importlib.import_module("own_schedule")
        generator = small_generator(AffineField(own.alpha, own.sigma, StudentT(4.0, 4), 1.0))
        generator.save(tmp_path / "last")
        sys.modules.pop("own_schedule")
        for trust in (None, (), "own", "own_schedule.other", ["os", "sys"]):
            with user_error("'own_schedule.alpha'", "load with trust=own_schedule"):
                Generator.load(tmp_path / "last", trust=trust)
        assert "own_schedule" not in sys.modules
        for trust in ("own_schedule", ["other", "own_schedule"]):
            assert outputs(Generator.load(tmp_path / "last", trust=trust)).equal(outputs(generator))
        sys.modules.pop("own_schedule")

    def test_a_formula_needs_no_trust(self, tmp_path):
        field = AffineField(Expression("1 - t", ["t"]), Expression("2*t", ["t"]), StudentT(4.0, 4), 1.0)
        small_generator(field).save(tmp_path / "last")
        assert outputs(Generator.load(tmp_path / "last")).equal(outputs(small_generator(field)))
