"""The audit of a velocity: right ones pass at every time, wrong ones are seen where they are wrong, and by how much."""

import json
import math

import pytest
import torch
from problems import gradient, mixture

from diffusion import audit as package
from diffusion.audit import Audit, audit
from diffusion.fields import EmpiricalField, curved, gravity, laplace, linear, radial_stretched, variance_exploding

FIELD = {
    "gravity": lambda: gravity(2),
    "linear": lambda: linear(2),
    "stretched": lambda: radial_stretched(2),
    "variance_exploding": lambda: variance_exploding(2),
}


def data(number=60, dim=2, scale=1.0):
    """Three modes, well apart."""
    return scale * mixture(linear(dim), dim).draw(number, torch.Generator().manual_seed(0))


class Altered:
    """A model whose velocity is another's, changed by change(v, x, t) where first <= t <= last."""

    def __init__(self, right, change, first=0.0, last=math.inf):
        self.right, self.change, self.first, self.last = right, change, first, last
        self.field, self.device = right.field, right.device

    def velocity(self, x, t):
        v = self.right.velocity(x, t)
        wrong = ((t >= self.first) & (t <= self.last)).view(-1, *[1] * (x.dim() - 1))
        return torch.where(wrong, self.change(v, x, t), v)


def scaled(model, factor, *band):
    return Altered(model, lambda v, x, t: factor * v, *band)


def violated(found):
    return (found.z.abs().amax(1) > found.limit).tolist()


class TestAnExactVelocity:
    @pytest.mark.parametrize("name", FIELD)
    def test_residuals_are_standard_normal_at_every_time(self, name):
        """Single points rule the residual near the data, which is then smaller, never larger, than a normal one."""
        x0, field = data(), FIELD[name]()
        found = audit(EmpiricalField(field, x0), x0, times=12, draws=2048)
        assert found.z.shape == (12, 64)
        assert found.times.equal(field.clock(12))
        assert found.z.isfinite().all()
        assert not any(violated(found))
        late = found.z[3:]
        assert 0.75 < late.square().mean().sqrt() < 1.25
        assert late.square().mean(1).sqrt().max() < 2
        assert 0.55 < (late.abs() < 1).double().mean() < 0.8  # 0.683 of a normal law
        assert found.share.max() < 0.06
        assert (found.share == 0).sum() >= 3  # no more than chance is left: below it as often as above

    def test_lines_of_any_shape(self):
        x0 = data(20)
        found = audit(EmpiricalField(curved(laplace()), x0), x0, times=6, draws=512, functions=16)
        assert not any(violated(found))

    def test_a_smooth_law(self):
        """The closed form of a mixture against many points of it, where each of them hardly counts."""
        law = mixture(gravity(2))
        x0 = law.draw(40_000, torch.Generator().manual_seed(1))
        found = audit(law, x0, times=6, draws=1024, functions=32)
        assert not any(violated(found))

    def test_images(self):
        """The same points in another shape have the same residuals."""
        x0 = data(40, 4)
        results = [audit(EmpiricalField(linear(), x), x, 4, 512, 16) for x in (x0, x0.view(-1, 1, 2, 2))]
        torch.testing.assert_close(results[0].z[1:], results[1].z[1:], rtol=1e-6, atol=1e-6)


