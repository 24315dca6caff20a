"""Wrong fields are refused, each by the check that is made for its fault; right ones pass, whatever the seed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from own_fields import Sheared, quadratic_logistic
from problems import FIELDS, names
from scipy import stats
from torch import Tensor

from diffusion.fields import (
    AffineField,
    Field,
    Gaussian,
    RadialField,
    Unavailable,
    checks,
    draws,
    expand_time,
    gravity,
    linear,
    pfgmpp,
    totals,
    validate,
    variance_exploding,
)
from diffusion.fields.checks import Subject, in_standard_errors, judge, largest_allowed, skipped
from diffusion.fields.draws import legendre
from diffusion.fields.lines import follow

CHECKS = ["continuity (strong)", "continuity (weak)", "field lines", "sampler", "mass", "start", "end", "prior"]
NOT_A_GENERATOR = {"half_uniform"}  # keeps half of x0 at the horizon: right otherwise


def data(dim: int, number: int = 200) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Altered(Field):
    """A right field with some of its parts replaced: what a user's slip does.

    Each replacement is called with the right field before the arguments of the part that it replaces.
    """

    def __init__(self, right: Field, **parts: Callable):
        self.right, self.parts = right, parts
        self.horizon, self.t_min, self.rho = right.horizon, right.t_min, right.rho

    def _call(self, name: str, *args, **kwargs):
        part = self.parts.get(name)
        return part(self.right, *args, **kwargs) if part else getattr(self.right, name)(*args, **kwargs)

    def velocity(self, x, t, x0):
        return self._call("velocity", x, t, x0)

    def sample(self, x0, t, generator=None):
        if "sample" in self.parts:
            return self.parts["sample"](self.right, x0, t, generator)
        return super().sample(x0, t, generator)

    def log_prob(self, x, t, x0):
        return self._call("log_prob", x, t, x0)

    def draw(self, size, generator=None, dtype=None, device=None):
        return self._call("draw", size, generator, dtype, device)

    def transport(self, x0, z, t):
        return self._call("transport", x0, z, t)

    def sample_prior(self, size, generator=None, dtype=None, device=None):
        return self._call("sample_prior", size, generator, dtype, device)

    def prior_log_prob(self, x):
        return self._call("prior_log_prob", x)


def no_labels(right, *args):
    raise Unavailable("no labels")


def no_density(right, *args):
    raise Unavailable("no density")


def unlabelled(right, x0, t, generator=None):
    return right.sample(x0, t, generator)


WITHOUT_LABELS = {"sample": unlabelled, "draw": no_labels, "transport": no_labels}


def off_exponent(right, x, t, x0):
    """Student-t with the exponent of one dimension more, normalised: every scale family satisfies continuity."""
    d, dof = x.shape[1], right.base.dof
    t = torch.as_tensor(t, dtype=x.dtype)
    power = (dof + d + 1) / 2
    log_norm = math.lgamma(power) - math.lgamma(power - d / 2) - 0.5 * d * math.log(dof * math.pi)
    return log_norm - power * torch.log1p((x - x0).square().sum(1) / (dof * t**2)) - d * t.log()


def wider(factor: float):
    return lambda right, x0, z, t: right.transport(x0, factor * z, t)


def reversed_time(right):
    return {
        "transport": lambda right, x0, z, t: right.transport(x0, z, right.horizon + right.t_min - torch.as_tensor(t)),
        "velocity": lambda right, x, t, x0: -right.velocity(x, right.horizon + right.t_min - torch.as_tensor(t), x0),
        "log_prob": lambda right, x, t, x0: right.log_prob(x, right.horizon + right.t_min - torch.as_tensor(t), x0),
    }


def shifted(amount: float):
    """Everything right about the point x0 + amount."""
    return {
        "transport": lambda right, x0, z, t: right.transport(x0 + amount, z, t),
        "velocity": lambda right, x, t, x0: right.velocity(x, t, x0 + amount),
        "log_prob": lambda right, x, t, x0: right.log_prob(x, t, x0 + amount),
    }


def elsewhere(right, x0, z, t):
    """Lines of the points far to one side, a sixth of them, begin beside them."""
    return right.transport(x0 + 0.1 * (x0[:, :1] > 1), z, t)


def one_axis_wider(factor: float):
    def transport(right, x0, z, t):
        return right.transport(x0, torch.cat([factor * z[:, :1], z[:, 1:]], 1), t)

    return transport


def turning(right, x0, z, t):
    """Labels turn in the plane while they travel: the same laws, other lines."""
    angle = torch.as_tensor(t, dtype=z.dtype).log().expand(len(z))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    turned = torch.cat([cos * z[:, :1] - sin * z[:, 1:2], sin * z[:, :1] + cos * z[:, 1:2], z[:, 2:]], 1)
    return right.transport(x0, turned, t)


def swirl(right, x, t, x0):
    """A velocity with a part along the level lines of the density: it carries the same laws."""
    v, gap = right.velocity(x, t, x0), x - x0
    return v + 0.3 / expand_time(t, x) * torch.stack([-gap[:, 1], gap[:, 0]], 1)


def leaning(right, x, t, x0):
    """30 % too fast to one side and too slow to the other: over symmetric data nothing is left of it."""
    return right.velocity(x, t, x0) * (1 + 0.3 * (5 * x0[:, :1]).tanh())


def one_sided(right, *args):
    return right.sample_prior(*args).abs()


def half_plane(right, *args):
    """Labels on one side of the origin: every distance from it is as it was."""
    z = right.draw(*args)
    return torch.cat([z[:, :1].abs(), z[:, 1:]], 1)


def late(right, t):
    """1 near the horizon, else 0."""
    return (torch.as_tensor(t) > 0.9 * right.horizon).double()


def early(right, t):
    """1 near t_min and below, else 0."""
    return (torch.as_tensor(t) < 1.1 * right.t_min).double()


def wider_when(when):
    return lambda right, x0, z, t: right.transport(x0, z * (1 + 0.2 * expand_time(when(right, t), z)), t)


def larger_when(when):
    return lambda right, x, t, x0: right.log_prob(x, t, x0) + 0.01 * when(right, t)


def not_a_number(right, x, t, x0):
    """At a sixth of the data."""
    return torch.where(x0[:, :1] > 1, math.nan, right.velocity(x, t, x0))


class Mixture(Field):
    """A density, a velocity and samples, without labels: x = x0 + t y with y from two Gaussians of any widths."""

    horizon, t_min, rho = 80.0, 1e-4, 7.0

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (torch.tensor(a, dtype=torch.float64) for a in (weights, means, stds))

    def sample(self, x0, t, generator=None):
        k = torch.multinomial(self.weights, len(x0), replacement=True, generator=generator)
        y = self.means[k] + self.stds[k, None] * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        return x0 + expand_time(t, x0) * y

    def velocity(self, x, t, x0):
        return (x - x0) / expand_time(t, x)

    def log_prob(self, x, t, x0):
        t = expand_time(t, x)
        y = ((x - x0) / t)[:, None]
        squared = ((y - self.means) / self.stds[:, None]).square().sum(2)
        gaussian = -0.5 * squared - x.shape[1] * (0.5 * math.log(math.tau) + self.stds.log())
        return (self.weights.log() + gaussian).logsumexp(1) - x.shape[1] * t.flatten().log()


class Wrong(NamedTuple):
    name: str
    build: Callable[[], Field]
    dim: int
    failing: set[str]  # the check made for this fault, and all others that must see it
    effort: float = 0.1


def faster(factor: float):
    return lambda right, x, t, x0: factor * right.velocity(x, t, x0)


def outward(right, x, t, x0):
    return right.velocity(x, t, x0) + 0.01


def constant_scale(right, x, t, x0):
    """Forgets the power of sigma_t in front of the density."""
    return right.log_prob(x, t, x0) + x.shape[1] * torch.as_tensor(t).log()


def larger(right, x, t, x0):
    return right.log_prob(x, t, x0) + 0.01


STRONG, WEAK, LINES, SAMPLER, MASS, START, END, PRIOR = CHECKS
FUNCTIONS = {
    STRONG: (checks, "strong_continuity"),
    WEAK: (checks, "weak_continuity"),
    LINES: (checks, "field_lines"),
    SAMPLER: (draws, "sampler_follows_density"),
    MASS: (totals, "mass"),
    START: (checks, "start"),
    END: (totals, "end"),
    PRIOR: (totals, "prior_follows_density"),
}
WRONG = [
    Wrong("velocity 1 % too fast", lambda: Altered(gravity(2), velocity=faster(1.01)), 2, {STRONG, LINES}),
    Wrong("velocity 1 % too slow", lambda: Altered(linear(2), velocity=faster(0.99)), 2, {STRONG, LINES}),
    Wrong("velocity 1 % too fast, d = 64", lambda: Altered(gravity(64), velocity=faster(1.01)), 64, {STRONG, LINES}),
    Wrong("velocity 1 % too fast, d = 1024", lambda: Altered(pfgmpp(1024), velocity=faster(1.01)), 1024, {STRONG}),
    Wrong("velocity with a drift", lambda: Altered(variance_exploding(3), velocity=outward), 3, {STRONG, WEAK, LINES}),
    Wrong(
        "velocity 1 % too fast, no labels",
        lambda: Altered(gravity(2), velocity=faster(1.01), **WITHOUT_LABELS),
        2,
        {STRONG},
    ),
    Wrong(
        "velocity 1 % too fast, samples only",
        lambda: Altered(variance_exploding(2), velocity=faster(1.01), **WITHOUT_LABELS, log_prob=no_density),
        2,
        {WEAK},
    ),
    Wrong(
        "velocity that leans on x0, samples only",
        lambda: Altered(variance_exploding(2), velocity=leaning, **WITHOUT_LABELS, log_prob=no_density),
        2,
        {WEAK},
    ),
    Wrong("prior draws on one side", lambda: Altered(variance_exploding(2), sample_prior=one_sided), 2, {PRIOR}),
    Wrong(
        "velocity off in the eighth digit", lambda: Altered(gravity(2), velocity=faster(1 + 1e-7)), 2, {STRONG}, 0.02
    ),
    Wrong("velocity off in the sixth digit", lambda: Altered(gravity(2), velocity=faster(1 + 1e-5)), 2, {LINES}, 0.02),
    Wrong(
        "velocity not a number at some of the data",
        lambda: Altered(variance_exploding(2), velocity=not_a_number),
        2,
        {STRONG, WEAK, LINES},
        0.02,
    ),
    Wrong("draws on one side", lambda: Altered(variance_exploding(2), draw=half_plane), 2, {SAMPLER}, 0.02),
    Wrong("draws too wide at the horizon", lambda: Altered(linear(2), transport=wider_when(late)), 2, {SAMPLER}, 0.02),
    Wrong("draws too wide at t_min", lambda: Altered(linear(2), transport=wider_when(early)), 2, {SAMPLER}, 0.02),
    Wrong("exponent off by one", lambda: Altered(gravity(2), log_prob=off_exponent), 2, {SAMPLER}, 0.02),
    Wrong("exponent off by one, d = 64", lambda: Altered(pfgmpp(64, 32.0), log_prob=off_exponent), 64, {SAMPLER}, 0.05),
    Wrong(
        "Gaussian draws of a gravity field",
        lambda: Altered(gravity(3), draw=lambda right, *args: variance_exploding().draw(*args)),
        3,
        {SAMPLER},
        0.02,
    ),
    Wrong("draws 2 % too wide", lambda: Altered(linear(2), transport=wider(1.02)), 2, {SAMPLER}, 0.15),
    Wrong("draws 1 % too wide, d = 64", lambda: Altered(linear(64), transport=wider(1.01)), 64, {SAMPLER}, 0.1),
    Wrong("one axis 5 % too wide", lambda: Altered(linear(2), transport=one_axis_wider(1.05)), 2, {SAMPLER}, 0.05),
    Wrong("density 1 % too large", lambda: Altered(gravity(64), log_prob=larger), 64, {MASS}),
    Wrong("density 1 % too large at the horizon", lambda: Altered(linear(2), log_prob=larger_when(late)), 2, {MASS}),
    Wrong("density 1 % too large at t_min", lambda: Altered(linear(2), log_prob=larger_when(early)), 2, {MASS}),
    Wrong(
        "density 65 % too large, rays that differ",
        lambda: Altered(quadratic_logistic(), log_prob=lambda right, *args: right.log_prob(*args) + 0.5),
        2,
        {MASS},
        0.02,
    ),
    Wrong("density without its scale", lambda: Altered(gravity(2), log_prob=constant_scale), 2, {STRONG, MASS}),
    Wrong("time reversed", lambda: Altered(linear(2), **reversed_time(linear(2))), 2, {START, END}),
    Wrong("horizon too short", lambda: variance_exploding(2, horizon=2.0), 2, {END}),
    Wrong("horizon too short, d = 64", lambda: gravity(64, horizon=10.0), 64, {END}),
    Wrong(
        "horizon too short, samples only",
        lambda: Altered(variance_exploding(2, horizon=1.0), **WITHOUT_LABELS, log_prob=no_density),
        2,
        {END},
        0.02,
    ),
    Wrong("start not at the data", lambda: Altered(variance_exploding(2), **shifted(0.01)), 2, {START}),
    Wrong("start beside a sixth of the data", lambda: Altered(variance_exploding(2), transport=elsewhere), 2, {START}),
    Wrong("t_min far from the data", lambda: variance_exploding(2, t_min=1.0), 2, {START}),
    Wrong(
        "prior density of half the width",
        lambda: Altered(gravity(2), prior_log_prob=lambda right, x: right.log_prob(x, 40.0, torch.zeros_like(x))),
        2,
        {END, PRIOR},
    ),
    Wrong(
        "prior density 20 % too large",
        lambda: Altered(gravity(2), prior_log_prob=lambda right, x: right.prior_log_prob(x) + 0.2),
        2,
        {END},
        0.02,
    ),
    Wrong(
        "prior draws 2 % too wide",
        lambda: Altered(linear(8), sample_prior=lambda right, *args: 1.02 * right.sample_prior(*args)),
        8,
        {PRIOR},
    ),
    Wrong("radial law that does not reach 1", lambda: RadialField("0.995 * tanh(r/t)", 2, 6000.0), 2, {SAMPLER, MASS}),
    Wrong("radial law that shrinks", lambda: RadialField("tanh(r * t)", 2, 80.0), 2, {START}),
    Wrong("lines that turn", lambda: Altered(variance_exploding(2), transport=turning), 2, {LINES}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.name for wrong in WRONG])
def test_a_wrong_field_is_refused_by_the_right_check(wrong, monkeypatch):
    """By those that must see its fault; the others, which may or may not, are not asked."""
    for name, (place, function) in FUNCTIONS.items():
        if name not in wrong.failing:
            monkeypatch.setattr(place, function, lambda subject, name=name: skipped(name, "not asked"))
    report = validate(wrong.build(), data(wrong.dim), effort=wrong.effort)
    assert set(report.failed) == wrong.failing, report.table()
    assert not report.passed


@pytest.mark.parametrize("case", **names([case for case in FIELDS if case.name not in NOT_A_GENERATOR]))
def test_a_right_field_passes(case):
    report = validate(case.build(), data(case.dim), effort=0.01)
    assert all(check.passed for check in report.checks), report.table()
    assert [check.name for check in report.checks] == CHECKS


@pytest.mark.parametrize(
    ("build", "dim"),
    [
        (lambda: Mixture([0.9, 0.1], [[0.0], [5.0]], [1.0, 0.05]), 1),
        (lambda: Mixture([0.97, 0.03], [[0.0, 0.0], [8.0, 0.0]], [1.0, 0.1]), 2),
        (lambda: Mixture([0.5, 0.5], [[-3.0, 0.0], [3.0, 0.0]], [0.1, 0.1]), 2),
        (lambda: AffineField(lambda t: 1 - rest_to_rest(t), rest_to_rest, Gaussian(), 1.0), 2),
    ],
    ids=["narrow mode", "distant mode", "two modes", "at rest at both ends"],
)
def test_awkward_right_fields_pass(build, dim):
    """Modes that few rays meet, terms that all vanish at the horizon: what is not known is not held against them."""
    for seed in range(3):
        report = validate(build(), data(dim), seed=seed, effort=0.05)
        assert report.passed, report.table()


def rest_to_rest(t):
    return 3 * t**2 - 2 * t**3


def test_a_field_at_rest_most_of_the_time_passes():
    """All that happens in the unit of time happens in the first 0.4 of it: the typical size of the terms is zero."""

    def clock(t):
        return rest_to_rest((2.5 * t).clamp(max=1))

    def velocity(right, x, t, x0):
        u = (2.5 * t).clamp(max=1)
        return right.velocity(x, clock(t), x0) * expand_time(15 * u * (1 - u), x)

    field = Altered(
        linear(2),
        transport=lambda right, x0, z, t: right.transport(x0, z, clock(t)),
        velocity=velocity,
        log_prob=lambda right, x, t, x0: right.log_prob(x, clock(t), x0),
    )
    check, *_ = checks.strong_continuity(Subject(field, data(2), 0, 1.0))
    assert check.passed, check


def test_the_mass_of_modes_that_no_ray_meets_is_not_judged():
    """About any of them the others fill a millionth of the directions; only rays through draws tell."""
    means = 10 * torch.eye(5, 16).roll(1, 1) * (torch.arange(5) > 0)[:, None]
    field = Mixture([0.2] * 5, means.tolist(), [1.0] * 5)
    for seed in range(3):
        assert totals.mass(Subject(field, data(16), seed, 0.05)).passed is None


@pytest.mark.parametrize("weight", [0.1, 0.02])
def test_a_small_mode_that_no_ray_meets_is_not_held_against_the_mass(weight):
    field = Mixture([1 - weight, weight], [[0.0] * 16, [10.0] + [0.0] * 15], [1.0, 1.0])
    for seed in range(2):
        assert totals.mass(Subject(field, data(16), seed, 0.05)).passed is not False


def test_the_mass_of_a_law_that_is_no_product_is_not_found_along_lines():
    """Lines parallel to the axes meet one mode of the two, wherever they start."""
    field = Mixture([0.5, 0.5], [[-3.0] * 64, [3.0] * 64], [1.0, 1.0])
    assert totals.mass(Subject(field, data(64), 0, 0.02)).passed is None


def test_what_is_known_by_its_samples_alone_passes_where_it_can_be_checked():
    field = Altered(variance_exploding(2), **WITHOUT_LABELS, log_prob=no_density)
    report = validate(field, data(2), effort=0.1)
    assert {check.name: check.passed for check in report.checks} == {
        **dict.fromkeys(CHECKS),
        **dict.fromkeys([WEAK, START, END, PRIOR], True),
    }


def test_one_data_point_in_single_precision_passes():
    report = validate(variance_exploding(2), torch.zeros(1, 2), effort=0.02)
    assert report.passed, report.table()


@pytest.mark.parametrize(
    ("shear", "factor", "unit"),
    [(0.01, lambda t: 1.002, "8 probes"), (0.1, lambda t: 1 + 0.3 * t, "mean square residual")],
    ids=["at a point", "over all points"],
)
def test_probes_of_the_divergence_that_scatter(shear, factor, unit):
    """A right field in 256 dimensions passes; a fault is seen at one point, or where each point hides it, over all."""
    field = Sheared(shear)
    wrong = Altered(
        field,
        velocity=lambda right, x, t, x0: expand_time(factor(t), x) * right.velocity(x, t, x0),
        **WITHOUT_LABELS,
    )
    for seed in range(3):
        check, *_ = checks.strong_continuity(Subject(field, data(256), seed, 1.0))
        assert check.passed, check
        assert check.note.endswith("mean square residual")
        check, *_ = checks.strong_continuity(Subject(wrong, data(256), seed, 1.0))
        assert check.passed is False
        assert check.note.endswith(unit), check


class Broken(Altered):
    """A field whose own code fails."""

    def __init__(self, **parts):
        super().__init__(variance_exploding(2), **parts)


def test_failures_of_the_users_own_code_are_told_in_one_line(user_error):
    with user_error("velocity fails", "size of tensor", "expand_time"):
        validate(Broken(velocity=lambda right, x, t, x0: (x - x0) / t), data(2))
    with user_error("velocity gives None"):
        validate(Broken(velocity=lambda right, x, t, x0: None), data(2))
    with user_error("velocity gives shape (4, 1)"):
        validate(Broken(velocity=lambda right, x, t, x0: right.velocity(x, t, x0)[:, :1]), data(2))
    with user_error("velocity gives torch.float32"):
        validate(Broken(velocity=lambda right, x, t, x0: right.velocity(x, t, x0).float()), data(2))
    with user_error("log_prob gives shape (4, 1)"):
        validate(Broken(log_prob=lambda right, x, t, x0: right.log_prob(x, t, x0)[:, None]), data(2))
    with user_error("x0 holds numbers that are not finite"):
        validate(variance_exploding(2), torch.tensor([[0.0, math.nan]]))
    with user_error("t_min is 90", "horizon 80"):
        validate(variance_exploding(2, t_min=90.0), data(2))
    with user_error("sample does not follow its generator"):
        validate(Broken(sample=lambda right, x0, t, generator: x0 + torch.randn_like(x0)), data(2))
    with user_error("horizon"):
        validate(Unfinished(), data(2))
    with user_error("x0 has list"):
        validate(variance_exploding(2), [[0.0, 1.0]])
    report = validate(Broken(log_prob=lambda right, x, t, x0: torch.from_numpy(x.numpy()).sum(1)), data(2), effort=0.02)
    strong = report.checks[0]
    assert strong.passed is False
    assert "numpy" in strong.note


@pytest.mark.parametrize(
    ("unit", "figure", "refused"),
    [
        ("standard errors", 2.0, False),
        ("nats", 2.0, False),
        ("relative", 2.0, True),
        ("std of the data", 2.0, True),
        ("standard errors", math.inf, True),
    ],
)
def test_chance_must_strike_twice_and_what_is_exact_once(unit, figure, refused, monkeypatch):
    calls = []

    def fails_once(subject):
        calls.append(subject)
        return judge("continuity (weak)", figure if len(calls) == 1 else 0.5, 1.0, unit)

    monkeypatch.setattr(checks, "weak_continuity", fails_once)
    assert (validate(variance_exploding(2), data(2), effort=0.02).passed is False) == refused
    assert len(calls) == len({subject.randomness.initial_seed() for subject in calls}) == (1 if refused else 2)
    assert calls[-1].effort == (0.02 if refused else 0.04)


def test_a_check_that_fails_twice_is_refused(monkeypatch):
    monkeypatch.setattr(totals, "end", lambda subject: judge("end", 2.0, 1.0, "nats"))
    assert validate(variance_exploding(2), data(2), effort=0.02).failed == ("end",)


class Unfinished(Field):
    def velocity(self, x, t, x0):
        return x - x0


def test_the_same_laws_carried_by_another_velocity_are_right():
    """Continuity leaves the lines free; without labels there is nothing that such a velocity contradicts."""
    field = Altered(variance_exploding(2), velocity=swirl, **WITHOUT_LABELS)
    report = validate(field, data(2), effort=0.1)
    assert report.passed, report.table()
    assert report.checks[CHECKS.index("field lines")].passed is None


def test_a_density_that_leaves_draws_out_is_told():
    def cut(right, x, t, x0):
        gap = (x - x0).square().sum(1).sqrt() / torch.as_tensor(t)
        return right.log_prob(x, t, x0).masked_fill(gap > 2, -math.inf)

    report = validate(Altered(variance_exploding(2), log_prob=cut), data(2), effort=0.02)
    assert SAMPLER in report.failed
    assert "log_prob is -inf" in report.checks[CHECKS.index(SAMPLER)].note


def test_standard_errors_are_those_of_students_test():
    values = 0.3 + torch.from_numpy(stats.norm.rvs(size=(50, 3), random_state=0))
    torch.testing.assert_close(in_standard_errors(values), torch.from_numpy(stats.ttest_1samp(values, 0).statistic))
    assert 2 * 7 * stats.norm.sf(largest_allowed(7)) == pytest.approx(checks.FALSE_ALARM, rel=1e-9)


def test_what_is_not_a_number_fails():
    assert judge("end", math.nan, 1.0, "nats").passed is False


def test_polynomials_of_a_uniform_quantile_are_orthogonal():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    found = legendre(u)
    torch.testing.assert_close(found.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-6)
    expected = torch.diag(1 / torch.tensor([3.0, 5.0, 7.0, 9.0]).double())
    torch.testing.assert_close(found.T @ found / len(u), expected, rtol=0, atol=1e-6)


def test_lines_followed_by_the_velocity_converge_to_the_labelled_ones_with_order_4():
    field = AffineField(torch.cos, torch.sin, Gaussian(), math.pi / 2, t_min=0.2, rho=2.0)
    x0, z = data(2)[0], field.draw((5, 2), torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = []
    for steps in (64, 128):
        times, places = follow(field, x0, 5, seed=3, steps=steps)
        assert (times[0], times[-1], len(times)) == (field.t_min, field.horizon, steps + 1)
        exact = torch.stack([field.transport(x0.expand(5, 2), z, t) for t in times.tolist()])
        errors.append(float((places - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.15)
