"""Stochastic samplers: the law of what they make, cost, seeds, refusals. A new scheme joins SCHEMES."""

import itertools
import math

import pytest
import torch
from problems import mixture
from scipy import stats

from diffusion.fields import (
    AffineField,
    EmpiricalField,
    Gaussian,
    StudentT,
    curved,
    drifting,
    gravity,
    laplace,
    linear,
    pfgmpp,
    radial_gravity,
    straight,
    variance_exploding,
    variance_preserving,
)
from diffusion.samplers import (
    Ancestral,
    Churn,
    Counted,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    Stochastic,
    generate,
    motion,
)
from diffusion.samplers.frames import PlainFrame
from diffusion.samplers.stochastic import Draws

LEVELS = {"none": 0.0, "weak": 0.3, "natural": 1.0, "strong": 3.0, "own": lambda t: (2 * t).sqrt() / (1 + t)}
SCHEMES = {  # with a level of noise, and evaluations in all
    "euler_maruyama": (EulerMaruyama, lambda steps: steps),
    "stochastic": (Stochastic, lambda steps: 2 * steps - 1),
    "predictor_corrector": (PredictorCorrector, lambda steps: 2 * steps - 1),
    "two_corrections": (lambda steps, noise=1.0: PredictorCorrector(steps, noise, 2), lambda steps: 3 * steps - 2),
    "ancestral": (Ancestral, lambda steps: steps),
    "churn": (Churn, lambda steps: 2 * steps - 1),
}
T_MIN = 0.1  # of fields whose law at the end is to be seen
FIELDS = {
    "variance_exploding": lambda: variance_exploding(2, t_min=T_MIN),
    "variance_preserving": lambda: variance_preserving(2, t_min=T_MIN),
    "linear": lambda: linear(2, t_min=T_MIN),
    "gravity": lambda: gravity(2, t_min=T_MIN),
    "pfgmpp": lambda: pfgmpp(2, 4.0, t_min=T_MIN),
    "laplace": lambda: AffineField(lambda t: 1 - t, torch.clone, laplace(), 1.0, T_MIN),
    "radial_gravity": lambda: radial_gravity(2, t_min=T_MIN),
    "straight_laplace": lambda: straight(laplace(), T_MIN),
}
MASSES = mixture(gravity(2))


def point_masses(field):
    return EmpiricalField(field, MASSES.means, MASSES.weights)


def randomness(seed=0):
    return torch.Generator().manual_seed(seed)


class AtTheEnd:
    """A model that leaves samples where they are at t_min."""

    def __init__(self, model):
        self.model, self.field = model, model.field
        self.field.endpoint = lambda x, t, velocity: x

    def velocity(self, x, t):
        return self.model.velocity(x, t)

    def score(self, x, t):
        return self.model.score(x, t)


def samples(name, sampler, number=700, seed=0):
    """At t_min, from the exact law at the horizon."""
    field = FIELDS[name]()
    start = MASSES.means[torch.multinomial(MASSES.weights, number, True, generator=randomness(seed + 1))]
    x_T = field.sample(start, field.horizon, randomness(seed + 2))
    return field, sampler(AtTheEnd(point_masses(field)), x_T, randomness(seed))


def p_values(field, x):
    """Kolmogorov and Smirnov's, of projections, against as many exact draws."""
    start = MASSES.means[torch.multinomial(MASSES.weights, 20_000, True, generator=randomness(7))]
    exact = field.sample(start, field.t_min, randomness(8))
    for angle in (0.3, 1.3, 2.3):
        direction = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        yield stats.ks_2samp((x @ direction).numpy(), (exact @ direction).numpy()).pvalue


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["variance_exploding", "linear", "gravity"])
def test_marginals_at_every_level_of_noise(name, level):
    field, x = samples(name, Stochastic(60, LEVELS[level]))
    assert min(p_values(field, x)) > 1e-3