class TestAWrongVelocity:
    @pytest.mark.parametrize("name", ["gravity", "stretched", "variance_exploding"])
    def test_five_percent_in_a_band_of_times_are_seen_there_alone(self, name):
        x0, field = data(), FIELD[name]()
        clock = field.clock(12).tolist()
        model = scaled(EmpiricalField(field, x0), 1.05, 0.99 * clock[6], 1.01 * clock[8])
        found = audit(model, x0, times=12, draws=4096)
        assert violated(found) == [6 <= k <= 8 for k in range(12)], found.table()
        marks = ["violated" in line for line in found.table().splitlines()[1:13]]
        assert marks == violated(found)

    def test_linear_five_percent(self):
        """Of narrow data, which spread all the way; wide ones hardly change their size around t = 1/2."""
        x0, field = data(scale=0.2), linear(2)
        clock = field.clock(8).tolist()
        found = audit(scaled(EmpiricalField(field, x0), 0.95, 0.99 * clock[4], 1.01 * clock[5]), x0, 8)
        assert violated(found) == [k in (4, 5) for k in range(8)], found.table()

    def test_a_drift_and_a_shrinkage_are_told_from_chance(self):
        x0, model = data(), EmpiricalField(linear(2), data())
        for change in (lambda v, x, t: v + 0.3, lambda v, x, t: v - 0.2 * x):
            found = audit(Altered(model, change), x0, times=5, draws=4096)
            assert all(violated(found)), found.table()

    def test_a_turn_about_the_centre_is_seen_where_the_law_is_not_round(self):
        """It leaves all functions of the distance alone: only waves can tell."""
        x0 = data()
        model = Altered(EmpiricalField(linear(2), x0), lambda v, x, t: v + torch.stack([-x[:, 1], x[:, 0]], 1))
        seen = violated(audit(model, x0, times=5, draws=4096))
        assert seen[:2] == [True, True]


