"""Test functions and Stein's vector fields: each formula against autograd, and the identities they are made for."""

import math

import pytest
import torch
from problems import divergence, gradient

from diffusion.fields.bumps import Bumps

DIM = 5


def bumps(dim=DIM):
    """Two without a wave, and three with, of several lengths."""
    randomness = torch.Generator().manual_seed(0)
    wave = torch.randn(5, dim, generator=randomness, dtype=torch.float64)
    wave[:2] = 0
    length = torch.tensor([0.5, 2.0, 1.0, 0.7, 3.0], dtype=torch.float64)
    return Bumps(length, wave, torch.tensor([0.0, 0.0, 0.3, 2.0, 5.0], dtype=torch.float64))


def points(dim=DIM, number=40):
    """From 1e-3 to 1e3 of the unit length."""
    randomness = torch.Generator().manual_seed(1)
    y = torch.randn(number, dim, generator=randomness, dtype=torch.float64)
    return y * torch.logspace(-3, 3, number, dtype=torch.float64)[:, None]


def test_value_is_that_of_the_formula():
    phi, y = bumps(), points()
    for k in range(5):
        h = 1 / (1 + y.square().sum(1) / DIM / phi.length[k] ** 2)
        expected = h * torch.cos((y * phi.wave[k]).sum(1) + phi.phase[k])
        torch.testing.assert_close(phi.value(y)[:, k], expected, rtol=1e-12, atol=1e-15)


def test_slope_is_the_derivative_along_a_vector():
    phi, y = bumps(), points().requires_grad_()
    v = torch.randn(len(y), DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    value = phi.value(y)
    expected = torch.stack([(gradient(value[:, k], y) * v).sum(1) for k in range(5)], 1)
    torch.testing.assert_close(phi.slope(y.detach(), v), expected.detach(), rtol=1e-10, atol=1e-15)


def test_divergence_of_the_vector_fields_is_that_of_autograd():
    phi, y = bumps(), points().requires_grad_()
    u, div = phi.fields(y)
    assert u.shape == (len(y), 5, DIM)
    expected = torch.stack([divergence(u[:, k], y) for k in range(5)], 1)
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-13)


def test_vector_fields_point_outward_without_a_wave_and_along_it_with_one():
    phi, y = bumps(), points()
    u, _ = phi.fields(y)
    h = 1 / (1 + y.square().mean(1, keepdim=True) / phi.length.square())
    torch.testing.assert_close(u[:, :2], h[:, :2, None] * y[:, None])
    cos = torch.cos(y @ phi.wave.T + phi.phase)
    torch.testing.assert_close(u[:, 2:], (h * (1 - h) * cos)[:, 2:, None] * phi.wave[2:])


def test_all_vector_fields_vanish_at_the_origin_and_far_away():
    """At the origin like |y|, and the waves like |y|^2: a score that grows like 1 / |y| is not felt there."""
    phi = bumps()
    direction = points(number=1)
    direction /= direction.norm()
    near, nearer, far = (phi.fields(scale * direction)[0].norm(dim=2) for scale in (1e-3, 1e-4, 1e6))
    torch.testing.assert_close(near[:, :2] / nearer[:, :2], torch.full((1, 2), 10.0).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(near[:, 2:] / nearer[:, 2:], torch.full((1, 3), 100.0).double(), rtol=0.01, atol=0)
    assert far.max() < 1e-4
    assert phi.value(1e6 * direction).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [1.0, 1.1])
def test_steins_identity_holds_for_a_gaussian_and_only_for_the_right_one(scale):
    """E[score . u + div u] = 0 for draws of the law whose score it is; draws 10 % wider are told from it."""
    number = 40_000
    y = scale * torch.randn(number, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u, div = bumps().fields(y)
    statistic = -(u * y[:, None]).sum(2) + div
    z = statistic.mean(0) / statistic.std(0) * math.sqrt(number)
    assert (z.abs().max() < 4) if scale == 1 else (z[:2].abs().min() > 6)