@pytest.mark.parametrize("name", FIELDS)
def test_marginals_of_every_field(name):
    field, x = samples(name, Stochastic(50, noise=0.5))
    assert min(p_values(field, x)) > 1e-3


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *((name, Churn(30, churn=5.0)) for name in FIELDS),
        *((name, Ancestral(60)) for name in FIELDS),
        ("linear", Ancestral(100, eta=0.5)),
        ("gravity", Ancestral(100, eta=0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_marginals_of_churn_and_ancestral(name, sampler):
    field, x = samples(name, sampler)
    assert min(p_values(field, x)) > 1e-3


@pytest.mark.parametrize("name", ["gravity", "linear"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_noise_is_drawn_anew(name, scheme):
    """From one prior draw come samples of all modes, and of the ODE only one."""
    field = FIELDS[name]()
    x_T = field.sample_prior((1, 2), randomness(3), dtype=torch.float64).expand(400, -1)
    for sampler, modes in ((SCHEMES[scheme][0](40), 3), (Heun(40), 1)):
        x = sampler(point_masses(field), x_T, randomness())
        assert len(torch.cdist(x, MASSES.means).argmin(1).unique()) == modes


class AtTheOrigin:
    """One data point, at 0: what is left of x without new noise is sigma_t e^-Lambda."""

    def __init__(self, field):
        self.field = field
        self.field.endpoint = lambda x, t, velocity: x

    def velocity(self, x, t):
        return self.field.velocity(x, t, torch.zeros_like(x))


@pytest.mark.parametrize("level", ["strength", "function"])
@pytest.mark.parametrize("name", ["variance_exploding", "linear"])
@pytest.mark.parametrize("scheme", ["euler_maruyama", "stochastic", "predictor_corrector", "two_corrections"])
def test_noise_is_renewed_as_told(scheme, name, level, monkeypatch):
    """Lambda in closed form: strength log(T / t_min) for VE, strength (log(1 / t_min) - 1 + t_min) for linear."""
    monkeypatch.setattr(Draws, "normal", lambda self, like: torch.zeros_like(like))
    field, strength = FIELDS[name](), 0.7
    renewal = strength * (math.log(field.horizon / T_MIN) - (1 - T_MIN) * (name == "linear"))
    g = {
        "variance_exploding": lambda t: (2 * strength * t).sqrt(),
        "linear": lambda t: (2 * strength * t * (1 - t)).sqrt(),
    }
    sampler = SCHEMES[scheme][0](12, noise=strength if level == "strength" else g[name])
    x = sampler(AtTheOrigin(field), torch.tensor([[field.horizon, -field.horizon]], dtype=torch.float64))
    expected = T_MIN * math.exp(-renewal) * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)


class Jointly:
    """A model that gives velocity and score for one evaluation."""

    device = torch.device("cpu")

    def __init__(self, model):
        self.model, self.field = model, model.field

    def velocity(self, x, t):
        return self.model.velocity(x, t)

    def velocity_and_score(self, x, t):
        return self.model.velocity(x, t), self.model.score(x, t)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("steps", [2, 5, 12])
def test_evaluations_are_those_stated(scheme, steps):
    build, evaluations = SCHEMES[scheme]
    for field in (gravity(2), variance_exploding(2)):
        model = Counted(Jointly(point_masses(field)))
        build(steps)(model, torch.ones(3, 2, dtype=torch.float64), randomness())
        assert model.evaluations == evaluations(steps)


def test_velocity_and_score_of_a_model_that_has_them_apart_count_as_two():
    model = Counted(point_masses(gravity(2)))
    EulerMaruyama(6)(model, torch.ones(3, 2, dtype=torch.float64), randomness())
    assert model.evaluations == 2 * 5 + 1


class WithoutScore:
    """A model without a score."""

    device = torch.device("cpu")

    def __init__(self, field):
        self.field, self.velocity = field, point_masses(field).velocity


@pytest.mark.parametrize(
    "sampler", [EulerMaruyama(5, 0.0), Stochastic(5, 0.0), PredictorCorrector(5, 0.0), Churn(5), Ancestral(5)]
)
def test_without_noise_and_with_noise_of_its_own_no_score_is_asked_for(sampler):
    assert sampler(WithoutScore(gravity(2)), torch.ones(2, 2)).isfinite().all()


def test_a_model_without_a_score_is_refused_where_one_is_needed(user_error):
    Stochastic(5)(WithoutScore(linear(2)), torch.ones(2, 2))
    for field, law, samplers in (
        (gravity(2), "StudentT", [Stochastic(5)]),
        (pfgmpp(2, 128.0), "StudentT", [Stochastic(5), Ancestral(5), Churn(5)]),
        (curved(Gaussian(2)), "TrajectoryField", [Stochastic(5), Ancestral(5), Churn(5)]),
    ):
        for sampler in samplers:
            with user_error("WithoutScore has no score", law):
                sampler(WithoutScore(field), torch.ones(2, 2))


@pytest.mark.parametrize("name", ["variance_preserving", "linear", "gravity", "straight_laplace"])
def test_motion_is_velocity_and_score(name):
    model = point_masses(FIELDS[name]())
    x, t = torch.randn(6, 2, generator=randomness(), dtype=torch.float64), model.field.clock(6)
    velocity, score = motion(model, x, t)
    torch.testing.assert_close(velocity, model.velocity(x, t))
    torch.testing.assert_close(score, model.score(x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["variance_preserving", "variance_exploding"])
def test_ancestral_is_that_of_ddim(name, eta):
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16, and for eta = 1 Ho et al. 2020, eq. 6 and 7."""
    field = FIELDS[name]()
    model, sampler = AtTheEnd(point_masses(field)), Ancestral(6, eta)
    x = x_T = field.horizon * torch.ones(2, 2, dtype=torch.float64)
    draws, times = randomness(5), sampler.grid(field, 6)
    for t, t_next in itertools.pairwise(times):
        (a, b), (s, r) = (c(torch.stack([t, t_next])).tolist() for c in (field.alpha, field.sigma))
        kept = (a / b) ** 2 if name == "variance_preserving" else 1.0
        forward = s**2 - (a / b) ** 2 * r**2  # variance of q(x_t | x_t')
        std = eta * math.sqrt(r**2 / s**2 * forward)
        x0 = model.model.denoised(x, t)
        if eta == 1 and name == "variance_preserving":
            mean = (b * (1 - kept) * x0 + math.sqrt(kept) * r**2 * x) / s**2
        else:
            mean = b * x0 + math.sqrt(r**2 - std**2) * (x - a * x0) / s
        x = mean + std * torch.randn(x.shape, generator=draws, dtype=torch.float64) if eta else mean
    torch.testing.assert_close(sampler(model, x_T, randomness(5)), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [Ancestral(30), Ancestral(30, eta=0.5), Churn(30)], ids=["full", "half", "churn"])
def test_a_level_that_falls_again_towards_the_horizon_is_not_renewed(sampler):
    field = drifting(lambda x0, t: (1 - t) * x0, lambda t: (2.2 * t).sin(), Gaussian(2))
    x = sampler(point_masses(field), field.sample_prior((200, 2), randomness(1), dtype=torch.float64), randomness())
    assert torch.cdist(x, MASSES.means).amin(1).max() < 0.05


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_renews_gravity_as_told(eta, monkeypatch):
    """One step to t_min with noise of ones: of the scale t_min all but the share t_min / T is new for eta = 1."""
    monkeypatch.setattr(Draws, "__call__", lambda self, draw, like: torch.ones_like(like))
    field = FIELDS["gravity"]()
    new = eta * (1 - T_MIN / field.horizon)
    x = Ancestral(2, eta)(AtTheOrigin(field), torch.full((1, 2), 3 * field.horizon, dtype=torch.float64))
    torch.testing.assert_close(x, torch.full_like(x, T_MIN * (3 * (1 - new) + new)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("law", [Gaussian(3), StudentT(1.0, 3)], ids=["gaussian", "cauchy"])
def test_a_stable_law_is_that_of_its_sums(law, share):
    a, (z, more) = law.stability, (law.draw((4000, 3), randomness(seed)) for seed in (0, 1))
    sums, exact = share * z + (1 - share**a) ** (1 / a) * more, law.draw((20_000, 3), randomness(2))
    for statistic in (lambda v: v[:, 1], lambda v: v.norm(dim=1)):
        assert stats.ks_2samp(statistic(sums).numpy(), statistic(exact).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("law", [StudentT(2.0, 3), StudentT(0.5, 3), laplace()], ids=["t2", "t0.5", "laplace"])
def test_other_laws_are_not_taken_for_stable(law):
    assert law.stability is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_samples_depend_on_the_seed_and_their_number_alone(scheme):
    model, sampler = mixture(gravity(2)), SCHEMES[scheme][0](12)
    first = generate(model, (10, 2), sampler, seed=1)
    for number, batch_size in ((10, 7), (4, 3)):
        other = generate(model, (number, 2), sampler, seed=1, batch_size=batch_size)
        torch.testing.assert_close(other, first[:number], rtol=0, atol=1e-6)
    state = torch.get_rng_state()
    assert not torch.isclose(first, generate(model, (10, 2), sampler, seed=2)).all(1).any()
    assert torch.get_rng_state().equal(state)


def test_every_sample_has_noise_of_its_own():
    field = gravity(2)
    x_T = field.sample_prior((1, 2), randomness(3)).expand(6, -1)
    x = Stochastic(12)(mixture(field), x_T, [randomness(i) for i in range(6)])
    assert (torch.cdist(x, x) + torch.eye(6)).min() > 1e-6
    with pytest.raises(ValueError, match="5 generators, expected one for each of 6"):
        Stochastic(12)(point_masses(field), x_T, [randomness(i) for i in range(5)])


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Stochastic(1), "steps=1"),
        (lambda: Stochastic(noise=-0.5), "noise is -0.5"),
        (lambda: EulerMaruyama(noise=math.nan), "noise is nan"),
        (lambda: PredictorCorrector(corrections=0), "corrections=0"),
        (lambda: Ancestral(eta=1.5), "eta is 1.5"),
        (lambda: Churn(churn=-1.0), "churn is -1"),
    ],
    ids=["steps", "negative", "nan", "corrections", "eta", "churn"],
)
def test_options_out_of_range_are_refused(build, text, user_error):
    with user_error(text):
        build()


@pytest.mark.parametrize("g", [lambda t: -t, lambda t: 1.0, lambda t: t / 0], ids=["negative", "number", "infinite"])
def test_a_level_of_noise_is_a_tensor_of_numbers(g, user_error):
    with user_error("noise g(t)", "expected"):
        Stochastic(5, g)(point_masses(linear(2)), torch.ones(2, 2), randomness())


def test_a_score_that_is_not_finite_is_reported(user_error):
    class Broken(Jointly):
        def velocity_and_score(self, x, t):
            velocity, score = super().velocity_and_score(x, t)
            score[2] += math.nan if t[0] < 1 else 0
            return velocity, score

    with user_error("score of sample 2", "t=0."):
        Stochastic(12)(Broken(point_masses(gravity(2))), torch.ones(4, 2), randomness())


@pytest.mark.parametrize(
    ("field", "size"),
    [(straight(Gaussian(2), T_MIN), 1.0), (radial_gravity(2, t_min=T_MIN), math.sqrt(2))],
    ids=["gaussian", "cauchy"],
)
def test_strength_of_a_field_that_is_not_affine(field, size):
    """g^2 = 2 sigma^2 / t with sigma t times the size of the law: its median radius over that of N(0, I)."""
    t = field.clock(9)
    frame = PlainFrame(point_masses(field), torch.ones(1, 2, dtype=torch.float64), {})
    torch.testing.assert_close(frame.natural(t), 2 * size**2 * t, rtol=0.3, atol=0)
    torch.testing.assert_close(frame.log_level(t).exp(), size * t, rtol=0.15, atol=0)


class Watched(AtTheOrigin):
    """Remembers where it was asked."""

    def __init__(self, field):
        super().__init__(field)
        self.asked = []

    def velocity(self, x, t):
        self.asked.append((x, float(t[0])))
        return super().velocity(x, t)


@pytest.mark.parametrize(("churn", "factor"), [(2.0, 1.2), (1000.0, math.sqrt(2))], ids=["below", "capped"])
def test_churn_raises_the_level_as_edm_does(churn, factor, monkeypatch):
    """Karras et al. 2022, algorithm 2, lines 4 to 6, with noise of ones."""
    monkeypatch.setattr(Draws, "__call__", lambda self, draw, like: torch.ones_like(like))
    model, sampler = Watched(variance_exploding(2)), Churn(10, churn=churn, inflate=1.5)
    sampler(model, torch.zeros(1, 2, dtype=torch.float64))
    t = float(sampler.grid(model.field, 10)[1])
    x, raised = model.asked[2]  # the first step starts at the horizon, above which there is nothing
    assert raised == pytest.approx(factor * t)
    assert x[0].tolist() == pytest.approx([1.5 * math.sqrt(raised**2 - t**2)] * 2)
