"""The problems with exact answers are themselves right: against direct integration, and against each other."""

import pytest
import torch
from problems import CLOSED_FORM, GaussianMixture, gradient, lines, mixture, names, point_masses, times

from diffusion.fields import AffineField, Gaussian, StudentT, gravity

every_closed_form = pytest.mark.parametrize("case", **names(CLOSED_FORM))


@pytest.mark.parametrize("base", [Gaussian(), StudentT(1.0, 1), StudentT(3.5, 1), StudentT(128.0, 1)])
def test_mixture_is_the_average_over_its_data(base):
    """In one dimension the integral over x0 is done directly, by the trapezoidal rule."""
    field = AffineField(lambda t: 1 - 0.5 * t, torch.clone, base, 1.0)
    means, stds = torch.tensor([[-1.0], [0.5]]).double(), torch.tensor([0.3, 0.2]).double()
    data = GaussianMixture(field, means, stds, torch.tensor([0.4, 0.6]).double())
    x = torch.tensor([[-40.0], [-1.2], [0.0], [0.4], [3.0], [1e4]]).double()
    x0 = torch.linspace(-4, 4, 40001, dtype=torch.float64)[:, None]
    weights = torch.distributions.Normal(means[:, 0], stds).log_prob(x0).exp() @ data.weights * 2e-4
    for t in (0.05, 0.4, 1.0):
        p = field.log_prob(x.repeat_interleave(len(x0), 0), t, x0.repeat(len(x), 1)).view(len(x), -1).exp() * weights
        finite = p.sum(1) > 1e-250  # further out a Gaussian underflows
        expected = p.sum(1).log()[finite]
        torch.testing.assert_close(data.log_prob(x, t)[finite], expected, rtol=1e-9, atol=1e-9)
        mean = (p @ x0)[finite] / p.sum(1, keepdim=True)[finite]
        torch.testing.assert_close(data.denoised(x, t)[finite], mean, rtol=1e-9, atol=1e-9)


@every_closed_form
def test_mixture_of_zero_width_is_a_set_of_points(case):
    field, _, z, t, _ = lines(case)
    points = point_masses(field, case.dim)
    data = GaussianMixture(field, points.points, torch.zeros(3, dtype=torch.float64), points.weights)
    x = field.transport(points.points[torch.arange(len(t)) % 3], z, t)
    torch.testing.assert_close(data.log_prob(x, t), points.log_prob(x, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(data.denoised(x, t), points.denoised(x, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(data.velocity(x, t), points.velocity(x, t), rtol=1e-8, atol=1e-8)


@every_closed_form
def test_score_of_the_mixture_is_the_gradient_of_its_density(case):
    field, _, z, t, _ = lines(case)
    data = mixture(field, case.dim)
    x = field.transport(data.means[torch.arange(len(t)) % 3], z, t).requires_grad_()
    torch.testing.assert_close(gradient(data.log_prob(x, t), x).detach(), data.score(x, t).detach())


def test_mixture_does_not_depend_on_what_it_is_asked_together_with():
    """The nodes of the quadrature follow the batch; the values must not."""
    field = gravity(2)
    data = mixture(field)
    near, far = torch.ones(1, 2, dtype=torch.float64), torch.full((1, 2), 1e7, dtype=torch.float64)
    for t in times(field, 5):
        both = torch.cat([near, far])
        torch.testing.assert_close(data.denoised(both, t)[:1], data.denoised(near, t), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(data.log_prob(both, t)[1:], data.log_prob(far, t), rtol=1e-12, atol=0)