class TestShare:
    def one_gaussian(self, field, std, number=40_000):
        """x0 ~ N(0, std^2), and its exact velocity (x - E[x0|x]) / t."""
        x0 = std * torch.randn(number, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        class Exact:
            device = x0.device

            def velocity(self, x, t):
                t = t[:, None]
                return x * t / (std**2 + t**2)

        Exact.field = field
        return x0, Exact()

    def test_share_is_the_relative_error_of_the_mean_flux(self):
        """For v = c E[f|x] the residual's mean is (1 - c) E[f . grad phi], whatever the functions: shares are
        proportional to |1 - c|, and c = 0 tells the factor."""
        x0, exact = self.one_gaussian(variance_exploding(2, horizon=20.0), 1.0)
        factors = (0.0, 0.5, 0.9, 1.1)
        found = {c: audit(scaled(exact, c), x0, times=6, draws=8192).share[3:] for c in factors}
        for c in factors[1:]:
            torch.testing.assert_close(found[c], abs(1 - c) * found[0.0], rtol=0.1, atol=4e-3)
        assert found[0.0].max() < 1

    def test_share_of_no_velocity_is_what_independent_draws_give(self, monkeypatch):
        """The factor itself: root mean square over functions of E[f . grad phi], over that of f . grad phi, with the
        gradient by autograd on own draws."""
        field, made = variance_exploding(2, horizon=20.0), []
        original = package.Bumps

        def recorder(*parts):
            made.append(original(*parts))
            return made[-1]

        monkeypatch.setattr(package, "Bumps", recorder)
        x0, exact = self.one_gaussian(field, 1.0)
        found = audit(scaled(exact, 0.0), x0, times=4, draws=8192, functions=24)
        (phi,) = made
        draws = torch.Generator().manual_seed(9)
        for k in (2, 3):
            t = float(found.times[k])
            start = x0[torch.randperm(len(x0), generator=draws)[:8000]]
            x = field.sample(start, t, draws)
            f = field.velocity(x, t, start)
            centre = x0.mean(0)
            scale = (x - centre).square().mean(1).median().sqrt()
            at = x.clone().requires_grad_()
            value = phi.value((at - centre) / scale)
            flux = torch.stack([(gradient(value[:, j], at) * f).sum(1) for j in range(value.shape[1])], 1).detach()
            expected = (flux.mean(0).square().mean() / flux.square().mean()).sqrt()
            assert float(found.share[k]) == pytest.approx(float(expected), rel=0.1)


class TestFunctions:
    def test_waves_lie_along_gaps_of_the_data_and_anywhere(self, monkeypatch):
        """Data on one axis: half of the waves see only it. Lengths are from 1/2 to 8, evenly in the logarithm."""
        made, original = [], package.Bumps
        monkeypatch.setattr(package, "Bumps", lambda *parts: made.append(original(*parts)) or made[-1])
        x0 = torch.zeros(30, 3, dtype=torch.float64)
        x0[:, 0] = torch.arange(30)
        audit(EmpiricalField(linear(3), x0), x0, times=2, draws=4, functions=200)
        wave = made[0].wave
        length = wave.norm(dim=1)
        along = (wave[:, 0].abs() / length) > 1 - 1e-12
        assert 90 <= int(along[:100].sum()) <= 100  # a point and itself have no gap
        assert not along[100:].any()
        assert 0.5 <= length.min() < 0.6 and 7 < length.max() <= 8
        assert float(length.log().mean()) == pytest.approx(math.log(2), abs=0.15)
        assert made[0].phase.max() - made[0].phase.min() > 6

    def test_the_batch_is_a_matter_of_memory(self):
        """All draws count, also those of the last, smaller batch."""
        seen = []
        x0 = data()
        model = Altered(EmpiricalField(linear(2), x0), lambda v, x, t: seen.append(len(x)) or v)
        audit(model, x0, times=2, draws=500, functions=3, batch_size=200)
        assert seen == [200, 200, 100] * 2

    def test_same_seed_same_result(self):
        x0 = data()
        model = EmpiricalField(linear(2), x0)
        a, b, c = (audit(model, x0, 3, 200, 8, seed) for seed in (0, 0, 1))
        assert a.z.equal(b.z) and a.share.equal(b.share)
        assert not torch.isclose(a.z[1:], c.z[1:]).any()

    @pytest.mark.parametrize(
        ("number", "options"),
        [(1, {}), (5, {"times": 1}), (5, {"draws": 1}), (5, {"functions": 0}), (5, {"times": -2})],
    )
    def test_bad_arguments_are_refused(self, number, options, user_error):
        x0 = data()[:number]
        with user_error(
            f"{number} data points", f"{options.get('times', 16)} times", "expected at least 2, 2, 2, 1 and 1"
        ):
            audit(EmpiricalField(linear(2), x0), x0, **options)


class TestReport:
    def test_limit_is_exceeded_by_one_exact_velocity_in_a_thousand(self):
        """The largest of m independent normal numbers."""
        found = Audit(torch.arange(4), torch.zeros(4, 8), torch.zeros(4), 100)
        largest = torch.randn(400_000, 32, generator=torch.Generator().manual_seed(0)).abs().amax(1)
        assert float((largest > found.limit).double().mean()) == pytest.approx(1e-3, abs=3e-4)

    def test_table_and_plain_data_agree(self):
        z = torch.tensor([[3.0, -4.0], [30.0, 40.0]], dtype=torch.float64)
        found = Audit(torch.tensor([0.5, 1.0]).double(), z, torch.tensor([0.0, 0.125]).double(), 2048)
        plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert (plain["draws"], plain["functions"], plain["limit"]) == (2048, 2, found.limit)
        assert plain["times"] == [
            {"time": 0.5, "rms_z": pytest.approx(math.sqrt(12.5)), "max_z": 4, "share": 0},
            {"time": 1.0, "rms_z": pytest.approx(math.sqrt(1250)), "max_z": 40, "share": 0.125},
        ]
        header, first, second, about = found.table().splitlines()
        assert first.split() == ["0.5", "3.54", "4.0", "0.00%"] + (["violated"] if found.limit < 4 else [])
        assert second.split() == ["1", "35.36", "40.0", "12.50%", "violated"]
        assert "2,048 draws" in about and f"{found.limit:.1f}" in about and "time" in header

    def test_data_that_never_mix_leave_no_gap(self):
        """Far apart, each x_t knows its x0 and the residual is 0 for every draw: not a number of standard errors."""
        x0 = torch.tensor([[-1e6, 0.0], [1e6, 0.0]], dtype=torch.float64)
        found = audit(EmpiricalField(variance_exploding(2), x0), x0, times=4, draws=64, functions=8)
        assert not any(violated(found))
        json.dumps(found.to_dict(), allow_nan=False)
