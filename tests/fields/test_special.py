"""Laws of radii and their inverses: against many-digit arithmetic, and against each other."""

import math

import mpmath
import numpy as np
import pytest
import torch

from diffusion import functions
from diffusion.fields import (
    RadialField,
    radial_exponential,
    radial_gaussian,
    radial_gravity,
    radial_stretched,
    radial_tanh,
    special,
)
from diffusion.fields.inversion import Quantile


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 3072])
def test_radius_laws_are_those_of_many_digits(dim):
    """Values against mpmath's incomplete beta and gamma functions."""
    s = math.sqrt(dim) * torch.logspace(-0.5, 0.5, 7, dtype=torch.float64)
    if dim < 3072:  # for mpmath takes its time
        s = torch.cat([s, torch.logspace(-3, 6, 10, dtype=torch.float64)])
    with mpmath.workdps(400):
        half, squares = mpmath.mpf(dim) / 2, [mpmath.mpf(value) ** 2 for value in s.tolist()]
        gaussian = [mpmath.gammainc(half, 0, q / 2, regularized=True) for q in squares if q < 30 * dim]
        cauchy = [mpmath.betainc(half, 0.5, 0, q / (1 + q), regularized=True) for q in squares]
        survival = [mpmath.betainc(0.5, half, 0, 1 / (1 + q), regularized=True) for q in squares]
        hazards = torch.tensor([float(-mpmath.log(q)) for q in survival], dtype=torch.float64)
        assert all(abs(a + b - 1) < 1e-25 for a, b in zip(cauchy, survival, strict=True))
    found = special.cauchy_radius(s, dim)
    np.testing.assert_allclose(found.tolist(), [float(p) for p in cauchy], rtol=1e-12, atol=1e-300)
    near = s[s.square() < 30 * dim]
    np.testing.assert_allclose(
        special.gaussian_radius(near, dim).tolist(), [float(p) for p in gaussian], rtol=1e-12, atol=1e-300
    )
    back = special.inverse_cauchy_radius(hazards, dim)
    resolved = found > 1e-280  # beneath, the numbers themselves are rounded to fewer digits
    torch.testing.assert_close(back[resolved], s[resolved], rtol=1e-11, atol=0)


def test_radius_laws_may_be_mapped_over():
    s = torch.logspace(-1, 1, 5, dtype=torch.float64)
    for law in (special.cauchy_radius, special.gaussian_radius):
        slope = torch.func.vmap(torch.func.grad(lambda s: law(s, 3)))(s)  # noqa: B023
        there = s.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(law(there, 3).sum(), there)[0], slope)


HAZARDS = torch.cat([torch.logspace(-12, 0, 49), torch.linspace(1, -math.log(1e-12), 40)]).double()


@pytest.mark.parametrize("decade", [-3, 0, 3])
@pytest.mark.parametrize(
    ("dim", "factory"),
    [(2, radial_tanh), (2, radial_exponential), (2, radial_stretched)]
    + [(dim, factory) for dim in (1, 2, 64, 3072) for factory in (radial_gravity, radial_gaussian)],
)
def test_radius_solves_the_law_and_is_the_closed_form(dim, factory, decade):
    """From psi = 1e-12 to 1 - 1e-12: to the rounding of psi, and where that fixes the radius to 1e-12, to 1e-12."""
    t = torch.full_like(HAZARDS, 10.0**decade)
    field = factory(dim, horizon=1e4, t_min=1e-4)
    u = -torch.expm1(-HAZARDS)
    found, closed = Quantile.apply(HAZARDS, t, field.cdf, None), Quantile.apply(HAZARDS, t, field.cdf, field.inverse)
    r = found.clone().requires_grad_()
    psi = field.cdf(r, t)
    slope = torch.autograd.grad(psi.sum(), r)[0]
    rounding = 2e-15 * r * slope  # what the last digits of log r and r do to psi
    if factory is radial_gravity:
        rounding = rounding + 2e-16 * dim * u  # and, in many dimensions, those of s^2 / (1 + s^2)
    assert ((psi - u).abs() <= 1e-14 * u + rounding).all()
    # scipy's functions are good to 3e-14.
    assert ((found / closed - 1).abs() < 1e-12 + 1e-13 * u / (slope * r)).all()
    assert ((field.cdf(closed, t) - u).abs() <= 1e-13 * u + rounding).all()


def test_rises_and_their_slopes_keep_their_digits():
    s = torch.tensor([0.0, 1e-12, 1e-3, 0.99, 1.01, 5.0, 20.0, 300.0], dtype=torch.float64, requires_grad=True)
    exact = {lambda s: -functions.expm1(-s): (lambda s: -mpmath.expm1(-s), lambda s: mpmath.exp(-s))}
    exact[functions.tanh] = (mpmath.tanh, lambda s: mpmath.sech(s) ** 2)
    for function, (value, slope) in exact.items():
        found = function(s)
        np.testing.assert_allclose(found.tolist(), [float(value(x)) for x in s.tolist()], rtol=1e-15)
        (found,) = torch.autograd.grad(found.sum(), s)
        np.testing.assert_allclose(found.tolist(), [float(slope(x)) for x in s.tolist()], rtol=1e-13)


@pytest.mark.parametrize("dim", [2, 3072])
@pytest.mark.parametrize("factory", [radial_tanh, radial_stretched, radial_gaussian])
def test_a_radius_costs_few_evaluations_of_the_law(factory, dim):
    calls, field = [0], factory(dim)

    def counted(r, t):
        calls[0] += 1
        return field.cdf(r, t)

    own = RadialField(counted, dim, field.horizon, None, field.t_min)
    calls[0] = 0
    z = own.draw((1024, dim), torch.Generator().manual_seed(0), dtype=torch.float64)
    own.transport(torch.zeros_like(z), z, own.clock(1024))
    assert calls[0] < 30
