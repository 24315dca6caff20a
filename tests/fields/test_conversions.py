"""Conversions between denoised, noise, velocity and score: against each other and against exact posteriors."""

import pytest
import torch
from problems import AFFINE, CLOSED_FORM, FIELDS, continuity_residual, gradient, lines, mixture, names, point_masses

from diffusion.fields import Gaussian, conversions

every_field = pytest.mark.parametrize("case", **names(FIELDS))
every_affine_field = pytest.mark.parametrize("case", **names(AFFINE))
every_closed_form = pytest.mark.parametrize("case", **names(CLOSED_FORM))
every_gaussian_field = pytest.mark.parametrize(
    "case", **names([case for case in AFFINE if isinstance(case.build().base, Gaussian)])
)


def marginal_points(case, make, number=12, seed=0):
    """A data set, and points of its marginal law at times from t_min to just before the horizon."""
    field, _, z, t, _ = lines(case, number, seed)
    data = make(field, case.dim)
    means = data.points if hasattr(data, "points") else data.means
    x0 = means[torch.arange(number) % len(means)]
    t = t.clone()
    t[-1] = 0.5 * (t[-2] + t[-1])  # where alpha vanishes at the horizon the noise does not determine x0
    return data, field.transport(x0, z, t), t


def size(x, *others):
    """The numbers that rounding is relative to, (B, 1)."""
    return sum((other.norm(dim=1, keepdim=True) for other in others), x.norm(dim=1, keepdim=True))


@every_affine_field
def test_conversions_agree_with_the_exact_posterior(case):
    """Given any one of denoised, noise and velocity, the other two are their posterior means."""
    data, x, t = marginal_points(case, point_masses)
    s = data.field.schedule(x, t)
    exact = conversions.Estimate(
        data.denoised(x, t),
        data.average(lambda x, t, x0: (x - data.field.alpha(t)[:, None] * x0) / data.field.sigma(t)[:, None], x, t),
        data.velocity(x, t),
    )
    found = {
        "denoised": conversions.from_denoised(s, x, exact.denoised),
        "noise": conversions.from_noise(s, x, exact.noise),
        "velocity": conversions.from_velocity(s, x, exact.velocity),
    }
    for estimate in found.values():
        for name, value in estimate._asdict().items():
            expected = getattr(exact, name)
            scale = {"denoised": size(x, expected), "noise": size(x, expected) / s.sigma}.get(name, size(x, expected))
            error = (value - expected).norm(dim=1, keepdim=True) / scale.clamp_min(1)
            if name == "velocity":
                error = error / (1 + s.sigma_dot.abs() / s.sigma)
            assert error.max() < 1e-11


@every_affine_field
def test_posterior_means_give_the_marginal_velocity_and_the_endpoint(case):
    data, x, t = marginal_points(case, point_masses)
    velocity = data.velocity(x, t)
    target = data.average(data.field.target, x, t)
    torch.testing.assert_close(data.field.velocity_from_target(x, t, target), velocity, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(data.field.endpoint(x, t, velocity), data.denoised(x, t), rtol=1e-9, atol=1e-9)


@every_field
def test_marginal_of_point_masses_satisfies_the_continuity_equation(case):
    data, x, t = marginal_points(case, point_masses, number=6)
    assert continuity_residual(data.log_prob, data.velocity, x, t).max() < 1e-8


@every_closed_form
def test_mixture_satisfies_its_continuity_equation(case):
    data, x, t = marginal_points(case, mixture, number=6)
    assert continuity_residual(data.log_prob, data.velocity, x, t).max() < 1e-8


@every_closed_form
def test_mixture_conversions(case):
    data, x, t = marginal_points(case, mixture)
    s = data.field.schedule(x, t)
    found = conversions.from_denoised(s, x, data.denoised(x, t))
    rounding = size(x) / s.sigma
    assert ((found.noise - data.noise(x, t)) / rounding).abs().max() < 1e-11
    assert ((found.velocity - data.velocity(x, t)) / (rounding * (s.sigma_dot.abs() + s.sigma))).abs().max() < 1e-11


@every_gaussian_field
def test_score_is_the_gradient_of_the_marginal_density(case):
    data, x, t = marginal_points(case, mixture)
    s = data.field.schedule(x, t)
    noise = data.noise(x, t)
    x = x.requires_grad_()
    score = gradient(data.log_prob(x, t), x).detach()
    torch.testing.assert_close(conversions.score_from_noise(s, noise), score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(conversions.noise_from_score(s, score), noise, rtol=1e-9, atol=1e-9)


def test_noise_does_not_give_the_score_of_gravity():
    """Which is why Generator.score refuses: the two differ by the scale that x reveals."""
    case = next(case for case in CLOSED_FORM if case.name == "gravity")
    data, x, t = marginal_points(case, mixture)
    from_noise = conversions.score_from_noise(data.field.schedule(x, t), data.noise(x, t))
    assert ((from_noise - data.score(x, t)).norm(dim=1) / data.score(x, t).norm(dim=1)).max() > 0.5
