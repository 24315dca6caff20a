"""What every sampler asks of models and prior draws, in one line."""

import pytest
import torch
from problems import mixture

from diffusion.fields import EmpiricalField, gravity, linear, variance_exploding
from diffusion.samplers import (
    Adaptive,
    AdaptiveMultistep,
    Ancestral,
    Churn,
    EulerMaruyama,
    Heun,
    Multistep,
    RungeKutta,
    Stochastic,
)

SAMPLERS = [
    Heun(4), Multistep(4), RungeKutta(3), Adaptive(), AdaptiveMultistep(), Ancestral(4), Churn(4), EulerMaruyama(4),
    Stochastic(4),
]  # fmt: skip
every = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)


class Answers:
    """A model whose velocity is what a function makes of the right one."""

    def __init__(self, change):
        self.right, self.change = mixture(linear()), change
        self.field = self.right.field

    def velocity(self, x, t):
        return self.change(self.right.velocity(x, t))


@every
@pytest.mark.parametrize(
    ("change", "named"),
    [(lambda v: v[:, :1], "(4, 1)"), (lambda v: v[:, 0], "(4,)"), (lambda v: v.numpy(), "ndarray")],
    ids=["broadcastable", "no coordinates", "numpy"],
)
def test_velocities_like_x(sampler, change, named, user_error):
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with user_error("velocity(x, t)", named, "(4, 2)"):
        sampler(Answers(change), x_T)


@every
@pytest.mark.parametrize(
    "x_T", [torch.zeros(0, 2), torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)], ids=["empty", "flat", "integers"]
)
def test_prior_draws_are_a_batch_of_points(sampler, x_T, user_error):
    with user_error("x_T has shape", "floating-point"):
        sampler(mixture(linear()), x_T)


def test_adaptive_begins_where_nothing_moves():
    """Of standardised data the velocity at the horizon is rounding, and torchdiffeq tries a step of any length."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(200, 2, generator=g) + 3
    model = EmpiricalField(linear(), (data - data.mean(0)) / data.std(0))
    x_T = torch.randn(16, 2, generator=g)
    exact = AdaptiveMultistep()(model, x_T)
    assert float((Adaptive()(model, x_T) - exact).square().mean(1).sqrt().median()) < 1e-4


@pytest.mark.parametrize(("scale", "said"), [(0.01, True), (1.0, False), (30.0, True)])
@pytest.mark.parametrize("sampler", [Multistep(20), RungeKutta(7)], ids=["Multistep", "RungeKutta"])
@pytest.mark.filterwarnings("error")
def test_data_of_another_scale_than_assumed_are_named(sampler, scale, said):
    right = mixture(variance_exploding())

    class Scaled:
        field = right.field

        def velocity(self, x, t):
            return right.velocity(x / scale, t / scale)

    x_T = 80.0 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if said:
        with pytest.warns(UserWarning, match="steps were made for 0.8") as caught:
            sampler(Scaled(), x_T)
        assert caught[0].filename == __file__
    else:
        sampler(Scaled(), x_T)


@pytest.mark.parametrize("sampler", [EulerMaruyama(4), Stochastic(4)], ids=["EulerMaruyama", "Stochastic"])
def test_scores_like_x(sampler, user_error):
    right = EmpiricalField(gravity(2), torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64))

    class Narrow:
        field, velocity = right.field, right.velocity

        def score(self, x, t):
            return right.score(x, t)[:, :1]

    x_T = right.field.sample_prior((4, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
    with user_error("score(x, t)", "(4, 1)", "(4, 2)"):
        sampler(Narrow(), x_T)
