"""Samplers on the arc for fields that do not say what their noise is, beside solutions by a method of order eight."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffusion.fields import (
    AffineField,
    EmpiricalField,
    Field,
    Gaussian,
    Product,
    RadialField,
    curved,
    gravity,
    pfgmpp,
    radial_exponential,
    radial_gaussian,
    radial_gravity,
    radial_stretched,
    radial_tanh,
    straight,
    uniform,
    variance_exploding,
)
from diffusion.samplers import BandGrid, Counted, Heun, Multistep, RungeKutta
from diffusion.samplers.arc import noise_scales
from diffusion.samplers.on_arc import FINEST, lines

CASES = {  # dimension, and t_min where the cloud is smooth still
    "stretched": (2, lambda: radial_stretched(2, t_min=0.15)),
    "stretched_64": (64, lambda: radial_stretched(64, t_min=1.0)),
    "tanh": (2, lambda: radial_tanh(2, t_min=0.15)),
    "exponential": (3, lambda: radial_exponential(3, t_min=0.15)),
    "radial_gravity": (2, lambda: radial_gravity(2, t_min=0.1)),
    "radial_gaussian": (3, lambda: radial_gaussian(3, t_min=0.1)),
    "text_that_changes_early": (2, lambda: RadialField("tanh((r/t)^(1+t/(t+3)))", 2, 2e4, t_min=0.15)),
    "straight": (2, lambda: straight(Gaussian(), t_min=0.1)),
    "curved": (2, lambda: curved(Gaussian(), t_min=0.1)),
}


@functools.cache
def problem(name, number=12, points=40):
    """A cloud of three modes under a field: the model, draws at the horizon, and the estimates from t_min."""
    dim, build = CASES[name]
    g = torch.Generator().manual_seed(0)
    means = torch.zeros(3, dim, dtype=torch.float64)
    means[:, :2] = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.3, -1.1]])
    noise = torch.randn(points, dim, generator=g, dtype=torch.float64)
    model = EmpiricalField(build(), means[torch.randint(3, (points,), generator=g)] + 0.25 * noise)
    x_T = model.field.sample_prior((number, dim), g, dtype=torch.float64)
    return model, x_T, exact(model, x_T)


def exact(model, x_T):
    """In the field's clock u = t^(1 / rho), with tolerance 1e-6."""
    field, rho = model.field, model.field.rho

    def slope(u, x):
        t = u**rho
        return rho * t / u * model.velocity(torch.from_numpy(x).view(x_T.shape), t).flatten().numpy()

    ends = np.array([field.horizon, field.t_min]) ** (1 / rho)
    solution = solve_ivp(slope, ends, x_T.flatten().numpy(), "DOP853", rtol=1e-6, atol=1e-6)
    x = torch.from_numpy(solution.y[:, -1]).view(x_T.shape)
    return field.endpoint(x, field.t_min, model.velocity(x, field.t_min))


def error(sampler, name):
    model, x_T, x_0 = problem(name)
    return float((sampler(model, x_T) - x_0).square().mean(1).sqrt().median())


@pytest.mark.parametrize("name", CASES)
def test_errors_fall_below_those_of_heun(name):
    """At 19 or 20 evaluations."""
    heun = error(Heun(10), name)
    assert error(Multistep(20, denoise=True), name) < min(heun, 0.02)
    assert error(RungeKutta(7, 3), name) < min(heun, 0.04)


@pytest.mark.parametrize("name", [name for name in CASES if name != "curved"])  # its velocity takes longest
def test_samplers_converge(name):
    assert error(Multistep(80, denoise=True), name) < 4e-4
    assert error(RungeKutta(27, 3), name) < 2e-3


def test_lines_of_a_scale_family_bend_nowhere():
    """psi = tanh(r / t): the median of r is T atanh(1/2)."""
    found = lines(radial_tanh(64), (8, 8))
    assert found.bent == 0
    assert found.noise == pytest.approx(np.arctanh(0.5) / 8, rel=0.4)
    assert lines(radial_gaussian(64), (64,)) == (pytest.approx(1.0, rel=0.05), 0)


def test_lines_of_a_law_that_changes_bend_while_it_does():
    """The rate is 1 + b'(t) t log(r / t) / b with b the power: it changes up to T, or up to many times 3."""
    stretched = lines(radial_stretched(64), (64,))
    assert stretched.bent == pytest.approx(2560 * stretched.noise)
    field = RadialField("tanh((r/t)^(1+t/(t+3)))", 64, 2e5)
    assert 30 < 8 * lines(field, (64,)).bent / lines(field, (64,)).noise / 8 < 1e3


def test_noise_is_seen_from_where_a_sample_begins():
    model, x_T, _ = problem("stretched_64")
    typical = lines(model.field, (64,)).noise
    z = x_T / model.field.horizon
    expected = (typical**2 / 2 + z.square().sum(1, keepdim=True) / 128).sqrt()
    torch.testing.assert_close(Multistep().noise(model, x_T), expected)
    assert Multistep().noise(model, 0 * x_T[:1]).item() == pytest.approx(typical / 2**0.5)


@pytest.mark.parametrize(
    ("field", "finest"),
    [(gravity(2), FINEST * 2**-0.25), (straight(uniform()), FINEST)],
    ids=["affine", "time without decades"],
)
def test_other_fields_keep_their_grid_and_noise(field, finest):
    model = EmpiricalField(field, torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64))
    x_T = torch.tensor([[70.0, 90.0]], dtype=torch.float64)
    assert Multistep(std=0.5).default_grid(model, x_T) == BandGrid(finest * 0.5, 2**0.5 * 0.5)
    assert Multistep().noise(model, x_T).equal(noise_scales(field, x_T))


@dataclass
class Own(Field):
    """Of one's own, not hashable: VE by another name."""

    horizon: float
    rho: float = 7.0
    looks = 0

    def velocity(self, x, t, x0):
        Own.looks += 1
        return (x - x0) / torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1)

    def sample(self, x0, t, generator=None):
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        return x0 + torch.as_tensor(t, dtype=x0.dtype).reshape(-1, 1) * noise


def test_a_field_is_looked_at_once():
    field = Own(80.0)
    with pytest.raises(TypeError):
        hash(field)

    class Point:
        def __init__(self):
            self.field = field

        def velocity(self, x, t):
            return field.velocity(x, t, torch.ones_like(x))

    model, x_T = Counted(Point()), field.sample_prior((4, 2), torch.Generator().manual_seed(0), torch.float64)
    for _ in range(2):
        torch.testing.assert_close(Multistep(8, denoise=True)(model, x_T), torch.ones_like(x_T), rtol=0, atol=1e-3)
    assert (model.evaluations, Own.looks) == (16, 17)


def test_the_sine_gets_an_offset_where_the_slope_may_not_vanish():
    """To order 3: for heavy tails, less in many dimensions, and for fields and laws of one's own. At order 4: all."""
    own, few = straight(uniform()), Multistep(8)
    laplace = AffineField(
        lambda t: 1 - t, lambda t: t, horizon=1.0, base=Product(torch.distributions.Laplace(0.0, 0.5**0.5)), rho=1.0
    )
    assert few._offset(variance_exploding(), 64) == few._offset(pfgmpp(64, 8.0), 64) == 0
    assert 0 < few._offset(own, 64) == few._offset(laplace, 64) == pytest.approx(8 * few._offset(gravity(64), 64))
    assert len({Multistep(30)._offset(field, 64) for field in (variance_exploding(), own, laplace, gravity(64))}) == 1
