"""Weak order of the stochastic samplers, without chance, against exact laws. A new scheme joins SDE or GAUSSIAN."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from diffusion.fields import (
    AffineField,
    Gaussian,
    StudentT,
    conversions,
    gravity,
    linear,
    straight,
    variance_exploding,
    variance_preserving,
)
from diffusion.samplers import (
    Ancestral,
    Churn,
    EulerMaruyama,
    Motion,
    PredictorCorrector,
    Stochastic,
    StochasticSampler,
)
from diffusion.samplers.frames import AffineFrame, PlainFrame
from diffusion.samplers.stochastic import Draws

LEVELS = {
    "none": 0.0,
    "weak": 0.3,
    "natural": 1.0,
    "constant": lambda t: 0.5 + 0 * t,
    "late": lambda t: 1.5 * t / (1 + t),
}
SDE = {"euler_maruyama": EulerMaruyama, "stochastic": Stochastic, "predictor_corrector": PredictorCorrector}
SCHEMES: dict[str, Callable[[int], StochasticSampler]] = {
    f"{scheme}-{level}": lambda steps, build=SDE[scheme], level=level: build(steps, noise=LEVELS[level])
    for scheme, level in itertools.product(SDE, LEVELS)
}
GAUSSIAN = SCHEMES | {
    "two_corrections": lambda steps: PredictorCorrector(steps, corrections=2),
    "ddim": lambda steps: Ancestral(steps, eta=0.0),
    "ancestral_half": lambda steps: Ancestral(steps, eta=0.5),
    "ddpm": Ancestral,
    "churn": lambda steps: Churn(steps, churn=10.0),
    "churn_within": lambda steps: Churn(steps, churn=10.0, lowest=0.3, highest=3.0),
}
FIELDS = {
    "variance_exploding": lambda: variance_exploding(1, 20.0, 0.05),
    "variance_preserving": lambda: variance_preserving(1),
    "linear": lambda: linear(1),
}
VE = FIELDS["variance_exploding"]()
ONCE = [name for name in GAUSSIAN if "-" not in name or "-natural" in name]


class Law(NamedTuple):
    mean: float
    std: float


class Impulses(Gaussian):
    """Noise for a batch of probes: the first two see none, the others a one in one draw each."""

    def __init__(self):
        super().__init__(1)
        self.draws = 0

    def draw(self, size, generator=None, dtype=None, device=None):
        xi = torch.zeros(size, dtype=dtype)
        xi[2 + self.draws] = 1
        self.draws += 1
        return xi


@dataclass(frozen=True)
class Fixed(Draws):
    """Normal numbers from a law."""

    law: Gaussian

    def normal(self, like):
        return self.law.draw(like.shape, dtype=like.dtype)


def frame_of(model, x):
    return (AffineFrame if isinstance(model.field, AffineField) else PlainFrame)(model, x, {})


class Straight:
    """The linear field as one of trajectories, which is not known to be affine."""

    def __init__(self):
        self.field, self.affine = straight(Gaussian(1), t_min=0.05), OneNormal(linear(1, t_min=0.05))
        self.velocity, self.score = self.affine.velocity, self.affine.score


class OneNormal:
    """N(0.7, 0.25) as data."""

    def __init__(self, field):
        self.field = field
        self.schedule = functools.cache(lambda t: field.schedule(torch.ones(1, 1, dtype=torch.float64), t))

    def noise(self, x, c):
        return (x - 0.7 * c.alpha) * c.sigma / (0.25 * c.alpha.square() + c.sigma.square())

    def velocity(self, x, t):
        c = self.schedule(float(t[0]))
        return conversions.from_noise(c, x, self.noise(x, c)).velocity if c.alpha > 0 else x - 0.7

    def score(self, x, t):
        c = self.schedule(float(t[0]))
        return conversions.score_from_noise(c, self.noise(x, c))


def exact_law(field, t) -> Law:
    alpha, sigma = (float(c(torch.tensor(t, dtype=torch.float64))) for c in (field.alpha, field.sigma))
    return Law(0.7 * alpha, math.hypot(0.5 * alpha, sigma))


def law_at_the_end(sampler, model, start: Law) -> Law:
    """Of the state at t_min, for a model that is linear in x: a scheme is then a linear map of the first state and of
    its random numbers, and the probes read off the coefficients."""
    noise, times = Impulses(), sampler.grid(model.field, sampler.steps)
    if isinstance(model.field, AffineField):
        model.field.base = noise
    x = torch.full((2 * sampler.steps + 2, 1), start.mean, dtype=torch.float64)
    x[1] += start.std
    x = sampler.integrate(frame_of(model, x), x, times, Fixed(None, noise))
    return Law(float(x[0]), float((x[1 : 2 + noise.draws] - x[0]).norm()))


def gaussian_error(sampler, model, field) -> float:
    """W2 distance of the law at t_min from the exact one, for a start with the exact law."""
    law, exact = law_at_the_end(sampler, model, exact_law(field, field.horizon)), exact_law(field, field.t_min)
    return math.hypot(law.mean - exact.mean, law.std - exact.std)


def slope(errors, doublings=1):
    return math.log2(errors[0] / errors[1]) / doublings


@pytest.mark.parametrize("name", GAUSSIAN)
def test_weak_order_on_a_gaussian_field(name):
    build = GAUSSIAN[name]
    errors = [gaussian_error(build(n + 1), OneNormal(FIELDS["variance_exploding"]()), VE) for n in (96, 192)]
    assert slope(errors) == pytest.approx(build(5).order, abs=0.15)
    assert errors[1] < (0.02 if build(5).order == 1 else 2e-3)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("field", ["variance_preserving", "linear"])
def test_weak_order_where_the_signal_fades(name, field):
    """alpha is 0 at the end of `linear`, where the log-SNR is infinite."""
    build = GAUSSIAN[name]
    errors = [gaussian_error(build(n + 1), OneNormal(FIELDS[field]()), FIELDS[field]()) for n in (64, 128)]
    assert slope(errors) == pytest.approx(build(5).order, abs=0.15)


@pytest.mark.parametrize("name", [name for name in GAUSSIAN if "-weak" in name or "-late" in name or "-" not in name])
def test_weak_order_on_a_field_that_is_not_affine(name):
    build, model = GAUSSIAN[name], Straight()
    errors = [gaussian_error(build(n + 1), model, model.affine.field) for n in (128, 256)]
    assert slope(errors) == pytest.approx(build(5).order, abs=0.15)


class ManyNormals(Draws):
    """Gauss-Hermite nodes in place of normal numbers: x is each state as often as there are nodes."""

    def normal(self, like):
        return NODES.repeat(len(like) // len(NODES))[:, None]


NODES, WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(12))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def equal_shares(number):
    """Midpoints of equal shares of the Cauchy law."""
    return (math.pi * ((torch.arange(number, dtype=torch.float64) + 0.5) / number - 0.5)).tan()


class OneValue(StudentT):
    """The same number in place of all draws."""

    def __init__(self, value):
        super().__init__(1.0, 1)
        self.value = value

    def draw(self, size, generator=None, dtype=None, device=None):
        return torch.full(size, self.value, dtype=dtype)


class TwoMasses:
    """Points of different mass on the line, under gravity; in closed form."""

    points, masses = torch.tensor([[-1.0, 0.8]]).double(), torch.tensor([[0.35, 0.65]]).double()

    def __init__(self):
        self.field, self.first_seen = gravity(1, 10.0, 0.3), None

    def velocity_and_score(self, x, t):
        gap, t = x - self.points, t[:, None]
        share = self.masses / (t.square() + gap.square())
        share = share / share.sum(1, keepdim=True)
        slope = -2 * gap / (t.square() + gap.square())
        return Motion(*((share * value).sum(1, keepdim=True) for value in (gap / t, slope)))

    def velocity(self, x, t):
        self.first_seen = x if self.first_seen is None else self.first_seen
        return self.velocity_and_score(x, t).velocity

    def means(self, functions, t):
        many = equal_shares(2000)[:, None]
        return np.einsum("k,nkf->f", self.masses[0].numpy(), functions(self.points + t * many)) / len(many)


def smooth(x):
    """Functions of x (..., 4) that tend to constants at infinity."""
    x = x.numpy()[..., None]
    at = np.array([-1.0, 0.0, 0.8])
    return np.concatenate([1 / (1 + 2 * (x - at) ** 2), x / (1 + x**2)], -1)


ANGLE = torch.linspace(-math.pi, math.pi, 301, dtype=torch.float64)
PLACES = (ANGLE[:-1] / 2).tan().clamp_min(-1e9)


def on_the_circle(u):
    """The smooth function of x = tan(angle / 2) with these values (300, F) at PLACES."""
    spline = CubicSpline(ANGLE.numpy(), np.concatenate([u, u[:1]]), bc_type="periodic")
    return lambda x: spline(2 * x.atan().numpy())


def normal_step(sampler, model, times, u):
    x = PLACES.repeat_interleave(len(WEIGHTS))[:, None]
    y = sampler.integrate(frame_of(model, x), x, times, ManyNormals(None))
    return np.einsum("xwf,w->xf", on_the_circle(u)(y.view(-1, len(WEIGHTS))), WEIGHTS.numpy())


def extension(v, z):
    """E[v(x + c xi)] over Cauchy xi at z = x + ic: the harmonic extension of the values `v` at PLACES to the upper
    half-plane, a power series on the disc."""
    n = np.arange(100)
    series = np.exp(-1j * n[:, None] * ANGLE[:-1].numpy()) @ v * np.where(n > 0, 2, 1)[:, None] / len(v)
    return (((1 + 1j * z) / (1 - 1j * z))[:, None] ** n @ series).real


def with_noise(sampler, model, times, value):
    """Where a step takes PLACES with this number for all noise, and where it asks the model first."""
    model.field.base, model.first_seen, x = OneValue(value), None, PLACES[:, None]
    return sampler.integrate(frame_of(model, x), x, times, Draws(None))[:, 0].numpy(), model.first_seen[:, 0].numpy()


def churn_step(sampler, model, times, u):
    """Noise comes first."""
    (_, raised), (y, x) = (with_noise(sampler, model, times, value) for value in (1.0, 0.0))
    return extension(on_the_circle(u)(torch.from_numpy(y)), x + 1j * (raised - x)[150])


def ancestral_step(sampler, model, times, u):
    """Noise comes last."""
    (noisy, _), (y, _) = (with_noise(sampler, model, times, value) for value in (1.0, 0.0))
    return extension(u, y + 1j * (noisy - y)[150])


def gravity_error(sampler, step=normal_step) -> float:
    """Of the means of `smooth` at t_min, for a start with the exact law.

    By the backward equation of the scheme: u(x) = E[smooth(last) | x now], step by step, each expectation a quadrature
    over the numbers that the scheme draws.
    """
    model = TwoMasses()
    times, u = sampler.grid(model.field, sampler.steps), smooth(PLACES)
    for k in reversed(range(sampler.steps - 1)):
        u = step(sampler, model, times[k : k + 2], u)
    error = model.means(on_the_circle(u), model.field.horizon) - model.means(smooth, model.field.t_min)
    return float(np.linalg.norm(error))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SDE)
def test_weak_order_at_gravity(scheme, level):
    """Against an exact mixture of two Cauchy laws, without chance."""
    build = SCHEMES[f"{scheme}-{level}"]
    errors = [gravity_error(build(n + 1)) for n in (16, 32)]
    assert slope(errors) == pytest.approx(build(5).order, abs=0.15)
    assert errors[1] < (0.015 if build(5).order == 1 else 7e-4)


@pytest.mark.parametrize(
    ("build", "step"),
    [
        (lambda steps: Churn(steps, churn=4.0), churn_step),
        (Ancestral, ancestral_step),
        (lambda steps: Ancestral(steps, eta=0.5), ancestral_step),
    ],
    ids=["churn", "ancestral", "ancestral_half"],
)
def test_weak_order_with_noise_of_gravitys_own(build, step):
    """Cauchy noise takes the Cauchy law of one scale to that of another."""
    errors = [gravity_error(build(n + 1), step) for n in (16, 32)]
    assert slope(errors) == pytest.approx(build(5).order, abs=0.15)
    assert errors[1] < (0.02 if build(5).order == 1 else 4e-3)


@pytest.mark.parametrize("build", [lambda steps: Churn(steps, churn=4.0), Ancestral], ids=["churn", "ancestral"])
def test_weak_order_with_gaussian_noise_at_gravity(build, monkeypatch):
    """As for laws that are not stable: the score makes up for noise of another law."""
    monkeypatch.setattr(AffineFrame, "stability", property(lambda self: None, lambda self, value: None))
    errors = [gravity_error(build(n + 1)) for n in (16, 32)]
    assert slope(errors) == pytest.approx(build(5).order, abs=0.15)
    assert errors[1] < (0.02 if build(5).order == 1 else 4e-3)
